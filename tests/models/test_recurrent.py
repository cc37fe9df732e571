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


def recurrence(parameters, u, suffix=""):
  """r, z = sigma(W u + V h + b); n = tanh(W u + b + r (V h + c)); h = (1 - z) n + z h."""
  kernel = np.asarray(parameters[f"input{suffix}"]["kernel"], np.float64)
  bias = np.asarray(parameters[f"input{suffix}"]["bias"], np.float64)
  V = np.split(np.asarray(parameters[f"recurrent{suffix}"], np.float64), 3, axis=1)
  W, b = np.split(kernel, 3, axis=1), np.split(bias, 3)
  c = np.asarray(parameters[f"bias{suffix}"], np.float64)

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  h = np.zeros((len(u), len(c)))
  hs = []
  for t in range(u.shape[1]):
    r, z = (sigmoid(u[:, t] @ W[i] + b[i] + h @ V[i]) for i in range(2))
    n = np.tanh(u[:, t] @ W[2] + b[2] + r * (h @ V[2] + c))
    h = (1 - z) * n + z * h
    hs.append(h)
  return np.stack(hs, 1)


@pytest.mark.parametrize("hidden", [None, H, 5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gru_is_its_recurrence(hidden, bidirectional):
  layer = GRU(hidden, bidirectional)
  u, p = inputs(), parameters(layer)
  leaves, structure = jax.tree.flatten(p)  # biases that start at zero would hide mistakes
  keys = jax.random.split(jax.random.key(2), len(leaves))
  p = structure.unflatten(
    [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  )
  expected = recurrence(p, np.asarray(u, np.float64))
  if bidirectional:
    backward = recurrence(p, np.asarray(u, np.float64)[:, ::-1], "_reverse")[:, ::-1]
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


def test_recurrent_matrices_start_orthogonal():
  for gate in np.split(np.asarray(parameters(GRU(5))["recurrent"]), 3, axis=1):
    np.testing.assert_allclose(gate @ gate.T, np.eye(5), atol=1e-5)


def test_gru_learns_by_the_gradient_of_its_recurrence():
  """Against central differences of the float64 recurrence, for a weighted sum of the outputs."""
  layer, u, p = GRU(), inputs(), parameters(GRU())
  weights = np.random.RandomState(0).randn(B, L, H)
  gradient = jax.grad(lambda p: (layer.apply({"params": p}, u) * weights).sum())(p)["recurrent"]
  for place in [(0, 0), (1, 4), (2, 8)]:
    ends = []
    for sign in (1, -1):
      moved = dict(p) | {"recurrent": np.array(p["recurrent"], np.float64)}
      moved["recurrent"][place] += sign * 1e-5
      ends.append((recurrence(moved, np.asarray(u, np.float64)) * weights).sum())
    assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4)
