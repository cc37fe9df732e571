"""Recurrent networks as mixers: LRU and RG-LRU, whose recurrence is linear, and the GRU.

All are called `mixer(u_BLH, *, dt=None, step_rescale=1.0)`, return `y_BLH` in the dtype of `u`, and
with one direction stream, see `models.mixers`. Recurrences are float32.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import mixers
from models.kernels import linear_scan, partition, s5_apply

Pair = tuple[jax.Array, jax.Array]

# LRU


def ring(r_min: float, r_max: float) -> nn.initializers.Initializer:
  """log(-log |lambda|), |lambda| being that of points uniform on a ring of the complex plane.

  |lambda|^2 is uniform between r_min^2 and r_max^2 (arXiv:2303.06349, lemma 3.2).
  """

  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    limits = jnp.finfo(dtype)  # at radii of exactly zero and one the logarithms are infinite
    low, high = max(r_min**2, float(limits.tiny)), min(r_max**2, 1 - float(limits.eps))
    return jnp.log(-0.5 * jnp.log(jax.random.uniform(key, shape, dtype, low, high)))

  return init


class LRU(nn.Module):
  """Linear recurrent unit (Orvieto et al., arXiv:2303.06349, section 3).

  x_t = lambda x_{t-1} + gamma (B u_t), y_t = Re(C x_t) + D u_t, with complex diagonal
  lambda = exp(-exp(nu_log) + i exp(theta_log)), so that |lambda| < 1, and gamma = exp(gamma_log),
  which starts at sqrt(1 - |lambda|^2): white inputs of variance one give states of variance one.
  Maps `u_BLH` to `y_BLH` of the same dtype; states are float32.

  Attributes:
    state: N, complex states.
    r_min, r_max: initial radii of the ring, see `ring`; 0 <= r_min < r_max <= 1.
    max_phase: initial phases are uniform from 0 to it.
    implementation: of `kernels.s5_apply`.

  Parameters, float32: nu_log, theta_log, gamma_log (N,), B (N, H, 2), C (H, N, 2), D (H,).

  Raises: ValueError for radii out of range, irregular sampling and rescaled steps.
  """

  state: int
  r_min: float = 0.0
  r_max: float = 1.0
  max_phase: float = 2 * math.pi
  implementation: str | None = None

  __call__ = mixers.call

  @nn.compact
  def extend(
    self,
    state: Pair | None,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[Pair, jax.Array]:
    """State and outputs after a further chunk, see `models.mixers`; None for the initial state."""
    mixers.refuse_sampling(self, dt, step_rescale)
    if not 0 <= self.r_min < self.r_max <= 1:
      raise ValueError(f"r_min={self.r_min}, r_max={self.r_max}; accepted: 0 <= r_min < r_max <= 1")
    sizes = {"state": self.state, "embed": u_BLH.shape[-1], None: 2}

    def phases(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      uniform = jax.random.uniform(key, shape, minval=jnp.finfo(jnp.float32).tiny)
      return jnp.log(uniform) + math.log(self.max_phase)

    def parameter(name: str, init: Any, *axes: str | None) -> jax.Array:
      return mixers.parameter(self, name, init, tuple(sizes[axis] for axis in axes), axes)

    normal = nn.initializers.normal
    nu_N = jnp.exp(parameter("nu_log", ring(self.r_min, self.r_max), "state"))
    theta_N = jnp.exp(parameter("theta_log", phases, "state"))
    # At first log sqrt(1 - |lambda|^2), without the subtraction.
    normaliser = 0.5 * jnp.log(-jnp.expm1(-2 * nu_N))
    scale_N = jnp.exp(parameter("gamma_log", lambda *_: normaliser, "state"))
    b_NH2 = parameter("B", normal((2 * sizes["embed"]) ** -0.5), "state", "embed", None)
    c_HN2 = parameter("C", normal(self.state**-0.5), "embed", "state", None)
    d_H = parameter("D", normal(1.0), "embed")
    y_BLH, state = s5_apply(
      u_BLH,
      (jnp.exp(-nu_N) * jnp.cos(theta_N), jnp.exp(-nu_N) * jnp.sin(theta_N)),
      (b_NH2[..., 0], b_NH2[..., 1]),
      (c_HN2[..., 0], c_HN2[..., 1]),
      d_H,
      state,
      scale=(scale_N, jnp.zeros_like(scale_N)),
      spec=partition.named("batch", "length", "state"),
      implementation=self.implementation,
    )
    return state, y_BLH

  step = mixers.step

  def initial_state(self, batch: int, features: int | None = None) -> Pair:
    """Zeros: (re, im), each (batch, N) float32, whatever the `features`."""
    del features
    return jnp.zeros((batch, self.state)), jnp.zeros((batch, self.state))


# RG-LRU


def gated_decay(
  gate_BLH: jax.Array, lambda_H: jax.Array, power: float = 8.0
) -> tuple[jax.Array, jax.Array]:
  """a = sigmoid(Lambda)^(c r) and sqrt(1 - a^2) (arXiv:2402.19427, eqs. 3, 4 and appendix A).

  By log a, so that neither loses digits where a is near one; gradients are finite for every gate.

  Args:
    gate_BLH: r, in [0, 1].
    lambda_H: Lambda.
    power: c.
  """
  rate_BLH = -power * jax.nn.log_sigmoid(lambda_H) * gate_BLH
  # The square root of zero has no derivative, though its limit here, with respect to the gate's
  # input, is zero.
  bounded_BLH = jnp.maximum(rate_BLH, jnp.finfo(rate_BLH.dtype).tiny)
  return jnp.exp(-rate_BLH), jnp.sqrt(-jnp.expm1(-2 * bounded_BLH))


class RGLRU(nn.Module):
  """Real-gated linear recurrent unit (De et al., Griffin, arXiv:2402.19427, section 2.4).

  r_t = sigmoid(W_a u_t + b_a), i_t = sigmoid(W_x u_t + b_x), a_t = sigmoid(Lambda)^(c r_t),
  y_t = a_t y_{t-1} + sqrt(1 - a_t^2) (i_t u_t)

  elementwise in H features. Maps `u_BLH` to `y_BLH` of the same dtype; of gates the products sum in
  float32, and everything after them is float32. The convolution and the branch around the unit in
  Griffin are not part of it.

  Attributes:
    blocks: J equal blocks on the diagonals of W_a and W_x, which are zero elsewhere.
    power: c.
    decay_min, decay_max: a^c = sigmoid(Lambda)^c starts uniform between them.
    implementation: of `kernels.linear_scan`.

  Parameters, float32: recurrence_kernel, input_kernel (J, H/J, H/J), recurrence_bias, input_bias
  and Lambda (H,).

  Raises: ValueError for blocks that do not divide H, bounds out of (0, 1), irregular sampling and
  rescaled steps.
  """

  blocks: int = 1
  power: float = 8.0
  decay_min: float = 0.9
  decay_max: float = 0.999
  implementation: str | None = None

  __call__ = mixers.call

  @nn.compact
  def extend(
    self,
    state_BH: jax.Array | None,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """State and outputs after a further chunk, see `models.mixers`; None for the initial state."""
    mixers.refuse_sampling(self, dt, step_rescale)
    features = u_BLH.shape[-1]
    if self.blocks < 1 or features % self.blocks:
      raise ValueError(f"blocks={self.blocks}; accepted: a divisor of the {features} features")
    if not 0 < self.decay_min <= self.decay_max < 1:
      raise ValueError(
        f"decay_min={self.decay_min}, decay_max={self.decay_max};"
        " accepted: 0 < decay_min <= decay_max < 1"
      )
    dtype = jnp.result_type(jnp.float32, u_BLH)
    size = features // self.blocks
    u_BLJK = u_BLH.reshape(*u_BLH.shape[:-1], self.blocks, size)

    def gate(name: str) -> jax.Array:
      kernel_JKM = mixers.parameter(
        self,
        f"{name}_kernel",
        nn.initializers.lecun_normal(batch_axis=0),
        (self.blocks, size, size),
        (None, "embed", "mlp"),
      ).astype(u_BLH.dtype)
      bias_H = mixers.parameter(self, f"{name}_bias", nn.initializers.zeros, (features,), ("mlp",))
      product = jnp.einsum("bljk,jkm->bljm", u_BLJK, kernel_JKM, preferred_element_type=dtype)
      return jax.nn.sigmoid(product.reshape(u_BLH.shape) + bias_H)

    def spread(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      decay = jax.random.uniform(key, shape, minval=self.decay_min, maxval=self.decay_max)
      log_a = jnp.log(decay) / self.power
      return log_a - jnp.log(-jnp.expm1(log_a))  # the inverse of log_sigmoid

    lambda_H = mixers.parameter(self, "Lambda", spread, (features,), ("mlp",))
    a_BLH, scale_BLH = gated_decay(gate("recurrence"), lambda_H, self.power)
    drive_BLH = scale_BLH * (gate("input") * u_BLH.astype(dtype))
    y_BLH, state_BH = linear_scan(
      a_BLH,
      drive_BLH,
      state_BH,
      spec=partition.named("batch", "length", "mlp"),
      implementation=self.implementation,
    )
    return state_BH, y_BLH.astype(u_BLH.dtype)

  step = mixers.step

  def initial_state(self, batch: int, features: int) -> jax.Array:
    """Zeros (batch, features) float32."""
    return jnp.zeros((batch, features))


# GRU


def gru_scan(
  x_BLG: jax.Array,
  recurrent_KG: jax.Array,
  bias_K: jax.Array,
  start_BK: jax.Array | None = None,
  *,
  reverse: bool = False,
) -> jax.Array:
  """The recurrence of a gated recurrent unit, whose input projections are given.

    r = sigmoid(x_r + U_r h),  z = sigmoid(x_z + U_z h),  n = tanh(x_n + r * (U_n h + b)),
    h' = (1 - z) * n + z * h

  in the variant of cuDNN and flax, which apply r after the product with U_n.

  Args:
    x_BLG: (B, L, 3 K) float32, the three projections side by side in the order r, z, n.
    recurrent_KG: (K, 3 K), U in the same order.
    bias_K: (K,), b.
    start_BK: the state before the first step taken; zeros by default.
    reverse: runs from the last step to the first.

  Returns: the states h, (B, L, K).
  """
  width = recurrent_KG.shape[0]

  def step(h_BK, x_BG):
    u_BG = h_BK @ recurrent_KG
    gates = jax.nn.sigmoid(x_BG[:, : 2 * width] + u_BG[:, : 2 * width])
    r_BK, z_BK = jnp.split(gates, 2, axis=-1)
    n_BK = jnp.tanh(x_BG[:, 2 * width :] + r_BK * (u_BG[:, 2 * width :] + bias_K))
    h_BK = (1 - z_BK) * n_BK + z_BK * h_BK
    return h_BK, h_BK

  if start_BK is None:
    start_BK = jnp.zeros((x_BLG.shape[0], width), x_BLG.dtype)
  _, h_LBK = jax.lax.scan(step, start_BK, jnp.moveaxis(x_BLG, 1, 0), reverse=reverse)
  return jnp.moveaxis(h_LBK, 0, 1)


def orthogonal_gates(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
  """An orthogonal matrix for each of the three gates, (K, 3 K)."""
  parts = [
    nn.initializers.orthogonal()(k, (shape[0],) * 2, dtype) for k in jax.random.split(key, 3)
  ]
  return jnp.concatenate(parts, axis=1)


class GRU(nn.Module):
  """Gated recurrent unit over a sequence (Cho et al., arXiv:1406.1078), see `gru_scan`.

  Maps `u_BLH` to `y_BLH` of the same dtype; the recurrence is float32. Causal, so that padding at
  the end does not reach earlier outputs; the backward direction sees it.

  Attributes:
    hidden: width of the carry; None is H.
    bidirectional: a second unit from the end. Both outputs are concatenated.

  A Dense layer brings the output back to H where `hidden` is not H or `bidirectional` is set.
  """

  hidden: int | None = None
  bidirectional: bool = False

  def __call__(
    self,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> jax.Array:
    """The outputs at every step.

    A GRU has no notion of time: `step_rescale` is ignored, and `dt`, which says that the gaps
    matter, is a ValueError.
    """
    del step_rescale
    return self._map(None, u_BLH, dt)[1]

  def extend(
    self,
    state_BK: jax.Array,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """State and outputs after a further chunk, see `models.mixers`; ValueError if bidirectional."""
    del step_rescale
    mixers.refuse_bidirectional(self)
    return self._map(state_BK, u_BLH, dt)

  step = mixers.step

  def initial_state(self, batch: int, features: int) -> jax.Array:
    """Zeros (batch, K) float32."""
    return jnp.zeros((batch, self.hidden or features))

  @nn.compact
  def _map(
    self, state_BK: jax.Array | None, u_BLH: jax.Array, dt: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    if dt is not None:
      raise ValueError("dt: given; a GRU, which knows no gaps, accepts only None")
    features = u_BLH.shape[-1]
    hidden = self.hidden or features
    named = nn.with_logical_partitioning
    zeros = named(nn.initializers.zeros, ("mlp",))

    def direction(name: str, reverse: bool) -> jax.Array:
      kernel = named(nn.initializers.lecun_normal(), ("embed", "mlp"))
      project = nn.Dense(3 * hidden, kernel_init=kernel, bias_init=zeros, name=f"input{name}")
      recurrent_KG: Any = self.param(
        f"recurrent{name}", named(orthogonal_gates, (None, "mlp")), (hidden, 3 * hidden)
      )
      bias_K: Any = self.param(f"bias{name}", zeros, (hidden,))
      x_BLG = project(u_BLH.astype(jnp.float32))
      return gru_scan(x_BLG, recurrent_KG, bias_K, state_BK, reverse=reverse)

    y_BLK = direction("", False)
    last_BK = y_BLK[:, -1]
    if self.bidirectional:
      y_BLK = jnp.concatenate([y_BLK, direction("_reverse", True)], axis=-1)
    y_BLK = y_BLK.astype(u_BLH.dtype)
    if y_BLK.shape[-1] == features and not self.bidirectional:
      return last_BK, y_BLK
    return last_BK, nn.Dense(
      features,
      dtype=u_BLH.dtype,
      kernel_init=named(nn.initializers.lecun_normal(), ("mlp", "embed")),
      bias_init=named(nn.initializers.zeros, ("embed",)),
      name="project",
    )(y_BLK)
