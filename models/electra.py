"""ELECTRA: a discriminator and the masked language model that makes its inputs, probed at depths.

Clark et al., arXiv:2003.10555; several probes of one generator: Meng et al., arXiv:2204.03243
(AMOS), section 3. The encoders are BERT's, norms after the sums, with a relative position bias that
all layers share beside the absolute positions, and without token types. For example

    model = Electra(4096, 128, layers=4, heads=4, probes=(1, 2, 3), max_length=64)
    hidden_PBMH = model.apply(variables, masked_BL, positions_BM, method="generate")
    logits_PBMV = model.apply(variables, hidden_PBMH, method="unembed")
    logits_BL = model.apply(variables, embedded_BLH, method="discriminate")

What lies between the last two (mixture, sampling, reversal) is in `objectives/replaced.py`.
Kernels, embeddings and biases of positions start as N(0, std). Dropout is of embeddings and of what
each sublayer adds, not of attention weights.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import attention, t5, transformer


def dense(std: float, *arguments: Any, **fields: Any) -> nn.Dense:
  """`attention.dense` whose kernel starts as N(0, std)."""
  return attention.dense(*arguments, kernel_init=nn.initializers.normal(std), **fields)


class Attention(nn.Module):
  """Multi-head attention with a bias (1, heads, L, L) on its scaled products."""

  heads: int
  std: float = 0.02

  @nn.compact
  def __call__(
    self, u_BLH: jax.Array, *, bias: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """(B, L, H); `mask` as of `attention.attention_mask`."""
    features = u_BLH.shape[-1]
    make = functools.partial(dense, self.std, features, dtype=u_BLH.dtype)
    head_dim, _ = attention.head_sizes(features, self.heads, None, None)

    def project(name: str) -> jax.Array:
      y = make(("embed", "heads"), name=name)(u_BLH)
      return y.reshape(*u_BLH.shape[:2], self.heads, head_dim)

    y_BLND = jax.nn.dot_product_attention(
      project("query"), project("key"), project("value"), bias.astype(u_BLH.dtype), mask
    )
    return make(("heads", "embed"), name="out")(y_BLND.reshape(u_BLH.shape))


class Encoder(nn.Module):
  """Positions, norm, and layers of which some learn nothing from those behind them.

  Attributes:
    layers, heads, mlp: number of layers, heads, and width between (4 H by default).
    max_length: number of absolute positions.
    outputs: after which layers, from 1, to hand out the hidden states; the last by default. But for
      the last of them, no gradient passes from behind one to before it: what hangs on an output
      trains the layers since the previous one.
    buckets, max_distance: of relative positions, see `t5.relative_buckets`.
    dropout: rate.
    std, relative_std: of the initial kernels and positions, and of the relative ones: where
      training is short, heads that look at some distances from the start save finding them.
    remat: recomputes layers in the backward pass.
  """

  layers: int
  heads: int
  mlp: int | None
  max_length: int
  outputs: tuple[int, ...] = ()
  buckets: int = 32
  max_distance: int = 128
  dropout: float = 0.0
  epsilon: float = 1e-5
  std: float = 0.02
  relative_std: float = 0.02
  remat: bool = False

  @nn.compact
  def __call__(
    self, x_BLH: jax.Array, *, lengths: jax.Array | None = None, train: bool = False
  ) -> list[jax.Array]:
    """The outputs, (B, L, H) each, in the order of depth.

    Args:
      x_BLH: embeddings.
      lengths: (B,) int, true lengths of padded rows; outputs at padding mean nothing.
      train: draws dropout masks.

    Raises: ValueError for rows that are too long, or outputs that are not increasing layers.
    """
    length, outputs = x_BLH.shape[1], self.outputs or (self.layers,)
    if length > self.max_length:
      raise ValueError(f"length={length}; accepted: up to max_length={self.max_length}")
    if sorted({*outputs}) != list(outputs) or outputs[0] < 1 or outputs[-1] != self.layers:
      raise ValueError(f"outputs={outputs}; accepted: increasing, from 1, to layers={self.layers}")

    def table(name: str, std: float, axes: tuple[str | None, str], *shape: int) -> Any:
      init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
      return self.param(name, init, shape)

    sizes = (self.max_length, x_BLH.shape[-1]), (self.buckets, self.heads)
    positions = table("position", self.std, (None, "embed"), *sizes[0])
    relative = table("relative", self.relative_std, (None, "heads"), *sizes[1])
    bucket_LL = t5.relative_buckets(
      length, length, buckets=self.buckets, max_distance=self.max_distance
    )
    bias = jnp.asarray(relative)[bucket_LL].transpose(2, 0, 1)[None]
    mask = attention.attention_mask("full", length, lengths=lengths)
    norm = functools.partial(transformer.norm, "layer", self.epsilon)
    attend = functools.partial(Attention, self.heads, self.std)
    kernels = functools.partial(dense, self.std)
    mlp = functools.partial(transformer.MLP, self.mlp, "gelu_exact", dense=kernels)

    def apply(layer: transformer.Layer, x: jax.Array) -> jax.Array:
      return layer(x, bias=bias, mask=mask, train=train)[0]

    x_BLH = norm(dtype=x_BLH.dtype, name="norm")(x_BLH + positions[:length].astype(x_BLH.dtype))
    x_BLH = nn.Dropout(self.dropout, deterministic=not train)(x_BLH)
    found = []
    for i in range(1, self.layers + 1):
      layer = transformer.Layer(
        attend, mlp, norm, prenorm=False, dropout=self.dropout, name=f"layer_{i}"
      )
      x_BLH = (nn.remat(apply) if self.remat else apply)(layer, x_BLH)
      x_BLH = nn.with_logical_constraint(x_BLH, ("batch", "length", None))
      if i in outputs:
        found.append(x_BLH)
        x_BLH = jax.lax.stop_gradient(x_BLH)
    return found


class Electra(nn.Module):
  """Generator and discriminator of one width, with one embedding matrix for both.

  Attributes:
    vocab: number of tokens.
    features: H, width of both.
    layers: of the discriminator, the encoder that pretraining is for.
    heads, mlp, max_length, buckets, max_distance, epsilon, std, relative_std, remat: of both, see
      `Encoder`.
    probes: depths of the generator's masked language models, increasing; it has so many layers.
    dropout: rate, of the discriminator; the generator has none.
    dtype: of the activations.
  """

  vocab: int
  features: int
  layers: int
  heads: int
  probes: tuple[int, ...]
  max_length: int
  mlp: int | None = None
  buckets: int = 32
  max_distance: int = 128
  dropout: float = 0.0
  epsilon: float = 1e-5
  std: float = 0.02
  relative_std: float = 0.02
  remat: bool = False
  dtype: Any = jnp.float32

  def setup(self) -> None:
    def parameter(name: str, init: Any, axes: tuple[str | None, ...], *shape: int) -> Any:
      return self.param(name, nn.with_logical_partitioning(init, axes), shape)

    fields = (
      "heads", "mlp", "max_length", "buckets", "max_distance", "epsilon", "std", "relative_std",
      "remat",
    )  # fmt: skip
    shared: dict[str, Any] = {name: getattr(self, name) for name in fields}
    normal, zeros = nn.initializers.normal(self.std), nn.initializers.zeros
    self.embedding = parameter("embedding", normal, ("vocab", "embed"), self.vocab, self.features)
    self.generator = Encoder(max(self.probes), outputs=self.probes, **shared)
    self.mlm_dense = dense(self.std, self.features, ("embed", None), dtype=self.dtype)
    self.mlm_norm = transformer.norm("layer", self.epsilon, dtype=self.dtype)
    self.mlm_bias = parameter("mlm_bias", zeros, ("vocab",), self.vocab)
    self.mixing = parameter("mixing", normal, ("embed",), self.features)
    self.discriminator = Encoder(self.layers, dropout=self.dropout, **shared)
    self.original = dense(self.std, 1, ("embed", None))

  def embed(self, tokens: jax.Array) -> jax.Array:
    """(..., H): embeddings of tokens (...,) int, or of their one-hot codes (..., vocab) float."""
    embedding = self.embedding.astype(self.dtype)
    if jnp.issubdtype(tokens.dtype, jnp.floating):
      return tokens.astype(self.dtype) @ embedding
    return embedding[tokens]

  def generate(
    self, tokens_BL: jax.Array, positions_BM: jax.Array, lengths: jax.Array | None = None
  ) -> jax.Array:
    """Hidden states (P, B, M, H) of every probe at the masked positions.

    Args:
      tokens_BL: int, masked.
      positions_BM: int.
      lengths: (B,) int, true lengths of padded rows.
    """
    states = self.generator(self.embed(tokens_BL), lengths=lengths)
    return jnp.stack([jnp.take_along_axis(h, positions_BM[..., None], axis=1) for h in states])

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits (..., vocab), float32, of hidden states (..., H): one head for all probes."""
    y = self.mlm_norm(jax.nn.gelu(self.mlm_dense(hidden), approximate=False))
    matrix_HV = self.embedding.T.astype(y.dtype)
    return jnp.matmul(y, matrix_HV, preferred_element_type=jnp.float32) + self.mlm_bias

  def score(self, hidden: jax.Array) -> jax.Array:
    """Mixing scores (...,), float32, of hidden states (..., H)."""
    return hidden.astype(jnp.float32) @ self.mixing

  def encode(
    self, x: jax.Array, *, lengths: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """The discriminator's features (B, L, H) of tokens (B, L) int or embeddings (B, L, H)."""
    x_BLH = x if jnp.issubdtype(x.dtype, jnp.floating) else self.embed(x)
    return self.discriminator(x_BLH, lengths=lengths, train=train)[-1]

  def discriminate(self, x: jax.Array, **fields: Any) -> jax.Array:
    """Logits (B, L), float32, of each token being the original; arguments as of `encode`."""
    return self.original(self.encode(x, **fields).astype(jnp.float32))[..., 0]

  def __call__(self, tokens_BL: jax.Array) -> Any:
    """Everything of rows that are not masked, as needed to initialise."""
    hidden = self.generate(tokens_BL, jnp.zeros((len(tokens_BL), 1), jnp.int32))
    return self.unembed(hidden), self.score(hidden), self.discriminate(tokens_BL)
