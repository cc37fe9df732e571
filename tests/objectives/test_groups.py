"""Groups: totals and counts against loops, the worst of them, Group DRO's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import groups


def test_totals_and_counts_of_groups():
  random = np.random.RandomState(0)
  values, members = random.rand(40), random.randint(0, 3, 40)
  mask = (random.rand(40) < 0.7).astype(np.float32)
  metrics = groups.by_group("loss", jnp.array(values), jnp.array(members), 4, jnp.array(mask))
  assert list(metrics) == [f"loss/group_{k}" for k in range(4)]
  for k in range(4):
    chosen = (members == k) & (mask > 0)
    total, count = metrics[f"loss/group_{k}"]
    np.testing.assert_allclose([total, count], [values[chosen].sum(), chosen.sum()], rtol=1e-6)
  whole = groups.by_group("hit", jnp.array(values > 0.5), jnp.array(members), 3)
  assert sum(float(t) for t, _ in whole.values()) == (values > 0.5).sum()


def test_the_worst_group_of_each_seed():
  metrics = {
    "test/accuracy": [0.1, 0.1],
    "test/accuracy/group_0": [0.9, 0.5],
    "test/accuracy/group_1": [0.7, 0.8],
    "test/accuracy/group_2": [float("nan"), 0.6],
  }
  assert groups.worst(metrics, "test/accuracy") == [0.7, 0.5]
  assert groups.worst(metrics, "test/accuracy", highest=True) == [0.9, 0.8]
  with pytest.raises(ValueError, match="name='test/loss'"):
    groups.worst(metrics, "test/loss")


def test_group_dro_weights():
  q, losses = np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.0, 2.0])
  wanted = q * np.exp(0.1 * losses)
  got = groups.robust_weights(jnp.array(q), jnp.array(losses), 0.1)
  np.testing.assert_allclose(got, wanted / wanted.sum(), rtol=1e-6)


def test_group_dro_is_the_weighted_loss_after_the_adversary_has_moved():
  random = np.random.RandomState(0)
  losses, members, mask = random.rand(20), random.randint(0, 3, 20), np.ones(20, np.float32)
  mask[15:], q = 0, np.array([0.1, 0.2, 0.3, 0.4])  # nobody is in the last group
  means = np.array([losses[:15][members[:15] == g].mean() for g in range(3)] + [0])
  wanted = q * np.exp(0.5 * means)
  wanted /= wanted.sum()

  def dro(losses):
    return groups.group_dro(losses, jnp.array(q), jnp.array(members), 0.5, jnp.array(mask))

  (value, got), gradient = jax.value_and_grad(dro, has_aux=True)(jnp.array(losses))
  np.testing.assert_allclose(got, wanted, rtol=1e-5)
  assert float(value) == pytest.approx(wanted @ means, rel=1e-5)
  # the adversary's move has no gradient: an example counts as its group's weight over its size
  sizes = np.bincount(members[:15], minlength=4)
  np.testing.assert_allclose(gradient, mask * wanted[members] / sizes[members], rtol=1e-4)
