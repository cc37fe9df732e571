"""Contrastive losses: float64 oracles, masks, and the same values and gradients when sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from objectives import contrastive


def embeddings(batch=16, width=5, seed=0):
  random = np.random.RandomState(seed)
  return jnp.float32(random.randn(batch, width)), jnp.float32(random.randn(batch, width))


def cosines(u, v):
  u, v = (np.float64(x) / np.linalg.norm(np.float64(x), axis=-1, keepdims=True) for x in (u, v))
  return u @ v.T


def oracle(u, v, temperature):
  logits = cosines(u, v) / temperature

  def side(x):
    return np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1) - np.diag(x)

  return (side(logits) + side(logits.T)).mean() / 2


def test_pairs_in_float64():
  u, v = embeddings()
  targets = jnp.arange(16) % 2
  loss, metrics = contrastive.cosine_pairs(jnp.stack([u, v], 1), {"targets": targets})
  cosine = np.diag(cosines(u, v))
  np.testing.assert_allclose(loss, ((cosine - targets) ** 2).mean(), rtol=1e-6)
  right = (cosine > 0.5) == (np.asarray(targets) > 0.5)
  assert float(metrics["accuracy"][0]) == right.sum()
  # neither a margin nor in-batch negatives: a pair counts by itself
  alone, _ = contrastive.cosine_pairs(jnp.stack([u, v], 1)[:1], {"targets": targets[:1]})
  np.testing.assert_allclose(alone, cosine[0] ** 2, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_info_nce_in_float64(temperature):
  u, v = embeddings()
  loss, metrics = contrastive.info_nce((u, v), {}, temperature)
  np.testing.assert_allclose(loss, oracle(u, v, temperature), rtol=1e-5)
  best = cosines(u, v).argmax(1) == np.arange(16)
  assert float(metrics["accuracy"][0]) == best.sum()


def test_masked_rows_are_neither_examples_nor_negatives():
  u, v = embeddings()
  mask = (jnp.arange(16) < 11).astype(jnp.float32)
  for padding in (0.0, 1e4):
    full_u, full_v = (x.at[11:].set(padding) for x in (u, v))
    loss, metrics = contrastive.info_nce((full_u, full_v), {"mask": mask}, 0.1)
    np.testing.assert_allclose(loss, oracle(u[:11], v[:11], 0.1), rtol=1e-5)
    assert float(metrics["loss"][1]) == 11
    both = jax.grad(lambda uv: contrastive.info_nce(uv, {"mask": mask}, 0.1)[0])((full_u, full_v))
    grads = np.concatenate(both, 1)
    assert np.isfinite(grads).all() and not np.any(grads[11:])
    pairs = jnp.stack([full_u, full_v], 1)
    batch = {"targets": jnp.ones(16), "mask": mask}
    expected = ((np.diag(cosines(u, v))[:11] - 1) ** 2).mean()
    np.testing.assert_allclose(contrastive.cosine_pairs(pairs, batch)[0], expected, rtol=1e-5)


def losses(u, v, mask):
  pairs = contrastive.cosine_pairs(jnp.stack([u, v], 1), {"targets": mask, "mask": mask})[0]
  return contrastive.info_nce((u, v), {"mask": mask}, 0.1)[0] + pairs


def test_negatives_of_other_devices_and_their_gradients():
  """Eight devices hold two rows each; the loss and gradients are those of the whole batch."""
  u, v = embeddings()
  mask = (jnp.arange(16) != 5).astype(jnp.float32)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  step = jax.value_and_grad(losses, (0, 1))
  sharded = jax.jit(step, in_shardings=(rows,) * 3, out_shardings=(None, (rows, rows)))
  value, grads = sharded(u, v, mask)
  expected, expected_grads = step(u, v, mask)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for ours, wanted in zip(grads, expected_grads, strict=True):
    assert len(ours.sharding.device_set) == 8
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
  # two rows a device, each with only its own negatives, would be another loss
  local = np.mean([losses(u[i : i + 2], v[i : i + 2], mask[i : i + 2]) for i in range(0, 16, 2)])
  assert abs(local - float(expected)) > 0.1


def test_gradients_by_finite_differences():
  u, v = embeddings(batch=4, width=3)
  mask = jnp.ones(4)
  grads = jax.grad(losses)(u, v, mask)
  with jax.enable_x64(True):
    u, v, mask = (jnp.float64(x) for x in (u, v, mask))
    for index in [(0, 0), (2, 1), (3, 2)]:
      step = jnp.zeros_like(u).at[index].set(1e-2)
      slope = (losses(u + step, v, mask) - losses(u - step, v, mask)) / 2e-2
      np.testing.assert_allclose(grads[index], slope, atol=5e-3)


def test_no_embedding_at_all_has_no_gradient():
  grads = jax.grad(lambda x: contrastive.normalise(x).sum())(jnp.zeros((2, 3)))
  np.testing.assert_array_equal(grads, np.zeros((2, 3)))
