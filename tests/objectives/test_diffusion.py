"""Diffusion: schedules, weights, parameterizations, samplers on a Gaussian, learned variances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from objectives import diffusion

LINEAR, COSINE = diffusion.linear(), diffusion.cosine()
MEAN = np.array([0.5, -0.3, 0.1])
FACTOR = np.array([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.2]])
COV = FACTOR @ FACTOR.T


def alphas(steps=1000):
  """alpha_t^2 of DDPM's schedule as its paper defines it."""
  return np.cumprod(1 - np.linspace(1e-4, 0.02, steps))


def exact(z, log_snr):
  """E[x | z] of x ~ N(MEAN, COV), in float64 unless `z` is traced."""
  alpha, sigma = diffusion.scales(log_snr)
  gain = alpha * jnp.asarray(COV) @ jnp.linalg.inv(alpha**2 * COV + sigma**2 * jnp.eye(3))
  return MEAN + (z - alpha * MEAN) @ gain.T


def denoiser(schedule):
  return lambda z, t: exact(z, jnp.asarray(schedule)[t])


@pytest.fixture
def wide():
  with jax.enable_x64(True):
    yield


# Schedules


def test_linear_is_the_published_schedule():
  alpha2 = alphas()
  np.testing.assert_allclose(np.exp(LINEAR), alpha2 / (1 - alpha2), rtol=1e-9)
  assert np.exp(LINEAR[0]) == pytest.approx(9999)
  np.testing.assert_allclose(np.exp(diffusion.linear(4000))[-1], np.exp(LINEAR[-1]), rtol=0.06)


def test_cosine_is_the_published_schedule():
  f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
  alpha2 = f(np.arange(1, 1000)) / f(0)
  np.testing.assert_allclose(np.exp(COSINE[:-1]), alpha2 / (1 - alpha2), rtol=1e-7)
  beta = 1 - (1 / (1 + np.exp(-COSINE[-1]))) / alpha2[-1]
  assert beta == pytest.approx(0.999)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_float32_scales_keep_both_ends(schedule):
  alpha, sigma = diffusion.scales(jnp.asarray(schedule, jnp.float32))
  wanted = 1 / (1 + np.exp(-schedule)), 1 / (1 + np.exp(schedule))
  np.testing.assert_allclose(np.float64(alpha) ** 2, wanted[0], rtol=3e-6)
  np.testing.assert_allclose(np.float64(sigma) ** 2, wanted[1], rtol=3e-6)


# Weights


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_p2_weight_is_its_equation(k, gamma):
  wanted = 1 / (k + np.exp(LINEAR)) ** gamma
  got = diffusion.p2_weight(jnp.asarray(LINEAR, jnp.float32), k=k, gamma=gamma)
  np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_p2_weight_of_one_and_one_is_the_noise_variance():
  np.testing.assert_allclose(diffusion.p2_weight(LINEAR), 1 - alphas(), rtol=1e-4)


def test_min_snr_weight():
  snr = np.exp(LINEAR)
  np.testing.assert_allclose(diffusion.min_snr_weight(LINEAR), np.minimum(snr, 5) / snr, rtol=1e-5)


# Parameterizations


@pytest.mark.parametrize("kind", diffusion.PARAMETERIZATIONS)
@pytest.mark.parametrize("t", [0, 300, 999])
def test_parameterizations_are_one_objective(wide, kind, t):
  """Any prediction is the noise and the data it stands for; its error is that of the noise."""
  rng = np.random.default_rng(t)
  x, noise, prediction = rng.normal(size=(3, 5, 4, 2))
  log_snr = jnp.full(5, LINEAR[t])
  z = diffusion.noised(x, noise, log_snr)
  right = diffusion.target(x, noise, log_snr, kind)
  np.testing.assert_allclose(diffusion.to_x0(right, z, log_snr, kind), x, atol=1e-9)
  np.testing.assert_allclose(diffusion.to_epsilon(right, z, log_snr, kind), noise, atol=1e-9)
  epsilon = diffusion.to_epsilon(prediction, z, log_snr, kind)
  alpha, sigma = diffusion.scales(LINEAR[t])
  np.testing.assert_allclose(
    alpha * diffusion.to_x0(prediction, z, log_snr, kind) + sigma * epsilon, z, atol=1e-9
  )
  error = diffusion.epsilon_error(prediction, x, noise, log_snr, kind)
  wanted = ((epsilon - noise) ** 2).reshape(5, -1).mean(axis=1)
  np.testing.assert_allclose(error, wanted, rtol=1e-5)


