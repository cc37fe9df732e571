"""The recurrence as a Pallas kernel for GPUs (Mosaic GPU, sm_90 and up): a thread is a channel.

    grid (batch, chunks, channels / 128, time / T)       time in order, the rest in parallel

     L ┌── 128 ──┐    128 threads run as many channels of one row of the batch. The copy engine
       │ T  ░░░░ │    (TMA) has blocks of T steps on their way to shared memory, three at any time.
       │ ↓  ░░░░ │    A thread loads eight steps of its channel into registers, runs them, and then
       │    ▒▒▒▒ │    stores eight: no load may pass a store, so that step by step each would wait
       └─────────┘    for shared memory. The carry is there between blocks, in float32.

Operands stay as they are in memory, (B, L, N). The last blocks hang over the edge: the copy engine
neither reads nor writes beyond the end of an axis (except as `_room` says), and steps beyond the
sequence leave the carry alone. It wants rows of whole 16 bytes, so that an N that is no multiple of
4 (8 in bfloat16) is padded.

One such program keeps about a thirtieth of an H100's bandwidth busy. Where B N / 128 of them are
too few, time is cut into chunks as well: a first launch makes of each chunk the factor and the sum
by which it changes a state that passes through, a second runs the recurrence over these, and a
third starts every chunk from the state that enters it. (Where such a factor overflows, a state of
exactly zero becomes NaN: decays are meant to be at most one.)

The backward pass is the same loop in the other direction over `y` and `dy`. Each program sums the
gradient of a constant decay in the order of time; nothing is atomic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from models.kernels import mosaic, rows
from models.kernels.linear_scan import xla
from models.kernels.mosaic import CHUNK, ENOUGH, WANTED
from models.kernels.rows import GROUP, Row

Parts = tuple[jax.Array, ...]

LANES = 128  # channels of a program, one a thread
STEPS = 32  # time steps of a block, at most
STAGES = 3  # blocks in shared memory
BUDGET = 160 * 2**10  # bytes of shared memory for them, of the 227 KiB of an SM
AXES = ("batch", "chunk", "channels")  # of the grid; the fourth, time, is the pipeline


class Blocks(NamedTuple):
  """How (B, L, N) is cut. The first `longer` chunks have one block more than the others."""

  batch: int
  length: int
  width: int
  steps: int  # T
  chunks: int

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.length, self.steps)

  @property
  def grid(self) -> tuple[int, int, int, int]:
    turns = pl.cdiv(self.blocks, self.chunks)
    return self.batch, self.chunks, pl.cdiv(self.width, LANES), turns

  @property
  def longer(self) -> int:
    return self.blocks % self.chunks

  def first(self, c: Any) -> Any:
    """The first block of chunk c, in the order of time."""
    return c * (self.blocks // self.chunks) + jnp.minimum(c, self.longer)

  def block(self, c: Any, k: jax.Array, descending: bool) -> tuple[jax.Array, jax.Array]:
    """The block that chunk c has as its k-th, and whether it is its first.

    All chunks take as many turns: one that is shorter begins with the same block twice.
    """
    again = jnp.where(c < self.longer, 0, 1) if self.longer else 0
    k = jnp.maximum(k - again, 0)
    return self.first(c + 1) - 1 - k if descending else self.first(c) + k, k == 0

  def valid(self, t: jax.Array, block: jax.Array) -> jax.Array | bool:
    """Whether step t of a block is inside the sequence."""
    return self.length % self.steps == 0 or block * self.steps + t < self.length

  def sequence(self, descending: bool) -> pl.BlockSpec:
    return pl.BlockSpec(
      (None, self.steps, LANES), lambda i, c, j, k: (i, self.block(c, k, descending)[0], j)
    )

  def edge(self, descending: bool) -> pl.BlockSpec:
    """The row that follows a block, one step further in the order in which blocks come."""

    def where(i: jax.Array, c: jax.Array, j: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
      block, _ = self.block(c, k, descending)
      t = block * self.steps - 1 if descending else (block + 1) * self.steps
      return i, jnp.clip(t, 0, self.length - 1), j

    return pl.BlockSpec((None, None, LANES), where)


STATE = pl.BlockSpec((None, None, LANES), lambda i, c, j, k: (i, c, j))  # of (B, chunks, N)
OUTER = pl.BlockSpec((None, LANES), lambda i, c, j, k: (i, j))  # of (B, N)


def refusal(a: Parts, b: Parts, h0: Parts) -> str | None:
  """Why the kernels cannot run these operands."""
  if h0[0].dtype != jnp.float32:
    return f"dtype {h0[0].dtype} of the carry; it needs float32"
  if b[0].dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {b[0].dtype} of b; it needs float32 or bfloat16"
  if (batch := math.prod(b[0].shape[:-2])) > 65535:
    return f"{batch} rows of the batch; it takes 65535"
  return None


def forward(
  a: Parts, b: Parts, h0: Parts, *, reverse: bool, states: bool = True, interpret: bool = False
) -> tuple[Parts, Parts]:
  """See `interface.py`. With `interpret` the kernel's steps run one by one on any platform."""
  shape = b[0].shape
  if 0 in shape:
    return b if states else (), h0

  def run(a: Parts, b: Parts, h0: Parts) -> tuple[Parts, Parts]:
    cut = _cut(a, b, b * states)
    options = dict(reverse=reverse, interpret=interpret)
    entered, h_last = _passed(a, b, h0, cut, **options)
    if cut.chunks > 1 and not states:
      return (), h_last
    y, left, _ = _launch(a, b, entered, cut=cut, states=states, **options)
    return y, tuple(part[:, 0 if reverse else -1] for part in left)

  y, h_last = mosaic.batched(run)(*_flat(a, b, h0))
  return _shaped(y, shape), _shaped(h_last, (*shape[:-2], shape[-1]))


