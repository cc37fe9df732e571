import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import constraints


def test_a_quadratic_under_a_constraint_reaches_its_saddle():
  """min |x|^2 / 2 with a'x >= 1 has x = a / |a|^2 and lambda = 1 / |a|^2."""
  a = jnp.array([1.0, 2.0])
  ascent = constraints.dual_ascent(0.05, restarts=False)

  def step(carry, _):
    x, multipliers, state = carry
    g = lambda x: {"half space": 1 - a @ x}  # noqa: E731
    gradient = jax.grad(lambda x: 0.5 * x @ x + constraints.lagrangian(multipliers, g(x)))(x)
    rises, state = ascent.update(g(x), state, multipliers)
    return (x - 0.1 * gradient, optax.apply_updates(multipliers, rises), state), None

  multipliers = {"half space": jnp.zeros(())}
  start = (jnp.zeros(2), multipliers, ascent.init(multipliers))
  (x, multipliers, _), _ = jax.lax.scan(step, start, length=3000)
  np.testing.assert_allclose(x, a / 5, rtol=1e-4)
  np.testing.assert_allclose(multipliers["half space"], 1 / 5, rtol=1e-4)


@pytest.mark.parametrize(
  ("multiplier", "violation", "restarts", "wanted"),
  [
    (0.5, 0.2, True, 0.52),  # rises where the constraint fails: not descends
    (0.5, 0.2, False, 0.52),
    (0.5, -0.2, True, 0.0),
    (0.5, -0.2, False, 0.48),
    (0.01, -0.2, False, 0.0),  # and never falls below 0
    (0.5, 0.0, True, 0.5),
  ],
)
def test_one_rise(multiplier, violation, restarts, wanted):
  ascent = constraints.dual_ascent(0.1, restarts)
  start = [jnp.asarray(multiplier)]
  rises, _ = ascent.update([jnp.asarray(violation)], ascent.init(start), start)
  np.testing.assert_allclose(optax.apply_updates(start, rises)[0], wanted, atol=1e-7)


def test_the_lagrangian_pushes_parameters_and_not_multipliers():
  multipliers, violations = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, -1.0])}
  assert float(constraints.lagrangian(multipliers, violations)) == 1.0
  by_multiplier, by_violation = jax.grad(constraints.lagrangian, (0, 1))(multipliers, violations)
  np.testing.assert_array_equal(by_multiplier["a"], 0)
  np.testing.assert_array_equal(by_violation["a"], [1, 2])


@pytest.mark.parametrize("restarts", [False, True, None])
def test_a_step_moves_both_players_from_the_same_place(restarts):
  """Written out; None leaves the multipliers as they are."""
  ascent = None if restarts is None else constraints.dual_ascent(0.5, restarts)
  optimizer, x = optax.sgd(0.1, momentum=0.9), jnp.array([1.0, 2.0])
  multipliers = {"a": jnp.asarray(0.3), "b": jnp.asarray(0.2)}

  def objective(x):
    return (x**2).sum(), ({"a": x[0] - 3.0, "b": x[1] - 1.5}, x)

  players = x, multipliers, optimizer, optimizer.init(x), ascent
  (moved, risen, state), (value, seen) = jax.jit(lambda: constraints.step(objective, *players))()
  np.testing.assert_allclose(value, 5 + 0.3 * -2 + 0.2 * 0.5, rtol=1e-6)
  np.testing.assert_allclose(moved, x - 0.1 * (2 * x + jnp.array([0.3, 0.2])), rtol=1e-6)
  np.testing.assert_allclose(state[0].trace, 2 * x + jnp.array([0.3, 0.2]), rtol=1e-6)
  np.testing.assert_array_equal(seen, x)
  np.testing.assert_allclose([risen["a"], risen["b"]], [0, 0.45] if ascent else [0.3, 0.2])


def test_mistakes():
  with pytest.raises(ValueError, match="multipliers=None"):
    constraints.dual_ascent(0.1).update({}, optax.EmptyState())
