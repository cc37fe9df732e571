"""Rules on quadratics and on a valley whose flows are known, all in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import curvature, flow

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def valley(p):
  """(1 + x^2) y^2: a line of minimisers, along which lambda_1 = 2 (1 + x^2)."""
  return (1 + p["x"] ** 2) * p["y"] ** 2


def observed(rule, loss_fn, params, steps):
  return jax.jit(functools.partial(flow.observe, loss_fn, rule, key=KEY, steps=steps))(params)


def test_on_a_quadratic_inverse_stableness_adds_up_to_one():
  """arXiv:2205.09745, figure 2: A = diag(1, 0.4), eta = 1: x flips along v_1."""
  a = jnp.array([1.0, 0.4])
  loss_fn = lambda x: 0.5 * (a * x**2).sum()  # noqa: E731
  start = jnp.array([0.3, 0.9])
  _, norm_T, lambda_T, cosine_T = observed(flow.normalised_descent(1.0), loss_fn, start, 400)
  np.testing.assert_allclose(lambda_T, 1, rtol=1e-12)
  inverse_T = norm_T / lambda_T
  np.testing.assert_allclose(inverse_T[-50:-1] + inverse_T[-49:], 1, atol=1e-9)
  np.testing.assert_allclose(cosine_T[-50:], 1, atol=1e-9)


def test_the_norm_is_global_and_not_a_layers():
  """Two parameters with gradients 3 and 4 move by 0.6 and 0.8 eta, not by eta each."""
  rule = flow.normalised_descent(0.1)
  grads = {"a": jnp.array([3.0]), "b": {"c": jnp.array([4.0])}}
  updates, _ = rule.update(grads, rule.init(grads))
  np.testing.assert_allclose(updates["a"], -0.06, rtol=1e-12)
  np.testing.assert_allclose(updates["b"]["c"], -0.08, rtol=1e-12)


def test_root_descent_descends_on_the_root_of_the_loss():
  loss_fn = lambda x: ((x - 1) ** 2).sum() + 0.5  # noqa: E731
  x, rule = jnp.array([0.3, 2.0]), flow.root_descent(0.1)
  value, grads = jax.value_and_grad(loss_fn)(x)
  updates, _ = rule.update(grads, rule.init(x), x, value=value)
  wanted = -0.1 * jax.grad(lambda x: jnp.sqrt(loss_fn(x)))(x)
  np.testing.assert_allclose(updates, wanted, rtol=1e-12)


@pytest.mark.parametrize(
  ("rule", "power"), [(flow.normalised_descent, 0), (flow.root_descent, 0.5)], ids=["N", "S"]
)
def test_the_period_two_orbit_across_the_valley(rule, power):
  """|y_t| + |y_{t+1}| is eta under N and eta sqrt(lambda_1 / 2) under S: the flows' constants."""
  eta, y_T, point = 1e-3, [], {"x": jnp.asarray(3.0), "y": jnp.asarray(3e-4)}
  step = jax.jit(lambda p: flow.descend(valley, rule(eta), p, rule(eta).init(p), 1)[0])
  for _ in range(100):
    point = step(point)
    y_T.append(abs(float(point["y"])))
  half = float(1 + point["x"] ** 2)
  np.testing.assert_allclose(np.add(y_T[-9:], y_T[-10:-1]), eta * half**power, rtol=5e-3)


def test_many_steps_are_single_steps_and_momentum_is_carried():
  rule, point = optax.sgd(0.02, momentum=0.9), {"x": jnp.asarray(0.5), "y": jnp.asarray(0.4)}
  state = rule.init(point)
  params, _, loss_T = flow.descend(valley, rule, point, state, 5)
  value_T, norm_T, *_ = observed(rule, valley, point, 5)
  for step in range(5):
    np.testing.assert_allclose([loss_T[step], value_T[step]], valley(point), rtol=1e-12)
    grads = jax.grad(valley)(point)
    np.testing.assert_allclose(norm_T[step], optax.tree.norm(grads), rtol=1e-12)
    updates, state = rule.update(grads, state)
    point = optax.apply_updates(point, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), params, point)


@pytest.mark.parametrize("logarithm", [False, True])
def test_the_flow_along_the_valley(logarithm):
  """x' = -4 x, or of log lambda_1 x' = -2 x / (1 + x^2), by 200 Euler steps."""
  lr, steps, x = 5e-4, 200, 2.0
  settings = {"lr": lr, "projections": 20, "projection_lr": 0.05, "logarithm": logarithm}
  move = functools.partial(flow.follow, valley, key=KEY, iterations=2, **settings)
  walk = jax.jit(lambda p: jax.lax.fori_loop(0, steps, lambda _, p: move(p), p))
  found = walk({"x": jnp.asarray(x), "y": jnp.asarray(0.0)})
  if not logarithm:
    wanted = x * np.exp(-4 * lr * steps)
  else:  # log x + x^2 / 2 falls by 2 t
    wanted, level = x, np.log(x) + x**2 / 2 - 2 * lr * steps
    for _ in range(50):
      wanted -= (np.log(wanted) + wanted**2 / 2 - level) / (1 / wanted + wanted)
  np.testing.assert_allclose(found["x"], wanted, rtol=1e-3)
  assert abs(float(found["y"])) < 1e-9


def test_a_step_of_the_flow_ends_on_the_manifold():
  settings = {"lr": 1e-9, "projections": 200, "projection_lr": 0.05}
  found = flow.follow(valley, {"x": jnp.asarray(1.0), "y": jnp.asarray(0.1)}, KEY, **settings)
  # Gradient flow keeps log x + x^2 / 2 - y^2 / 2; steps of 0.05 nearly do.
  level = lambda x, y: np.log(x) + x**2 / 2 - y**2 / 2  # noqa: E731
  np.testing.assert_allclose(level(found["x"], found["y"]), level(1.0, 0.1), atol=2e-3)
  assert float(valley(found)) < 1e-12


def test_a_record_is_kept_at_its_steps_alone():
  times, calls = jnp.array([0, 3, 3, 7]), []

  def body(record, step):
    def measure():
      jax.debug.callback(lambda s: calls.append(int(s)), step)
      return step * 10.0 + 1

    return flow.record(record, times, step, measure), None

  record, _ = jax.jit(lambda: jax.lax.scan(body, jnp.zeros(4), jnp.arange(10)))()
  np.testing.assert_array_equal(record, [1, 31, 31, 71])
  jax.effects_barrier()
  assert sorted(calls) == [0, 3, 7]


def test_sharpness_is_the_first_eigenpair():
  a = jnp.array([1.0, -5.0, 3.0])
  value, v = curvature.sharpness(lambda p: 0.5 * (a * p["w"] ** 2).sum(), {"w": jnp.ones(3)}, KEY)
  np.testing.assert_allclose(value, 3, rtol=1e-12)
  np.testing.assert_allclose(np.abs(v["w"]), [0, 0, 1], atol=1e-9)
