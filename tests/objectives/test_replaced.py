"""Replaced token detection: masks of fixed count, mixtures of logits, samples, reversal, loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import replaced

KEY = jax.random.key(0)


def normal(seed, *shape):
  return np.random.RandomState(seed).randn(*shape)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.5])
def test_only_the_gradient_is_scaled(scale):
  x = jnp.array([0.1, -3.0])
  f = jax.jit(lambda x: jnp.sin(replaced.scale_gradient(x, scale)).sum())
  assert f(x) == jnp.sin(x).sum()
  np.testing.assert_allclose(jax.grad(f)(x), scale * np.cos(x), rtol=1e-6)


def test_a_fixed_number_of_candidates_is_masked():
  candidates = np.ones((64, 20), bool)
  candidates[:, ::5] = False  # 16 of each row
  candidates[1, 4:] = False  # 3
  candidates[2] = False
  positions, weights = replaced.masked_positions(KEY, jnp.array(candidates), 0.25)
  assert positions.shape == weights.shape == (64, 5)
  np.testing.assert_array_equal(weights.sum(1)[:4], [4, 1, 0, 4])
  for row, at, used in zip(candidates, np.array(positions), np.array(weights), strict=True):
    assert len(set(at)) == 5 and row[at[used > 0]].all()
  drawn = np.array(positions)[3:, :4].ravel()
  assert np.bincount(drawn, minlength=20)[1] > 0 and set(drawn) == set(
    np.flatnonzero(candidates[0])
  )


def test_put_leaves_the_rest():
  rows = jnp.arange(12).reshape(2, 6)
  positions, weights = jnp.array([[0, 5], [2, 3]]), jnp.array([[1.0, 1.0], [0.0, 1.0]])
  one = replaced.put(rows, positions, 99, weights)
  np.testing.assert_array_equal(one, [[99, 1, 2, 3, 4, 99], [6, 7, 8, 99, 10, 11]])
  values = jnp.arange(8.0).reshape(2, 2, 2)
  vectors = replaced.put(jnp.zeros((2, 6, 2)), positions, values, weights)
  np.testing.assert_array_equal(vectors[0, 5], [2, 3])
  np.testing.assert_array_equal(vectors[1].sum(1), [0, 0, 0, 13, 0, 0])


def test_logits_are_mixed_and_only_the_weights_learn():
  scores, logits, v = normal(0, 3, 2, 4), normal(1, 3, 2, 4, 7), normal(2, 2, 4, 7)
  alpha = np.exp(scores) / np.exp(scores).sum(0)
  mixed, weights = replaced.mixture(jnp.array(scores), jnp.array(logits))
  np.testing.assert_allclose(weights, alpha, rtol=1e-5)
  np.testing.assert_allclose(mixed, (alpha[..., None] * logits).sum(0), rtol=1e-4, atol=1e-6)

  def value(scores, logits):
    return (replaced.mixture(scores, logits)[0] * v).sum()

  by_scores, by_logits = jax.grad(value, (0, 1))(jnp.array(scores), jnp.array(logits))
  assert not by_logits.any()
  dot = (logits * v).sum(-1)
  np.testing.assert_allclose(by_scores, alpha * (dot - (alpha * dot).sum(0)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_temperature_is_of_the_gradient_alone(temperature):
  z, v = jnp.array(normal(3, 5, 6)), jnp.array(normal(4, 5, 6))
  noisy = np.float64(z) + np.float64(jax.random.gumbel(KEY, z.shape))
  code = replaced.straight_through(KEY, z, temperature)
  np.testing.assert_array_equal(code, np.eye(6)[noisy.argmax(-1)])

  gradient = jax.grad(lambda z: (replaced.straight_through(KEY, z, temperature) * v).sum())(z)
  soft = np.exp((noisy - noisy.max(-1, keepdims=True)) / temperature)
  soft /= soft.sum(-1, keepdims=True)
  inner = (soft * v).sum(-1, keepdims=True)
  np.testing.assert_allclose(gradient, soft * (v - inner) / temperature, rtol=1e-3, atol=1e-6)


def test_samples_are_of_the_softmax():
  z = jnp.array([0.0, 1.0, -1.0, 2.0])
  counts = replaced.straight_through(KEY, jnp.broadcast_to(z, (40_000, 4)), 0.3).mean(0)
  np.testing.assert_allclose(counts, jax.nn.softmax(z), atol=0.01)


def test_detection_is_the_mean_of_all_that_counts():
  logits, original = normal(5, 3, 8), normal(6, 3, 8) > 0
  weights = (np.arange(8) < [[8], [5], [8]]).astype(np.float32)
  batch = {"weights": jnp.array(weights), "mask": jnp.array([1.0, 1.0, 0.0])}
  loss, metrics = replaced.detection(jnp.array(logits), jnp.array(original), batch)
  p, counted = 1 / (1 + np.exp(-logits)), weights * [[1], [1], [0]]
  terms = -np.where(original, np.log(p), np.log(1 - p))
  np.testing.assert_allclose(loss, (terms * counted).sum() / 13, rtol=1e-5)
  total, count = metrics["loss"]
  np.testing.assert_allclose(total / count, loss, rtol=1e-6)
  gone = counted * ~original
  assert metrics["replaced"] == (gone.sum(), 13)
  assert metrics["missed"] == ((gone * (logits > 0)).sum(), gone.sum())
  assert metrics["accuracy"][0] == (counted * ((logits > 0) == original)).sum()


def test_mistakes():
  with pytest.raises(ValueError, match="rate=0; accepted"):
    replaced.masked_positions(KEY, jnp.ones((1, 4), bool), 0)
