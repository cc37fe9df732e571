"""Gaussian diffusion: schedules, noising, what is predicted, loss weights, samplers.

z_t = alpha_t x + sigma_t eps, alpha_t^2 + sigma_t^2 = 1, eps ~ N(0, I) (arXiv:2006.11239, equation
4; alpha_t^2 is its abar_t). A schedule is its table of log(SNR) = log(alpha_t^2 / sigma_t^2), made
in float64 on the host. Then alpha_t^2 = sigmoid(log_snr) and sigma_t^2 = sigmoid(-log_snr) are
exact to rounding at both ends, and log_snr = inf is the data. For example

    log_snr_T = linear(1000)
    t_B, log_snr_B, noise, z = corrupt(key, x, log_snr_T)
    error_B = epsilon_error(model(z, t_B), x, noise, log_snr_B, "epsilon")
    loss = (p2_weight(log_snr_B) * error_B).mean()

    samples = ddim(lambda z, t: to_x0(model(z, t), z, log_snr_T[t], "epsilon"), z, steps)

with steps = transitions(log_snr_T, 25). Images are (B, ..., C) with values in [-1, 1].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PARAMETERIZATIONS = ("epsilon", "x0", "v")

# Schedules


def from_betas(beta_T: np.ndarray) -> np.ndarray:
  """log-SNR (T,) float64, falling, of alpha_t^2 = prod_{s <= t} (1 - beta_s)."""
  log_alpha2_T = np.cumsum(np.log1p(-np.asarray(beta_T, np.float64)))
  return log_alpha2_T - np.log(-np.expm1(log_alpha2_T))


def linear(steps: int = 1000) -> np.ndarray:
  """log-SNR (T,) float64 of beta from 0.1 / T to 20 / T (arXiv:2006.11239, section 4: T = 1000)."""
  return from_betas(np.linspace(1e-4, 0.02, steps) * (1000 / steps))


def cosine(steps: int = 1000, offset: float = 0.008) -> np.ndarray:
  """log-SNR (T,) float64 of alpha_t^2 = f(t + 1) / f(0), f(t) = cos(pi/2 (t/T + s) / (1 + s))^2.

  beta_t is at most 0.999 (arXiv:2102.09672, equation 17); s is `offset`.
  """
  f = np.cos(np.pi / 2 * (np.arange(steps + 1) / steps + offset) / (1 + offset)) ** 2
  return from_betas(np.minimum(1 - f[1:] / f[:-1], 0.999))


def scales(log_snr: Any) -> tuple[jax.Array, jax.Array]:
  """(alpha, sigma), float32 or wider."""
  log_snr = jnp.asarray(log_snr)
  return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


# The forward process and what is predicted


def corrupt(
  key: jax.Array, x: jax.Array, log_snr_T: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(t_B int32 uniform on 0..T-1, log_snr_B, noise, z) of examples `x` (B, ...), as float32."""
  of_t, of_noise = jax.random.split(key)
  t_B = jax.random.randint(of_t, x.shape[:1], 0, len(log_snr_T))
  log_snr_B = jnp.asarray(log_snr_T, jnp.float32)[t_B]
  noise = jax.random.normal(of_noise, x.shape, jnp.float32)
  return t_B, log_snr_B, noise, noised(x, noise, log_snr_B)


def noised(x: jax.Array, noise: jax.Array, log_snr: jax.Array) -> jax.Array:
  """z = alpha x + sigma noise, of x (B, ...) and log_snr (B,) or ()."""
  alpha, sigma = _scales_of(x, log_snr)
  return alpha * x + sigma * noise


def target(x: jax.Array, noise: jax.Array, log_snr: jax.Array, kind: str) -> jax.Array:
  """What a network of this parameterization predicts: the noise, x, or v = alpha noise - sigma x.

  v: arXiv:2202.00512, appendix D. Raises ValueError for a kind not in PARAMETERIZATIONS.
  """
  alpha, sigma = _scales_of(x, log_snr)
  return _choose(kind, lambda: noise, lambda: x, lambda: alpha * noise - sigma * x)