def test_corrupt_draws_every_timestep_and_unit_variance():
  x = jnp.full((20_000, 2), 0.7)
  t, log_snr, noise, z = diffusion.corrupt(jax.random.key(0), x, LINEAR)
  assert (int(t.min()), int(t.max())) == (0, 999)
  np.testing.assert_allclose(np.bincount(t // 100) / 20_000, 0.1, atol=0.01)
  np.testing.assert_allclose(log_snr, LINEAR[t], rtol=1e-6)
  alpha, sigma = (np.asarray(s)[:, None] for s in diffusion.scales(log_snr))
  np.testing.assert_allclose(z, alpha * x + sigma * noise, atol=1e-6)
  assert float(noise.std()) == pytest.approx(1, abs=0.01)


# The reverse process


def test_posterior_is_the_published_one(wide):
  """Equations 6 and 7 of DDPM, at every timestep."""
  alpha2 = alphas()
  before = np.append(1.0, alpha2[:-1])
  beta = 1 - alpha2 / before
  x, z = np.random.default_rng(0).normal(size=(2, 1000))
  steps = jax.tree.map(jnp.asarray, diffusion.transitions(LINEAR))
  mean, lower = diffusion.posterior(x, z, steps)
  wanted = np.sqrt(before) * beta * x + np.sqrt(1 - beta) * (1 - before) * z
  np.testing.assert_allclose(mean, wanted / (1 - alpha2), rtol=1e-6, atol=1e-8)
  variance = (1 - before) / (1 - alpha2) * beta
  np.testing.assert_allclose(np.exp(lower), np.append(variance[1], variance[1:]), rtol=1e-6)
  np.testing.assert_allclose(np.exp(diffusion.posterior(x, z, steps, 1.0)[1]), beta, rtol=1e-6)


def test_ddim_steps_are_the_published_ones(wide):
  """Equation 12 of DDIM by a loop over the respaced timesteps."""
  z = np.random.default_rng(1).normal(size=(4, 3))
  got = diffusion.ddim(denoiser(LINEAR), jnp.asarray(z), diffusion.transitions(LINEAR, 10))
  times, alpha2 = np.round(np.linspace(0, 999, 10)).astype(int)[::-1], alphas()
  for t, s in zip(times, [*times[1:], None], strict=True):
    x0 = np.asarray(exact(z, LINEAR[t]))
    epsilon = (z - np.sqrt(alpha2[t]) * x0) / np.sqrt(1 - alpha2[t])
    after = 1.0 if s is None else alpha2[s]
    z = np.sqrt(after) * x0 + np.sqrt(1 - after) * epsilon
  np.testing.assert_allclose(got, z, atol=1e-9)


def test_ddim_follows_the_flow_of_a_gaussian(wide):
  """Where the denoiser is exact, z_t - alpha_t m goes along each eigenvector as the root of
  alpha_t^2 lambda + sigma_t^2; steps converge to that at first order."""
  z = np.random.default_rng(2).normal(size=(4, 3))
  values, vectors = np.linalg.eigh(COV)
  alpha, sigma = (float(s) for s in diffusion.scales(LINEAR[-1]))
  growth = np.sqrt(values / (alpha**2 * values + sigma**2))
  wanted = MEAN + ((z - alpha * MEAN) @ vectors * growth) @ vectors.T
  errors = []
  for count in (250, 1000):
    steps = diffusion.transitions(LINEAR, count)
    errors.append(np.abs(diffusion.ddim(denoiser(LINEAR), jnp.asarray(z), steps) - wanted).max())
  assert errors[1] < 0.01
  assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm upper", "ddim"])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_samplers_reproduce_a_gaussian(sampler, schedule):
  z = jax.random.normal(jax.random.key(1), (40_000, 3))
  steps, denoise = diffusion.transitions(schedule, 400), denoiser(schedule)
  if sampler == "ddim":
    x = jax.jit(lambda z: diffusion.ddim(denoise, z, steps))(z)
  else:
    fraction = float(sampler == "ddpm upper")
    both = lambda z, t: (denoise(z, t), fraction)  # noqa: E731
    x = jax.jit(lambda z: diffusion.ddpm(both, jax.random.key(2), z, steps))(z)
  np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=0.02)
  np.testing.assert_allclose(np.cov(np.asarray(x), rowvar=False), COV, atol=0.03)


def test_samplers_see_the_timesteps_of_the_whole_schedule():
  steps = diffusion.transitions(LINEAR, 25)
  assert (steps.timestep[0], steps.timestep[-1], len(steps.timestep)) == (0, 999, 25)
  seen = []

  def denoise(z, t):
    jax.debug.callback(lambda t: seen.append(int(t)), t, ordered=True)
    return z

  jax.block_until_ready(diffusion.ddim(denoise, jnp.ones((1, 2)), steps))
  jax.effects_barrier()
  assert seen == steps.timestep[::-1].tolist()


# Learned variances


def test_variational_bits_are_divergences(wide):
  """Against numerical integration of KL, and the bits of the 8-bit value at t = 0."""
  steps = diffusion.transitions(LINEAR)
  x, x0, z, fraction = 0.3, 0.1, 0.6, 0.4
  t = jnp.array([500, 0])
  shaped = [jnp.full((2, 1), v) for v in (x0, fraction, x, z)]
  bits = diffusion.variational_bits(*shaped, t, steps)

  def normal(index, x0, fraction):
    step = jax.tree.map(lambda a: a[index], steps)
    mean, log_variance = diffusion.posterior(x0, z, step, fraction)
    return stats.norm(float(mean), float(np.exp(0.5 * log_variance)))

  q, p = normal(500, x, 0.0), normal(500, x0, fraction)
  low, high = q.ppf([1e-12, 1 - 1e-12])
  nats = integrate.quad(lambda y: q.pdf(y) * (q.logpdf(y) - p.logpdf(y)), low, high)[0]
  assert float(bits[0]) == pytest.approx(nats / np.log(2), rel=1e-6)
  first = normal(0, x0, fraction)
  mass = max(first.cdf(x + 1 / 255) - first.cdf(x - 1 / 255), 1e-12)
  assert float(bits[1]) == pytest.approx(-np.log2(mass), rel=1e-4)


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_the_loss_is_the_weighted_error_and_the_bound_is_not_weighted(bound):
  """And the bound does not move the predicted noise."""
  x, key = jax.random.uniform(jax.random.key(1), (6, 4), minval=-1), jax.random.key(2)
  t, log_snr, noise, z = diffusion.corrupt(key, x, LINEAR)
  value = jnp.array([0.3, 0.6])
  x0 = diffusion.to_x0(jnp.full_like(z, 0.3), z, log_snr, "epsilon")
  bits = diffusion.variational_bits(
    x0, jnp.full_like(z, 0.6), x, z, t, diffusion.transitions(LINEAR)
  )

  def loss(value):
    def predict(seen, seen_t):
      np.testing.assert_array_equal(seen_t, t)
      np.testing.assert_array_equal(seen, z)
      return jnp.full_like(seen, value[0]), jnp.full_like(seen, value[1])

    loss_B, *rest = diffusion.losses(predict, key, x, LINEAR, diffusion.p2_weight, bound)
    return loss_B.sum(), (loss_B, rest)

  grad, (loss_B, (error_B, log_snr_B)) = jax.grad(loss, has_aux=True)(value)
  weight_B = diffusion.p2_weight(log_snr)
  np.testing.assert_allclose(error_B, ((0.3 - noise) ** 2).mean(axis=1), rtol=1e-5)
  np.testing.assert_allclose(loss_B, weight_B * error_B + bound * bits, rtol=1e-5)
  np.testing.assert_array_equal(log_snr_B, log_snr)
  slope = 2 * (weight_B * (0.3 - noise).mean(axis=1)).sum()
  assert float(grad[0]) == pytest.approx(float(slope), rel=1e-4)
  assert (abs(float(grad[1])) > 0) == bool(bound)


def test_bands_part_the_errors():
  log_snr, error, mask = jnp.log(jnp.array([0.5, 2.0, 0.001, 1.0])), jnp.arange(1.0, 5), jnp.ones(4)
  bands = {"low": (0.0, 0.01), "middle": (0.01, 1.0), "high": (1.0, np.inf)}
  found = diffusion.by_band(error, log_snr, mask.at[0].set(0), bands)
  assert {k: (float(a), float(b)) for k, (a, b) in found.items()} == {
    "low": (3, 1),
    "middle": (4, 1),
    "high": (2, 1),
  }


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_samples_of_predicted_noise_stay_within_the_images(kind):
  z = jax.random.normal(jax.random.key(0), (50, 3))

  def predict(
    z, t_B
  ):  # the noise of an exact denoiser of N(MEAN, COV), far beyond [-1, 1] at times
    log_snr_B = jnp.asarray(LINEAR, jnp.float32)[t_B]
    x0 = jax.vmap(lambda z, s: exact(z[None], s)[0])(z, log_snr_B)
    alpha, sigma = (s[:, None] for s in diffusion.scales(log_snr_B))
    return (z - alpha * x0) / sigma, 0.0

  key, steps = jax.random.key(3), diffusion.transitions(LINEAR, 20)

  def clipped(z, t):
    return exact(z, jnp.asarray(LINEAR)[t]).clip(-1, 1)

  if kind == "ddim":
    wanted = diffusion.ddim(clipped, z, steps)
  else:
    wanted = diffusion.ddpm(lambda z, t: (clipped(z, t), 0.0), key, z, steps)
  got = diffusion.sample(kind, predict, key, z, LINEAR, 20)
  np.testing.assert_allclose(got, wanted, atol=1e-3)
  assert np.abs(got).max() <= 1 + 1e-6
  with pytest.raises(ValueError, match="kind='heun'; accepted: ddim, ddpm"):
    diffusion.sample("heun", predict, key, z, LINEAR, 20)


def test_the_bins_of_a_pixel_are_a_distribution(wide):
  levels = jnp.linspace(-1, 1, 256)
  log_bins = diffusion._log_bin(levels, jnp.asarray(0.9), jnp.asarray(-4.0))
  assert float(jnp.exp(log_bins).sum()) == pytest.approx(1, abs=1e-6)


def test_mistakes():
  x = jnp.zeros((2, 3))
  with pytest.raises(ValueError, match="kind='noise'; accepted: epsilon, x0, v"):
    diffusion.target(x, x, jnp.zeros(2), "noise")
  with pytest.raises(ValueError, match="count=1; accepted: 2 to 1000"):
    diffusion.transitions(LINEAR, 1)
