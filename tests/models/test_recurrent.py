"""LRU, RG-LRU and GRU against their equations in float64 numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from models.recurrent import GRU, LRU, RGLRU, gated_decay

B, L, H = 2, 6, 3


def inputs():
  return jax.random.normal(jax.random.key(0), (B, L, H))


def parameters(layer, shape=(B, L, H)):
  return nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), jnp.zeros(shape)))["params"]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def float64(parameters):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)


# LRU


def lru(p, u):
  lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
  b, c = (p[name][..., 0] + 1j * p[name][..., 1] for name in "BC")
  x, ys = np.zeros((len(u), len(lam))), []
  for u_t in np.moveaxis(u, 1, 0):
    x = lam * x + np.exp(p["gamma_log"]) * (u_t @ b.T)
    ys.append((x @ c.T).real + p["D"] * u_t)
  return np.stack(ys, axis=1)


def test_lru_is_its_recurrence():
  layer, u = LRU(5, r_min=0.4, r_max=0.99), inputs()
  p = parameters(layer)
  y = jax.jit(layer.apply)({"params": p}, u)
  np.testing.assert_allclose(y, lru(float64(p), np.asarray(u, np.float64)), atol=1e-5)
  half = layer.apply({"params": p}, u.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.05)


@pytest.mark.parametrize(("r_min", "r_max", "phase"), [(0.0, 1.0, 6.28), (0.9, 0.999, 0.31)])
def test_lru_starts_on_a_ring(r_min, r_max, phase):
  """Squared radii and phases are uniform; gamma is sqrt(1 - |lambda|^2), to every digit."""
  p = float64(parameters(LRU(4096, r_min, r_max, phase)))
  square = np.exp(-2 * np.exp(p["nu_log"]))
  angle = np.exp(p["theta_log"])
  for value, low, high in ((square, r_min**2, r_max**2), (angle, 0, phase)):
    assert value.min() >= low - 1e-6 and value.max() <= high + 1e-6
    quantiles = np.quantile((value - low) / (high - low), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, [0.25, 0.5, 0.75], atol=0.03)
  np.testing.assert_allclose(
    np.exp(2 * p["gamma_log"]), -np.expm1(-2 * np.exp(p["nu_log"])), rtol=1e-5
  )
  assert [p[name].std() for name in "BC"] == pytest.approx([(2 * H) ** -0.5, 1 / 64], rel=0.03)


def test_white_inputs_give_an_lru_states_of_variance_one():
  layer = LRU(256, r_max=0.95)
  u = jax.random.normal(jax.random.key(3), (128, 100, H))
  start = layer.initial_state(128)
  variables = {"params": parameters(layer)}
  extend = jax.jit(lambda u: layer.apply(variables, start, u, method="extend"))
  (re, im), _ = extend(u)
  variance = (re**2 + im**2).mean(axis=0)
  assert variance.mean() == pytest.approx(1, abs=0.1)
  radius = jnp.exp(-jnp.exp(variables["params"]["nu_log"]))
  for part in (radius < jnp.median(radius), radius >= jnp.median(radius)):
    assert variance[part].mean() == pytest.approx(1, abs=0.15)


# RG-LRU


def rg_lru(p, u, power=8.0):
  def gate(name):
    blocks = p[f"{name}_kernel"]
    parts = np.split(u, len(blocks), axis=-1)
    product = [part @ kernel for part, kernel in zip(parts, blocks, strict=True)]
    return sigmoid(np.concatenate(product, axis=-1) + p[f"{name}_bias"])

  a = sigmoid(p["Lambda"]) ** (power * gate("recurrence"))
  drive = np.sqrt(1 - a**2) * gate("input") * u
  h, hs = np.zeros((len(u), u.shape[-1])), []
  for t in range(u.shape[1]):
    h = a[:, t] * h + drive[:, t]
    hs.append(h)
  return np.stack(hs, axis=1)


@pytest.mark.parametrize("blocks", [1, H])
def test_rg_lru_is_its_recurrence(blocks):
  layer, u = RGLRU(blocks), inputs()
  p = parameters(layer)
  p = {name: x + (0.3 if name.endswith("bias") else 0) for name, x in p.items()}
  assert p["input_kernel"].shape == (blocks, H // blocks, H // blocks)
  y = jax.jit(layer.apply)({"params": p}, u)
  np.testing.assert_allclose(y, rg_lru(float64(p), np.asarray(u, np.float64)), atol=1e-5)
  half = layer.apply({"params": p}, u.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.02)


def test_rg_lru_starts_with_decays_between_the_bounds():
  p = float64(parameters(RGLRU(decay_min=0.8), (1, 2, 2048)))
  decay = sigmoid(p["Lambda"]) ** 8
  assert decay.min() >= 0.8 - 1e-5 and decay.max() <= 0.999 + 1e-5
  np.testing.assert_allclose(np.quantile(decay, [0.25, 0.5, 0.75]), [0.85, 0.9, 0.95], atol=0.01)


def test_gated_decays_keep_their_digits_and_gradients_at_extremes():
  gates = jnp.array([-120, -80, -9, 0, 9, 80], jnp.float32)
  grid = jnp.meshgrid(gates, jnp.array([-60, -4, 0, 4, 60], jnp.float32), indexing="ij")

  @jax.jit
  def decay(gate, lam):
    def both(gate, lam):
      return gated_decay(jax.nn.sigmoid(gate), lam)

    gradients = jax.grad(lambda *x: both(*x)[1].sum(), argnums=(0, 1))(gate, lam)
    return *both(gate, lam), gradients

  a, scale, gradients = decay(*grid)
  gate64, lam64 = (np.asarray(x, np.float64) for x in grid)
  rate = 8 * np.log1p(np.exp(-lam64)) * sigmoid(gate64)
  # Below 1e-38 float32 has no normal numbers: both are as good as one and zero there.
  np.testing.assert_allclose(a, np.exp(-rate), rtol=1e-4, atol=1e-37)
  np.testing.assert_allclose(scale, np.sqrt(-np.expm1(-2 * rate)), rtol=1e-5, atol=1e-18)
  assert (a >= 0).all() and (a <= 1).all() and (scale > 0).all() and (scale <= 1).all()
  # Elsewhere the derivatives of sigmoid and expm1 cancel to some absolute error.
  middle = (rate > 1e-30) & (rate < 4) & (gate64 <= 0)
  slope = np.exp(-2 * rate) / np.sqrt(-np.expm1(-2 * rate)) * rate
  expected = slope * sigmoid(-gate64), -slope * sigmoid(-lam64) / np.log1p(np.exp(-lam64))
  for given, wanted in zip(gradients, expected, strict=True):
    assert np.isfinite(given).all()
    np.testing.assert_allclose(given[middle], wanted[middle], rtol=1e-4, atol=1e-30)


def test_rg_lru_learns_by_the_gradient_of_its_recurrence():
  layer = RGLRU()
  with jax.enable_x64(True):
    p, u = float64(parameters(layer)), np.asarray(inputs(), np.float64)
    start = np.ones((B, H))

    def outputs(p, u, start):
      return layer.apply({"params": p}, start, u, method="extend")

    check_grads(outputs, (p, u, start), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (LRU(4, r_min=0.5, r_max=0.5), "r_min=0.5, r_max=0.5; accepted: 0 <= r_min < r_max <= 1"),
    (LRU(4, r_max=1.1), "r_max=1.1; accepted"),
    (RGLRU(2), "blocks=2; accepted: a divisor of the 3 features"),
    (RGLRU(decay_max=1.0), "decay_max=1.0; accepted: 0 < decay_min <= decay_max < 1"),
  ],
)
def test_mistakes_in_fields(layer, message):
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), inputs())


# GRU


def recurrence(parameters, u, suffix=""):
  """r, z = sigma(W u + V h + b); n = tanh(W u + b + r (V h + c)); h = (1 - z) n + z h."""
  kernel = np.asarray(parameters[f"input{suffix}"]["kernel"], np.float64)
  bias = np.asarray(parameters[f"input{suffix}"]["bias"], np.float64)
  V = np.split(np.asarray(parameters[f"recurrent{suffix}"], np.float64), 3, axis=1)
  W, b = np.split(kernel, 3, axis=1), np.split(bias, 3)
  c = np.asarray(parameters[f"bias{suffix}"], np.float64)

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


@pytest.mark.parametrize("layer", [GRU(5), LRU(5), RGLRU()])
def test_parameters_carry_logical_axis_names(layer):
  variables = jax.eval_shape(layer.init, jax.random.key(0), inputs())
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