def to_x0(prediction: jax.Array, z: jax.Array, log_snr: jax.Array, kind: str) -> jax.Array:
  """The x that a prediction stands for, given z (B, ...) and its log_snr (B,) or ()."""
  alpha, sigma = _scales_of(z, log_snr)
  return _choose(
    kind,
    lambda: (z - sigma * prediction) / alpha,
    lambda: prediction,
    lambda: alpha * z - sigma * prediction,
  )


def to_epsilon(prediction: jax.Array, z: jax.Array, log_snr: jax.Array, kind: str) -> jax.Array:
  """The noise that a prediction stands for, likewise."""
  alpha, sigma = _scales_of(z, log_snr)
  return _choose(
    kind,
    lambda: prediction,
    lambda: (z - alpha * prediction) / sigma,
    lambda: sigma * z + alpha * prediction,
  )


def epsilon_error(
  prediction: jax.Array, x: jax.Array, noise: jax.Array, log_snr_B: jax.Array, kind: str
) -> jax.Array:
  """(B,) mean squared error of the noise that a prediction stands for, whatever it predicts.

  |eps error|^2 = SNR |x error|^2 = alpha^2 |v error|^2, so that a weight made for one
  parameterization is the same objective for all. float32.
  """
  error = (prediction - target(x, noise, log_snr_B, kind)).astype(jnp.float32)
  mean_B = (error**2).reshape(len(x), -1).mean(axis=1)
  factor_B = _choose(
    kind,
    lambda: jnp.ones_like(log_snr_B),
    lambda: jnp.exp(log_snr_B),
    lambda: jax.nn.sigmoid(log_snr_B),
  )
  return factor_B * mean_B


def _scales_of(x: jax.Array, log_snr: Any) -> tuple[jax.Array, jax.Array]:
  """alpha and sigma in the shape that multiplies `x`."""
  log_snr = jnp.asarray(log_snr)
  return scales(log_snr.reshape(*log_snr.shape, *(1,) * (x.ndim - log_snr.ndim)))


def _choose(kind: str, *of_kind: Callable[[], jax.Array]) -> jax.Array:
  if kind not in PARAMETERIZATIONS:
    raise ValueError(f"kind={kind!r}; accepted: {', '.join(PARAMETERIZATIONS)}")
  return of_kind[PARAMETERIZATIONS.index(kind)]()


# Weights of `epsilon_error`


def p2_weight(log_snr: Any, *, k: float = 1.0, gamma: float = 1.0) -> jax.Array:
  """Perception-prioritised weight 1 / (k + SNR)^gamma (arXiv:2204.00227); any shape.

  1 - abar_t for k = gamma = 1; no weight at all for gamma = 0. k may be 0.
  """
  log_k = np.log(k) if k else -np.inf
  return jnp.exp(-gamma * jnp.logaddexp(log_k, jnp.asarray(log_snr)))


def min_snr_weight(log_snr: Any, *, limit: float = 5.0) -> jax.Array:
  """min(SNR, limit) / SNR (arXiv:2303.09556, section 3.4, for a predicted noise); any shape."""
  return jnp.exp(jnp.minimum(0.0, np.log(limit) - jnp.asarray(log_snr)))


