"""Merging: averages and lines against float64, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import merging

TREE = {
  "kernel": np.random.RandomState(0).randn(3, 4, 5).astype(np.float32),
  "scale": np.random.RandomState(1).randn(3).astype(np.float32),
}


@pytest.mark.parametrize("weights", [None, [0.7, 0.3, 0.0], [2.0, -1.0, 0.5]])
def test_average_in_float64(weights):
  got = merging.average(TREE, None if weights is None else jnp.array(weights))
  w = np.full(3, 1 / 3) if weights is None else np.array(weights)
  for name, leaf in TREE.items():
    wanted = sum(w[k] * leaf[k].astype(np.float64) for k in range(3))
    assert got[name].shape == leaf.shape[1:]
    np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-6)


def test_average_sums_in_float32():
  """The third of a bfloat16 rounded before it is summed three times is not the number again."""
  x = jnp.full((3, 2), 1.7, jnp.bfloat16)
  got = merging.average({"x": x})["x"]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, x[0])


def test_the_line_passes_both_ends_and_the_average():
  ends = [jax.tree.map(lambda x, i=i: x[i], TREE) for i in range(2)]
  line = merging.interpolate(*ends, jnp.array([0.0, 0.5, 1.0, 1.5]))
  middle = merging.average(jax.tree.map(lambda x: x[:2], TREE))
  for i, wanted in ((0, ends[0]), (1, middle), (2, ends[1])):
    got = jax.tree.map(lambda x, i=i: x[i], line)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, wanted)
  beyond = ends[1]["kernel"] + 0.5 * (ends[1]["kernel"] - ends[0]["kernel"])
  np.testing.assert_allclose(line["kernel"][3], beyond, rtol=1e-5, atol=1e-6)
  one = merging.interpolate(*ends, 0.25)
  assert one["kernel"].shape == TREE["kernel"].shape[1:]


def test_under_vmap_and_grad():
  """A set of weights for each of two targets; the gradient of a weight is its model."""
  weights = jnp.array([[1.0, 0, 0], [0, 0.5, 0.5]])
  got = jax.vmap(lambda w: merging.average(TREE, w))(weights)
  np.testing.assert_allclose(got["kernel"][0], TREE["kernel"][0], rtol=1e-6)
  slope = jax.grad(lambda w: merging.average(TREE, w)["kernel"].sum())(weights[0])
  np.testing.assert_allclose(slope, TREE["kernel"].sum((1, 2)), rtol=1e-5)


def test_refused():
  with pytest.raises(ValueError, match=r"count: int32\[3\]; accepted: floating \[3, ...\]"):
    merging.average(TREE | {"count": np.zeros(3, np.int32)})
  with pytest.raises(
    ValueError, match=r"kernel: float32\[3, 4, 5\]; accepted: floating \[2, ...\]"
  ):
    merging.average(TREE, jnp.ones(2) / 2)
  with pytest.raises(ValueError, match="scale: float32"):
    merging.interpolate(TREE, TREE | {"scale": np.zeros(2, np.float32)}, 0.5)
  with pytest.raises(ValueError, match="x: int32"):
    merging.interpolate({"x": np.zeros(2, np.int32)}, {"x": np.zeros(2, np.int32)}, 0.5)