def backward(
  a: Parts, y: Parts, h0: Parts, dy: Parts, dh_last: Parts, *, reverse: bool, interpret=False
) -> tuple[Parts, Parts, Parts]:
  """See `interface.py`. The carry is conj(a_t) g_t, so that it ends as the gradient of h0."""
  shape, constant = y[0].shape, a[0].ndim == 1
  if 0 in shape:
    return tuple(map(jnp.zeros_like, a)), dy, dh_last

  def run(a: Parts, y: Parts, h0: Parts, dy: Parts, dh_last: Parts) -> tuple[Parts, Parts, Parts]:
    cut = _cut(a, y, dy, dy, a)
    start, _ = _passed(a, dy, dh_last, cut, reverse=not reverse, interpret=interpret, adjoint=True)
    da, db, left = _launch_back(a, y, h0, dy, start, cut=cut, reverse=reverse, interpret=interpret)
    da = tuple(part.sum(1) for part in da) if constant else da
    return da, db, tuple(part[:, -1 if reverse else 0] for part in left)

  da, db, dh0 = mosaic.batched(run)(*_flat(a, y, h0, dy, dh_last))
  da = tuple(part.sum(0)[: shape[-1]] for part in da) if constant else _shaped(da, shape)
  return da, _shaped(db, shape), _shaped(dh0, (*shape[:-2], shape[-1]))


def _passed(
  a: Parts, b: Parts, h: Parts, cut: Blocks, *, adjoint: bool = False, **options: bool
) -> tuple[Parts, Parts]:
  """The state (B, chunks, N) that enters each chunk, and (B, N) that leaves the last.

  `h` (B, N) enters the first; the rest is as in `_launch`.
  """
  first = tuple(part[:, None] for part in h)
  if cut.chunks == 1:
    return first, h
  zeros = tuple(jnp.zeros((cut.batch, cut.chunks, cut.width), part.dtype) for part in h)
  _, added, factor = _launch(
    a, b, zeros, cut=cut, states=False, adjoint=adjoint, product=a[0].ndim == 3, **options
  )
  factor = factor or _powers(rows.conj(a) if adjoint else a, cut)
  again = _cut(factor, added, added)._replace(chunks=1)
  left, last, _ = _launch(factor, added, first, cut=again, **options)
  return entering(h, left, reverse=options["reverse"]), tuple(part[:, 0] for part in last)


