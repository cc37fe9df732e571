"""A core on a mesh: each device runs its part, and what a part needs of the others is exchanged.

XLA partitions its own operations but no kernel's call, and a loop over time that is cut between
devices it runs on all of them, from sequences that it gathers. So where the axes are known the
cores run under `jax.shard_map`. A sequence whose time is cut is read twice: each part first makes
one number of itself, the factor and the sum by which it changes a state that passes through; these
are gathered, and every part then starts from the state that enters it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from models.kernels import dispatch

Names = tuple[str, ...]


class Axes(NamedTuple):
  """The mesh axes over which operands lie."""

  batch: Names
  length: Names
  channels: Names

  @property
  def own(self) -> P:
    """Of what every device has for itself, as `own` below stacks it."""
    return P(self.batch + self.length + self.channels)


def find(name: str, spec: P | None, x: jax.Array, sizes: Sequence[int]) -> Axes | None:
  """The axes of (batch, time, channels), of these sizes, on the mesh that is current.

  They are those of `spec`, or else, on a mesh with axes of Explicit type, those of `x`. An axis
  that does not divide its size is left out; so are those that are Manual already.

  Returns: None where nothing is to be mapped: no axes are known, or every device has its part.

  Raises: ValueError for axes that the mesh does not have; `name` is what `spec` is of.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if spec is None:
    spec = jax.typeof(x).sharding.spec
    if not any(spec):
      return None
  entries = (*spec, *(None,) * (3 - len(spec)))
  given = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
  if unknown := [n for names in given for n in names if n not in mesh.axis_names]:
    known = ", ".join(mesh.axis_names) or "none: no mesh is current, see jax.set_mesh"
    raise ValueError(f"spec of {name}: {', '.join(unknown)}; accepted: axes of the mesh ({known})")
  if mesh.empty or dispatch.whole():
    return None
  left = []
  for names, size in zip(given, sizes, strict=True):
    free = tuple(n for n in names if n not in mesh.manual_axes)
    left.append(free if size % ways(free) == 0 else ())
  return Axes(*left)


def named(*names: str) -> P | None:
  """`spec` of logical axes such as ("batch", "length", "state"), by the rules that are current."""
  rules = nn.get_logical_axis_rules()
  return nn.logical_to_mesh_axes(names, rules) if rules else None


def ways(names: Names) -> int:
  """How many parts axes of the current mesh make together."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[n] for n in names)


def over(function: Callable[..., Any], operands: Any, specs: Any, out_specs: Any) -> Any:
  """Calls `function` on each device with its parts of `operands`; specs may be prefixes."""
  mesh = jax.sharding.get_abstract_mesh()
  free = set(mesh.axis_names) - set(mesh.manual_axes)
  if AxisType.Explicit in mesh.axis_types:
    full = jax.tree.broadcast(specs, operands)
    operands = jax.tree.map(jax.sharding.reshard, operands, full)
  mapped = jax.shard_map(
    function, in_specs=specs, out_specs=out_specs, axis_names=free, check_vma=False
  )
  return mapped(*operands)


def own(tree: Any) -> Any:
  """What a device keeps for itself, with an axis along which those of all devices are stacked."""
  return jax.tree.map(lambda x: x[None], tree)


def owned(tree: Any) -> Any:
  """The inverse of `own`."""
  return jax.tree.map(lambda x: x[0], tree)


def passed_on(factor: Any, added: Any, start: Any, names: Names, *, reverse: bool) -> Any:
  """What enters each part in time of h -> factor h + added, and what leaves the last one.

  Args:
    factor, added: of this device's part; complex or real.
    start: what enters the first part; with `reverse`, the last.
    names: the mesh axes over which time lies.
  """
  parts = lax.all_gather((factor, added), names)

  def step(h: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
    return part[0] * h + part[1], h

  left, entered = lax.scan(step, start, parts, reverse=reverse)
  return entered[lax.axis_index(names)], left
