"""The recurrence as a Pallas kernel for TPUs: time in sequence, channels in the lanes.

    grid (batch rows / R, channels / D, time / T)      time innermost, in order

     L ┌──────── D ────────┐    One program holds R rows of the batch, D channels and T steps in
       │ T  ░░░░░░░░░░░░░░ │    fast memory while the next block is on its way. A step is one row of
       │ ↓  ░░░░░░░░░░░░░░ │    each block; the carry stays in registers, and between blocks in a
       │    ▒ next block ▒ │    float32 scratch.
       └───────────────────┘

Operands stay as they are in memory, (B, L, N): a layout in whole registers would make the loop
shorter and the traffic around it three times as large. The recurrence waits for its own result, so
that several rows of the batch share a program where the channels alone do not fill it. Any length
and any number of channels: the last blocks hang over the edge, rows beyond it are never read into
the carry, channels beyond it touch nobody, and what is written there is dropped. Sixteen-bit
sequences are widened one block at a time, because a single row of them cannot be addressed.

The backward pass is one kernel as well: the same loop in the other direction over `y` and `dy`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.kernels import rows
from models.kernels.rows import GROUP, Row

Parts = tuple[jax.Array, ...]

LANES = 1024  # channels of a program: eight registers, enough to hide the latency of a step
STEPS = 256  # time steps of a block
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
BUDGET = 10 * 2**20  # bytes of fast memory, of the 16 MiB that the smallest chip has


class Blocks(NamedTuple):
  """How (B, L, N) is cut."""

  batch: int
  length: int
  width: int
  rows: int  # R, divides the batch
  steps: int  # T
  lanes: int  # D

  @property
  def grid(self) -> tuple[int, int, int]:
    return (
      self.batch // self.rows,
      pl.cdiv(self.width, self.lanes),
      pl.cdiv(self.length, self.steps),
    )

  def valid(self, block: jax.Array) -> jax.Array | int:
    """How many steps of a block in time are inside the sequence."""
    return rows.valid(self.length, self.steps, block)


def refusal(a: Parts, b: Parts, h0: Parts) -> str | None:
  """Why the kernels cannot run these operands."""
  if h0[0].dtype != jnp.float32:
    return f"dtype {h0[0].dtype} of the carry; it needs float32"
  if b[0].dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {b[0].dtype} of b; it needs float32 or bfloat16"
  return None


def forward(
  a: Parts, b: Parts, h0: Parts, *, reverse: bool, states: bool = True, interpret: bool = False
) -> tuple[Parts, Parts]:
  """See `interface.py`. With `interpret` the kernel's steps run one by one on any platform."""
  shape, carry = b[0].shape, h0[0].dtype
  if 0 in shape:
    return b if states else (), h0
  a, b, h0, per_step = _flat(a, b, h0)
  low = b[0].dtype != carry
  moved = len(b) * (b[0].dtype.itemsize * (1 + states) + (carry.itemsize if per_step else 0))
  cut = _cut(b[0].shape, 2 * moved + 2 * len(b) * carry.itemsize * low)
  last = cut.grid[2] - 1
  sequence = pl.BlockSpec(
    (cut.rows, cut.steps, cut.lanes), lambda i, j, k: (i, last - k if reverse else k, j)
  )
  state = pl.BlockSpec((cut.rows, 1, cut.lanes), lambda i, j, k: (i, 0, j))
  constant = pl.BlockSpec((1, cut.lanes), lambda i, j, k: (0, j))

  each = len(b)
  carries = [pltpu.VMEM((cut.rows, 1, cut.lanes), carry)] * each
  wide = [pltpu.VMEM((cut.rows, cut.steps, cut.lanes), carry)] * each if low else []
  with rows.indices_of_32_bits(interpret):
    y, h_last = pl.pallas_call(
      partial(_forward, cut=cut, reverse=reverse, per_step=per_step),
      grid=cut.grid,
      in_specs=((sequence if per_step else constant,) * each, (sequence,) * each, (state,) * each),
      out_specs=((sequence,) * each * states, (state,) * each),
      out_shape=(tuple(map(_like, b)) if states else (), tuple(map(_like, h0))),
      scratch_shapes=(carries, wide, wide if states else []),
      compiler_params=ORDER,
      cost_estimate=_cost(b[0].size, 2 if each == 1 else 8, moved),
      interpret=interpret,
      name="linear_scan",
    )(a, b, h0)
  return _shaped(y, shape), _shaped(h_last, (*shape[:-2], shape[-1]))


