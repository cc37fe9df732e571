"""Constraints g(x) <= 0 on what is trained, by Lagrange multipliers that rise where they fail.

The players move at once, each from the same values: the parameters by any optimizer along the
gradient of the Lagrangian, the multipliers by `dual_ascent` along the constraints. Multipliers and
constraints are trees of the same structure. `step` is a move of both, or of the parameters alone:

    value = loss + lagrangian(multipliers, violations)            # differentiated by the parameters
    rises, state = ascent.update(violations, state, multipliers)
    multipliers = optax.apply_updates(multipliers, rises)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def lagrangian(multipliers: Any, violations: Any) -> jax.Array:
  """Sum of multiplier times violation: what the constraints add to a loss, a scalar.

  The multipliers are held constant under differentiation.
  """
  return optax.tree.vdot(jax.lax.stop_gradient(multipliers), violations)


def dual_ascent(learning_rate: float, restarts: bool = True) -> optax.GradientTransformation:
  """lambda <- max(lambda + learning_rate * g, 0), and 0 where g < 0 under restarts.

  Source: arXiv:2208.04425, section 4. Without restarts a multiplier that grew while its constraint
  failed goes on pushing for as long after the constraint is met. The transformation takes
  violations g in place of gradients, goes uphill, and returns differences for
  `optax.apply_updates`: put no scaling by -1 behind it.
  """

  def update(violations: Any, state: Any, multipliers: Any = None) -> tuple[Any, Any]:
    if multipliers is None:
      raise ValueError("multipliers=None; accepted: the multipliers, as `params`")

    def rise(g: jax.Array, multiplier: jax.Array) -> jax.Array:
      raised = jnp.maximum(multiplier + learning_rate * g, 0)
      return (jnp.where(g < 0, 0, raised) if restarts else raised) - multiplier

    return jax.tree.map(rise, violations, multipliers), state

  return optax.GradientTransformation(lambda multipliers: optax.EmptyState(), update)


def step(
  objective: Callable[[Any], tuple[jax.Array, tuple[Any, Any]]],
  params: Any,
  multipliers: Any,
  optimizer: optax.GradientTransformation,
  opt_state: Any,
  ascent: optax.GradientTransformation | None = None,
) -> tuple[tuple[Any, Any, Any], tuple[jax.Array, Any]]:
  """One move, of both players from one forward pass.

  Args:
    objective: parameters -> (loss, (violations, anything else)).
    params, multipliers: where the players are.
    optimizer, opt_state: of the parameters.
    ascent: `dual_ascent`; None keeps the multipliers: a penalised objective.

  Returns: (params, multipliers, opt_state) after it, and (Lagrangian, anything else) before it.
  """

  def whole(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    loss, (violations, extra) = objective(params)
    return loss + lagrangian(multipliers, violations), (violations, extra)

  (value, (violations, extra)), grads = jax.value_and_grad(whole, has_aux=True)(params)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  if ascent is not None:
    rises, _ = ascent.update(violations, ascent.init(multipliers), multipliers)
    multipliers = optax.apply_updates(multipliers, rises)
  return (params, multipliers, opt_state), (value, extra)
