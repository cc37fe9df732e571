"""Groups: totals and counts against loops, the worst of them, Group DRO's weights."""

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