def backward(
  a: Parts, y: Parts, h0: Parts, dy: Parts, dh_last: Parts, *, reverse: bool, interpret=False
) -> tuple[Parts, Parts, Parts]:
  """See `interface.py`.

  The carry is rows.conj(a_t) g_t: it begins as the gradient of h_last and ends as that of h0.
  """
  shape, carry = y[0].shape, h0[0].dtype
  if 0 in shape:
    return tuple(map(jnp.zeros_like, a)), dy, dh_last
  shape_a = a[0].shape
  a, y, h0, per_step = _flat(a, y, h0)
  _, dy, dh_last, _ = _flat(a, dy, dh_last)
  each, low = len(y), y[0].dtype != carry
  moved = each * (y[0].dtype.itemsize * 3 + (2 * carry.itemsize if per_step else 0))
  cut = _cut(y[0].shape, 2 * moved + 3 * each * carry.itemsize * low)
  last = cut.grid[2] - 1
  # The rows of one register, just before a block (after it, if reverse): y at its edge.
  tile = GROUP * carry.itemsize // y[0].dtype.itemsize
  tiles, final = cut.steps // tile, pl.cdiv(cut.length, tile) - 1

  def edge(i: jax.Array, j: jax.Array, k: jax.Array) -> tuple[Any, ...]:
    where = (k + 1) * tiles if reverse else (last - k) * tiles - 1
    return i, jnp.clip(where, 0, final), j

  sequence = pl.BlockSpec(
    (cut.rows, cut.steps, cut.lanes), lambda i, j, k: (i, k if reverse else last - k, j)
  )
  state = pl.BlockSpec((cut.rows, 1, cut.lanes), lambda i, j, k: (i, 0, j))
  constant = pl.BlockSpec((1, cut.lanes), lambda i, j, k: (0, j))
  total = pl.BlockSpec((1, 1, cut.lanes), lambda i, j, k: (i, 0, j))

  edges = y if last else ()
  groups = jax.ShapeDtypeStruct((cut.grid[0], 1, cut.width), carry)
  carries = [pltpu.VMEM((cut.rows, 1, cut.lanes), carry)] * each
  wide = [pltpu.VMEM((cut.rows, cut.steps, cut.lanes), carry)] * each if low else []
  with rows.indices_of_32_bits(interpret):
    da, db, dh0 = pl.pallas_call(
      partial(_backward, cut=cut, reverse=reverse, per_step=per_step),
      grid=cut.grid,
      in_specs=(
        (sequence if per_step else constant,) * each,
        (sequence,) * each,
        (pl.BlockSpec((cut.rows, tile, cut.lanes), edge),) * len(edges),
        (state,) * each,
        (sequence,) * each,
        (state,) * each,
      ),
      out_specs=((sequence if per_step else total,) * each, (sequence,) * each, (state,) * each),
      out_shape=(
        tuple(map(_like, a)) if per_step else (groups,) * each,
        tuple(map(_like, dy)),
        tuple(map(_like, h0)),
      ),
      scratch_shapes=(carries, carries, [] if per_step else carries, wide, wide, wide),
      compiler_params=ORDER,
      cost_estimate=_cost(y[0].size, 4 if each == 1 else 16, moved),
      interpret=interpret,
      name="linear_scan_backward",
    )(a, y, edges, h0, dy, dh_last)
  da = _shaped(da, shape_a) if per_step else tuple(part.sum((0, 1)) for part in da)
  return da, _shaped(db, shape), _shaped(dh0, (*shape[:-2], shape[-1]))


def _forward(
  a: Any, b: Any, h0: Any, y: Any, h_last: Any, carries: Any, b_wide: Any, y_wide: Any, *,
  cut: Blocks, reverse: bool, per_step: bool,
) -> None:  # fmt: skip
  """The kernel: references to the parts of a block, in, out and scratch."""
  k = pl.program_id(2)
  pl.when(k == 0)(partial(rows.copy, h0, carries))
  rows.copy(b, b_wide)
  source, target = b_wide or b, y_wide or y
  decay = None if per_step else tuple(part[...] for part in a)

  def step(t: jax.Array, j: int | None, states: tuple[Row, ...]) -> tuple[Row, ...]:
    after = []
    for r, h in enumerate(states):
      new = rows.add(rows.times(decay or rows.row(a, r, t, j), h), rows.row(source, r, t, j))
      if target:
        rows.put(target, r, t, j, new)
      after.append(new)
    return tuple(after)

  n = cut.valid(cut.grid[2] - 1 - k if reverse else k)
  states = tuple(tuple(part[r] for part in carries) for r in range(cut.rows))
  rows.store(carries, rows.steps(n, step, states, descending=reverse))
  rows.copy(y_wide, y)
  pl.when(k == cut.grid[2] - 1)(partial(rows.copy, carries, h_last))