def _powers(a: Parts, cut: Blocks) -> Parts:
  each = cut.blocks // cut.chunks
  lengths = [(each + (c < cut.longer)) * cut.steps for c in range(cut.chunks)]
  lengths[-1] -= cut.blocks * cut.steps - cut.length
  return powers(a, lengths)


def powers(a: Parts, lengths: Sequence[int] | np.ndarray) -> Parts:
  """The product (B, chunks, ...) of a constant decay (B, ...) over the steps of each chunk."""
  some, where = np.unique(lengths, return_inverse=True)
  found = jnp.stack([lax.integer_pow(xla.native(a), int(n)) for n in some], axis=1)
  return xla.parts(found[:, where])


def entering(h: Parts, left: Parts, *, reverse: bool) -> Parts:
  """The state (B, chunks, ...) that enters each chunk: h (B, ...), and those that others leave."""
  both = [(part[:, None], x) for part, x in zip(h, left, strict=True)]
  pieces = [(x[:, 1:], first) if reverse else (first, x[:, :-1]) for first, x in both]
  return tuple(jnp.concatenate(p, axis=1) for p in pieces)


def _launch(
  a: Parts, b: Parts, h0: Parts, *, cut: Blocks, reverse: bool, interpret: bool,
  states: bool = True, adjoint: bool = False, product: bool = False,
) -> tuple[Parts, Parts, Parts]:  # fmt: skip
  """(y, h_last, product of a) of every chunk, from h0 (B, chunks, N).

  With `adjoint` the recurrence is that of the carry of `backward`, h -> conj(a) (h + b).
  """
  each, per_step, like = len(b), a[0].ndim == 3, tuple(map(_like, h0))
  sequence, state = (cut.sequence(reverse),) * each, (STATE,) * each
  return _call(
    partial(_forward, cut=cut, reverse=reverse, adjoint=adjoint),
    (a, b, h0),
    grid=cut.grid,
    in_specs=(sequence if per_step else (OUTER,) * each, sequence, state),
    out_specs=(sequence * states, state, state * product),
    out_shape=(tuple(map(_like, b)) * states, like, like * product),
    carries=each * (1 + product),
    interpret=interpret,
    name="linear_scan",
  )


def _launch_back(
  a: Parts, y: Parts, h0: Parts, dy: Parts, dh_last: Parts, *,
  cut: Blocks, reverse: bool, interpret: bool,
) -> tuple[Parts, Parts, Parts]:  # fmt: skip
  """(da, db, carry that leaves) of every chunk, from dh_last (B, chunks, N).

  The gradient of a constant decay is of that shape as well.
  """
  each, per_step, like = len(y), a[0].ndim == 3, tuple(map(_like, dh_last))
  sequence, edge = (cut.sequence(not reverse),) * each, (cut.edge(not reverse),) * each
  state, outer = (STATE,) * each, (OUTER,) * each
  return _call(
    partial(_backward, cut=cut, reverse=reverse),
    (a, y, y, h0, dy, dh_last),
    grid=cut.grid,
    in_specs=(sequence if per_step else outer, sequence, edge, outer, sequence, state),
    out_specs=(sequence if per_step else state, sequence, state),
    out_shape=(tuple(map(_like, a)) if per_step else like, tuple(map(_like, dy)), like),
    carries=each * (1 if per_step else 2),
    interpret=interpret,
    name="linear_scan_backward",
  )


