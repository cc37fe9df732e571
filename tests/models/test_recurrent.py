"""The GRU mixer against its equations in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.recurrent import GRU

B, L, H = 2, 6, 3


def inputs():
  return jax.random.normal(jax.random.key(0), (B, L, H))


def parameters(layer):
  return nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), inputs()))["params"]


def recurrence(cell, u):
  """r, z = sigma(W u + V h + b); n = tanh(W u + b + r (V h + c)); h = (1 - z) n + z h."""

  def linear(name, x):
    return x @ np.asarray(cell[name]["kernel"], np.float64) + np.asarray(cell[name].get("bias", 0))

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  h = np.zeros((len(u), cell["hn"]["kernel"].shape[0]))
  hs = []
  for t in range(u.shape[1]):
    r = sigmoid(linear("ir", u[:, t]) + linear("hr", h))
    z = sigmoid(linear("iz", u[:, t]) + linear("hz", h))
    n = np.tanh(linear("in", u[:, t]) + r * linear("hn", h))
    h = (1 - z) * n + z * h
    hs.append(h)
  return np.stack(hs, 1)


@pytest.mark.parametrize("hidden", [None, H, 5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gru_is_its_recurrence(hidden, bidirectional):
  layer = GRU(hidden, bidirectional)
  u, p = inputs(), parameters(layer)
  expected = recurrence(p["cell"], np.asarray(u, np.float64))
  if bidirectional:
    backward = recurrence(p["cell_reverse"], np.asarray(u, np.float64)[:, ::-1])[:, ::-1]
    expected = np.concatenate([expected, backward], axis=-1)
  assert ("project" in p) == (bidirectional or hidden == 5)
  if "project" in p:
    expected = expected @ np.asarray(p["project"]["kernel"]) + np.asarray(p["project"]["bias"])
  y = jax.jit(layer.apply)({"params": p}, u)
  assert y.shape == u.shape
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_gru_ignores_the_step_scale_and_refuses_gaps():
  layer, u = GRU(), inputs()
  variables = {"params": parameters(layer)}
  y = layer.apply(variables, u)
  np.testing.assert_array_equal(layer.apply(variables, u, step_rescale=2.0), y)
  with pytest.raises(ValueError, match="dt: given"):
    layer.apply(variables, u, dt=jnp.ones((B, L)))


def test_gru_recurs_in_float32_and_returns_the_dtype_of_its_input():
  layer, u = GRU(5), inputs()
  variables = {"params": parameters(layer)}
  y = layer.apply(variables, u.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), layer.apply(variables, u), atol=0.03)


def test_gru_parameters_carry_logical_axis_names():
  variables = jax.eval_shape(GRU(5).init, jax.random.key(0), inputs())
  assert all(
    isinstance(leaf, nn.LogicallyPartitioned)
    for leaf in jax.tree.leaves(
      variables["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
  )
