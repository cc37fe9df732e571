import jax
import jax.numpy as jnp
import numpy as np

from objectives import classification

LOGITS = np.array([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0], [1.0, 4.0, 0.0], [5.0, 0.0, 0.0]])
LABELS = np.array([0, 1, 1, 2], np.int32)


def reference():
  shifted = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
  return -shifted[np.arange(4), LABELS], np.array([1, 0, 1, 0])


def test_cross_entropy_is_the_mean_over_real_rows():
  mask = np.array([1, 1, 1, 0], np.float32)
  loss, metrics = classification.cross_entropy(
    jnp.float32(LOGITS), {"labels": LABELS, "mask": mask}
  )
  losses, correct = reference()
  np.testing.assert_allclose(loss, losses[:3].mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], (losses[:3].sum(), 3), rtol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], (correct[:3].sum(), 3))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((loss, metrics)))


def test_sums_over_batches_give_the_mean_over_examples():
  parts = [slice(0, 3), slice(3, 4)]
  totals = [
    classification.cross_entropy(jnp.float32(LOGITS[p]), {"labels": LABELS[p]})[1]["loss"]
    for p in parts
  ]
  total, count = np.sum(totals, axis=0)
  np.testing.assert_allclose(total / count, reference()[0].mean(), rtol=1e-6)


def test_masked_rows_have_no_gradient_and_an_empty_batch_is_finite():
  def gradient(mask):
    batch = {"labels": LABELS, "mask": jnp.float32(mask)}
    return jax.grad(lambda x: classification.cross_entropy(x, batch)[0])(jnp.float32(LOGITS))

  np.testing.assert_array_equal(gradient([1, 0, 1, 0])[1::2], 0)
  np.testing.assert_array_equal(gradient([0, 0, 0, 0]), 0)


def test_bfloat16_logits_are_reduced_in_float32():
  batch = {"labels": LABELS}
  low = jnp.asarray(LOGITS, jnp.bfloat16)
  loss, _ = classification.cross_entropy(low, batch)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, reference()[0].mean(), rtol=1e-6)