def _call(
  kernel: Callable[..., None], operands: Any, *, grid: tuple[int, ...], in_specs: Any,
  out_specs: Any, out_shape: Any, carries: int, interpret: bool, name: str,
) -> Any:  # fmt: skip
  """kernel(chunk, turn, *references, *carries) as a pipeline over the last axis of the grid.

  `pl.pallas_call` is the same pipeline step by step; as a compiled one jax 0.12 has it no more.
  """
  scratch = [plgpu.SMEM((LANES,), jnp.float32)] * carries
  roomy = jax.tree.map(_room, out_specs, out_shape)
  if interpret:
    results = pl.pallas_call(
      lambda *refs: kernel(pl.program_id(1), pl.program_id(3), *refs),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      out_shape=roomy,
      scratch_shapes=scratch,
      interpret=True,
    )(*operands)
    return jax.tree.map(_cropped, results, out_shape)

  specs, tree = jax.tree.flatten((*in_specs, *out_specs))
  given, (out_types, out_tree) = jax.tree.leaves(operands), jax.tree.flatten(roomy)

  def program(*refs: Any) -> None:
    i, c, j = (lax.axis_index(axis) for axis in AXES)
    here = [pl.BlockSpec(s.block_shape, lambda k, s=s: s.index_map(i, c, j, k)) for s in specs]
    whole, scratch = refs[: len(specs)], refs[len(specs) :]
    plgpu.emit_pipeline(
      lambda turn, *blocks: kernel(c, turn[0], *jax.tree.unflatten(tree, blocks), *scratch),
      grid=grid[3:],
      in_specs=here[: len(given)],
      out_specs=here[len(given) :],
      max_concurrent_steps=STAGES,
    )(*whole)

  call = plgpu.kernel(
    program,
    out_type=out_types,
    scratch_types=scratch,
    grid=grid[:3],
    grid_names=AXES,
    # A thread reads and writes nothing in shared memory but its own channel, so that barriers
    # around each store would only cost time. Where blocks have no results, these barriers are
    # what keeps one from being overwritten before all threads have read it.
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=bool(out_shape[0])),
    kernel_name=name,
  )
  results = mosaic.launched(call, out_types, interpret)(*given)
  return jax.tree.map(_cropped, jax.tree.unflatten(out_tree, results), out_shape)