def losses(
  predict: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
  key: jax.Array,
  x: jax.Array,
  log_snr_T: np.ndarray,
  weight: Callable[[jax.Array], jax.Array] = jnp.ones_like,
  bound: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(loss_B, error_B, log_snr_B) of noise predicted at timesteps drawn uniformly.

  The loss is weight(log_snr) error + bound * `variational_bits`: a term for learned variances,
  which is not weighted and moves no predicted noise (arXiv:2102.09672, section 3.1).

  Args:
    predict: `predict(z, t_B) -> (noise, fraction)`; see `posterior` for the fraction.
    key: of timesteps and noise.
    x: (B, ...) in [-1, 1].
    log_snr_T: the schedule.
    weight: such as `p2_weight`.
    bound: T / 1000 in the released code; 0 leaves the term out.
  """
  t_B, log_snr_B, noise, z = corrupt(key, x, log_snr_T)
  predicted, fraction = predict(z, t_B)
  error_B = epsilon_error(predicted, x, noise, log_snr_B, "epsilon")
  loss_B = weight(log_snr_B) * error_B
  if bound:
    x0 = jax.lax.stop_gradient(to_x0(predicted, z, log_snr_B, "epsilon"))
    loss_B += bound * variational_bits(x0, fraction, x, z, t_B, transitions(log_snr_T))
  return loss_B, error_B, log_snr_B


def by_band(
  error_B: jax.Array,
  log_snr_B: jax.Array,
  mask_B: jax.Array,
  bands: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Metrics {band: (total, count)} of errors at an SNR above the band's first border up to its
  second."""
  snr_B = jnp.exp(log_snr_B)
  inside = {name: mask_B * (snr_B > low) * (snr_B <= high) for name, (low, high) in bands.items()}
  return {name: ((error_B * inside_B).sum(), inside_B.sum()) for name, inside_B in inside.items()}


# The reverse process


class Transitions(NamedTuple):
  """Steps z_t -> z_s of a sampler, arrays (n,), the step to the data first.

  With c = 1 - SNR_t / SNR_s, the forward process from s to t adds the variance sigma_t^2 c.
  """

  timestep: Any  # t, an index into the schedule
  alpha: Any  # at t
  sigma: Any
  alpha_next: Any  # at s: 1 and 0 for the data
  sigma_next: Any
  renewed: Any  # c
  log_lower: Any  # log of the posterior's variance sigma_s^2 c; the first is the second's
  log_upper: Any  # log sigma_t^2 c


def transitions(log_snr_T: np.ndarray, count: int | None = None) -> Transitions:
  """The steps of a sampler, float64 on the host.

  Args:
    log_snr_T: the schedule that the network was trained with.
    count: of steps, at timesteps 0 .. T-1 evenly spaced and rounded (arXiv:2102.09672, section 4);
      None for all T. Timesteps stay those of the whole schedule.

  Raises: ValueError for a count that is not in 2..T.
  """
  total = len(log_snr_T)
  count = total if count is None else count
  if not 2 <= count <= total:
    raise ValueError(f"count={count}; accepted: 2 to {total}")
  timestep = np.round(np.linspace(0, total - 1, count)).astype(np.int32)
  at = np.asarray(log_snr_T, np.float64)[timestep]
  following = np.append(np.inf, at[:-1])
  renewed = -np.expm1(at - following)
  alpha, sigma = _host_scales(at)
  alpha_next, sigma_next = _host_scales(following)
  lower = sigma_next**2 * renewed
  lower[0] = lower[1]
  log_upper = np.log(sigma**2 * renewed)
  return Transitions(
    timestep, alpha, sigma, alpha_next, sigma_next, renewed, np.log(lower), log_upper
  )


def _host_scales(log_snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))


