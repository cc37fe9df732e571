"""The recurrence over a mesh: batch and channels apart, time by summary and replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from models.kernels import partition
from models.kernels.linear_scan import xla
from models.kernels.partition import Axes

Parts = tuple[jax.Array, ...]


def forward(
  run: Callable[..., Any], a: Parts, b: Parts, h0: Parts, *, reverse: bool, axes: Axes
) -> tuple[Parts, Parts, Any]:
  """(y, h_last) of `run`, a backend's `forward`, and the state that enters each part in time."""

  def part(a: Parts, b: Parts, h0: Parts) -> tuple[Parts, Parts, Any]:
    if not axes.length:
      return *run(a, b, h0, reverse=reverse), partition.own(h0)
    entered, left = passed(run, a, b, h0, reverse=reverse, axes=axes)
    y, _ = run(a, b, entered, reverse=reverse)
    return y, left, partition.own(entered)

  specs = _specs(a, b, axes)
  return partition.over(part, (a, b, h0), specs, (*specs[1:], axes.own))


def backward(
  run: Callable[..., Any], run_back: Callable[..., Any], a: Parts, y: Parts, entered: Any,
  dy: Parts, dh_last: Parts, *, reverse: bool, axes: Axes,
) -> tuple[Parts, Parts, Parts]:  # fmt: skip
  """(da, db, dh0) by a backend's pair of functions, given what `forward` has kept."""

  def part(a: Parts, y: Parts, h0: Any, dy: Parts, dh_last: Parts) -> Any:
    h0, dh0 = partition.owned(h0), None
    if axes.length:
      dh_last, dh0 = passed_back(run, a, dy, dh_last, reverse=reverse, axes=axes)
    da, db, own_dh0 = run_back(a, y, h0, dy, dh_last)
    if a[0].ndim == 1:
      da = lax.psum(da, axes.batch + axes.length)
    return da, db, dh0 or own_dh0

  of_a, of_b, of_h = _specs(a, y, axes)
  specs = (of_a, of_b, axes.own, of_b, of_h)
  return partition.over(part, (a, y, entered, dy, dh_last), specs, (of_a, of_b, of_h))


def passed(
  run: Callable[..., Any], a: Parts, b: Parts, h0: Parts, *, reverse: bool, axes: Axes
) -> tuple[Parts, Parts]:
  """The state that enters this part in time, and the one that leaves the last."""
  _, added = run(a, b, tuple(map(jnp.zeros_like, h0)), reverse=reverse, states=False)
  decay = xla.native(a)
  factor = jnp.prod(decay, axis=-2) if a[0].ndim > 1 else decay ** b[0].shape[-2]
  start = xla.native(h0)
  factor = jnp.broadcast_to(factor, start.shape)
  found = partition.passed_on(factor, xla.native(added), start, axes.length, reverse=reverse)
  entered, left = map(xla.parts, found)
  return entered, left


def passed_back(
  run: Callable[..., Any], a: Parts, dy: Parts, dh_last: Parts, *, reverse: bool, axes: Axes
) -> tuple[Parts, Parts]:
  """The gradient of the state that leaves this part, and that of the one that enters the first.

  s_t = conj(a_t) g_t, with g as in `xla.adjoint`, is a recurrence of the same form backwards,
  s_t = conj(a_t) s_{t+1} + conj(a_t) dy_t.
  """
  conj = xla.parts(jnp.conj(xla.native(a)))
  wide = xla.native(tuple(x.astype(a[0].dtype) for x in dy))
  driven = xla.parts(jnp.conj(xla.native(a)) * wide)
  return passed(run, conj, driven, dh_last, reverse=not reverse, axes=axes)


def _specs(a: Parts, b: Parts, axes: Axes) -> tuple[P, P, P]:
  """Of a, b and h0; the batch is the first of the axes in front."""
  lead = (axes.batch, *(None for _ in b[0].shape[1:-2]))[: b[0].ndim - 2]
  sequence, state = P(*lead, axes.length, axes.channels), P(*lead, axes.channels)
  decay = P(axes.channels) if a[0].ndim == 1 else sequence
  return decay, sequence, state
