"""Second derivatives of a loss over parameter trees: products, traces, top eigenvalues.

A loss here is a pure function of the parameters alone, `loss_fn(params) -> ()`; what it averages
over (a batch, its key) is closed over. No function forms a matrix, all follow the parameters'
dtype, and all may be jitted, vmapped, differentiated and sharded. H is the Hessian, d the number of
parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

Params = Any
LossFn = Callable[[Params], jax.Array]

MASKS = ("coordinate", "tensor")


def hvp(loss_fn: LossFn, params: Params, v: Params) -> Params:
  """H v, forward over reverse: about two gradients. `v` has the structure of `params`."""
  return jax.jvp(jax.grad(loss_fn), (params,), (v,))[1]


def quadratic_form(loss_fn: LossFn, params: Params, v: Params) -> jax.Array:
  """v' H v, a scalar. Its gradient in `params`, `v` held, takes third derivatives."""
  return optax.tree.vdot(v, hvp(loss_fn, params, v))


def probe(
  key: jax.Array,
  params: Params,
  keep: float = 1.0,
  mask: Literal["coordinate", "tensor"] = "coordinate",
) -> Params:
  """A random v with E[v v'] = I: signs, of which a part is kept and scaled by 1 / sqrt(keep).

  Args:
    key: a PRNG key.
    params: the structure, shapes and dtypes of v.
    keep: probability that an entry is not 0, in (0, 1]. 1: Rademacher, the least variance that
      independent entries can have.
    mask: kept or dropped is an entry, or a parameter's whole tensor (which still has a sign for
      every entry: one sign for all would sum the entries of H).

  Raises: ValueError for another `keep` or `mask`.
  """
  if not 0 < keep <= 1:
    raise ValueError(f"keep={keep}; accepted: above 0, at most 1")
  if mask not in MASKS:
    raise ValueError(f"mask={mask!r}; accepted: {', '.join(MASKS)}")
  sign_key, mask_key = jax.random.split(key)
  signs = optax.tree.random_like(sign_key, params, jax.random.rademacher)
  if keep == 1:
    return signs

  def kept(key: jax.Array, v: jax.Array) -> jax.Array:
    shape = v.shape if mask == "coordinate" else ()
    return jnp.where(jax.random.bernoulli(key, keep, shape), v / keep**0.5, 0).astype(v.dtype)

  return jax.tree.map(kept, optax.tree.split_key_like(mask_key, params), signs)


