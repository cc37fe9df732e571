"""T5: an encoder and a decoder with relative positions.

Raffel et al., arXiv:1910.10683; the gated form without tied, scaled logits is v1.1. For example

    small = T5(32_128, 512, 6, 8)
    v1_1 = T5(32_128, 512, 8, 6, mlp=1024, activation="geglu", tied=False, scaled=False)
    logits_BTV = small.apply(variables, tokens_BL, shifted_BT, lengths=lengths_B)

where `shifted` are the targets behind a padding token, the first to be read. There is no cache:
to decode a token the decoder reads all before it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.attention import attention_mask, dense
from models.transformer import MLP, norm


def relative_buckets(
  queries: int, keys: int, *, buckets: int = 32, max_distance: int = 128, causal: bool = False
) -> np.ndarray:
  """(queries, keys) int: which of the learned biases holds between two positions.

  Half of the buckets are one for each distance, half grow with its logarithm up to `max_distance`,
  beyond which all is one. Without `causal` half of them all are for keys behind the query.
  arXiv:1910.10683, section 2.1.
  """
  # By numpy, since powers of two times the exact ones lie on the edge between two buckets.
  distance = np.arange(queries)[:, None] - np.arange(keys)
  first: Any = 0
  if not causal:
    buckets //= 2
    first, distance = np.where(distance < 0, buckets, 0), np.abs(distance)
  distance, exact = np.maximum(distance, 0), buckets // 2
  ratio = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
  far = exact + (ratio * (buckets - exact)).astype(int)
  return first + np.where(distance < exact, distance, np.minimum(far, buckets - 1))


class Attention(nn.Module):
  """Attention to `memory`, with a bias on the products and no scale (it is in the initial query).

  Attributes:
    heads, head_dim: number and width of heads, whose product need not be the width of the inputs.
  """

  heads: int
  head_dim: int

  @nn.compact
  def __call__(
    self,
    x_BLH: jax.Array,
    memory_BSH: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """(B, L, H); `bias` is (1, heads, L, S) float, `mask` as of `attention_mask`."""
    batch, _, features = x_BLH.shape
    scaled = nn.initializers.normal((features * self.head_dim) ** -0.5)

    def project(name: str, x: jax.Array, **fields: Any) -> jax.Array:
      fields |= {"dtype": x.dtype, "use_bias": False, "name": name}
      y = dense(self.heads * self.head_dim, ("embed", "heads"), **fields)(x)
      return y.reshape(batch, -1, self.heads, self.head_dim)

    y_BLND = jax.nn.dot_product_attention(
      project("query", x_BLH, kernel_init=scaled),
      project("key", memory_BSH),
      project("value", memory_BSH),
      bias=None if bias is None else bias.astype(x_BLH.dtype),
      mask=mask,
      scale=1.0,
    )
    out = dense(features, ("heads", "embed"), dtype=x_BLH.dtype, use_bias=False, name="out")
    return out(y_BLND.reshape(batch, -1, self.heads * self.head_dim))


class Stack(nn.Module):
  """The encoder, or, of inputs with a memory, the decoder; fields as of `T5`."""

  layers: int
  heads: int
  head_dim: int
  mlp: int | None
  activation: str
  buckets: int
  max_distance: int
  epsilon: float
  dropout: float

  @nn.compact
  def __call__(
    self,
    x_BLH: jax.Array,
    *,
    mask: jax.Array | None,
    memory: jax.Array | None = None,
    memory_mask: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """(B, L, H); masks as of `attention_mask`."""
    length, causal = x_BLH.shape[1], memory is not None
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "heads"))
    biases: Any = self.param("relative", init, (self.buckets, self.heads))
    sizes = {"buckets": self.buckets, "max_distance": self.max_distance}
    bucket_LL = relative_buckets(length, length, causal=causal, **sizes)
    bias = jnp.asarray(biases)[bucket_LL].transpose(2, 0, 1)[None]
    drop = nn.Dropout(self.dropout, deterministic=not train)
    normalise = functools.partial(norm, "rms", self.epsilon, dtype=x_BLH.dtype)
    attention = functools.partial(Attention, self.heads, self.head_dim)

    x_BLH = drop(x_BLH)
    for i in range(self.layers):
      name = f"layer_{i}"
      y = normalise(name=f"{name}_attention_norm")(x_BLH)
      x_BLH += drop(attention(name=f"{name}_attention")(y, y, bias=bias, mask=mask))
      if memory is not None:
        y = normalise(name=f"{name}_cross_norm")(x_BLH)
        x_BLH += drop(attention(name=f"{name}_cross")(y, memory, mask=memory_mask))
      y = normalise(name=f"{name}_mlp_norm")(x_BLH)
      x_BLH += drop(MLP(self.mlp, self.activation, use_bias=False, name=f"{name}_mlp")(y))
      x_BLH = nn.with_logical_constraint(x_BLH, ("batch", "length", None))
    return drop(normalise(name="final_norm")(x_BLH))


class T5(nn.Module):
  """Encoder, decoder, and one embedding matrix for both.

  Attributes:
    vocab: number of tokens.
    features: H, width of the residual streams.
    layers: number of layers of the encoder.
    heads, head_dim: number and width of heads.
    decoder_layers: of the decoder; `layers` by default.
    mlp, activation: as for `transformer.MLP`.
    buckets, max_distance: of relative positions, see `relative_buckets`.
    epsilon: of RMSNorm.
    tied: logits from the embedding matrix.
    scaled: logits of features divided by sqrt(H).
    dropout: rate, of embeddings, of what sublayers add, and of the outputs.
    dtype: of the activations.
  """

  vocab: int
  features: int
  layers: int
  heads: int
  head_dim: int = 64
  decoder_layers: int | None = None
  mlp: int | None = None
  activation: str = "relu"
  buckets: int = 32
  max_distance: int = 128
  epsilon: float = 1e-6
  tied: bool = True
  scaled: bool = True
  dropout: float = 0.0
  dtype: Any = jnp.float32

  def setup(self) -> None:
    def parameter(name: str, init: Any, axes: tuple[str, str], *shape: int) -> Any:
      return self.param(name, nn.with_logical_partitioning(init, axes), shape)

    unit = nn.initializers.normal(1.0)
    self.embedding = parameter("embedding", unit, ("vocab", "embed"), self.vocab, self.features)
    fields = (
      "heads", "head_dim", "mlp", "activation", "buckets", "max_distance", "epsilon", "dropout",
    )  # fmt: skip
    shared: dict[str, Any] = {name: getattr(self, name) for name in fields}
    self.encoder = Stack(self.layers, **shared)
    self.decoder = Stack(
      self.layers if self.decoder_layers is None else self.decoder_layers, **shared
    )
    if not self.tied:
      init, axes = nn.initializers.lecun_normal(), ("embed", "vocab")
      self.unembedding = parameter("unembedding", init, axes, self.features, self.vocab)

  def encode(
    self, tokens: jax.Array, *, lengths: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """The memory (B, L, H) of tokens (B, L) int with true lengths (B,) int."""
    mask = attention_mask("full", tokens.shape[1], lengths=lengths)
    return self.encoder(self._embed(tokens), mask=mask, train=train)

  def decode(
    self,
    tokens: jax.Array,
    memory: jax.Array,
    *,
    lengths: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Logits (B, T, vocab), float32, of what follows each of tokens (B, T) int.

    `memory` (B, L, H) and its `lengths` are the encoder's.
    """
    x_BTH = self.decoder(
      self._embed(tokens),
      mask=attention_mask("causal", tokens.shape[1]),
      memory=memory,
      memory_mask=attention_mask("full", memory.shape[1], lengths=lengths),
      train=train,
    )
    x_BTH = x_BTH * self.features**-0.5 if self.scaled else x_BTH
    matrix_HV = self.embedding.T if self.tied else self.unembedding
    return jnp.matmul(x_BTH, matrix_HV.astype(x_BTH.dtype), preferred_element_type=jnp.float32)

  def __call__(
    self,
    inputs: jax.Array,
    targets: jax.Array,
    *,
    lengths: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Logits (B, T, vocab), float32.

    Args:
      inputs: (B, L) int.
      targets: (B, T) int, shifted to the right.
      lengths: (B,) int, true lengths of the inputs.
      train: draws dropout masks.
    """
    memory = self.encode(inputs, lengths=lengths, train=train)
    return self.decode(targets, memory, lengths=lengths, train=train)

  def _embed(self, tokens: jax.Array) -> jax.Array:
    return self.embedding[tokens].astype(self.dtype)
