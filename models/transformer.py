"""The Transformer: decoders, encoders and prefix language models from one definition.

Vaswani et al., arXiv:1706.03762. Rotary positions: arXiv:2104.09864. Grouped-query attention:
arXiv:2305.13245. Gated activations: arXiv:2002.05202. RMSNorm: arXiv:1910.07467. For example

    gpt = Transformer(vocab=256, features=128, layers=4, heads=4, max_length=512)
    llama = Transformer(49_152, 576, 30, 9, kv_heads=3, mlp=1536, position="rotary", norm="rms",
                        activation="swiglu", use_bias=False)
    bert = Transformer(30_522, 768, 12, 12, mask="full", max_length=512, types=2, prenorm=False,
                       embed_norm=True, epsilon=1e-12, activation="gelu_exact", head="mlm")
    vit = Transformer(None, 384, 12, 6, mask="full", max_length=197)        # of (B, L, d) patches
    logits_BLV = gpt.apply(variables, tokens_BL)

Training needs `rngs={"dropout": key}`. Parameters are float32, and so are softmax, norms and logits
whatever the activations' `dtype`. Every projection is a matrix (in, out) made by the field `dense`,
so that a paper on linear layers replaces that and nothing else.

Dropout is of embeddings and of what each sublayer adds; attention weights, which
`jax.nn.dot_product_attention` does not hand out, have none.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import (
  MASKS,
  Attention,
  Factory,
  accept,
  attention_mask,
  check_range,
  dense,
  head_sizes,
  segment_positions,
  sinusoids,
)
from models.sequence import length_mask, zero_padding

POSITIONS = ("learned", "sinusoidal", "rotary", "none")
NORMS = ("layer", "rms")
HEADS = ("tied", "untied", "mlm", None)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=True),
  "gelu_exact": functools.partial(nn.gelu, approximate=False),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
  "relu": nn.relu,
  "swiglu": nn.silu,
  "geglu": functools.partial(nn.gelu, approximate=True),
}
GATED = ("swiglu", "geglu")
REMATS = (False, True, "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")


class MLP(nn.Module):
  """down(activation(up(x))), or the gated down(activation(gate(x)) * up(x)) (arXiv:2002.05202).

  Attributes:
    hidden: width between; 4 H by default.
    activation: a key of ACTIVATIONS; "gelu" is the tanh form, "swiglu" and "geglu" are gated.
    use_bias, dense: as for `Attention`, of `up`, `gate` and `down`.
  """

  hidden: int | None = None
  activation: str = "gelu"
  use_bias: bool = True
  dense: Factory = dense

  @nn.compact
  def __call__(self, x_BLH: jax.Array) -> jax.Array:
    accept("activation", self.activation, ACTIVATIONS)
    features = x_BLH.shape[-1]
    hidden = 4 * features if self.hidden is None else self.hidden
    make = functools.partial(self.dense, dtype=x_BLH.dtype, use_bias=self.use_bias)
    activate, gated = ACTIVATIONS[self.activation], self.activation in GATED
    y = make(hidden, ("embed", "mlp"), name="up")(x_BLH)
    y = activate(make(hidden, ("embed", "mlp"), name="gate")(x_BLH)) * y if gated else activate(y)
    return make(features, ("mlp", "embed"), name="down")(y)


def norm(
  kind: str, epsilon: float, *, use_bias: bool = True, dtype: Any = None, name: str | None = None
) -> nn.Module:
  """LayerNorm ("layer") or RMSNorm ("rms", arXiv:1910.07467) over the last axis, in float32."""
  accept("norm", kind, NORMS)
  ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
  fields: dict[str, Any] = {"dtype": dtype, "scale_init": ones, "name": name}
  if kind == "rms":
    return nn.RMSNorm(epsilon, **fields)
  # The variance is of differences from the mean: E[x^2] - E[x]^2 cancels where the mean is large.
  return nn.LayerNorm(
    epsilon, use_bias=use_bias, bias_init=zeros, use_fast_variance=False, **fields
  )


class Layer(nn.Module):
  """x + sublayer(norm(x)), or norm(x + sublayer(x)), for attention and then for the MLP.

  Attributes:
    attention, mlp, norm: factories of the parts, called with `name` (and `norm` with `dtype`).
    mixer: factory of what takes attention's place, called `mixer(u_BLH)`; None for attention.
    prenorm: norm before each sublayer; otherwise after the sum.
    dropout: rate, of what each sublayer adds.
  """

  attention: Factory
  mlp: Factory
  norm: Factory
  mixer: Factory | None = None
  prenorm: bool = True
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x_BLH: jax.Array,
    *,
    cache: Any = None,
    padding: jax.Array | None = None,
    train: bool = False,
    **fields: Any,
  ) -> tuple[jax.Array, Any]:
    """The layer's output and cache; `fields` are for `Attention`.

    `padding` (B, L) bool, False at padding, is for a mixer, which sees zeros there.
    """

    def residual(x: jax.Array, sublayer: Callable[[jax.Array], jax.Array], name: str) -> jax.Array:
      normalise = self.norm(dtype=x.dtype, name=f"{name}_norm")
      y = sublayer(normalise(x) if self.prenorm else x)
      x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
      return x if self.prenorm else normalise(x)

    def mix(u: jax.Array) -> jax.Array:
      nonlocal cache
      if self.mixer is not None:
        return self.mixer(name="mixer")(zero_padding(u, padding))
      attend = self.attention(name="attention")
      if cache is None:
        return attend(u, **fields)
      y, cache = attend(u, cache=cache, **fields)
      return y

    x_BLH = residual(x_BLH, mix, "attention" if self.mixer is None else "mixer")
    return residual(x_BLH, self.mlp(name="mlp"), "mlp"), cache


class Cache(NamedTuple):
  """What a decoder keeps of the positions it has seen.

  Attributes:
    layers: a pair (keys, values) of (B, S, kv_heads, head_dim) for each layer; for a scanned model
      one pair with a leading axis of layers.
    filled: (B,) int32, the positions seen, in each row.
  """

  layers: Any
  filled: jax.Array


def init_cache(model: "Transformer", batch: int, length: int, dtype: Any = None) -> Cache:
  """An empty cache for `length` positions in each of `batch` rows; dtype of the model by default.

  Raises: ValueError where learned positions are fewer, and for a model that cannot have a cache.
  """
  if model.mask == "full" or model.mixer is not None:
    given = "mask='full'" if model.mask == "full" else "mixer: given"
    raise ValueError(f"{given}; accepted for a cache: causal or prefix attention in every layer")
  model.check_length(length)
  head_dim, kv_heads = head_sizes(model.features, model.heads, model.kv_heads, model.head_dim)
  zeros = jnp.zeros((batch, length, kv_heads, head_dim), model.dtype if dtype is None else dtype)
  layers: Any = ((zeros, zeros),) * model.layers
  if model.scan:
    layers = (jnp.broadcast_to(zeros, (model.layers, *zeros.shape)),) * 2
  return Cache(layers, jnp.zeros(batch, jnp.int32))


class Transformer(nn.Module):
  """Embeddings, layers, final norm (if norms come first), logits.

  Attributes:
    vocab: number of tokens. None: inputs are floats, outputs are features.
    features: H, width of the residual stream.
    layers: number of layers.
    heads, kv_heads, head_dim: as for `Attention`.
    mlp, activation: `hidden` and `activation` of `MLP`.
    mask: "causal", "full" (an encoder) or "prefix", see `attention_mask`.
    position: "learned", "sinusoidal" (token embeddings are then multiplied by sqrt(H),
      arXiv:1706.03762, section 3.4), "rotary" or "none".
    max_length: number of learned positions.
    rotary_base: of rotary positions.
    types: number of token types, which are embedded; None for none.
    project: where there is no vocabulary, a Dense layer takes inputs (B, L, d) to the width.
    prenorm: norm before each sublayer and at the end; otherwise after each sum.
    norm, epsilon: "layer" or "rms", and what is added to the variance.
    embed_norm: another norm after the embeddings.
    use_bias: of projections and LayerNorm.
    head: "tied" (logits from the embedding matrix), "untied", "mlm" (BERT's: Dense, exact GELU,
      norm, then the embedding matrix and a bias) or None (features).
    dropout: rate, see the module; or one a layer (the embeddings' is the first).
    mixer: a sequence mixer's factory in place of attention; or one a layer, None for attention.
    dense: makes every projection but that of the logits, see `dense`.
    embed_init: of tokens, learned positions and types.
    implementation: of `jax.nn.dot_product_attention`.
    scan: `nn.scan` over layers, all alike, with stacked parameters (see `stack_layers`): time to
      compile does not grow with their number.
    remat: recomputes layers in the backward pass, from their inputs (True) or from what a policy of
      `jax.checkpoint_policies` keeps too, see REMATS.
    dtype: of the activations.
  """

  vocab: int | None
  features: int
  layers: int
  heads: int
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp: int | None = None
  activation: str = "gelu"
  mask: str = "causal"
  position: str = "learned"
  max_length: int | None = None
  rotary_base: float = 10_000.0
  types: int | None = None
  project: bool = True
  prenorm: bool = True
  norm: str = "layer"
  epsilon: float = 1e-5
  embed_norm: bool = False
  use_bias: bool = True
  head: str | None = "tied"
  dropout: float | Sequence[float] = 0.0
  mixer: Factory | Sequence[Factory | None] | None = None
  dense: Factory = dense
  embed_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)
  implementation: Any = None
  scan: bool = False
  remat: bool | str = False
  dtype: Any = jnp.float32

  def setup(self) -> None:
    accept("mask", self.mask, MASKS)
    accept("position", self.position, POSITIONS)
    accept("head", self.head, HEADS)
    accept("remat", self.remat, REMATS)
    if self.position == "learned" and self.max_length is None:
      raise ValueError("max_length=None; accepted: a number, under learned positions")
    for name in ("dropout", "mixer"):
      value = getattr(self, name)
      if isinstance(value, Sequence) and (self.scan or len(value) != self.layers):
        accepted = "one for all, under scan" if self.scan else f"one for each of {self.layers}"
        raise ValueError(f"{name}: {len(value)} given; accepted: {accepted}")
    dropouts = self.dropout
    if not isinstance(dropouts, Sequence):
      dropouts = (dropouts,) * self.layers
    make = functools.partial(self.dense, dtype=self.dtype)
    normalise = functools.partial(norm, self.norm, self.epsilon, use_bias=self.use_bias)
    attention = functools.partial(
      Attention,
      self.heads,
      self.kv_heads,
      self.head_dim,
      causal=self.mask == "causal",
      rotary=self.rotary_base if self.position == "rotary" else None,
      use_bias=self.use_bias,
      dense=self.dense,
      implementation=self.implementation,
    )
    mlp = functools.partial(MLP, self.mlp, self.activation, self.use_bias, self.dense)

    def parameter(name: str, init: Any, axes: tuple[str | None, ...], *shape: int | None) -> Any:
      return self.param(name, nn.with_logical_partitioning(init, axes), shape)

    def table(name: str, axis: str | None, rows: int | None) -> Any:
      return parameter(name, self.embed_init, (axis, "embed"), rows, self.features)

    def layer(i: int) -> Layer:
      mixer = self.mixer[i] if isinstance(self.mixer, Sequence) else self.mixer
      return Layer(attention, mlp, normalise, mixer, self.prenorm, dropouts[i])

    if self.vocab is not None:
      self.embedding = table("embedding", "vocab", self.vocab)
    elif self.project:
      self.projection = make(self.features, (None, "embed"), use_bias=self.use_bias)
    if self.position == "learned":
      self.position_embedding = table("position_embedding", None, self.max_length)
    if self.types is not None:
      self.type_embedding = table("type_embedding", None, self.types)
    if self.embed_norm:
      self.embedding_norm = normalise(dtype=self.dtype)
    self.drop = nn.Dropout(dropouts[0])
    self.layer: Any = layer(0) if self.scan else [layer(i) for i in range(self.layers)]
    if self.prenorm:
      self.final_norm = normalise(dtype=self.dtype)
    if self.vocab is not None and self.head == "untied":
      init, axes = nn.initializers.lecun_normal(), ("embed", "vocab")
      self.unembedding = parameter("unembedding", init, axes, self.features, self.vocab)
    if self.vocab is not None and self.head == "mlm":
      self.mlm_dense = make(self.features, ("embed", None), use_bias=True)
      self.mlm_norm = normalise(dtype=self.dtype)
      self.mlm_bias = parameter("mlm_bias", nn.initializers.zeros, ("vocab",), self.vocab)

  def check_length(self, length: int) -> None:
    """Raises ValueError for more positions than are learned."""
    if self.position == "learned" and self.max_length is not None and length > self.max_length:
      raise ValueError(f"length={length}; accepted: up to max_length={self.max_length}")

  def embed(self, inputs: jax.Array) -> jax.Array:
    """(B, L, H): what `inputs` are before positions, types, norm and dropout.

    Tokens (B, L) are looked up; floats are projected where the model does that, and otherwise are
    embeddings (B, L, H) already, also for a model with a vocabulary.

    Raises: ValueError for anything else, and for tokens outside the vocabulary. Under `jit`, where
    tokens are not known, theirs are NaN.
    """
    inputs = jnp.asarray(inputs)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      if self.vocab is not None and inputs.ndim == 2:
        scale = math.sqrt(self.features) if self.position == "sinusoidal" else 1.0
        return (scale * _rows("inputs", self.embedding, inputs)).astype(self.dtype)
    elif inputs.ndim == 3 and self.vocab is None and self.project:
      return self.projection(inputs.astype(self.dtype))
    elif inputs.ndim == 3 and inputs.shape[-1] == self.features:
      return inputs.astype(self.dtype)
    width = "d" if self.vocab is None and self.project else self.features
    accepted = f"float [B, L, {width}]" + (" or int [B, L]" if self.vocab is not None else "")
    raise ValueError(f"inputs: {inputs.dtype}{list(inputs.shape)}; accepted: {accepted}")

  def unembed(self, x: jax.Array) -> jax.Array:
    """Logits (..., vocab), float32, of features (..., H).

    Raises: ValueError for a model without a head.
    """
    if self.vocab is None or self.head is None:
      raise ValueError(f"vocab={self.vocab} with head={self.head}; accepted: both, for logits")
    if self.head == "mlm":
      x = self.mlm_norm(ACTIVATIONS["gelu_exact"](self.mlm_dense(x)))
    matrix_HV = self.unembedding if self.head == "untied" else self.embedding.T
    logits = jnp.matmul(x, matrix_HV.astype(x.dtype), preferred_element_type=jnp.float32)
    return logits + self.mlm_bias if self.head == "mlm" else logits

  def __call__(
    self,
    inputs: jax.Array,
    *,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    prefix: jax.Array | None = None,
    lengths: jax.Array | None = None,
    types: jax.Array | None = None,
    cache: Cache | None = None,
    logits: bool = True,
    hidden: bool = False,
    train: bool = False,
  ) -> Any:
    """Logits (B, L, vocab), float32, or features (B, L, H).

    Args:
      inputs: see `embed`.
      segments: (B, L) int, which of the sequences packed in a row a position belongs to (0 for
        padding); neither attention nor positions cross them.
      positions: (B, L) int; by default from 0 in each segment, and on from where the cache ends.
      prefix: (B,) or (B, L), see `attention_mask`; for mask="prefix".
      lengths: (B,) int, true lengths of padded rows; outputs at padding mean nothing.
      types: (B, L) int; all 0 by default.
      cache: of the positions before these ones (`init_cache`); filled by these, or by `lengths` of
        them, so that rows of different lengths go on each from its own end. Positions beyond its
        size are lost. A prefix belongs to the call that starts the rows.
      logits: False for features, whatever the head.
      hidden: also returns (layers + 1, B, L, H): the embeddings and each layer's output, the last
        after the final norm.
      train: draws dropout masks.

    Returns: the outputs alone, or a tuple of them and, where asked for, hidden states and cache.

    Raises: ValueError for inputs, tokens or positions that the model has no place for, as far as
      they are known before compilation, and for arguments that exclude each other.
    """
    x_BLH = self.embed(inputs)
    length = x_BLH.shape[1]
    given = None if prefix is None else prefix.ndim
    wanted = None if self.mask != "prefix" else 1 if segments is None else 2
    if given != wanted and not (given is None and cache is not None):
      shape = {None: "None", 1: "(B,)", 2: "(B, L)"}[wanted]
      packed = "out" if segments is None else ""
      raise ValueError(
        f"prefix: {'None' if prefix is None else prefix.shape}; accepted: {shape}, under "
        f"mask={self.mask!r} with{packed} segments"
      )
    start, slots = None, length
    if cache is not None:
      if segments is not None:
        raise ValueError("segments: given with a cache; accepted: one sequence a row")
      start, slots = cache.filled, jax.tree.leaves(cache.layers)[0].shape[-3]
      check_range("cache: end", start + (length if lengths is None else lengths), 0, slots)
    mask = None  # plain causal attention is left to the library, which may have a kernel for it
    if not (self.mask == "causal" and segments is None and lengths is None and cache is None):
      seen = {"segments": segments, "prefix": prefix, "lengths": lengths}
      mask = attention_mask(self.mask, length, **seen, start=start, slots=slots)
    if positions is None and segments is not None:
      positions = segment_positions(segments)
    elif positions is None:
      if cache is None:
        self.check_length(length)
      first = 0 if cache is None else cache.filled[:, None]
      positions = first + jnp.arange(length)[None]

    if self.position == "learned":
      x_BLH += _rows("positions", self.position_embedding, positions).astype(self.dtype)
    elif self.position == "sinusoidal":
      x_BLH += sinusoids(positions, self.features).astype(self.dtype)
    if self.types is not None:
      types = jnp.zeros((1, 1), jnp.int32) if types is None else types
      x_BLH += _rows("types", self.type_embedding, types).astype(self.dtype)
    elif types is not None:
      raise ValueError("types: given; accepted: None, for a model without token types")
    if self.embed_norm:
      x_BLH = self.embedding_norm(x_BLH)
    axes = ("batch", "length" if cache is None else None, None)
    x_BLH = nn.with_logical_constraint(self.drop(x_BLH, deterministic=not train), axes)

    def apply(layer: Layer, x_BLH: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
      x_BLH, cache = layer(
        x_BLH,
        mask=mask,
        positions=positions,
        cache=cache,
        start=start,
        padding=None if lengths is None else length_mask(lengths, length),
        train=train,
      )
      x_BLH = nn.with_logical_constraint(x_BLH, axes)
      return x_BLH, (cache, x_BLH if hidden else None)

    if self.remat:
      policy = None if self.remat is True else getattr(jax.checkpoint_policies, self.remat)
      apply = nn.remat(apply, policy=policy, prevent_cse=not self.scan)
    embedded_BLH, before = x_BLH, None if cache is None else cache.layers
    if self.scan:
      apply = nn.scan(
        apply,
        variable_axes={True: 0},
        split_rngs={True: True},
        length=self.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      x_BLH, (caches, states) = apply(self.layer, x_BLH, before)
    else:
      results = []
      for i, layer in enumerate(self.layer):
        x_BLH, result = apply(layer, x_BLH, None if before is None else before[i])
        results.append(result)
      caches, states = zip(*results, strict=True)

    if self.prenorm:
      x_BLH = self.final_norm(x_BLH)
    has_head = self.vocab is not None and self.head is not None
    outputs: list[Any] = [self.unembed(x_BLH) if logits and has_head else x_BLH]
    if hidden:
      outputs.append(jnp.stack([embedded_BLH, *states[:-1], x_BLH]))
    if cache is not None:
      outputs.append(Cache(caches, cache.filled + (length if lengths is None else lengths)))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def stack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A collection of an unrolled `Transformer` (its parameters) as the scanned one has it."""
  layers = sum(name.startswith("layer_") for name in tree)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *(tree[f"layer_{i}"] for i in range(layers)))
  rest = {name: value for name, value in tree.items() if not name.startswith("layer_")}
  return rest | {"layer": nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})}


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A collection of a scanned `Transformer` (its parameters) as the unrolled one has it."""
  stacked = nn.meta.remove_axis(tree["layer"], 0, {nn.PARTITION_NAME: "layers"})
  layers = range(len(jax.tree.leaves(stacked)[0]))
  rest = {name: value for name, value in tree.items() if name != "layer"}
  return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in layers}


def _rows(name: str, table_NH: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of a table; NaN for an index out of range, so that no mistake under `jit` goes unseen."""
  check_range(name, index, 0, table_NH.shape[0] - 1)
  return table_NH.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