def hutchinson_trace(
  loss_fn: LossFn,
  params: Params,
  key: jax.Array,
  probes: int = 1,
  *,
  keep: float = 1.0,
  mask: Literal["coordinate", "tensor"] = "coordinate",
  parallel: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Unbiased estimate of tr(H): the mean of v' H v over random v (Hutchinson, 1989).

  May be differentiated in `params`, at 4 to 6 times the cost of a gradient for each probe.

  Args:
    loss_fn: of the parameters.
    params: where.
    key: a PRNG key.
    probes: how many v.
    keep, mask: of `probe`.
    parallel: how many probes are computed side by side; the rest in turn.

  Returns: the estimate and its standard error, scalars; the error of one probe is nan.
  """
  _, product = jax.linearize(jax.grad(loss_fn), params)  # the loss itself is computed once

  def estimate(key: jax.Array) -> jax.Array:
    v = probe(key, params, keep, mask)
    return optax.tree.vdot(v, product(v))

  keys = jax.random.split(key, probes)
  estimates_K = jax.lax.map(estimate, keys, batch_size=min(parallel, probes))
  error = estimates_K.std(ddof=1) / probes**0.5 if probes > 1 else jnp.full((), jnp.nan)
  return estimates_K.mean(), jax.lax.stop_gradient(error)


def trace_gradient(
  loss_fn: LossFn,
  params: Params,
  key: jax.Array,
  strength: float,
  due: jax.Array | bool = True,
  *,
  probes: int = 1,
  keep: float = 1.0,
  mask: Literal["coordinate", "tensor"] = "coordinate",
  nonnegative: bool = False,
  stopped: bool = False,
) -> tuple[Params, jax.Array]:
  """The gradient of strength * tr(H), estimated: a penalty on the trace (arXiv:2208.05924).

  Args:
    loss_fn, params, key, probes, keep, mask: of `hutchinson_trace`.
    strength: lambda.
    due: zeros are returned, and nothing is computed, where it is false.
    nonnegative: of max(estimate, 0): biased, but bounded below where the trace is not.
    stopped: the estimate is a number, so that its gradient is 0.

  Returns: a tree as `params`, and the estimate itself.
  """

  def penalty(params: Params) -> tuple[jax.Array, jax.Array]:
    estimate, _ = hutchinson_trace(loss_fn, params, key, probes, keep=keep, mask=mask)
    bounded = jnp.maximum(estimate, 0) if nonnegative else estimate
    return strength * (jax.lax.stop_gradient(bounded) if stopped else bounded), estimate

  def nothing(params: Params) -> tuple[Params, jax.Array]:
    return optax.tree.zeros_like(params), jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))

  return jax.lax.cond(due, jax.grad(penalty, has_aux=True), nothing, params)


def exact_trace(loss_fn: LossFn, params: Params, parallel: int = 64) -> jax.Array:
  """tr(H) by d products with unit vectors: for small networks, as an oracle."""
  flat, unravel = ravel_pytree(params)

  def diagonal(i: jax.Array) -> jax.Array:
    unit_i = jax.nn.one_hot(i, flat.size, dtype=flat.dtype)
    return quadratic_form(lambda x: loss_fn(unravel(x)), flat, unit_i)

  return jax.lax.map(diagonal, jnp.arange(flat.size), batch_size=min(parallel, flat.size)).sum()


def top_eigenpairs(
  loss_fn: LossFn, params: Params, key: jax.Array, count: int = 1, iterations: int = 32
) -> tuple[jax.Array, Params]:
  """The algebraically largest eigenvalues of H and their vectors, by Lanczos.

  Every new vector is orthogonalised against all before, twice, so that no eigenvalue appears as
  often as rounding pleases. Unlike power iteration this does not find a large negative eigenvalue.

  Args:
    loss_fn: of the parameters.
    params: where.
    key: draws the first vector.
    count: how many pairs, at most `iterations`.
    iterations: products with H, at most d are done. Memory: as many copies of the parameters.

  Returns: eigenvalues (count,), descending, and a tree of eigenvectors of unit norm, with a leading
  axis (count,).

  Raises: ValueError for a `count` that is more than the iterations done.
  """
  steps = min(iterations, sum(leaf.size for leaf in jax.tree.leaves(params)))
  if not 0 < count <= steps:
    raise ValueError(f"count={count}; accepted: 1 to {steps}, the iterations done")
  _, product = jax.linearize(jax.grad(loss_fn), params)
  dtype = jnp.result_type(*jax.tree.leaves(params))
  first_key, fresh_key = jax.random.split(key)

  def normal(key: jax.Array) -> Params:
    return optax.tree.random_like(key, params, jax.random.normal)

  def orthogonal(v: Params, basis: Params) -> Params:
    """v without its part in the span of the basis; rows not yet filled are 0."""
    parts = jax.tree.map(lambda q, x: jnp.tensordot(q, x, x.ndim), basis, v)
    along_T = sum(jax.tree.leaves(parts))
    return jax.tree.map(lambda x, q: x - jnp.tensordot(along_T, q, 1), v, basis)

  def step(carry: Any, t: jax.Array) -> Any:
    q, basis = carry
    basis = jax.tree.map(lambda b, x: b.at[t].set(x), basis, q)
    w = product(q)
    alpha, size = optax.tree.vdot(q, w), optax.tree.norm(w)
    w = orthogonal(orthogonal(w, basis), basis)
    # Where the span of the basis is invariant a fresh direction goes on: T falls apart in blocks.
    ended = optax.tree.norm(w) <= 10 * jnp.finfo(dtype).eps * size
    fresh = normal(jax.random.fold_in(fresh_key, t))
    fresh = orthogonal(orthogonal(fresh, basis), basis)
    following = unit(jax.tree.map(functools.partial(jnp.where, ended), fresh, w))
    beta = jnp.where(ended, 0, optax.tree.norm(w))
    return (following, basis), (alpha, beta)

  empty = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), params)
  start = (unit(normal(first_key)), empty)
  (_, basis), (alpha_T, beta_T) = jax.lax.scan(step, start, jnp.arange(steps))
  beta_T = beta_T[:-1]
  values_T, mix_TT = jnp.linalg.eigh(jnp.diag(alpha_T) + jnp.diag(beta_T, 1) + jnp.diag(beta_T, -1))
  mix_CT = mix_TT[:, ::-1].T[:count]
  return values_T[::-1][:count], jax.tree.map(lambda q: jnp.tensordot(mix_CT, q, 1), basis)


def sharpness(
  loss_fn: LossFn, params: Params, key: jax.Array, iterations: int = 32
) -> tuple[jax.Array, Params]:
  """lambda_1 and v_1 of H, a scalar and a tree as `params`: the first of `top_eigenpairs`."""
  values, vectors = top_eigenpairs(loss_fn, params, key, 1, iterations)
  return values[0], jax.tree.map(lambda x: x[0], vectors)


def unit(v: Params) -> Params:
  """v over its global norm; 0 stays 0."""
  norm = optax.tree.norm(v)
  return optax.tree.scale(1 / jnp.where(norm > 0, norm, 1), v)