def posterior(
  x0: jax.Array, z: jax.Array, step: Transitions, fraction: Any = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Mean and log-variance of p(z_s | z_t, x0).

  The mean is alpha_s (c x0 + (1 - c) z / alpha_t), which is equation 7 of arXiv:2006.11239 for any
  two times. The log-variance lies between those of `Transitions`: `fraction` 0 is the posterior's
  own, 1 the forward process's, and a network may say where (arXiv:2102.09672, equation 15).

  Args:
    x0: the data, or an estimate, in the shape of `z`.
    z: (B, ...).
    step: fields that broadcast against `z`.
    fraction: likewise.
  """
  mean = step.alpha_next * (step.renewed * x0 + (1 - step.renewed) * z / step.alpha)
  return mean, step.log_lower + fraction * (step.log_upper - step.log_lower)


def ddim(
  denoise: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array, steps: Transitions
) -> jax.Array:
  """Samples without noise of their own (arXiv:2010.02502, equation 12 with sigma_t = 0).

  Args:
    denoise: `denoise(z, t) -> x0`, an estimate of the data at timestep t () int32; what is clipped
      or guided is clipped or guided there.
    z: (B, ...) standard normal.
    steps: see `transitions`.
  """

  def body(z: jax.Array, step: Transitions) -> tuple[jax.Array, None]:
    x0 = denoise(z, step.timestep)
    epsilon = (z - step.alpha * x0) / step.sigma
    return step.alpha_next * x0 + step.sigma_next * epsilon, None

  return jax.lax.scan(body, z, _on_device(steps, z.dtype), reverse=True)[0]


def ddpm(
  denoise: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
  key: jax.Array,
  z: jax.Array,
  steps: Transitions,
) -> jax.Array:
  """Ancestral samples (arXiv:2006.11239, algorithm 2).

  Args:
    denoise: `denoise(z, t) -> (x0, fraction)`, as for `ddim` and `posterior`.
    key: of the noise.
    z, steps: as for `ddim`.
  """

  def body(z: jax.Array, step_and_key: tuple[Transitions, jax.Array]) -> tuple[jax.Array, None]:
    step, key = step_and_key
    x0, fraction = denoise(z, step.timestep)
    mean, log_variance = posterior(x0, z, step, fraction)
    noise = jnp.where(step.sigma_next > 0, jax.random.normal(key, z.shape, z.dtype), 0)
    return mean + jnp.exp(0.5 * log_variance) * noise, None

  keys = jax.random.split(key, len(steps.timestep))
  return jax.lax.scan(body, z, (_on_device(steps, z.dtype), keys), reverse=True)[0]


def sample(
  kind: str,
  predict: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
  key: jax.Array,
  z: jax.Array,
  log_snr_T: np.ndarray,
  count: int,
) -> jax.Array:
  """Images in [-1, 1], to which every estimate of them is clipped, by a network of `losses`.

  Args:
    kind: "ddim" or "ddpm".
    predict: as for `losses`.
    key: of ddpm's noise.
    z: (B, ...) standard normal.
    log_snr_T, count: the schedule, and the steps to take, as for `transitions`.

  Raises: ValueError for another kind, or a count out of range.
  """
  if kind not in ("ddim", "ddpm"):
    raise ValueError(f"kind={kind!r}; accepted: ddim, ddpm")
  steps = transitions(log_snr_T, count)

  def denoise(z: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
    predicted, fraction = predict(z, jnp.broadcast_to(t, len(z)))
    log_snr = jnp.asarray(log_snr_T, jnp.float32)[t]
    return to_x0(predicted, z, log_snr, "epsilon").clip(-1, 1), fraction

  if kind == "ddim":
    return ddim(lambda z, t: denoise(z, t)[0], z, steps)
  return ddpm(denoise, key, z, steps)


def variational_bits(
  x0: jax.Array, fraction: jax.Array, x: jax.Array, z: jax.Array, t_B: jax.Array, steps: Transitions
) -> jax.Array:
  """(B,) a term of the variational bound, bits a dimension: what trains a learned variance.

  KL(q(z_s | z_t, x) || p(z_s | z_t, x0)), or -log2 p(x | z_0) of 8-bit values at t = 0
  (arXiv:2102.09672, section 3.1, whose hybrid loss stops the gradient of `x0`).

  Args:
    x0, fraction: what the network says, see `posterior`; in the shape of `x`.
    x: (B, ...) data in [-1, 1].
    z: (B, ...) at timesteps `t_B` (B,) int.
    steps: of the whole schedule.
  """
  shape = (len(x), *(1,) * (x.ndim - 1))
  step = jax.tree.map(lambda a: a[t_B].reshape(shape), _on_device(steps, z.dtype))
  wanted, log_wanted = posterior(x, z, step)
  mean, log_variance = posterior(x0, z, step, fraction)
  gap = log_wanted - log_variance
  divergence = 0.5 * (jnp.exp(gap) - 1 - gap + (wanted - mean) ** 2 * jnp.exp(-log_variance))
  nats = jnp.where(t_B.reshape(shape) > 0, divergence, -_log_bin(x, mean, log_variance))
  return nats.reshape(len(x), -1).mean(axis=1) / np.log(2)


def _log_bin(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """Log-probability of the bin of 2/255 around `x` under a normal; the outermost are half-lines."""
  scale = jnp.exp(-0.5 * log_variance)
  above, below = ((x - mean + side / 255) * scale for side in (1, -1))
  cdf = jax.scipy.stats.norm.cdf
  inside = jnp.log(jnp.maximum(cdf(above) - cdf(below), 1e-12))
  outer = jnp.where(x < -0.999, above, -below)
  return jnp.where(jnp.abs(x) > 0.999, jax.scipy.stats.norm.logcdf(outer), inside)


def _on_device(steps: Transitions, dtype: Any) -> Transitions:
  """As arrays of `dtype`, but for the timesteps."""
  floats = (jnp.asarray(a, dtype) for a in steps[1:])
  return Transitions(jnp.asarray(steps.timestep, jnp.int32), *floats)
