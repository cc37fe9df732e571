"""Merging models: averages and lines in the space of parameters.

    soup = average(stacked)                          # leaves (K, ...) to (...)
    leaning = average(stacked, jnp.array([0.7, 0.2, 0.1]))
    line = interpolate(start, end, jnp.linspace(0, 1, 11))      # leaves (...) to (11, ...)

Both work on any tree of floating leaves, under `jit`, `grad` and `vmap`. A mean of networks is a
network only where they lie in one basin: branches of a common start (arXiv:2208.03306, section 2.4;
arXiv:2203.05482; arXiv:2208.05592), not runs from different initialisations.
"""

from typing import Any

import jax
import jax.numpy as jnp


def average(tree: Any, weights_K: jax.Array | None = None) -> Any:
  """sum_k w_k theta_k over the leading axis, K, of every leaf, in float32 and then in its dtype.

  Args:
    tree: leaves (K, ...), floating.
    weights_K: (K,) float, used as they are: weights that do not sum to 1 scale the result. 1 / K
      each by default.

  Raises: ValueError for a leaf that is not floating (a counter, a code) or not of K models.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  size = len(weights_K) if weights_K is not None else _size(leaves)
  for path, leaf in leaves:
    _check(path, leaf, f"floating [{size}, ...]", leaf.shape[:1] == (size,))
  weights_K = jnp.full(size, 1 / size) if weights_K is None else weights_K.astype(jnp.float32)
  return jax.tree.map(
    lambda x: jnp.tensordot(weights_K, x.astype(jnp.float32), 1).astype(x.dtype), tree
  )


def interpolate(start: Any, end: Any, fractions: jax.Array | float) -> Any:
  """(1 - a) start + a end, in float32 and then in the dtype of `start`.

  Args:
    start, end: trees of one structure and the same shapes, floating leaves.
    fractions: a; beyond 0 and 1 the line goes on. With an array (N,) every leaf gets a leading axis
      of N, the models along the line.

  Raises: ValueError for a leaf that is not floating or differs in shape.
  """
  fractions = jnp.asarray(fractions, jnp.float32)

  def between(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    _check(path, b, f"floating {list(a.shape)}", a.shape == b.shape)
    _check(path, a, "floating", True)
    share = fractions.reshape(*fractions.shape, *(1,) * a.ndim)
    return ((1 - share) * a.astype(jnp.float32) + share * b.astype(jnp.float32)).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(between, start, end)


def _size(leaves: list[tuple[Any, jax.Array]]) -> int:
  """K, of the first leaf that has an axis."""
  return next((leaf.shape[0] for _, leaf in leaves if leaf.ndim), 0)


def _check(path: Any, leaf: jax.Array, accepted: str, fits: bool) -> None:
  if not (fits and jnp.issubdtype(leaf.dtype, jnp.floating)):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    raise ValueError(f"{name}: {leaf.dtype}{list(leaf.shape)}; accepted: {accepted}")
