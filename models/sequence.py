"""Residual stacks of sequence mixers: block, encoder; heads for sequences, positions and frames.

The network of S5 (arXiv:2208.04933 and its released code, layers.py and seq_model.py), which serves
any mixer: a module called `mixer(u_BLH, *, dt=None, step_rescale=1.0) -> y_BLH`, such as `ssm.S5`,
`ssm.S4D`, `long_conv.SGConv`, `recurrent.LRU`, `recurrent.RGLRU` and `recurrent.GRU`. For example

    block = functools.partial(Block, mixer=functools.partial(ssm.S5, state=16, blocks=8))
    model = Classifier(Encoder(block, features=128, layers=8, vocab=20), classes=10)
    logits_BC = model.apply(variables, tokens_BL, lengths=lengths_B, train=False)

Training needs `rngs={"dropout": key}` and, under BatchNorm, `mutable=["batch_stats"]`.

Padding: given `lengths`, inputs beyond them are zeroed after the encoder's linear layer and before
each mixer, and take no part in BatchNorm's statistics or in pooling, so that the logits do not
depend on the amount of padding. The released code instead feeds the pad symbol to the encoder: pads
enter its statistics, and the states that real tokens see from behind.

Where every mixer streams (see `models.mixers`), so do the encoder and the heads with an output a
position: `extend` and `step` take `state = model.initial_state(batch)`.

Parameters and statistics are float32; `dtype` is that of activations. Under an outer `vmap` over
seeds, statistics are of one seed.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import mixers
from models.attention import dense

ACTIVATIONS = ("half_glu1", "half_glu2", "full_glu", "gelu")
NORMS = ("batch", "layer", "scalar")
INITS = ("lecun", "uniform")
POOLINGS = ("mean", "last")
GAPS = ("ssm", "append", "ignore")

ACTIVATION_AXES = ("batch", "length", None)


def uniform(fan_in: int) -> nn.initializers.Initializer:
  """Uniform on +-1 / sqrt(fan_in): the default of PyTorch's Linear, for kernel and bias."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class ScalarNorm(nn.Module):
  """scale / std (x - mean + shift), statistics over channels, one learned scale and shift in all.

  The channel norm of S4's and SGConv's image models. Statistics are float32.
  """

  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BLH: jax.Array) -> jax.Array:
    ones, zeros = (
      nn.with_logical_partitioning(init, ())
      for init in (nn.initializers.ones, nn.initializers.zeros)
    )
    scale: Any = self.param("scale", ones, ())
    shift: Any = self.param("shift", zeros, ())
    x_BLH = x_BLH.astype(jnp.float32)
    centred_BLH = x_BLH - x_BLH.mean(axis=-1, keepdims=True)
    variance_BL1 = jnp.square(centred_BLH).mean(axis=-1, keepdims=True)
    y_BLH = scale * jax.lax.rsqrt(variance_BL1 + self.epsilon) * (centred_BLH + shift)
    return y_BLH.astype(self.dtype)


def normalise(
  x_BLH: jax.Array,
  mask_BL: jax.Array | None,
  train: bool,
  *,
  kind: str = "batch",
  momentum: float = 0.95,
  dtype: Any = jnp.float32,
  name: str = "norm",
) -> jax.Array:
  """A norm within the calling module, under `name`.

  Args:
    x_BLH: what is normalised.
    mask_BL: False where a position takes no part in the statistics of a batch.
    train: normalise by the statistics of the batch, not the running ones.
    kind: "batch" (over batch and time, for each feature), "layer" (over features), "scalar" (over
      features, with a single scale and shift).
    momentum: of the running statistics.

  Raises: ValueError for another `kind`.
  """
  if kind == "scalar":
    return ScalarNorm(dtype=dtype, name=name)(x_BLH)
  fields = {
    "epsilon": 1e-5,
    "dtype": dtype,
    "scale_init": nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
    "bias_init": nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
    "name": name,
  }
  if kind == "layer":
    return nn.LayerNorm(**fields)(x_BLH)
  if kind != "batch":
    raise ValueError(f"norm={kind!r}; accepted: {', '.join(NORMS)}")
  norm = nn.BatchNorm(momentum=momentum, use_running_average=not train, **fields)
  return norm(x_BLH, mask=None if mask_BL is None else mask_BL[..., None])


