"""Full-batch descent followed step by step: rules, where they go, how sharp the loss is there.

A loss is a pure function of the parameters alone, `loss_fn(params) -> ()`, as in `curvature`; a
rule is an optax transformation, which is given the loss as `value`. T is the number of steps. Near
a minimiser all of this wants float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from objectives import curvature
from objectives.curvature import LossFn, Params


def normalised_descent(eta: float) -> optax.GradientTransformation:
  """x - eta grad L / |grad L|; the norm is that of all parameters together, not of a layer's."""
  return optax.chain(optax.normalize_by_update_norm(eps=0.0), optax.sgd(eta))


def root_descent(eta: float) -> optax.GradientTransformationExtraArgs:
  """x - eta grad sqrt(L) = x - eta grad L / (2 sqrt L), for a loss L above 0."""

  def update(grads: Any, state: Any, params: Any = None, *, value: jax.Array, **extra: Any) -> Any:
    return optax.tree.scale(-eta / (2 * jnp.sqrt(value)), grads), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def descend(
  loss_fn: LossFn,
  rule: optax.GradientTransformation,
  params: Params,
  opt_state: Any,
  steps: int,
) -> tuple[Params, Any, jax.Array]:
  """Parameters and optimizer state after so many steps, and the loss (T,) before each of them."""
  rule = optax.with_extra_args_support(rule)

  def step(carry: Any, _: None) -> Any:
    params, opt_state = carry
    value, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = rule.update(grads, opt_state, params, value=value)
    return (optax.apply_updates(params, updates), opt_state), value

  (params, opt_state), loss_T = jax.lax.scan(step, (params, opt_state), length=steps)
  return params, opt_state, loss_T


def observe(
  loss_fn: LossFn,
  rule: optax.GradientTransformation,
  params: Params,
  key: jax.Array,
  steps: int,
  iterations: int = 32,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """What `descend` passes on its way from `params`, with a fresh optimizer state.

  Args:
    loss_fn, rule, params, steps: as of `descend`.
    key, iterations: of `curvature.sharpness`.

  Returns: before each step the loss, the gradient's norm, lambda_1, and |cos(gradient, v_1)|, (T,).
  """
  rule = optax.with_extra_args_support(rule)

  def step(carry: Any, _: None) -> Any:
    params, opt_state = carry
    value, grads = jax.value_and_grad(loss_fn)(params)
    lambda_1, v = curvature.sharpness(loss_fn, params, key, iterations)
    norm = optax.tree.norm(grads)
    cosine = jnp.abs(optax.tree.vdot(v, grads)) / norm
    updates, opt_state = rule.update(grads, opt_state, params, value=value)
    return (optax.apply_updates(params, updates), opt_state), (value, norm, lambda_1, cosine)

  return jax.lax.scan(step, (params, rule.init(params)), length=steps)[1]


def consecutive(
  loss_T: jax.Array, norm_T: jax.Array, lambda_T: jax.Array, eta: float, root: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Means over pairs of steps of two sums that are 1 in the limit (arXiv:2205.09745, section 4).

  Where steps flip along v_1 near a manifold on which the loss is 0: 1/S(t) + 1/S(t+1), of
  `normalised_descent` alone, with S = eta lambda_1 / |grad L|; and sqrt L(t) + sqrt L(t+1) over eta
  sqrt(lambda_1 / 2), of `root_descent` over eta lambda_1 / 2.

  Args:
    loss_T, norm_T, lambda_T: of `observe`.
    eta: step size.
    root: whether the rule is `root_descent`.
  """
  half_T = lambda_T / 2 if root else jnp.sqrt(lambda_T / 2)
  inverse_T, roots_T = norm_T / (eta * lambda_T), jnp.sqrt(loss_T) / (eta * half_T)
  first, second = ((x[1:] + x[:-1]).mean() for x in (inverse_T, roots_T))
  return first, second


def follow(
  loss_fn: LossFn,
  params: Params,
  key: jax.Array,
  *,
  lr: float,
  projections: int,
  projection_lr: float,
  logarithm: bool = False,
  iterations: int = 32,
) -> Params:
  """An Euler step of the flow to flatter minimisers, dX / dt = -P grad lambda_1(H).

  P projects on the tangent space of the manifold of minimisers: a step of length `lr` along the
  gradient of v_1' H v_1, v_1 held, which is exact where lambda_1 is simple, and back on to the
  manifold by gradient descent (arXiv:2205.09745, reference flow of the experiments).

  Args:
    loss_fn: of the parameters.
    params: a minimiser.
    key, iterations: of `curvature.sharpness`.
    lr: of the step.
    projections, projection_lr: steps of gradient descent, and their size.
    logarithm: the flow down log lambda_1.
  """
  lambda_1, v = curvature.sharpness(loss_fn, params, key, iterations)
  slope = jax.grad(functools.partial(curvature.quadratic_form, loss_fn))(params, v)
  params = optax.tree.add_scale(params, -lr / (lambda_1 if logarithm else 1), slope)

  def project(_: jax.Array, params: Params) -> Params:
    return optax.tree.add_scale(params, -projection_lr, jax.grad(loss_fn)(params))

  return jax.lax.fori_loop(0, projections, project, params)


def record(
  record_T: jax.Array, steps_T: jax.Array, step: jax.Array, measure: Callable[[], jax.Array]
) -> jax.Array:
  """`record_T` with `measure()` where `steps_T` is `step`; at other steps nothing is computed.

  For what is too expensive to measure at every step of a compiled program. Under a `vmap` that maps
  `step` it is computed at every one.
  """

  def now(record_T: jax.Array) -> jax.Array:
    return jnp.where(step == steps_T, measure(), record_T)

  return jax.lax.cond(jnp.isin(step, steps_T), now, lambda x: x, record_T)
