"""Weights in few bits: formats, double quantisation of scales, and a Dense layer over them.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, arXiv:2305.14314 (NF4, double quantisation), and its
released code, bitsandbytes. For example

    stored = quantise(kernel_IO, "nf4")                    # 4.127 bits a weight
    kernel_IO = dequantise(stored, "nf4")
    model = Transformer(..., dense=functools.partial(QuantisedDense, format="nf4"))
    params, collection = quantise_tree(pretrained["params"], "nf4")
    model.apply({"params": params, "quantised": collection}, tokens_BL)

A block is `block` consecutive inputs of one output, so that the stored arrays keep the kernel's two
axes, in the order (out, in), and shard along them; as the released code has it for matrices whose
width is a multiple of the block. What is stored is no parameter: it lives in the collection
"quantised", which is checkpointed and not optimised.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from scipy.special import ndtri

from models.attention import KERNEL_INIT, accept

COLLECTION = "quantised"
KERNELS = r"(^|/)kernel$"
BLOCK, SCALE_BLOCK = 64, 256  # weights to a scale; scales to a scale of scales

Stored = Mapping[str, jax.Array]


# The released table; `normal_float(4)` to 2e-7, as that was computed in float32.
NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
  *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
  *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)


class Format(NamedTuple):
  """What a block's values, divided by its largest magnitude, are rounded to.

  Attributes:
    levels: ascending, from -1 to 1.
    centred: the middle of the block's range is subtracted first, and stored.
  """

  levels: tuple[float, ...]
  centred: bool = False

  @property
  def per_byte(self) -> int:
    """Codes to a byte; three bits take four."""
    return next(n for n, size in ((4, 4), (2, 16), (1, 256)) if len(self.levels) <= size)


def normal_float(bits: int) -> tuple[float, ...]:
  """Quantiles of the normal distribution over the largest: zero, and one more above than below.

  Released code, create_normal_map. The paper's definition, read literally, needs the quantile of 0.
  """
  half = 2 ** (bits - 1)
  outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
  above, below = (ndtri(np.linspace(outermost, 0.5, half + more)[:-1]) for more in (1, 0))
  levels = np.sort(np.concatenate([above, [0.0], -below]))
  return tuple((levels / levels.max()).tolist())


def integer(bits: int) -> tuple[float, ...]:
  """2^bits - 1 equal steps about zero."""
  most = 2 ** (bits - 1) - 1
  return tuple((np.arange(-most, most + 1) / most).tolist())


def signed(*magnitudes: float) -> tuple[float, ...]:
  """Those magnitudes over the largest, with both signs."""
  values = np.array(magnitudes) / max(magnitudes)
  return tuple(np.unique(np.concatenate([-values, values])).tolist())


def dynamic_map() -> tuple[float, ...]:
  """The 256 values that scales are rounded to: a float of 8 bits whose exponent is unary.

  Released code, create_dynamic_map: for i = 0 .. 6, the midpoints of 2^i equal parts of [0.1, 1]
  times 10^(i - 6), of either sign; 0; 1.
  """
  decades = []
  for i in range(7):
    edges = np.linspace(0.1, 1, 2**i + 1)
    decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
  above = np.concatenate(decades)
  return tuple(np.sort(np.concatenate([-above, above, [0.0, 1.0]])).tolist())


FORMATS = {
  "nf4": Format(NF4),
  **{f"nf{bits}": Format(normal_float(bits)) for bits in (2, 3)},
  **{f"int{bits}": Format(integer(bits)) for bits in (2, 3, 4, 8)},
  "affine4": Format(tuple(np.linspace(-1, 1, 16).tolist()), centred=True),  # asymmetric int4
  # The released code's table (recalled): E2M1, but for a smallest value of 1/192, not 1/12.
  "fp4": Format(signed(0, 0.0625, 2, 3, 4, 6, 8, 12)),
  "fp4_e2m1": Format(signed(0, 0.5, 1, 1.5, 2, 3, 4, 6)),
  "fp4_e3m0": Format(signed(0, 1, 2, 4, 8, 16, 32, 64)),
}
SCALES = dynamic_map()


def nearest(x: jax.Array, levels: tuple[float, ...]) -> jax.Array:
  """uint8, the index of the nearest level; halfway between two, the lower."""
  edges = np.array(levels)
  edges = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
  return jnp.searchsorted(edges, x, side="left").astype(jnp.uint8)


def pack(codes: jax.Array, per_byte: int) -> jax.Array:
  """(..., n) uint8 to (..., n / per_byte): the first code in the highest bits."""
  bits = 8 // per_byte
  shifts = np.arange(per_byte - 1, -1, -1, dtype=np.uint8) * np.uint8(bits)
  parts = codes.reshape(*codes.shape[:-1], -1, per_byte) << shifts
  return parts.sum(-1, dtype=jnp.uint8)


def unpack(packed: jax.Array, per_byte: int) -> jax.Array:
  """The codes that `pack` was given."""
  bits = 8 // per_byte
  shifts = np.arange(per_byte - 1, -1, -1, dtype=np.uint8) * np.uint8(bits)
  codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
  return codes.reshape(*packed.shape[:-1], -1)


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
  return x / jnp.where(by > 0, by, 1)


def quantise(
  kernel_IO: jax.Array, format: str, *, block: int = BLOCK, double: bool = True
) -> dict[str, jax.Array]:
  """A kernel (in, out) in few bits (arXiv:2305.14314, section 3).

  Args:
    kernel_IO: float, in a multiple of `block`.
    format: a key of FORMATS.
    block: weights to a scale, their largest magnitude.
    double: scales, less their mean, are stored in 8 bits, with one scale for 256 of them.

  Returns:
    "codes" (out, in / codes a byte) uint8, and "scale" (out, in / block) float32 or, where double,
    "scale_codes" of that shape uint8, "scale_scale" (n,) and "scale_mean" () float32; of a centred
    format "offset" (out, in / block) float32.

  Raises: ValueError for another format or width.
  """
  chosen = _format(format)
  if kernel_IO.shape[0] % block:
    raise ValueError(f"in={kernel_IO.shape[0]}; accepted: multiples of block={block}")
  w_ONB = kernel_IO.T.astype(jnp.float32).reshape(kernel_IO.shape[1], -1, block)
  stored = {}
  if chosen.centred:
    stored["offset"] = (w_ONB.max(-1) + w_ONB.min(-1)) / 2
    w_ONB -= stored["offset"][..., None]
  scale_ON = jnp.abs(w_ONB).max(-1)
  codes_ONB = nearest(_divide(w_ONB, scale_ON[..., None]), chosen.levels)
  stored["codes"] = pack(codes_ONB.reshape(len(scale_ON), -1), chosen.per_byte)
  return stored | (_quantise_scales(scale_ON) if double else {"scale": scale_ON})


def _quantise_scales(scale_ON: jax.Array) -> dict[str, jax.Array]:
  """Scales are positive: without their mean, half of the signed levels would be idle."""
  mean = scale_ON.mean()
  flat = (scale_ON - mean).ravel()
  blocks = jnp.pad(flat, (0, -len(flat) % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
  most = jnp.abs(blocks).max(-1)
  codes = nearest(_divide(blocks, most[:, None]), SCALES).ravel()[: len(flat)]
  return {
    "scale_codes": codes.reshape(scale_ON.shape),
    "scale_scale": most,
    "scale_mean": mean,
  }


def dequantise(stored: Stored, format: str, dtype: Any = jnp.float32) -> jax.Array:
  """The kernel (in, out) that `quantise` stored, of `dtype`; float32 inside."""
  chosen = _format(format)
  if "scale" in stored:
    scale_ON = stored["scale"]
  else:
    codes_ON = stored["scale_codes"]
    # Which scale a scale has, elementwise: flattening sharded codes would gather them.
    index_ON = jnp.arange(codes_ON.shape[0])[:, None] * codes_ON.shape[1]
    index_ON = (index_ON + jnp.arange(codes_ON.shape[1])) // SCALE_BLOCK
    scale_ON = jnp.array(SCALES, jnp.float32)[codes_ON] * stored["scale_scale"][index_ON]
    scale_ON += stored["scale_mean"]
  codes_OI = unpack(stored["codes"], chosen.per_byte)
  w_OI = jnp.array(chosen.levels, jnp.float32)[codes_OI]
  w_ONB = w_OI.reshape(*scale_ON.shape, -1) * scale_ON[..., None]
  if chosen.centred:
    w_ONB += stored["offset"][..., None]
  return w_ONB.reshape(w_OI.shape).T.astype(dtype)


def bits(stored: Any, format: str) -> float:
  """Bits a weight, scales included, of what was stored: a tree of arrays or of their shapes."""
  flat = traverse_util.flatten_dict(stored)
  weights = sum(x.size for path, x in flat.items() if path[-1] == "codes")
  size = sum(x.size * x.dtype.itemsize for x in flat.values())
  return 8 * size / (weights * _format(format).per_byte)


def _format(name: str) -> Format:
  accept("format", name, FORMATS)
  return FORMATS[name]


def quantise_tree(
  params: Any, format: str, *, block: int = BLOCK, double: bool = True, pattern: str = KERNELS
) -> tuple[Any, Any]:
  """Parameters without the kernels whose path `pattern` finds, and the collection that has those.

  Args:
    params: without flax's boxes; axes before a kernel's last two (layers, seeds) are mapped.
    format, block, double: as for `quantise`.
    pattern: a regular expression, searched for in paths such as "layer_0/mlp/up/kernel".
  """
  rest, stored = {}, {}
  one = functools.partial(quantise, format=format, block=block, double=double)
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    if re.search(pattern, path):
      stored[path] = _mapped(one, leaf.ndim - 2)(leaf)
    else:
      rest[path] = leaf
  return tuple(traverse_util.unflatten_dict(tree, sep="/") for tree in (rest, stored))  # type: ignore[return-value]


def dequantise_tree(params: Any, stored: Any, format: str) -> Any:
  """Parameters with the kernels that `quantise_tree` took out, float32, as they are rounded."""
  flat = traverse_util.flatten_dict(params, sep="/")
  kernels: dict[str, dict[str, jax.Array]] = {}
  for path, leaf in traverse_util.flatten_dict(stored, sep="/").items():
    parent, _, name = path.rpartition("/")
    kernels.setdefault(parent, {})[name] = leaf
  for path, fields in kernels.items():
    one = functools.partial(dequantise, format=format)
    flat[path] = _mapped(one, fields["codes"].ndim - 2)(fields)
  return traverse_util.unflatten_dict(flat, sep="/")


def round_tree(params: Any, format: str, **options: Any) -> Any:
  """Parameters with their kernels as `format` rounds them; options of `quantise_tree`."""
  return dequantise_tree(*quantise_tree(params, format, **options), format)


def _mapped(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
  for _ in range(axes):
    function = jax.vmap(function)
  return function


class QuantisedDense(nn.Module):
  """y = x dequantise(stored) + b: a Dense layer over frozen low-bit weights; a factory for `dense`.

  The kernel is dequantised where it is used, in the backward pass again: autodiff would otherwise
  keep the float matrix of every layer, and with it all the memory that the format saves. Layers
  should be scanned: where they are unrolled, XLA for CPUs dequantises many ahead of their use.

  Attributes:
    features, axes, dtype, use_bias, kernel_init: as for `models.attention.dense`.
    format, block, double: as for `quantise`.
    remat: False leaves what is kept for the backward pass to autodiff.
  """

  features: int
  axes: tuple[str | None, str | None]
  format: str = "nf4"
  block: int = BLOCK
  double: bool = True
  remat: bool = True
  dtype: Any = None
  use_bias: bool = True
  kernel_init: Callable[..., jax.Array] = KERNEL_INIT

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def start() -> dict[str, nn.LogicallyPartitioned]:
      kernel_IO = self.kernel_init(self.make_rng("params"), (x.shape[-1], self.features))
      stored = quantise(kernel_IO, self.format, block=self.block, double=self.double)
      names = {2: self.axes[::-1], 1: (None,), 0: ()}
      return {k: nn.LogicallyPartitioned(v, names[v.ndim]) for k, v in stored.items()}

    def multiply(x: jax.Array, stored: Stored) -> jax.Array:
      return jnp.matmul(x, dequantise(stored, self.format, x.dtype))

    stored: Any = self.variable(COLLECTION, "kernel", start).value
    x = x.astype(self.dtype or x.dtype)
    y = (jax.checkpoint(multiply) if self.remat else multiply)(x, stored)
    if self.use_bias:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
      bias: Any = self.param("bias", zeros, (self.features,))
      y += bias.astype(y.dtype)
    return y
