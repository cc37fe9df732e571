"""Low-rank adapters (LoRA): y = f(x) + (alpha / r) drop(x) A B, around any linear layer f.

Hu et al., arXiv:2106.09685; on quantised layers, Dettmers et al., arXiv:2305.14314. For example

    adapted = functools.partial(lora.dense, rank=16, alpha=16)
    adapted = lora.factory(format="nf4", rank=16, alpha=16)   # the same on 4-bit weights (QLoRA)
    model = Transformer(..., dense=adapted)
    init, loss = lora.freeze(*supervised(model, objective, example))
    variables = lora.around(pretrained["params"], init(key), "nf4")
    plain = lora.merge(params, alpha=16)                      # for the model without adapters

An adapter's parameters `lora_a`, `lora_b` lie beside the layer's own, whose paths stay what they
were, so that pretrained parameters fit as they are.
"""

import functools
import re
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from models import attention, quantised
from models.attention import Factory

ADAPTERS = r"(^|/)lora_[ab]$"
FROZEN = "frozen"
# Uniform within 1 / sqrt(in), PyTorch's Kaiming initialisation of linear layers.
INIT_A = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRA(nn.Module):
  """A layer and its adapter; made by `dense`.

  Attributes:
    features, axes, dtype, use_bias: of the layer.
    base: factory of the layer, as `models.attention.dense` is one.
    rank, alpha: r, and what the adapter's output is multiplied by, times r.
    dropout: rate, of the adapter's input alone; in calls that have a "dropout" key.
  """

  features: int
  axes: tuple[str | None, str | None]
  base: Factory
  rank: int
  alpha: float
  dropout: float = 0.0
  dtype: Any = None
  use_bias: bool = True

  def setup(self) -> None:
    self.layer = self.base(self.features, self.axes, dtype=self.dtype, use_bias=self.use_bias)
    nn.share_scope(self, self.layer)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def parameter(name: str, init: Any, axes: tuple[str | None, ...], *shape: int) -> Any:
      return self.param(name, nn.with_logical_partitioning(init, axes), shape)

    y = self.layer(x)
    a_IR = parameter("lora_a", INIT_A, (self.axes[0], None), x.shape[-1], self.rank)
    b_RO = parameter(
      "lora_b", nn.initializers.zeros, (None, self.axes[1]), self.rank, self.features
    )
    x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x).astype(y.dtype)
    return y + self.alpha / self.rank * (x @ a_IR.astype(y.dtype) @ b_RO.astype(y.dtype))


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  rank: int,
  alpha: float,
  dropout: float = 0.0,
  targets: Collection[str] | None = None,
  base: Factory = attention.dense,
  name: str | None = None,
  dtype: Any = None,
  use_bias: bool = True,
) -> nn.Module:
  """Factory of layers with adapters, for the field `dense` of models.

  Args:
    features, axes, name, dtype, use_bias: as for `models.attention.dense`.
    rank, alpha, dropout, base: as for `LoRA`.
    targets: names of the layers that have an adapter, such as ("query", "value"); None for all.

  Raises: ValueError for a rank below 1.
  """
  if rank < 1:
    raise ValueError(f"rank={rank}; accepted: at least 1")
  if targets is not None and name not in targets:
    return base(features, axes, name=name, dtype=dtype, use_bias=use_bias)
  return LoRA(features, axes, base, rank, alpha, dropout, dtype, use_bias, name=name)


def factory(
  *,
  rank: int,
  alpha: float = 1.0,
  dropout: float = 0.0,
  targets: Collection[str] = (),
  format: str = "",
  double: bool = True,
  remat: bool = True,
) -> Factory:
  """The linear layer of a way to fine-tune, as plain options.

  Args:
    rank, alpha, dropout: of adapters; rank 0 for none.
    targets: as for `dense`; () for all layers.
    format, double, remat: of `quantised.QuantisedDense` underneath; "" for float weights.
  """
  base: Any = attention.dense
  if format:
    base = functools.partial(quantised.QuantisedDense, format=format, double=double, remat=remat)
  if not rank:
    return base
  adapted = functools.partial(dense, rank=rank, alpha=alpha, dropout=dropout, base=base)
  return functools.partial(adapted, targets=targets or None)


def merge(params: Any, alpha: float) -> Any:
  """Parameters without adapters, whose kernels W have become W + (alpha / r) A B.

  Kernels are (..., in, out). Those of quantised layers have to be there: `dequantise_tree`.

  Raises: ValueError for an adapter without a kernel.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for path in [path for path in flat if path.endswith("lora_a")]:
    layer = path.removesuffix("lora_a")
    a, b = flat.pop(path), flat.pop(f"{layer}lora_b")
    if f"{layer}kernel" not in flat:
      raise ValueError(f"{layer}kernel: missing; accepted: every adapter with its kernel")
    flat[f"{layer}kernel"] = flat[f"{layer}kernel"] + alpha / a.shape[-1] * (a @ b)
  return traverse_util.unflatten_dict(flat, sep="/")


def split(params: Any, trained: str = ADAPTERS) -> tuple[Any, Any]:
  """The parameters whose path the regular expression finds, and the others; boxes are kept."""
  flat = traverse_util.flatten_dict(params, sep="/")
  chosen = {path: leaf for path, leaf in flat.items() if re.search(trained, path)}
  rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return traverse_util.unflatten_dict(chosen, sep="/"), traverse_util.unflatten_dict(rest, sep="/")


def join(params: Any, others: Any) -> Any:
  """What `split` took apart."""
  parts = [traverse_util.flatten_dict(tree, sep="/") for tree in (params, others)]
  return traverse_util.unflatten_dict(parts[0] | parts[1], sep="/")


def freeze(
  init: Callable[..., Any], loss: Callable[..., Any], trained: str = ADAPTERS, dtype: Any = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """`init` and `loss` of a task that trains only the parameters whose path `trained` finds.

  The others move to the collection "frozen": they have no gradient and no optimizer state, and are
  of `dtype` (None: as they were) but for the scales of norms.
  """

  def frozen_init(key: jax.Array) -> dict[str, Any]:
    variables = dict(init(key))
    params, others = split(variables.pop("params"), trained)
    norms, large = split(others, r"(^|/)scale$")
    large = jax.tree.map(lambda x: x.astype(dtype or x.dtype), large)
    return {"params": params, FROZEN: join(norms, large), **variables}

  def frozen_loss(params, variables, batch, key, *, train, **options):
    others = {name: value for name, value in variables.items() if name != FROZEN}
    whole = join(params, variables[FROZEN])
    value, (metrics, updated) = loss(whole, others, batch, key, train=train, **options)
    return value, (metrics, {FROZEN: variables[FROZEN], **updated})

  return frozen_init, frozen_loss


def around(params: Any, variables: Any, format: str = "", double: bool = True) -> dict[str, Any]:
  """Pretrained parameters as the variables of a model that is to be fine-tuned.

  Args:
    params: pretrained, without boxes; leading axes, such as of seeds, as in `variables`.
    variables: what the init of `freeze` made, for its adapters; one without "frozen" trains all
      parameters, and starts from the pretrained ones.
    format, double: as for `quantised.quantise_tree`; "" if the model's weights are floats.
  """
  if FROZEN not in variables:
    return {"params": params}
  stored = {}
  if format:
    params, stored[quantised.COLLECTION] = quantised.quantise_tree(params, format, double=double)
  return variables | {FROZEN: params} | stored
