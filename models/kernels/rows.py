"""What the TPU kernels share: loops over the rows of a block, rows of real or complex parts, and
matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

Row = tuple[jax.Array, ...]  # the parts of one row, each (1, D): (x,) or (re, im)

GROUP = 8  # rows of a register, unrolled


def steps(n: jax.Array | int, step: Callable[..., Any], carry: Any, *, descending: bool) -> Any:
  """step(t, j, carry) for t in 0..n-1 or n-1..0; j is its place in an unrolled group, or None."""
  groups, tail = n >> 3, n & 7
  order = range(GROUP)[:: -1 if descending else 1]

  def group(i: jax.Array, carry: Any) -> Any:
    start = pl.multiple_of((groups - 1 - i if descending else i) * GROUP, GROUP)
    for j in order:
      carry = step(start + j, j, carry)
    return carry

  def single(i: jax.Array, carry: Any) -> Any:
    return step(n - 1 - i if descending else groups * GROUP + i, None, carry)

  loops = [(groups, group), (tail, single)]
  for count, body in reversed(loops) if descending else loops:
    if not (isinstance(count, int) and count == 0):
      carry = lax.fori_loop(0, count, body, carry)
  return carry


def valid(length: int, steps: int, block: jax.Array) -> jax.Array | int:
  """How many of the `steps` of a block in time are inside a sequence of `length`."""
  if length % steps == 0:
    return steps
  return jnp.minimum(steps, length - block * steps)


@contextlib.contextmanager
def indices_of_32_bits(interpret: bool) -> Iterator[None]:
  """Mosaic takes no 64-bit indices, which `jax_enable_x64` would make."""
  with contextlib.nullcontext() if interpret else jax.enable_x64(False):
    yield


def row(x: Any, r: int, t: jax.Array, j: int | None = None) -> Row:
  """Step t of row r of the batch, of references (R, T, D); j as in `steps`."""
  return tuple(_at(part, r, t, j)[...] for part in x)


def put(x: Any, r: int, t: jax.Array, j: int | None, row: Row) -> None:
  """Writes what `row` reads."""
  for part, value in zip(x, row, strict=True):
    _at(part, r, t, j)[...] = value


def _at(part: Any, r: int, t: jax.Array, j: int | None) -> Any:
  if j is None:
    return part.at[r, pl.ds(t, 1), :]
  # The address of the group is computed once, and its rows are at constant distances from it.
  return part.at[r, pl.ds(pl.multiple_of(t - j, GROUP), GROUP), :].at[j : j + 1, :]


def copy(source: Any, target: Any) -> None:
  """Whole blocks, converted; nothing where either is absent."""
  if source and target:
    for x, y in zip(source, target, strict=True):
      y[...] = x[...].astype(y.dtype)


def store(target: Any, rows: tuple[Row, ...]) -> None:
  """One row each of the batch into references (R, 1, D)."""
  for r, row in enumerate(rows):
    for part, value in zip(target, row, strict=True):
      part[r] = value


def add(x: Row, y: Row) -> Row:
  """x + y."""
  return tuple(p + q for p, q in zip(x, y, strict=True))


def times(x: Row, y: Row) -> Row:
  """x y, real or complex."""
  if len(x) == 1:
    return (x[0] * y[0],)
  return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def conj(x: Row) -> Row:
  """The complex conjugate; a real row is its own."""
  return x if len(x) == 1 else (x[0], -x[1])


def precision(default: lax.Precision) -> lax.Precision:
  """Of products of float32 factors: `jax.default_matmul_precision`, if it asks for more passes."""
  name = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  try:
    wanted = lax.Precision(name or "default")
  except ValueError:  # it can name algorithms, too
    return default
  return default if wanted == lax.Precision.DEFAULT else wanted


def dot(x: jax.Array, z: jax.Array, axes: tuple[int, int], exact: lax.Precision) -> jax.Array:
  """The product of two matrices over these axes, summed in float32.

  `exact` is of float32 factors: one pass of the matrix unit, as if they were bfloat16; three, HIGH,
  which are products of halves and exact to 1e-5; or six, HIGHEST.
  """

  def product(x: jax.Array, z: jax.Array, precision: lax.Precision) -> jax.Array:
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, z, dims, precision, preferred_element_type=jnp.float32)

  once = lax.Precision.DEFAULT
  if x.dtype != jnp.float32:
    return product(x, z, once)
  if exact != lax.Precision.HIGH:
    return product(x, z, exact)
  (x, less_x), (z, less_z) = _halves(x), _halves(z)
  return product(x, z, once) + (product(x, less_z, once) + product(less_x, z, once))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
