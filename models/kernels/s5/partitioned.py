"""S5 over a mesh: batch and states apart, time by summary and replay.

Where states are cut, every device has a part of each sum over them, and the direct term is added
by the first alone. The summary in time is the recurrence of `linear_scan` between plain products;
only the replay is the fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from models.kernels import dispatch, partition
from models.kernels.linear_scan import interface as scan
from models.kernels.linear_scan import partitioned as scan_partitioned
from models.kernels.partition import Axes
from models.kernels.s5 import xla

Pair = tuple[jax.Array, ...]


def forward(
  run: Callable[..., Any],
  u: jax.Array,
  a: tuple[Pair, ...],
  scale: tuple[Pair | None, ...],
  B: Pair,
  C: Pair,
  D: jax.Array,
  x0: tuple[Pair, ...],
  *,
  reverses: tuple[bool, ...],
  axes: Axes,
) -> tuple[jax.Array, tuple[Pair, ...], Any]:
  """As a backend's, by one's `forward`; kept is what that keeps and the states entering a part."""

  def part(u: jax.Array, a: Any, scale: Any, B: Pair, C: Any, D: jax.Array, x0: Any) -> Any:
    entered, left = x0, None
    if axes.length:
      drives = xla.drives(u, scale, B)
      entered, left = _each(scan_partitioned.passed, a, drives, x0, reverses, axes)
    y, x_last, saved = run(u, a, scale, B, _flat(C), _once(D, axes), entered)
    return _summed(y, axes), left or x_last, partition.own((saved, entered))

  operands = u, a, scale, B, _by_direction(C, len(a)), D, x0
  specs = _specs(operands, axes)
  return partition.over(part, operands, specs, (specs[0], specs[-1], axes.own))


def backward(
  run_back: Callable[..., Any],
  saved: Any,
  u: jax.Array,
  a: tuple[Pair, ...],
  scale: tuple[Pair | None, ...],
  B: Pair,
  C: Pair,
  D: jax.Array,
  x0: tuple[Pair, ...],
  dy: jax.Array,
  dx_last: tuple[Pair, ...],
  *,
  reverses: tuple[bool, ...],
  axes: Axes,
) -> tuple[Any, ...]:
  """As a backend's, by one's `backward`."""

  def part(
    saved: Any, u: jax.Array, a: Any, scale: Any, B: Pair, C: Any, D: Any, dy: Any, end: Any
  ):
    (saved, entered), dx0 = partition.owned(saved), None
    if axes.length:
      end, dx0 = _each(scan_partitioned.passed_back, a, xla.slopes(dy, C), end, reverses, axes)
    du, da, dscale, dB, dC, dD, own_dx0 = run_back(
      saved, u, a, scale, B, _flat(C), _once(D, axes), entered, dy, end
    )
    of_all = partial(lax.psum, axis_name=axes.batch + axes.length)
    da, dscale = jax.tree.map(lambda x: of_all(x) if x.ndim == 1 else x, (da, dscale))
    dB, dC, dD = of_all((dB, _by_direction(dC, len(a)), dD))
    return _summed(du, axes), da, dscale, dB, dC, dD, dx0 or own_dx0

  operands = u, a, scale, B, _by_direction(C, len(a)), D
  *specs, state = _specs(operands, axes)
  du, da, dscale, dB, dC, dD, dx0 = partition.over(
    part,
    (saved, *operands, dy, dx_last),
    (axes.own, *specs, specs[0], state),
    (*specs, state),
  )
  return du, da, dscale, dB, _flat(dC), dD, dx0


def _each(
  passed: Callable[..., Any], a: Any, drives: Any, starts: Any, reverses: Any, axes: Axes
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
  """`passed` for each direction: what enters this part in time, and what leaves the last."""
  run = partial(dispatch.forward, scan.IMPLEMENTATIONS, None)
  entered, left = zip(
    *(
      passed(run, *sides, reverse=reverse, axes=axes)
      for *sides, reverse in zip(a, drives, starts, reverses, strict=True)
    ),
    strict=True,
  )
  return entered, left


def _specs(operands: Any, axes: Axes) -> tuple[Any, ...]:
  """Of u, a, scale, B, C by direction, D and x0."""
  sequence, state = P(axes.batch, axes.length), P(axes.batch, axes.channels)

  def decay(x: jax.Array) -> P:
    return P(axes.channels) if x.ndim == 1 else P(*sequence, axes.channels)

  a, scale = jax.tree.map(decay, operands[1:3])
  return sequence, a, scale, P(axes.channels), P(None, None, axes.channels), P(), state


def _by_direction(C: Pair, directions: int) -> Pair:
  """(H, directions, P): the parts of both directions are of the same states."""
  return tuple(x.reshape(len(x), directions, -1) for x in C)


def _flat(C: Pair) -> Pair:
  return tuple(x.reshape(len(x), -1) for x in C)


def _once(D: jax.Array, axes: Axes) -> jax.Array:
  if not axes.channels:
    return D
  return jnp.where(lax.axis_index(axes.channels) == 0, D, jnp.zeros_like(D))


def _summed(y: jax.Array, axes: Axes) -> jax.Array:
  """Over the parts of the states."""
  if not axes.channels:
    return y
  wide = jnp.promote_types(y.dtype, jnp.float32)
  return lax.psum(y.astype(wide), axes.channels).astype(y.dtype)