def length_mask(lengths_B: jax.Array, length: int) -> jax.Array:
  """(B, length) bool: True at the positions of a sequence, False at padding."""
  return jnp.arange(length) < lengths_B[:, None]


def zero_padding(x_BLH: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
  """`x` with zeros where `mask` is False; `x` itself without a mask."""
  return x_BLH if mask_BL is None else jnp.where(mask_BL[..., None], x_BLH, 0)


def pool(x_BLH: jax.Array, lengths_B: jax.Array | None = None, how: str = "mean") -> jax.Array:
  """One float32 vector a sequence, (B, H).

  Args:
    x_BLH: features.
    lengths_B: true lengths, at least 1; None where nothing is padded.
    how: "mean" over the true positions, or the "last" of them.
  """
  if how not in POOLINGS:
    raise ValueError(f"pooling={how!r}; accepted: {', '.join(POOLINGS)}")
  length = x_BLH.shape[1]
  if how == "last":
    if lengths_B is None:
      return x_BLH[:, -1].astype(jnp.float32)
    last_B11 = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(x_BLH, last_B11, axis=1)[:, 0].astype(jnp.float32)
  if lengths_B is None:
    return x_BLH.mean(axis=1, dtype=jnp.float32)
  total_BH = zero_padding(x_BLH, length_mask(lengths_B, length)).sum(axis=1, dtype=jnp.float32)
  return total_BH / lengths_B[:, None]


class Block(nn.Module):
  """Residual block: x + activation(mixer(norm(x))), or norm(x + activation(mixer(x))).

  Attributes:
    mixer: makes the mixer, `mixer(name=...)`: a module class or a `functools.partial` of one.
    activation: what follows the mixer's output y, with g = dropout(gelu(y)), tanh form:
      "half_glu1": dropout(g * sigmoid(W g + b));
      "half_glu2": dropout(y * sigmoid(W g + b)), the multiplicand being the raw y;
      "full_glu": dropout((V g + c) * sigmoid(W g + b)), the position-wise GLU of S4 and S4D;
      "gelu": g.
    norm: "batch", "layer" or "scalar", see `normalise`.
    prenorm: norm before the mixer; otherwise after the sum.
    momentum: of BatchNorm's running statistics; the released code's default is 0.95.
    dropout: rate.
    tied_dropout: one mask a sequence, shared over time; otherwise one a position.
    linear_init: of the gate's and the value's layers: "lecun" (normal, zero bias) or "uniform".
    dtype: of the activations.
  """

  mixer: Callable[..., nn.Module]
  activation: str = "half_glu1"
  norm: str = "batch"
  prenorm: bool = True
  momentum: float = 0.95
  dropout: float = 0.0
  tied_dropout: bool = True
  linear_init: str = "lecun"
  dtype: Any = jnp.float32

  def __call__(
    self,
    x_BLH: jax.Array,
    *,
    mask: jax.Array | None = None,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
    train: bool = False,
  ) -> jax.Array:
    """The block's output (B, L, H).

    Args:
      x_BLH: the residual stream.
      mask: (B, L) bool, False at padding.
      dt, step_rescale: for the mixer.
      train: draws dropout masks, and normalises by the statistics of the batch.
    """
    return self._map(None, x_BLH, mask, train, dt=dt, step_rescale=step_rescale)[1]

  def extend(
    self,
    state: Any,
    x_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[Any, jax.Array]:
    """State of the mixer and outputs after a further chunk, see `models.mixers`."""
    return self._map(state, x_BLH, None, False, dt=dt, step_rescale=step_rescale)

  step = mixers.step

  def initial_state(self, batch: int, features: int) -> Any:
    """That of the mixer. Raises: ValueError for a mixer that does not stream."""
    mixer: Any = self.mixer(parent=None)
    if not hasattr(mixer, "extend"):
      raise ValueError(f"mixer: {type(mixer).__name__}; accepted: one with `extend`, to stream")
    return mixer.initial_state(batch, features)

  @nn.compact
  def _map(
    self, state: Any, x_BLH: jax.Array, mask: jax.Array | None, train: bool, **sampling: Any
  ) -> tuple[Any, jax.Array]:
    x_BLH = x_BLH.astype(self.dtype)
    y_BLH = self._normalise(x_BLH, mask, train) if self.prenorm else x_BLH
    mixer: Any = self.mixer(name="mixer")
    if state is None:
      y_BLH = mixer(zero_padding(y_BLH, mask), **sampling)
    else:
      state, y_BLH = mixer.extend(state, y_BLH, **sampling)
    x_BLH = x_BLH + self._activate(y_BLH, train)
    return state, x_BLH if self.prenorm else self._normalise(x_BLH, mask, train)

  def _normalise(self, x_BLH: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    fields = {"kind": self.norm, "momentum": self.momentum, "dtype": self.dtype}
    return normalise(x_BLH, mask, train, **fields)

  def _activate(self, y_BLH: jax.Array, train: bool) -> jax.Array:
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation={self.activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    if self.linear_init not in INITS:
      raise ValueError(f"linear_init={self.linear_init!r}; accepted: {', '.join(INITS)}")
    shared = (1,) if self.tied_dropout else ()
    drop = nn.Dropout(self.dropout, broadcast_dims=shared, deterministic=not train)
    g_BLH = drop(nn.gelu(y_BLH, approximate=True))
    if self.activation == "gelu":
      return g_BLH
    width = y_BLH.shape[-1]
    inits: dict[str, Any] = {}
    if self.linear_init == "uniform":
      inits = dict.fromkeys(("kernel_init", "bias_init"), uniform(width))
    linear = functools.partial(dense, width, ("embed", "mlp"), dtype=self.dtype, **inits)
    gate_BLH = nn.sigmoid(linear(name="gate")(g_BLH))
    if self.activation == "half_glu1":
      return drop(g_BLH * gate_BLH)
    if self.activation == "half_glu2":
      return drop(y_BLH * gate_BLH)
    return drop(linear(name="value")(g_BLH) * gate_BLH)


class Tokens(nn.Module):
  """A Dense layer on one-hot tokens, computed as a look-up: (B, L) int to (B, L, features).

  The kernel's initial standard deviation is 1/sqrt(vocab), as the one-hot form has it, and there is
  a bias; an `embedding`, as PyTorch has it, is N(0, 1) and has none. A token outside the vocabulary
  is the zero vector, plus the bias.
  """

  vocab: int
  features: int
  embedding: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    init = nn.initializers
    kernel_VH = self.param(
      "kernel",
      nn.with_logical_partitioning(
        init.normal(1.0) if self.embedding else init.lecun_normal(), ("vocab", "embed")
      ),
      (self.vocab, self.features),
    )
    rows_BLH = jnp.take(
      jnp.asarray(kernel_VH, self.dtype), tokens_BL, axis=0, mode="fill", fill_value=0
    )
    if self.embedding:
      return rows_BLH
    bias_H = self.param(
      "bias", nn.with_logical_partitioning(init.zeros, ("embed",)), (self.features,)
    )
    return rows_BLH + jnp.asarray(bias_H, self.dtype)


class Encoder(nn.Module):
  """Linear layer to the residual width, then `layers` blocks, then a norm if one is named.

  Attributes:
    block: makes a block, `block(dtype=..., name=...)`: a `functools.partial` of `Block`.
    features: H, width of the residual stream.
    layers: number of blocks.
    vocab: number of token symbols, for int inputs.
    embedding: how they are read, see `Tokens`.
    final_norm: after the blocks, see `normalise`; None for none, as in S5.
    momentum: of that norm's running statistics.
    remat: recomputes each block in the backward pass and keeps only its input.
    dtype: of the activations, here and in the blocks.
  """

  block: Callable[..., nn.Module]
  features: int
  layers: int
  vocab: int | None = None
  embedding: bool = False
  final_norm: str | None = None
  momentum: float = 0.95
  remat: bool = False
  dtype: Any = jnp.float32

  def __call__(
    self,
    inputs: jax.Array,
    *,
    lengths: jax.Array | None = None,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
    train: bool = False,
  ) -> jax.Array:
    """Features (B, L, H); those at padding mean nothing.

    Args:
      inputs: (B, L) int tokens, or (B, L, d) floating point.
      lengths: (B,) true lengths; None where nothing is padded.
      dt: (B, L) gaps between samples, see `ssm.S5`.
      step_rescale: see `ssm.S5`.
      train: see `Block`.

    Raises: ValueError where `inputs` are neither, and for int inputs without `vocab`.
    """
    return self._map(None, inputs, lengths, train, dt=dt, step_rescale=step_rescale)[1]

  def extend(
    self,
    state: Any,
    inputs: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[Any, jax.Array]:
    """State, a tuple of the blocks', and features after a further chunk, see `models.mixers`."""
    return self._map(state, inputs, None, False, dt=dt, step_rescale=step_rescale)

  step = mixers.step

  def initial_state(self, batch: int) -> Any:
    """That of each block. Raises: ValueError for a mixer that does not stream."""
    block: Any = self.block(dtype=self.dtype, parent=None)
    return tuple(block.initial_state(batch, self.features) for _ in range(self.layers))

  @nn.compact
  def _map(
    self,
    state: Any,
    inputs: jax.Array,
    lengths: jax.Array | None,
    train: bool,
    *,
    dt: jax.Array | None,
    step_rescale: float | jax.Array,
  ) -> tuple[Any, jax.Array]:
    if jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.ndim == 2:
      if self.vocab is None:
        raise ValueError(f"vocab=None: inputs are {inputs.dtype} tokens; accepted: their number")
      x_BLH = Tokens(self.vocab, self.features, self.embedding, self.dtype, name="linear")(inputs)
    elif jnp.issubdtype(inputs.dtype, jnp.floating) and inputs.ndim == 3:
      axes = (None, "embed")
      x_BLH = dense(self.features, axes, name="linear", dtype=self.dtype)(inputs)
    else:
      raise ValueError(
        f"inputs: {inputs.dtype}{list(inputs.shape)}; accepted: int [B, L] or float [B, L, d]"
      )

    mask = None if lengths is None else length_mask(lengths, inputs.shape[1])
    if dt is not None and mask is not None:
      # The gap behind the last sample is not to depend on whether padding follows it.
      dt = jnp.where(mask, dt, 1)

    def apply(block: Any, x_BLH: jax.Array) -> jax.Array:
      return block(x_BLH, mask=mask, dt=dt, step_rescale=step_rescale, train=train)

    if self.remat:
      apply = nn.remat(apply)
    x_BLH = nn.with_logical_constraint(zero_padding(x_BLH, mask), ACTIVATION_AXES)
    states = []
    for i in range(self.layers):
      block: Any = self.block(dtype=self.dtype, name=f"layer_{i}")
      if state is None:
        x_BLH = apply(block, x_BLH)
      else:
        last, x_BLH = block.extend(state[i], x_BLH, dt=dt, step_rescale=step_rescale)
        states.append(last)
      x_BLH = nn.with_logical_constraint(x_BLH, ACTIVATION_AXES)
    if self.final_norm is None:
      return tuple(states), x_BLH
    fields = {"kind": self.final_norm, "momentum": self.momentum, "dtype": self.dtype}
    return tuple(states), normalise(x_BLH, mask, train, **fields)


class LanguageModel(nn.Module):
  """The next token at every position: encoder (causal, over tokens) and linear decoder."""

  encoder: Encoder
  vocab: int

  def __call__(
    self, inputs: jax.Array, *, lengths: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """Logits (B, L, vocab), float32, of int tokens (B, L); arguments as for `Encoder`."""
    return self._decode(self.encoder(inputs, lengths=lengths, train=train))

  def extend(self, state: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    """State of the encoder and logits after a further chunk of tokens, see `models.mixers`."""
    state, x_BLH = self.encoder.extend(state, inputs)
    return state, self._decode(x_BLH)

  step = mixers.step

  def initial_state(self, batch: int) -> Any:
    """That of the encoder."""
    return self.encoder.initial_state(batch)

  @nn.compact
  def _decode(self, x_BLH: jax.Array) -> jax.Array:
    return dense(self.vocab, ("embed", "vocab"), name="decoder")(x_BLH).astype(jnp.float32)


class Classifier(nn.Module):
  """One label a sequence: encoder, pooling over the true positions, linear decoder.

  Attributes:
    encoder: an `Encoder`.
    classes: number of labels.
    pooling: "mean", or "last" for the last true position.
  """

  encoder: nn.Module
  classes: int
  pooling: str = "mean"

  @nn.compact
  def __call__(
    self,
    inputs: jax.Array,
    *,
    lengths: jax.Array | None = None,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
    train: bool = False,
  ) -> jax.Array:
    """Logits (B, classes), float32; arguments as for `Encoder`."""
    x_BLH = self.encoder(inputs, lengths=lengths, dt=dt, step_rescale=step_rescale, train=train)
    pooled_BH = pool(x_BLH, lengths, self.pooling)
    return dense(self.classes, ("embed", "vocab"), name="decoder")(pooled_BH)

  def initial_state(self, batch: int) -> Any:
    """Raises ValueError: a label is of the whole sequence."""
    raise ValueError(f"pooling={self.pooling!r}: one label a sequence; accepted: none, to stream")


class Retrieval(nn.Module):
  """One label a pair of documents, both through one encoder as a batch of 2B.

  Of the pooled a and b, [a, b, a - b, a * b] -> Dense(H) -> GELU -> Dense(classes).
  """

  encoder: nn.Module
  classes: int = 2
  pooling: str = "mean"

  @nn.compact
  def __call__(
    self,
    inputs: jax.Array,
    *,
    lengths: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
    train: bool = False,
  ) -> jax.Array:
    """Logits (B, classes), float32.

    Args:
      inputs: (B, 2, L) int tokens, or (B, 2, L, d) floating point.
      lengths: (B, 2) true lengths; None where nothing is padded.
      step_rescale, train: as for `Encoder`.
    """
    if inputs.shape[1] != 2:
      raise ValueError(f"inputs: {list(inputs.shape)}; accepted: [B, 2, L] or [B, 2, L, d]")
    documents = inputs.reshape(-1, *inputs.shape[2:])
    lengths = None if lengths is None else lengths.reshape(-1)
    x_NLH = self.encoder(documents, lengths=lengths, step_rescale=step_rescale, train=train)
    features = x_NLH.shape[-1]
    a_BH, b_BH = jnp.unstack(pool(x_NLH, lengths, self.pooling).reshape(-1, 2, features), axis=1)
    pair_BK = jnp.concatenate([a_BH, b_BH, a_BH - b_BH, a_BH * b_BH], axis=-1)
    hidden_BH = nn.gelu(dense(features, ("embed", "mlp"), name="compare")(pair_BK))
    return dense(self.classes, ("mlp", "vocab"), name="decoder")(hidden_BH)


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
  """The neighbourhood of each stride-th pixel, (N, h, w, c) to (N, h', w', size * size * c).

  `size` is odd; the border is padded with zeros. A Dense layer on this is a convolution; with so
  few channels it is twice as fast as `nn.Conv` on CPU, alone and under `vmap` over seeds.
  """
  half = size // 2
  rows, columns = (-(-n // stride) for n in x.shape[1:3])
  x = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  return jnp.concatenate(
    [
      x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
      for i in range(size)
      for j in range(size)
    ],
    axis=-1,
  )


def halve(x: jax.Array) -> jax.Array:
  """Maximum over 2 x 2 pixels, (N, h, w, c) to (N, h // 2, w // 2, c)."""
  rows, columns = x.shape[1] // 2, x.shape[2] // 2
  x = x[:, : 2 * rows, : 2 * columns]
  return x.reshape(x.shape[0], rows, 2, columns, 2, x.shape[3]).max(axis=(2, 4))


class FrameEncoder(nn.Module):
  """Small convolutional network on each frame, (..., height, width, channels) to (..., features).

  Conv 12 of 5x5, ReLU, max-pool 2; conv 12 of 3x3 with stride 2, ReLU, max-pool 2; Dense, ReLU: the
  pendulum network of arXiv:2208.04933. Without `convolutional` the Dense layer sees the pixels.
  """

  features: int = 30
  convolutional: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, frames: jax.Array) -> jax.Array:
    def layer(x: jax.Array, features: int, name: str) -> jax.Array:
      return nn.relu(dense(features, (None, "mlp"), name=name, dtype=self.dtype)(x))

    leading = frames.shape[:-3]
    x = frames.reshape(-1, *frames.shape[-3:]).astype(self.dtype)
    if self.convolutional:
      x = halve(layer(patches(x, 5, 1), 12, "conv_0"))
      x = halve(layer(patches(x, 3, 2), 12, "conv_1"))
    return layer(x.reshape(*leading, -1), self.features, "dense")


class FrameRegressor(nn.Module):
  """Mean and variance of targets at every frame of irregularly sampled frames.

  Attributes:
    encoder: an `Encoder`, over the frame features.
    outputs: number of targets a frame.
    gaps: what becomes of `dt`: "ssm" (step sizes of the mixers), "append" (one more frame feature)
      or "ignore"; under the last two the mixers take samples to be equally spaced.
    hidden: width of the frame features and of both heads.
    convolutional: as for `FrameEncoder`.
  """

  encoder: Encoder
  outputs: int
  gaps: str = "ssm"
  hidden: int = 30
  convolutional: bool = True

  def __call__(
    self,
    frames: jax.Array,
    *,
    dt: jax.Array | None = None,
    lengths: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
    train: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """(mean, variance), each (B, L, outputs) float32.

    Args:
      frames: (B, L, 24, 24, 1) or of another size of at least 6, floating point.
      dt: (B, L) gaps t_k - t_{k-1}, dt_0 = 1; needed unless `gaps` is "ignore".
      lengths, step_rescale, train: as for `Encoder`.
    """
    fields = {"lengths": lengths, "step_rescale": step_rescale, "train": train}
    return self._map(None, frames, dt, **fields)[1]

  def extend(
    self,
    state: Any,
    frames: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """State of the encoder, and mean and variance of further frames, see `models.mixers`."""
    return self._map(state, frames, dt, step_rescale=step_rescale)

  step = mixers.step

  def initial_state(self, batch: int) -> Any:
    """That of the encoder."""
    return self.encoder.initial_state(batch)

  @nn.compact
  def _map(
    self, state: Any, frames: jax.Array, dt: jax.Array | None, **fields: Any
  ) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    if self.gaps not in GAPS:
      raise ValueError(f"gaps={self.gaps!r}; accepted: {', '.join(GAPS)}")
    if dt is None and self.gaps != "ignore":
      raise ValueError(f"dt=None under gaps={self.gaps!r}; accepted: (B, L) gaps between frames")
    x_BLK = FrameEncoder(self.hidden, self.convolutional, name="frames")(frames)
    if self.gaps == "append" and dt is not None:
      x_BLK = jnp.concatenate([x_BLK, dt[..., None].astype(x_BLK.dtype)], axis=-1)
    fields["dt"] = dt if self.gaps == "ssm" else None
    if state is None:
      x_BLH = self.encoder(x_BLK, **fields)
    else:
      state, x_BLH = self.encoder.extend(state, x_BLK, **fields)
    x_BLH = x_BLH.astype(jnp.float32)

    def head(name: str) -> jax.Array:
      hidden_BLK = nn.tanh(dense(self.hidden, ("embed", "mlp"), name=f"{name}_hidden")(x_BLH))
      return dense(self.outputs, ("mlp", "vocab"), name=name)(hidden_BLK)

    return state, (head("mean"), positive(head("variance")))


def positive(v: jax.Array) -> jax.Array:
  """exp(v) for v < 0 and v + 1 above: positive, with a continuous first derivative."""
  return jnp.where(v < 0, jnp.exp(jnp.minimum(v, 0)), v + 1)


def parameter_count(variables: Any) -> int:
  """Number of trained values in a (possibly abstract, possibly boxed) variable tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
