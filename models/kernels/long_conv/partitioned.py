"""The convolution over a mesh: batch and features apart; for time, features are dealt out instead.

A part in time of all features becomes, by one all-to-all, all times of a part of the features, and
back: what each device sends is its own share of the sequence, once each way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from models.kernels import partition
from models.kernels.partition import Axes


def forward(run: Callable[..., Any], *operands: Any, axes: Axes) -> jax.Array:
  """y of `run`, a backend's `forward`."""

  def part(u: jax.Array, k: Any, k_backward: Any, pre: Any, post: Any) -> jax.Array:
    u, pre, post = _whole((u, pre, post), axes)
    return _cut(run(u, k, k_backward, pre, post), axes)

  sequence, _ = _specs(axes)
  return partition.over(part, operands, _of_operands(axes), sequence)


def backward(run: Callable[..., Any], *operands: Any, axes: Axes) -> tuple[Any, ...]:
  """The gradients of a backend's `backward`."""

  def part(u: Any, k: Any, k_backward: Any, pre: Any, post: Any, dy: Any) -> tuple[Any, ...]:
    u, pre, post, dy = _whole((u, pre, post, dy), axes)
    du, dk, dk_backward, dpre, dpost = run(u, k, k_backward, pre, post, dy)
    du, dpre, dpost = _cut((du, dpre, dpost), axes)
    return du, *lax.psum((dk, dk_backward), axes.batch), dpre, dpost

  sequence, _ = _specs(axes)
  return partition.over(part, operands, (*_of_operands(axes), sequence), _of_operands(axes))


def _specs(axes: Axes) -> tuple[P, P]:
  """Of sequences and of kernels."""
  return P(axes.batch, axes.length, axes.channels), P(axes.channels + axes.length)


def _of_operands(axes: Axes) -> tuple[P, ...]:
  sequence, kernel = _specs(axes)
  return sequence, kernel, kernel, sequence, sequence


def _whole(sequences: Any, axes: Axes) -> Any:
  """All times of fewer features."""
  if not axes.length:
    return sequences
  deal = partial(lax.all_to_all, axis_name=axes.length, split_axis=2, concat_axis=1, tiled=True)
  return jax.tree.map(deal, sequences)


def _cut(sequences: Any, axes: Axes) -> Any:
  """The inverse of `_whole`."""
  if not axes.length:
    return sequences
  deal = partial(lax.all_to_all, axis_name=axes.length, split_axis=1, concat_axis=2, tiled=True)
  return jax.tree.map(deal, sequences)
