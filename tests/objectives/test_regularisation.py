"""Each regulariser by its formula in float64, and that each does nothing at strength 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import classification, regularisation

KEY = jax.random.key(3)
RANDOM = np.random.RandomState(0)
BATCH = {
  "inputs": jnp.asarray(RANDOM.uniform(-1, 1, (6, 4, 4, 1)), jnp.float32),
  "labels": jnp.array([0, 1, 2, 0, 1, 2]),
}
WEIGHTS = jnp.asarray(RANDOM.randn(16, 3), jnp.float32)


def apply(key, x):
  return jnp.tanh(x.reshape(len(x), -1) @ WEIGHTS), {"seen": x}


def loss(kind, strength, key=KEY, **options):
  return regularisation.cross_entropy(key, apply, BATCH, 3, kind, strength, **options)


def logs():
  logits = np.asarray(apply(KEY, BATCH["inputs"])[0], np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_without_a_regulariser_it_is_the_cross_entropy():
  value, (metrics, extra) = loss("none", 0.0)
  plain, wanted = classification.cross_entropy(apply(KEY, BATCH["inputs"])[0], BATCH)
  np.testing.assert_allclose(value, plain, rtol=1e-6)
  assert metrics == wanted
  np.testing.assert_array_equal(extra["seen"], BATCH["inputs"])


def test_smoothing_and_confidence_by_their_formulas():
  onehot, log_p = np.eye(3)[np.asarray(BATCH["labels"])], logs()
  smooth = -((0.8 * onehot + 0.2 / 3) * log_p).sum(-1).mean()
  np.testing.assert_allclose(loss("smoothing", 0.2)[0], smooth, rtol=1e-5)
  entropy = -(np.exp(log_p) * log_p).sum(-1).mean()
  np.testing.assert_allclose(
    loss("confidence", 0.5)[0], -(onehot * log_p).sum(-1).mean() - 0.5 * entropy, rtol=1e-5
  )
  np.testing.assert_allclose(
    regularisation.mean_entropy(apply(KEY, BATCH["inputs"])[0]), entropy, rtol=1e-5
  )


def test_a_random_jacobian_projection_estimates_its_square_norm():
  """E|J' v|^2 = |J|^2, against the Jacobian itself."""
  jacobian = jax.vmap(jax.jacrev(lambda x: apply(KEY, x[None])[0][0]))(BATCH["inputs"])
  keys = jax.random.split(KEY, 4000)
  draw = jax.jit(jax.vmap(lambda k: loss("jacobian", 2.0, k)[0]))
  extra = draw(keys).mean() - loss("none", 0.0)[0]
  np.testing.assert_allclose(extra, (jacobian**2).sum() / 6, rtol=0.03)


def test_images_are_changed_and_metrics_are_of_their_own_labels():
  _, (_, cut) = loss("cutout", 2.0)
  assert ((cut["seen"] == -1).sum((1, 2, 3)) > 0).all()
  _, (metrics, mixed) = loss("mixup", 1.0)
  assert not np.allclose(mixed["seen"], BATCH["inputs"])
  assert metrics["accuracy"][1] == 6
  _, (_, flipped) = loss("none", 0.0, augment=lambda key, x: x[:, ::-1])
  np.testing.assert_array_equal(flipped["seen"], BATCH["inputs"][:, :, ::-1])


@pytest.mark.parametrize("kind", ["smoothing", "confidence", "jacobian"])
def test_nothing_is_added_at_strength_0(kind):
  np.testing.assert_allclose(loss(kind, 0.0)[0], loss("none", 0.0)[0], rtol=1e-6)


def test_mistakes():
  with pytest.raises(ValueError, match="regulariser='x'; accepted: none, smoothing"):
    loss("x", 0.0)
