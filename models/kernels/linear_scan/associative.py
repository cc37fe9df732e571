"""The recurrence as a tree of `lax.associative_scan`, any platform.

About 2 log L passes over memory where a loop has one, but each of them in parallel over time: for a
GPU or a TPU without a kernel the right choice, since there every step of a loop costs a launch, or
a copy of the sequence. The functions are those of `xla.py`. Products of decays arise that no state
needs; where these overflow, a state of exactly zero becomes NaN: decays are meant to be at most
one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from models.kernels.linear_scan import xla
from models.kernels.linear_scan.xla import Buffer, Parts


def scan(a: Parts, b: Buffer, h0: jax.Array, *, reverse: bool) -> tuple[Buffer, jax.Array]:
  """The states, in a buffer like `b`, and the last one, native like `h0` (..., N)."""
  x = xla.native(b)
  if x.shape[-2] == 0:
    return b, h0
  y = _tree(_decays(a, x), x, h0, reverse)
  return _like(b, y), y[..., 0 if reverse else -1, :]


def last(a: Parts, b: Buffer, h0: jax.Array, *, reverse: bool) -> jax.Array:
  """The last state of `scan`."""
  return scan(a, b, h0, reverse=reverse)[1]


def adjoint(
  a: Parts, y: Buffer, h0: jax.Array, dy: Buffer, dh_last: jax.Array, *, reverse: bool
) -> tuple[Parts, Buffer, jax.Array]:
  """Gradients (da, db, dh0) of `scan`, in the convention where d of (re, im) is d re + i d im."""
  x = xla.native(dy)
  length = x.shape[-2]
  if length == 0:
    return tuple(map(jnp.zeros_like, a)), dy, dh_last
  decay = jnp.conj(_decays(a, x))
  # g_t = dy_t + conj(a_{t+1}) g_{t+1}, into which the gradient of h_last goes undiminished.
  one = jnp.ones_like(decay[..., :1, :])
  pieces = [one, decay[..., :-1, :]] if reverse else [decay[..., 1:, :], one]
  g = _tree(jnp.concatenate(pieces, axis=-2), x, dh_last, not reverse)
  first = length - 1 if reverse else 0
  slope = g * jnp.conj(_before(y, h0, reverse))
  if a[0].ndim == 1:
    slope = slope.sum(axis=tuple(range(slope.ndim - 1)))
  return xla.parts(slope), _like(dy, g), decay[..., first, :] * g[..., first, :]


def _tree(decay: jax.Array, x: jax.Array, h0: jax.Array, reverse: bool) -> jax.Array:
  """h_t = decay_t h_{t-1} + x_t from h0 (..., N); the axes of `decay` before time may be 1."""
  t = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
  first = x.shape[-2] - 1 if reverse else 0
  x = jnp.where(t == first, x + decay * h0[..., None, :], x)

  def combine(earlier, later):
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]

  return lax.associative_scan(combine, (decay, x), reverse=reverse, axis=x.ndim - 2)[1]


def _before(y: Buffer, h0: jax.Array, reverse: bool) -> jax.Array:
  """The state before each step, native."""
  start, states = h0[..., None, :], xla.native(y)
  pieces = [states[..., 1:, :], start] if reverse else [start, states[..., :-1, :]]
  return jnp.concatenate(pieces, axis=-2)


def _decays(a: Parts, x: jax.Array) -> jax.Array:
  """(..., L, N), of a constant decay (1, ..., L, N)."""
  decay = xla.native(a)
  if decay.ndim > 1:
    return decay
  return jnp.broadcast_to(decay, (*(1 for _ in x.shape[:-2]), *x.shape[-2:]))


def _like(buffer: Buffer, y: jax.Array) -> Buffer:
  return xla.parts(y) if isinstance(buffer, tuple) else jnp.stack([y.real, y.imag], axis=-2)