def _backward(
  a: Any, y: Any, edges: Any, h0: Any, dy: Any, dh_last: Any, da: Any, db: Any, dh0: Any,
  carries: Any, edge: Any, totals: Any, y_wide: Any, dy_wide: Any, db_wide: Any, *,
  cut: Blocks, reverse: bool, per_step: bool,
) -> None:  # fmt: skip
  """The kernel. `edge` is the state before the first step of the block, in the order of time."""
  k = pl.program_id(2)
  last = cut.grid[2] - 1

  @pl.when(k == 0)
  def _() -> None:
    rows.copy(dh_last, carries)
    for total in totals:
      total[...] = jnp.zeros_like(total)

  pl.when(k == last)(partial(rows.copy, h0, edge))
  if edges:
    at = 0 if reverse else edges[0].shape[1] - 1

    @pl.when(k < last)
    def _() -> None:
      for part, row in zip(edge, edges, strict=True):
        part[...] = row[...].astype(part.dtype)[:, at : at + 1]

  rows.copy(y, y_wide)
  rows.copy(dy, dy_wide)
  states, source, target = y_wide or y, dy_wide or dy, db_wide or db
  decay = None if per_step else tuple(part[...] for part in a)
  n = cut.valid(k if reverse else last - k)

  def before(r: int, t: jax.Array, j: int | None) -> Row:
    """The state that step t started from."""
    if reverse:
      if j is not None and j < GROUP - 1:
        return rows.row(states, r, t + 1, j + 1)
      inside = rows.row(states, r, jnp.minimum(t + 1, n - 1))
      first = t == n - 1
    else:
      if j:
        return rows.row(states, r, t - 1, j - 1)
      inside = rows.row(states, r, jnp.maximum(t - 1, 0))
      first = t == 0
    return tuple(jnp.where(first, e[r], x) for e, x in zip(edge, inside, strict=True))

  def step(t: jax.Array, j: int | None, carry: Any) -> Any:
    after = []
    for r, (c, total) in enumerate(carry):
      g = rows.add(rows.row(source, r, t, j), c)
      rows.put(target, r, t, j, g)
      slope = rows.times(g, rows.conj(before(r, t, j)))
      if per_step:
        rows.put(da, r, t, j, slope)
      summed = total if per_step else rows.add(total, slope)
      after.append((rows.times(rows.conj(decay or rows.row(a, r, t, j)), g), summed))
    return tuple(after)

  carry = tuple(
    (tuple(part[r] for part in carries), tuple(part[r] for part in totals)) for r in range(cut.rows)
  )
  carry = rows.steps(n, step, carry, descending=not reverse)
  rows.store(carries, tuple(c for c, _ in carry))
  rows.store(totals, tuple(total for _, total in carry))
  rows.copy(db_wide, db)

  @pl.when(k == last)
  def _() -> None:
    rows.copy(carries, dh0)
    for part, total in zip(() if per_step else da, totals, strict=True):
      part[...] = total[...].sum(axis=0, keepdims=True)


def _cut(shape: tuple[int, ...], bytes_of_element: int) -> Blocks:
  """Blocks that fit: `bytes_of_element` counts buffers, two of each operand, and scratch."""
  batch, length, width = shape
  lanes = min(width, LANES)
  together = next(r for r in (8, 4, 2, 1) if batch % r == 0 and (r == 1 or r * lanes <= LANES))
  steps = STEPS
  while steps > 32 and steps * together * max(lanes, 128) * bytes_of_element > BUDGET:
    steps //= 2
  return Blocks(batch, length, width, together, min(steps, length), lanes)


def _flat(a: Parts, b: Parts, h0: Parts) -> tuple[Parts, Parts, Parts, bool]:
  """With one batch axis; a constant decay as (1, N), a state as (B, 1, N)."""
  *lead, length, width = b[0].shape
  batch = 1
  for n in lead:
    batch *= n
  per_step = a[0].shape == b[0].shape and a[0].ndim > 1
  sequence, state = (batch, length, width), (batch, 1, width)
  a = _shaped(a, sequence if per_step else (1, width))
  return a, _shaped(b, sequence), _shaped(h0, state), per_step


def _shaped(x: Parts, shape: tuple[int, ...]) -> Parts:
  return tuple(part.reshape(shape) for part in x)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _cost(elements: int, flops: int, moved: int) -> pl.CostEstimate:
  return pl.CostEstimate(flops=flops * elements, transcendentals=0, bytes_accessed=moved * elements)
