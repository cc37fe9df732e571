import jax
import jax.numpy as jnp
import numpy as np

from objectives import language

B, L, V = 3, 4, 5
RANDOM = np.random.RandomState(0)
LOGITS = RANDOM.randn(B, L, V) * 2
TARGETS = RANDOM.randint(0, V, (B, L))
WEIGHTS = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0.5, 1, 1, 0]], np.float32)
MASK = np.array([1, 1, 0], np.float32)


def losses():
  log_p = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]


def test_the_mean_is_over_the_tokens_that_count():
  batch = {"targets": TARGETS, "weights": WEIGHTS, "mask": MASK}
  loss, metrics = language.next_token(jnp.float32(LOGITS), batch)
  weights = WEIGHTS * MASK[:, None]
  np.testing.assert_allclose(loss, (losses() * weights).sum() / 5, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], ((losses() * weights).sum(), 5), rtol=1e-5)
  np.testing.assert_allclose(metrics["bits"][0] / metrics["bits"][1], loss / np.log(2), rtol=1e-6)
  hits = (LOGITS.argmax(-1) == TARGETS) * weights
  np.testing.assert_allclose(metrics["accuracy"], (hits.sum(), 5))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((loss, metrics)))


def test_without_weights_and_mask_every_token_counts():
  loss, metrics = language.next_token(jnp.float32(LOGITS), {"targets": TARGETS})
  np.testing.assert_allclose(loss, losses().mean(), rtol=1e-5)
  assert metrics["loss"][1] == B * L


def test_a_uniform_model_takes_the_logarithm_of_the_vocabulary():
  _, metrics = language.next_token(jnp.zeros((B, L, 8)), {"targets": TARGETS})
  total, count = metrics["bits"]
  np.testing.assert_allclose(total / count, 3, rtol=1e-6)


def test_what_does_not_count_has_no_gradient_and_nothing_counting_is_finite():
  def gradient(weights):
    batch = {"targets": TARGETS, "weights": weights}
    return jax.grad(lambda x: language.next_token(x, batch)[0])(jnp.float32(LOGITS))

  np.testing.assert_array_equal(gradient(WEIGHTS)[WEIGHTS == 0], 0)
  assert (np.abs(gradient(WEIGHTS)[WEIGHTS > 0]).max(-1) > 0).all()
  np.testing.assert_array_equal(gradient(np.zeros_like(WEIGHTS)), 0)


def test_shifted_rows_count_all_but_padding():
  rows = np.array([[9, 7, 8, 0, 0], [7, 8, 9, 7, 8]])
  found = language.shifted(rows)
  np.testing.assert_array_equal(found["inputs"], rows[:, :-1])
  np.testing.assert_array_equal(found["targets"], rows[:, 1:])
  np.testing.assert_array_equal(found["weights"], [[1, 1, 0, 0], [1, 1, 1, 1]])
