import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from objectives import regression

B, L, K = 3, 4, 2
RNG = np.random.default_rng(0)
MEAN, TARGETS = RNG.normal(size=(2, B, L, K))
VARIANCE = RNG.uniform(0.1, 2, (B, L, K))
BATCH = {
  "targets": np.float32(TARGETS),
  "mask": np.array([1, 1, 0], np.float32),
  "lengths": np.array([4, 2, 3], np.int32),
}
REAL = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_gaussian_nll_sums_targets_and_averages_frames():
  outputs = jnp.float32(MEAN), jnp.float32(VARIANCE)
  loss, metrics = regression.gaussian_nll(outputs, BATCH)
  nll = -stats.norm(MEAN, np.sqrt(VARIANCE)).logpdf(TARGETS).sum(-1)
  np.testing.assert_allclose(loss, (nll * REAL).sum() / 6, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], ((nll * REAL).sum(), 6), rtol=1e-5)
  squares = ((MEAN - TARGETS) ** 2).sum(-1)
  np.testing.assert_allclose(metrics["mse"], ((squares * REAL).sum(), 12), rtol=1e-5)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((loss, metrics)))


def test_variance_has_a_floor():
  def loss(variance):
    return regression.gaussian_nll((jnp.float32(MEAN), jnp.full((B, L, K), variance)), BATCH)[0]

  np.testing.assert_allclose(loss(0.0), loss(1e-6))
  assert np.isfinite(jax.grad(loss)(0.0))


@pytest.mark.parametrize("fields", [set(), {"mask"}, {"lengths"}, {"mask", "lengths"}])
def test_mean_squared_error(fields):
  batch = {k: v for k, v in BATCH.items() if k in fields | {"targets"}}
  real = np.ones((B, L))
  if "mask" in fields:
    real[2] = 0
  if "lengths" in fields:
    real *= np.arange(L) < BATCH["lengths"][:, None]
  loss, metrics = regression.mean_squared_error(jnp.float32(MEAN), batch)
  total, count = (((MEAN - TARGETS) ** 2).sum(-1) * real).sum(), real.sum() * K
  np.testing.assert_allclose(loss, total / count, rtol=1e-5)
  np.testing.assert_allclose(metrics["mse"], (total, count), rtol=1e-5)


def test_one_target_vector_an_example():
  batch = {"targets": BATCH["targets"][:, 0], "mask": BATCH["mask"]}
  loss, _ = regression.mean_squared_error(jnp.float32(MEAN[:, 0]), batch)
  np.testing.assert_allclose(loss, ((MEAN - TARGETS)[:2, 0] ** 2).mean(), rtol=1e-5)
