"""Real FFTs along the last axis that stay where their operand is.

XLA's partitioner gathers the operand of an FFT onto every device even where the axis transformed is
whole on each (jax-ml/jax#15680), so the partitioning is given here. TPU compilers do not ask for it
(jax-ml/jax#38196), they get `dft.py`. Otherwise these are `jnp.fft.rfft` and `jnp.fft.irfft`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def rfft(x: jax.Array, size: int) -> jax.Array:
  """(..., T) real to (..., size // 2 + 1), `x` padded with zeros to `size`."""
  return _transform(jnp.fft.rfft, size)(x)


def irfft(x: jax.Array, size: int) -> jax.Array:
  """(..., size // 2 + 1) to (..., size) real."""
  return _transform(jnp.fft.irfft, size)(x)


@functools.cache
def _transform(transform: Callable[..., jax.Array], size: int) -> Callable[[jax.Array], jax.Array]:
  """`transform(x, size)`, partitioned over all axes but the last, with `vmap` and derivatives."""

  def whole(x: jax.Array) -> jax.Array:
    # Of two axes: with more, XLA may choose a memory layout that its FFT on CPU then refuses.
    return transform(x.reshape(-1, x.shape[-1]), size).reshape(*x.shape[:-1], -1)

  def partition(mesh: Any, operands: Any, result: Any) -> Any:
    rows = result.sharding
    if isinstance(rows, NamedSharding):  # in a `shard_map` over some of the axes it is not
      # Neither's last axis may be split, whatever those around would like.
      rows = NamedSharding(mesh, PartitionSpec(*rows.spec[: len(result.shape) - 1]))
    return mesh, whole, rows, (rows,)

  partitioned = custom_partitioning(whole)
  partitioned.def_partition(
    partition, sharding_rule="... m -> ... n", need_replication_factors=("m", "n")
  )

  mapped = jax.custom_batching.custom_vmap(partitioned)

  @mapped.def_vmap
  def _(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    return mapped(x), True  # the mapped axis is in front, one more to partition over

  function = jax.custom_jvp(mapped)

  @function.defjvp
  def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The tangent by XLA's own transform: nothing above can be transposed.
    return function(*primals), whole(*tangents)

  return function