def _room(spec: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """`x` with room for the blocks that hang over, where they are contiguous in memory.

  Those Mosaic GPU writes as so many bytes, which run into what follows the end of an axis.
  """
  if spec.block_shape[-2] is not None and x.shape[-1] != LANES:
    return x
  sizes = [pl.cdiv(n, b or 1) * (b or 1) for n, b in zip(x.shape, spec.block_shape, strict=True)]
  return jax.ShapeDtypeStruct(tuple(sizes), x.dtype)


def _cropped(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  return x[tuple(map(slice, like.shape))]


def _forward(
  chunk: jax.Array, turn: jax.Array, a: Any, b: Any, h0: Any, y: Any, h_last: Any, product: Any,
  *carries: Any, cut: Blocks, reverse: bool, adjoint: bool,
) -> None:  # fmt: skip
  """The kernel: references to the parts of a block, in, out and scratch."""
  each = len(b)
  block, first = cut.block(chunk, turn, reverse)
  state, running = carries[:each], carries[each:]

  @pl.when(first)
  def _() -> None:
    _put(state, _row(h0))
    _put(running, tuple(jnp.full(LANES, x, jnp.float32) for x in (1.0, 0.0)[: len(running)]))

  decay = _row(a) if a[0].ndim == 1 else ()

  def load(t: jax.Array) -> tuple[Row, Row]:
    factor = decay or _row(a, t)
    return rows.conj(factor) if adjoint else factor, _row(b, t)

  def step(t: jax.Array, loaded: tuple[Row, Row], carry: tuple[Row, Row]) -> Any:
    (factor, drive), (h, p) = loaded, carry
    inside = cut.valid(t, block)
    if adjoint:
      new = rows.times(factor, rows.add(h, drive))
    else:
      new = rows.add(rows.times(factor, h), drive)
    h = mosaic.select(inside, new, h)
    return (h, mosaic.select(inside, rows.times(factor, p), p) if p else p), (h,)

  h, p = _sweep(cut, reverse, load, step, (_row(state), _row(running)), (y,))
  _put(state, h)
  _put(running, p)

  @pl.when(turn == cut.grid[3] - 1)
  def _() -> None:
    _put(h_last, h)
    _put(product, p)


def _backward(
  chunk: jax.Array, turn: jax.Array, a: Any, y: Any, edges: Any, h0: Any, dy: Any, dh_last: Any,
  da: Any, db: Any, left: Any, *carries: Any, cut: Blocks, reverse: bool,
) -> None:  # fmt: skip
  """The kernel. `edge` is the state before the first step of the block, in the order of time."""
  each = len(y)
  block, first = cut.block(chunk, turn, not reverse)
  state, totals = carries[:each], carries[each:]

  @pl.when(first)
  def _() -> None:
    _put(state, _row(dh_last))
    _put(totals, tuple(jnp.zeros(LANES, jnp.float32) for _ in totals))

  decay = _row(a) if a[0].ndim == 1 else ()
  outermost = cut.blocks - 1 if reverse else 0
  edge = mosaic.select(block == outermost, _row(h0), _row(edges))
  start = jnp.minimum(cut.steps, cut.length - block * cut.steps) - 1 if reverse else 0

  def load(t: jax.Array) -> tuple[Row, Row, Row]:
    inside = _row(y, jnp.clip(t + 1 if reverse else t - 1, 0, cut.steps - 1))
    return decay or _row(a, t), _row(dy, t), mosaic.select(t == start, edge, inside)

  def step(t: jax.Array, loaded: tuple[Row, Row, Row], carry: tuple[Row, Row]) -> Any:
    (factor, drive, before), (c, total) = loaded, carry
    inside = cut.valid(t, block)
    g = rows.add(drive, c)
    slope = rows.times(g, rows.conj(before))
    c = mosaic.select(inside, rows.times(rows.conj(factor), g), c)
    if total:
      return (c, mosaic.select(inside, rows.add(total, slope), total)), (g,)
    return (c, total), (g, slope)

  targets = (db,) if totals else (db, da)
  c, total = _sweep(cut, not reverse, load, step, (_row(state), _row(totals)), targets)
  _put(state, c)
  _put(totals, total)

  @pl.when(turn == cut.grid[3] - 1)
  def _() -> None:
    _put(left, c)
    if totals:
      _put(da, total)


def _sweep(
  cut: Blocks, descending: bool, load: Callable[..., Any], step: Callable[..., Any], carry: Any,
  targets: tuple[Any, ...],
) -> Any:  # fmt: skip
  """The carry after all steps; step(t, load(t), carry) returns it and a row for each target."""

  def store(t: jax.Array, results: tuple[Row, ...]) -> None:
    for target, row in zip(targets, results, strict=True):
      _put(target, row, t)

  return mosaic.sweep(cut.steps, descending, load, step, carry, store)


def _row(x: Any, t: Any = ...) -> Row:
  """Step t of the references to the parts of a block, or the whole of single rows."""
  return tuple(part[t].astype(jnp.float32) for part in x)


def _put(x: Any, row: Row, t: Any = ...) -> None:
  """Writes what `_row` reads; nothing where there is no reference."""
  for part, value in zip(x, row, strict=bool(x)):
    part[t] = value.astype(part.dtype)


def _cut(*sequences: Parts) -> Blocks:
  """Blocks of these, of which (B, L, N) go through shared memory; the second has that shape."""
  batch, length, width = sequences[1][0].shape
  moved = [part.dtype.itemsize for parts in sequences for part in parts if part.ndim == 3]
  fits = BUDGET // (STAGES * LANES * sum(moved))
  steps = min(STEPS, fits, length + GROUP - 1) // GROUP * GROUP
  programs = batch * pl.cdiv(width, LANES)
  chunks = max(1, min(pl.cdiv(WANTED, programs), length // CHUNK)) if programs < ENOUGH else 1
  return Blocks(batch, length, width, steps, chunks)


def _flat(a: Parts, *others: Parts) -> tuple[Parts, ...]:
  """One batch axis and channels in whole 16 bytes; a constant decay and states as (B, N)."""
  *lead, _, width = others[0][0].shape
  batch, extra = math.prod(lead), -width % (16 // others[0][0].dtype.itemsize)

  def flat(x: jax.Array) -> jax.Array:
    size = (batch, width) if x.ndim == 1 else (batch, *x.shape[len(lead) :])
    x = jnp.broadcast_to(x, size) if x.ndim == 1 else x.reshape(size)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]) if extra else x

  return tuple(tuple(map(flat, parts)) for parts in (a, *others))


def _shaped(x: Parts, shape: tuple[int, ...]) -> Parts:
  return tuple(part[..., : shape[-1]].reshape(shape) for part in x)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)
