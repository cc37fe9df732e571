"""The recurrence as one loop over time, for CPUs.

The state at a step overwrites the row of `b` that it is made from: one read and one write an
element, no transposition of time to the front, no logarithmic tree. On CPU this is several times
faster than `lax.associative_scan` and than `lax.scan`. Complex problems keep their parts apart in
memory and form native complex numbers from one row at a time, because XLA then makes one kernel of
the arithmetic of a step, where separate parts become four. Inputs of 16 bits are widened as a whole
before the loop: within it XLA on CPU would convert the whole buffer at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Parts = tuple[jax.Array, ...]

# A sequence in memory: its parts, each (..., L, N), or one array (..., L, 2, N) of re and im.
Buffer = Any


def scan(a: Parts, b: Buffer, h0: jax.Array, *, reverse: bool) -> tuple[Buffer, jax.Array]:
  """The states, in a buffer like `b`, and the last one, native like `h0` (..., N)."""
  length = _length(b)
  if length == 0:  # a row of an empty sequence cannot even be traced
    return b, h0

  def step(i: jax.Array, carry: tuple[jax.Array, Buffer]) -> tuple[jax.Array, Buffer]:
    h, y = carry
    t = length - 1 - i if reverse else i
    h = _decay(a, t) * h + _row(y, t)
    return h, _put(y, h, t)

  h_last, y = lax.fori_loop(0, length, step, (h0, b))
  return y, h_last


def last(a: Parts, b: Buffer, h0: jax.Array, *, reverse: bool) -> jax.Array:
  """The last state of `scan`; nothing is written."""
  length = _length(b)

  def step(i: jax.Array, h: jax.Array) -> jax.Array:
    t = length - 1 - i if reverse else i
    return _decay(a, t) * h + _row(b, t)

  return lax.fori_loop(0, length, step, h0) if length else h0


def adjoint(
  a: Parts, y: Buffer, h0: jax.Array, dy: Buffer, dh_last: jax.Array, *, reverse: bool
) -> tuple[Parts, Buffer, jax.Array]:
  """Gradients (da, db, dh0) of `scan`, in the convention where d of (re, im) is d re + i d im.

  g_t = dy_t + conj(a_{t+1}) g_{t+1}, db_t = g_t, da_t = g_t conj(y_{t-1}), dh0 = conj(a_0) g_0,
  where conj(a_L) g_L is the gradient of h_last.

  The loop carries g of the step before, so that nothing but the new row is computed from the buffer
  it overwrites; a second reader would make XLA copy the whole buffer at every step. The first step
  is inside the loop, masked, because a row written outside costs copies as well. Gradients of a
  decay for each step take the place of the states, which nothing reads again: buffers of their own
  would first be filled with zeros.
  """
  length = _length(y)
  if length == 0:
    return tuple(jnp.zeros_like(part) for part in a), dy, dh_last
  constant, apart = a[0].ndim == 1, isinstance(y, tuple)
  last, first, back = (0, length - 1, 1) if reverse else (length - 1, 0, -1)

  def at(t: jax.Array) -> jax.Array:
    return jnp.clip(t, 0, length - 1)

  def step(i: jax.Array, carry: tuple[jax.Array, Any, Buffer]) -> tuple[jax.Array, Any, Buffer]:
    g, da, db = carry
    t = last + back * i
    g = _row(db, t) + jnp.where(i == 0, 1, jnp.conj(_decay(a, at(t - back)))) * g

    def slope(y: Buffer) -> jax.Array:
      return g * jnp.conj(jnp.where(t == first, h0, _row(y, at(t + back))))

    if constant:
      da = da + slope(y)
    elif apart:
      for k in range(len(da)):  # the second part from a buffer that has the first one already
        da = (*da[:k], _update(da[k], parts(slope(da))[k], t), *da[k + 1 :])
    else:
      da = _put(da, slope(y), t)
    return g, da, _put(db, g, t)

  into: Any = y
  if constant:
    into = jnp.zeros_like(h0)
  elif not apart:
    into = tuple(jnp.zeros_like(part) for part in a)
  g, da, db = lax.fori_loop(0, length, step, (dh_last, into, dy))
  if constant:
    da = parts(da.sum(axis=tuple(range(da.ndim - 1))))
  return da, db, jnp.conj(_decay(a, first)) * g


def forward(
  a: Parts, b: Parts, h0: Parts, *, reverse: bool, states: bool = True,
  scan: Callable[..., Any] = scan, last: Callable[..., Any] = last,
) -> tuple[Parts, Parts]:  # fmt: skip
  """See `interface.py`."""
  b_wide, start = _cast(b, h0[0].dtype), native(h0)
  if not states:
    return (), parts(last(a, b_wide, start, reverse=reverse))
  y, h_last = scan(a, b_wide, start, reverse=reverse)
  return _cast(y, b[0].dtype), parts(h_last)


def backward(
  a: Parts, y: Parts, h0: Parts, dy: Parts, dh_last: Parts, *, reverse: bool,
  adjoint: Callable[..., Any] = adjoint,
) -> tuple[Parts, Parts, Parts]:  # fmt: skip
  """See `interface.py`."""
  wide = h0[0].dtype
  da, db, dh0 = adjoint(
    a, _cast(y, wide), native(h0), _cast(dy, wide), native(dh_last), reverse=reverse
  )
  return da, _cast(db, dy[0].dtype), parts(dh0)


def native(x: Buffer) -> jax.Array:
  """One real or complex array of the parts. Of a whole sequence it should end in a fusion."""
  if not isinstance(x, tuple):
    x = (x[..., 0, :], x[..., 1, :])
  return x[0] if len(x) == 1 else lax.complex(*x)


def parts(x: jax.Array) -> Parts:
  """The inverse of `native`."""
  return (x.real, x.imag) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,)


def _cast(x: Parts, dtype: jnp.dtype) -> Parts:
  return tuple(part.astype(dtype) for part in x)


def _length(x: Buffer) -> int:
  return x[0].shape[-2] if isinstance(x, tuple) else x.shape[-3]


def _decay(a: Parts, t: jax.Array | int) -> jax.Array:
  return native(a) if a[0].ndim == 1 else native(tuple(_slice(part, t) for part in a))


def _row(x: Buffer, t: jax.Array | int) -> jax.Array:
  """The row at time t, native."""
  if isinstance(x, tuple):
    return native(tuple(_slice(part, t) for part in x))
  return lax.complex(_slice(x, t, 0), _slice(x, t, 1))


def _put(x: Buffer, row: jax.Array, t: jax.Array | int) -> Buffer:
  """`x` with the native row at time t."""
  if isinstance(x, tuple):
    return tuple(_update(whole, part, t) for whole, part in zip(x, parts(row), strict=True))
  return _update(_update(x, row.real, t, 0), row.imag, t, 1)


def _slice(x: jax.Array, *where: jax.Array | int) -> jax.Array:
  """x[..., *where, :]"""
  lead, width = x.shape[: x.ndim - 1 - len(where)], x.shape[-1]
  starts, sizes = (*(0 for _ in lead), *where, 0), (*lead, *(1 for _ in where), width)
  return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False).reshape(*lead, width)


def _update(x: jax.Array, row: jax.Array, *where: jax.Array | int) -> jax.Array:
  lead, width = x.shape[: x.ndim - 1 - len(where)], x.shape[-1]
  row = row.reshape(*lead, *(1 for _ in where), width)
  starts = (*(0 for _ in lead), *where, 0)
  return lax.dynamic_update_slice(x, row, starts, allow_negative_indices=False)
