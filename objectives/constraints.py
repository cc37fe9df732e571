"""Constraints g(x) <= 0 on what is trained, by Lagrange multipliers that rise where they fail.

The players move at once, each from the same values: the parameters by any optimizer along the
gradient of the Lagrangian, the multipliers by `dual_ascent` along the constraints. Multipliers and
constraints are trees of the same structure.

    value = loss + lagrangian(multipliers, violations)            # differentiated by the parameters
    rises, state = ascent.update(violations, state, multipliers)
    multipliers = optax.apply_updates(multipliers, rises)
"""

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
