"""S5 as one Pallas kernel for GPUs (Mosaic GPU, sm_90) in each direction: states stay on the chip.

    grid (pairs of rows of the batch, chunks of time)         a program walks over its blocks

    u ──TMA──► (2 · 32, H) ──wgmma B──► drive ──recurrence──► x ──wgmma C──► y ──TMA──►
               two buffers              float32, shared       bfloat16,      + D u
                                        memory, rows plain    registers

The 64 rows that a product of the matrix unit (wgmma) has at least are 32 steps of two rows of the
batch, so that the 128 threads of a program have 64 states of each, or two of 128; zeros make H and
P whole multiples of 64, and an odd batch even. A thread loads eight steps of its states into
registers, runs them, and then stores eight. The states are rounded to bfloat16 on their way to the
second product, as a factor; the carry is float32. What a block writes is its `y` and the state that
entered it.

The backward kernel walks over the blocks the other way, in two groups of 128 threads: one makes
drive and states of a block again and sums the gradient of C, the other runs the recurrence of the
gradients, sums that of B and makes du; the gradient of the decay is the one thing that takes both.

    u, dy ──► states:     u B ──► x ──► dC += dyᵀ x ──────────────────► da += g conj(x before)
         └──► gradients:  dy C ──► g ──► dB += uᵀ g ──► g Bᵀ + D dy ──► du    (x and g in memory)

What is summed over time is summed in registers, in the order of time, then by XLA over programs.

Directions of time, and groups of states where all do not fit (in the backward kernel 64 fit), are
launches that add to what the last one left, in float32. Where the batch makes too few programs,
time is cut into chunks as well, as in `linear_scan/gpu.py`: a first launch makes of each chunk the
state that it leaves when it starts from zero, the kernel of `linear_scan` runs the recurrence over
these, and the launch proper starts every chunk from the state that enters it.

This is for bfloat16 `u` of up to 128 features with constant decays and no scale. All else is the
kernel of `linear_scan` between the matrix products of `xla.py`, its states in device memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from models.kernels import mosaic, rows
from models.kernels.linear_scan import gpu as scan
from models.kernels.linear_scan import xla as loop
from models.kernels.mosaic import Machine
from models.kernels.rows import GROUP, Row
from models.kernels.s5 import xla

Pair = tuple[jax.Array, ...]

STEPS = 32  # time steps of a block
TILE = 2 * STEPS  # rows of a product: those of two rows of the batch
UNIT = 64  # features and states come in whole multiples
WIDEST = 128  # features: the sums of the backward kernel fill half the registers
STATES = 128  # of a launch, at most
MEMORY = 226 * 2**10  # bytes of shared memory, of 227 KiB
SPARE = 8  # floats between rows in shared memory, which keep the threads of a product apart
WGMMA, COLUMNS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)


class Cut(NamedTuple):
  """How the operands are cut. Pairs of rows that have the same matrices follow each other."""

  pairs: int
  alike: int  # pairs with the same matrices: all of them, but under vmap
  length: int
  width: int  # H
  states: int  # P of a launch
  turns: int  # blocks of a chunk

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.length, STEPS)

  @property
  def chunks(self) -> int:
    return pl.cdiv(self.blocks, self.turns)

  @property
  def stages(self) -> int:
    """Blocks of u and dy in the shared memory of the backward kernel."""
    return 2 if self.width <= UNIT else 1

  @property
  def room(self) -> int:
    """Blocks of all chunks, if all were as long."""
    return self.chunks * self.turns

  def turns_of(self, c: jax.Array) -> jax.Array:
    """The last chunk may have fewer."""
    return jnp.minimum(self.turns, self.blocks - c * self.turns)

  def block(self, c: jax.Array, k: jax.Array, descending: bool) -> jax.Array:
    """The block that chunk c has as its k-th."""
    return c * self.turns + (self.turns_of(c) - 1 - k if descending else k)

  def inside(self, block: jax.Array) -> Callable[[jax.Array], jax.Array | bool]:
    """Whether a step of a block is inside the sequence."""
    whole = self.length % STEPS == 0
    return lambda t: whole or block * STEPS + t < self.length

  def groups(self, wide: int) -> list[slice]:
    """The states of each launch."""
    return [slice(p, p + self.states) for p in range(0, wide, self.states)]

  def each(self, *size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A pair of arrays for each program."""
    return (jax.ShapeDtypeStruct((self.pairs, *size), jnp.float32),) * 2

  def panels(self) -> list[Any]:
    """Scratch that the recurrence runs over, a pair."""
    return [plgpu.SMEM((2, STEPS, self.states + SPARE), jnp.float32)] * 2


def refusal(
  u: jax.Array, a: Any, scale: Any, B: Pair, C: Pair, D: jax.Array, x0: Any
) -> str | None:
  """Why the kernels cannot run these operands."""
  if D.dtype != jnp.float32:
    return f"dtype {D.dtype} of the states; it needs float32"
  if u.dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {u.dtype} of u; it needs float32 or bfloat16"
  if u.shape[0] > 65535:
    return f"{u.shape[0]} rows of the batch; it takes 65535"
  return None


def fused(u: jax.Array, a: Any, scale: Any, B: Pair) -> bool:
  """Whether the states stay on the chip; otherwise this is `xla.py` with the scan's kernel."""
  constant = all(x[0].ndim == 1 for x in a) and all(x is None for x in scale)
  some = 0 not in u.shape and 0 not in B[0].shape
  return u.dtype == jnp.bfloat16 and u.shape[2] <= WIDEST and constant and some


def forward(
  u: jax.Array, a: tuple[Pair, ...], scale: tuple[Pair | None, ...], B: Pair, C: Pair, D: jax.Array,
  x0: tuple[Pair, ...], *, reverses: tuple[bool, ...], interpret: bool = False,
) -> tuple[jax.Array, tuple[Pair, ...], Any]:  # fmt: skip
  """See `interface.py`; kept are the states that enter the blocks, or all of them if not fused."""
  if not fused(u, a, scale, B):
    between = partial(_scan, interpret=interpret)
    return xla.forward(u, a, scale, B, C, D, x0, reverses=reverses, scan=between)
  run = mosaic.batched(partial(_forward, reverses=reverses, machine=Machine(interpret)))
  operands = jax.tree.map(lambda x: x[None], (u, a, B, C, D, x0))
  return jax.tree.map(lambda x: x[0], run(*operands))


def backward(
  saved: Any, u: jax.Array, a: tuple[Pair, ...], scale: tuple[Pair | None, ...], B: Pair, C: Pair,
  D: jax.Array, x0: tuple[Pair, ...], dy: jax.Array, dx_last: tuple[Pair, ...], *,
  reverses: tuple[bool, ...], interpret: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
  """See `interface.py`."""
  if not fused(u, a, scale, B):
    between = partial(_adjoint, interpret=interpret)
    operands = saved, u, a, scale, B, C, D, x0, dy, dx_last
    return xla.backward(*operands, reverses=reverses, adjoint=between)
  run = mosaic.batched(partial(_backward, reverses=reverses, machine=Machine(interpret)))
  operands = jax.tree.map(lambda x: x[None], (saved, u, a, B, C, D, dy, dx_last))
  du, da, dB, dC, dx0 = jax.tree.map(lambda x: x[0], run(*operands))
  dD = jnp.einsum("blh,blh->h", dy.astype(D.dtype), u.astype(D.dtype))
  return du, da, (None,) * len(a), dB, dC, dD, dx0


def _scan(
  a: Pair, v_BLcP: jax.Array, x0_BP: jax.Array, *, reverse: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  """`xla.scan` of `linear_scan`, by the kernel."""
  parts = v_BLcP[:, :, 0], v_BLcP[:, :, 1]
  x, last = scan.forward(a, parts, loop.parts(x0_BP), reverse=reverse, interpret=interpret)
  return jnp.stack(x, axis=2), loop.native(last)


def _adjoint(
  a: Pair, x_BLcP: jax.Array, x0_BP: jax.Array, dx_BLcP: jax.Array, dx_last: jax.Array, *,
  reverse: bool, interpret: bool,
) -> tuple[Pair, jax.Array, jax.Array]:  # fmt: skip
  """`xla.adjoint` of `linear_scan`, by the kernel."""
  x, dx = ((z[:, :, 0], z[:, :, 1]) for z in (x_BLcP, dx_BLcP))
  start, end = loop.parts(x0_BP), loop.parts(dx_last)
  da, dv, dx0 = scan.backward(a, x, start, dx, end, reverse=reverse, interpret=interpret)
  return da, jnp.stack(dv, axis=2), loop.native(dx0)


# From here on all operands have an axis G in front, of problems with matrices of their own: one of
# them, or as many as `vmap` has. The pairs of rows are those of all problems, one after the other.


def _forward(
  u: jax.Array, a: Any, B: Pair, C: Pair, D: jax.Array, x0: Any, *,
  reverses: tuple[bool, ...], machine: Machine,
) -> tuple[jax.Array, Any, Any]:  # fmt: skip
  """(y, the last states, the states that enter the blocks), all but y for each direction."""
  B_GcHP = _matrices(B).swapaxes(2, 3)
  wide = B_GcHP.shape[-1]
  cut = _cut(u, STATES if wide % STATES == 0 and _fits(u, STATES) else UNIT)
  sequence, y = _sequence(u, cut, machine), _wide(D)
  lasts, marks = [], []
  for k, reverse in enumerate(reverses):
    C_GcPH = _matrices(_output(C, k, len(reverses))).swapaxes(2, 3)
    decay, start = _rows_of_two(a[k]), _paired(x0[k])
    found = []
    for own in cut.groups(wide):
      final = k == len(reverses) - 1 and own.stop == wide
      a_own, B_own, start_own = _part((decay, B_GcHP, start), own)
      entered = _passed(cut, sequence, a_own, B_own, start_own, reverse=reverse, machine=machine)
      y, last, mark = _launch(
        cut, sequence, a_own, B_own, entered, C_GcPH[:, :, own], y,
        reverse=reverse, machine=machine, final=final,
      )  # fmt: skip
      found.append((tuple(x[:, 0 if reverse else -1] for x in last), mark))
    last, mark = _joined(found)
    lasts.append(_unpaired(last, x0[k]))
    marks.append(tuple(x.reshape(len(u), -1, *x.shape[1:])[:, :, : cut.blocks] for x in mark))
  return _cropped(y, u), tuple(lasts), tuple(marks)


def _backward(
  saved: Any, u: jax.Array, a: Any, B: Pair, C: Pair, D: jax.Array, dy: jax.Array, dx_last: Any, *,
  reverses: tuple[bool, ...], machine: Machine,
) -> tuple[jax.Array, Any, Pair, Pair, Any]:  # fmt: skip
  """(du, da, dB, dC, dx0)."""
  B_GcHP = _matrices(B).swapaxes(2, 3)
  wide, states = B_GcHP.shape[-1], B[0].shape[1]
  cut = _cut(u, UNIT)
  us, dys, du = _sequence(u, cut, machine), _sequence(dy, cut, machine), _wide(D)
  das, dx0s = [], []
  dBs: list[jax.Array] = []
  dCs: list[jax.Array] = []
  for k, reverse in enumerate(reverses):
    C_GcHP = _matrices(_output(C, k, len(reverses)))
    decay, end, found = _rows_of_two(a[k]), _paired(dx_last[k]), []
    mark = tuple(x.reshape(cut.pairs, *x.shape[2:]) for x in saved[k])
    for own in cut.groups(wide):
      final = k == len(reverses) - 1 and own.stop == wide
      a_own, B_own, C_own, mark_own, end_own = _part((decay, B_GcHP, C_GcHP, mark, end), own)
      entered = _passed(
        cut, dys, rows.conj(a_own), C_own, end_own,
        reverse=not reverse, machine=machine, adjoint=True,
      )  # fmt: skip
      du, da, dB, dC, left = _launch_back(
        cut, us, dys, a_own, B_own, C_own, mark_own, entered, du,
        reverse=reverse, machine=machine, final=final,
      )  # fmt: skip
      found.append((da, (dB, dC), tuple(x[:, -1 if reverse else 0] for x in left)))
    da, matrices, dx0 = _joined(found)
    das.append(tuple(x.reshape(len(u), -1, wide).sum(1)[:, :states] for x in da))
    for x, sums in zip(matrices, (dBs, dCs), strict=True):
      total = x.reshape(len(u), -1, *x.shape[2:]).sum(1)
      sums.append(total[..., : u.shape[-1], :states])
    dx0s.append(_unpaired(dx0, dx_last[k]))
  dB_GcPH, dC_GcHP = jnp.stack(dBs).sum(0).swapaxes(2, 3), jnp.concatenate(dCs, axis=-1)
  matrices = (dB_GcPH[:, 0], dB_GcPH[:, 1]), (dC_GcHP[:, 0], -dC_GcHP[:, 1])
  return _cropped(du, u), tuple(das), *matrices, tuple(dx0s)


def _passed(
  cut: Cut, u: jax.Array, a: Pair, B_GcHP: jax.Array, start: Pair, *, reverse: bool,
  machine: Machine, adjoint: bool = False,
) -> Pair:  # fmt: skip
  """The state (pairs, chunks, 2, P) that enters each chunk; `start` (pairs, 2, P) enters the first.

  With `adjoint` the recurrence is that of the carry of the backward kernel, x -> a (x + u B).
  """
  if cut.chunks == 1:
    return tuple(x[:, None] for x in start)
  zeros = tuple(jnp.zeros_like(x, shape=(cut.pairs, cut.chunks, *x.shape[1:])) for x in start)
  _, added, _ = _launch(
    cut, u, a, B_GcHP, zeros, None, None, reverse=reverse, machine=machine, adjoint=adjoint
  )
  steps = np.minimum(cut.turns, cut.blocks - np.arange(cut.chunks) * cut.turns) * STEPS
  steps[-1] -= cut.blocks * STEPS - cut.length
  factor = tuple(jnp.repeat(x, cut.alike, axis=0) for x in scan.powers(a, steps))

  def flat(pair: Pair) -> Pair:
    return tuple(x.reshape(*x.shape[:-2], -1) for x in pair)

  left, _ = scan.forward(
    flat(factor), flat(added), flat(start), reverse=reverse, interpret=machine.interpret
  )
  left = tuple(x.reshape(z.shape) for x, z in zip(left, zeros, strict=True))
  return scan.entering(start, left, reverse=reverse)


def _launch(
  cut: Cut, u: jax.Array, a: Pair, B_GcHP: jax.Array, x0: Pair, C_GcPH: jax.Array | None,
  base: jax.Array | None, *, reverse: bool, machine: Machine, adjoint: bool = False,
  final: bool = False,
) -> tuple[Any, Pair, Any]:  # fmt: skip
  """(y, the last states, the states that enter the blocks) of every chunk, from x0.

  Without C only the last states. `base` is what y is added to: D, or the y of another launch.
  """
  states, found = (2, cut.states), C_GcPH is not None
  weights = [x.reshape(-1, *x.shape[2:]) for x in (B_GcHP, C_GcPH) if x is not None]
  return _call(
    partial(_forward_kernel, cut=cut, reverse=reverse, adjoint=adjoint, machine=machine),
    (u, a, x0, weights, base),
    (
      _sum(cut, u, final) if found else (),
      cut.each(cut.chunks, *states),
      cut.each(cut.room, *states) if found else (),
    ),
    [
      _tiles(2, TILE, cut.width),
      cut.panels(),
      [_tiles(2, *x.shape[1:]) for x in weights],
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=2 * len(weights)),
      machine.spare(TILE, cut.states),
    ],
    cut=cut,
    machine=machine,
    name="s5",
  )


def _launch_back(
  cut: Cut, u: jax.Array, dy: jax.Array, a: Pair, B_GcHP: jax.Array, C_GcHP: jax.Array,
  marks: Pair, end: Pair, base: jax.Array, *, reverse: bool, machine: Machine, final: bool,
) -> tuple[Any, Pair, jax.Array, jax.Array, Pair]:  # fmt: skip
  """(du, da, dB, dC, the carry that leaves) of every chunk; du is added to `base`."""
  states, weights = (2, cut.states), [x.reshape(-1, *x.shape[2:]) for x in (B_GcHP, C_GcHP)]
  sums = jax.ShapeDtypeStruct((cut.pairs, cut.chunks, 2, cut.width, cut.states), jnp.float32)
  return _call(
    partial(_backward_kernel, cut=cut, reverse=reverse, machine=machine),
    (u, dy, a, marks, end, weights, base),
    (_sum(cut, u, final), cut.each(cut.chunks, *states), sums, sums, cut.each(cut.chunks, *states)),
    [
      [_tiles(cut.stages, TILE, cut.width) for _ in range(2)],
      _tiles(1, TILE, cut.width),
      [cut.panels() for _ in range(2)],
      [_tiles(2, TILE, cut.states) for _ in range(2)],
      [_tiles(2, *x.shape[1:]) for x in weights],
      plgpu.Barrier(num_arrivals=4, num_barriers=cut.stages),
      plgpu.Barrier(num_arrivals=4),
      [plgpu.Barrier() for _ in range(2)],
      plgpu.SMEM((2,), jnp.int32),
      [machine.spare(*shape) for shape in ((cut.width, TILE),) * 2 + ((cut.states, UNIT),)],
    ],
    cut=cut,
    machine=machine,
    name="s5_backward",
    **(dict(num_threads=2, thread_name="side") if machine.sides == 2 else {}),
  )


def _call(
  kernel: Callable[..., None], operands: Any, results: Any, scratch: list[Any], *,
  cut: Cut, machine: Machine, name: str, **threads: Any,
) -> Any:  # fmt: skip
  """kernel(references of operands, of results, *scratch) for each pair of rows and chunk."""
  given, tree = jax.tree.flatten(operands)
  types, out_tree = jax.tree.flatten(results)

  def program(*refs: Any) -> None:
    ins, outs, own = refs[: len(given)], refs[len(given) :][: len(types)], refs[len(given) :]
    kernel(jax.tree.unflatten(tree, ins), jax.tree.unflatten(out_tree, outs), *own[len(types) :])

  call = plgpu.kernel(
    program,
    out_type=types,
    scratch_types=scratch,
    grid=(cut.pairs, cut.chunks),
    grid_names=("pair", "chunk"),
    # The kernels say themselves where threads wait for each other: not between steps.
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name=name,
    **threads,
    **machine.options(),
  )
  found = mosaic.launched(call, types, machine.interpret)(*given)
  return jax.tree.unflatten(out_tree, found)


def _forward_kernel(
  given: Any, results: Any, us: Any, x: Any, weights: Any, loaded: Any, ready: Any, spare: Any, *,
  cut: Cut, reverse: bool, adjoint: bool, machine: Machine,
) -> None:  # fmt: skip
  """References: operands and results in device memory, then scratch."""
  u, a, x0, matrices, base = given
  y, last, marks = results
  i, c = lax.axis_index("pair"), lax.axis_index("chunk")
  problem, turns = lax.div(i, cut.alike), cut.turns_of(c)
  _fetch_matrices(matrices, weights, problem, ready)

  def fetch(k: jax.Array) -> None:
    _fetch(u, us.at[lax.rem(k, 2)], i, cut.block(c, k, reverse), loaded.at[lax.rem(k, 2)])

  def turn(k: jax.Array, h: Row) -> Row:
    slot, block = lax.rem(k, 2), cut.block(c, k, reverse)
    plgpu.barrier_wait(loaded.at[slot])
    _drive(us.at[slot], weights[0], x, 0, cut, machine)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()
    pl.when(k + 1 < turns)(lambda: fetch(k + 1))
    _put(marks, (i, block), h)
    h = _recur(x, _at(a, (problem,)), h, cut.inside(block), reverse, cut, machine, adjoint=adjoint)
    plgpu.commit_smem()
    if marks:
      values = _values(x, cut, machine)

      def product(own: Any) -> jax.Array:
        factors = [(v, weights[1].at[p, :, own], spare) for p, v in enumerate(values)]
        return _product(UNIT, factors, machine)

      _finish(product, base, us.at[slot], y, us.at[slot], i, block, problem, cut, machine)
    return h

  fetch(jnp.int32(0))
  plgpu.barrier_wait(ready)
  h = lax.fori_loop(0, turns, turn, _at(x0, (i, c)))
  _put(last, (i, c), h)
  plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
  given: Any, results: Any, blocks: Any, out: Any, panels: Any, lows: Any, weights: Any,
  loaded: Any, ready: Any, signals: Any, zeros: Any, spares: Any, *,
  cut: Cut, reverse: bool, machine: Machine,
) -> None:  # fmt: skip
  """References: operands and results in device memory, then scratch.

  `zeros` holds zeros. The compiler does not know that: of what lies in the same place in all turns
  it would keep the addresses, hundreds of them, in registers, and run out of these.
  """
  u, dy, a, marks, end, matrices, base = given
  du, da, dB, dC, left = results
  (us, dys), (x, g), (x_low, g_low), (found, done) = blocks, panels, lows, signals
  i, c = lax.axis_index("pair"), lax.axis_index("chunk")
  problem, turns = lax.div(i, cut.alike), cut.turns_of(c)
  ahead, apart = cut.stages - 1, machine.sides == 2

  def at(k: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cut.block(c, k, not reverse), lax.rem(k, cut.stages)

  def fetch(k: jax.Array) -> None:
    block, slot = at(k)
    for source, target in ((u, us), (dy, dys)):
      _fetch(source, target.at[slot], i, block, loaded.at[slot])

  def before(k: jax.Array) -> Row:
    return _at(marks, (i, at(k)[0]))

  def states(k: jax.Array, sums: Any) -> None:
    """The states of a block and what they add to dC."""
    block, slot, zero = *at(k), zeros[0]
    _drive(us.at[slot + zero], weights[0], x, zero, cut, machine)
    plgpu.commit_smem()
    _recur(x, _at(a, (problem,)), before(k), cut.inside(block), reverse, cut, machine)
    plgpu.commit_smem()
    _lower(x, x_low, zero, cut, machine)
    for p, total in enumerate(sums):
      machine.multiply(total, dys.at[slot + zero], x_low.at[zero + p], spares[0], flip=True)

  def gradients(k: jax.Array, h: Row, sums: Any) -> Row:
    """The gradients of the states of a block, what they add to dB, and du."""
    block, slot, zero = *at(k), zeros[1]
    _drive(dys.at[slot + zero], weights[1], g, zero, cut, machine)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()
    decay = rows.conj(_at(a, (problem,)))
    h = _recur(g, decay, h, cut.inside(block), not reverse, cut, machine, adjoint=True)
    plgpu.commit_smem()
    if apart:
      plgpu.barrier_arrive(found)
    _lower(g, g_low, zero, cut, machine)
    for p, total in enumerate(sums):
      machine.multiply(total, us.at[slot + zero], g_low.at[zero + p], spares[1], flip=True)

    def product(own: Any) -> jax.Array:
      factors = [(g_low.at[p], weights[0].at[p, own], spares[2]) for p in (zero, zero + 1)]
      return _product(UNIT, factors, machine, turn=True)

    _finish(product, base, dys.at[slot + zero], du, out.at[zero], i, block, problem, cut, machine)
    return h

  def slopes(k: jax.Array, total: Row) -> Row:
    """What a block adds to the gradient of the decay."""

    def step(t: jax.Array, both: tuple[Row, Row], carry: tuple[Row, Row]) -> Any:
      (state, slope), (last, total) = both, carry
      return (state, rows.add(total, rows.times(slope, rows.conj(last)))), None

    def load(t: jax.Array) -> tuple[Row, Row]:
      return _row(x, t, cut), _row(g, t, cut)

    start = before(k), total
    return mosaic.sweep(STEPS, reverse, load, step, start, together=machine.together)[1]

  def work(first: bool, second: bool, *sums: Any) -> None:
    """What the first and the second group do, or one group for both."""

    def turn(k: jax.Array, carry: tuple[Row, Row]) -> tuple[Row, Row]:
      h, total = carry
      if second:
        pl.when(k + ahead < turns)(lambda: fetch(k + ahead))
      plgpu.barrier_wait(loaded.at[at(k)[1]])
      if first:
        states(k, sums[:2])
      if second:
        h = gradients(k, h, sums[-2:])
      if first and apart:
        plgpu.barrier_wait(found)
        total = slopes(k, total)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()
        plgpu.barrier_arrive(done)
      elif first:
        total = slopes(k, total)
      else:
        plgpu.barrier_wait(done)
      return h, total

    zeros[0 if first else 1] = 0
    if second:
      zeros[1] = 0
      _fetch_matrices(matrices, weights, problem, ready)
      for k in range(ahead):
        fetch(jnp.int32(k))
    plgpu.barrier_wait(ready)
    start = _at(end, (i, c)) if second else (), machine.zeros(2 * first, (2, cut.states))
    h, total = lax.fori_loop(0, turns, turn, start)
    for p in range(2):
      if first:
        dC[i, c, p] = sums[p][...]
      if second:
        dB[i, c, p] = sums[p - 2][...]
    _put(da if first else (), (i, c), total)
    _put(left if second else (), (i, c), h)
    plgpu.wait_smem_to_gmem(0)

  sums = (plgpu.ACC((cut.width, cut.states), jnp.float32),) * 2
  if not apart:
    pl.run_scoped(partial(work, True, True), *sums, *sums)
    return
  for side in range(2):
    one = partial(pl.run_scoped, partial(work, side == 0, side == 1), *sums)
    pl.when(lax.axis_index("side") == side)(one)


def _fetch(source: Any, target: Any, i: jax.Array, block: jax.Array, barrier: Any) -> None:
  """A block of both rows of pair i."""
  for r in range(2):
    rows_ = source.at[2 * i + r, pl.ds(block * STEPS, STEPS)]
    plgpu.copy_gmem_to_smem(rows_, target.at[pl.ds(r * STEPS, STEPS)], barrier)


def _fetch_matrices(matrices: Any, weights: Any, problem: jax.Array, barrier: Any) -> None:
  for source, target in zip(matrices, weights, strict=True):
    for p in range(2):
      plgpu.copy_gmem_to_smem(source.at[2 * problem + p], target.at[p], barrier)


def _product(width: int, factors: Any, machine: Machine, *, turn: bool = False) -> jax.Array:
  """The sum of products (TILE, width)."""

  def run(total: Any) -> jax.Array:
    for factor in factors:
      machine.multiply(total, *factor, turn=turn)
    plgpu.wgmma_wait(0)
    return total[...]

  return pl.run_scoped(run, plgpu.ACC((TILE, width), jnp.float32))


def _drive(block: Any, weights: Any, x: Any, zero: Any, cut: Cut, machine: Machine) -> None:
  """What drives the states, into the panels."""
  for p, panel in enumerate(x):
    product = _product(cut.states, [(block, weights.at[zero + p])], machine)
    machine.put_rows(panel, cut.states, product)


def _values(x: Any, cut: Cut, machine: Machine) -> list[jax.Array]:
  """The panels as factors of a product."""
  return [machine.rows(panel, cut.states).astype(jnp.bfloat16) for panel in x]


def _lower(x: Any, target: Any, zero: jax.Array, cut: Cut, machine: Machine) -> None:
  """The same, in shared memory."""
  for p, value in enumerate(_values(x, cut, machine)):
    target[zero + p] = value
  plgpu.commit_smem()


def _recur(
  x: Any, a: Row, h: Row, inside: Callable[[jax.Array], jax.Array | bool], descending: bool,
  cut: Cut, machine: Machine, *, adjoint: bool = False,
) -> Row:  # fmt: skip
  """Runs over the panels of a block in place, and returns the carry.

  With `adjoint` that is a x_t, which the next step takes as it is. Steps beyond the sequence keep
  the carry, and zero gradients.
  """

  def step(t: jax.Array, drive: Row, h: Row) -> tuple[Row, Row]:
    if adjoint:
      here = rows.add(drive, h)
      new = mosaic.select(inside(t), rows.times(a, here), h)
      return new, mosaic.select(inside(t), here, drive)
    h = mosaic.select(inside(t), rows.add(rows.times(a, h), drive), h)
    return h, h

  def store(t: jax.Array, row: Row) -> None:
    for panel, value in zip(x, row, strict=True):
      panel[:, t, pl.ds(0, cut.states)] = value

  load = partial(_row, x, cut=cut)
  return mosaic.sweep(STEPS, descending, load, step, h, store, machine.together)


def _finish(
  product: Callable[[Any], jax.Array], base: Any, block: Any, y: Any, through: Any, i: jax.Array,
  k: jax.Array, problem: jax.Array, cut: Cut, machine: Machine,
) -> None:  # fmt: skip
  """Writes product(columns) of y (TILE, H), and what it is added to, some columns after others.

  That is D times the block, or what the last launch left. The y of the last launch goes `through`
  shared memory, from where TMA takes it.
  """
  final = y.dtype != jnp.float32
  for h in range(0, cut.width, UNIT):
    own = pl.ds(h, UNIT)
    value = product(own)
    if len(base.shape) > 2:
      more = machine.load(base.at[i, k, :, own], WGMMA)
    else:
      D = machine.load(base.at[problem, own], COLUMNS)
      more = lax.broadcast_in_dim(D, (TILE, UNIT), (1,)) * block[:, own].astype(jnp.float32)
    if final:
      through[:, own] = (value + more).astype(y.dtype)
    else:
      y[i, k, :, own] = value + more
  plgpu.commit_smem()
  for r in range(2 * final):
    rows_ = y.at[2 * i + r, pl.ds(k * STEPS, STEPS)]
    plgpu.copy_smem_to_gmem(through.at[pl.ds(r * STEPS, STEPS)], rows_)


def _row(x: Any, t: jax.Array, cut: Cut) -> Row:
  """Step t of the panels, (2, P)."""
  return tuple(panel[:, t, pl.ds(0, cut.states)] for panel in x)


def _at(pair: Any, where: Any) -> Row:
  return tuple(part[where] for part in pair)


def _put(pair: Any, where: Any, values: Row) -> None:
  """Writes what `_at` reads; nothing where there is no reference."""
  for part, value in zip(pair, values, strict=bool(pair)):
    part[where] = value


def _tiles(*shape: int) -> Any:
  """Scratch for factors of products, arranged as the matrix unit takes them."""
  tiles = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiles)


def _sum(cut: Cut, u: jax.Array, final: bool) -> jax.ShapeDtypeStruct:
  """The y or du of a launch. What the next one adds to lies as the threads have it."""
  if final:
    return jax.ShapeDtypeStruct(u.shape, u.dtype)
  return jax.ShapeDtypeStruct((cut.pairs, cut.room, TILE, cut.width), jnp.float32)


def _fits(u: jax.Array, states: int) -> bool:
  """Whether the forward kernel has room for so many states."""
  width = _up(u.shape[-1], UNIT)
  return 2 * (4 * width * states + 2 * TILE * width + 4 * TILE * (states + SPARE)) <= MEMORY


def _cut(u: jax.Array, states: int) -> Cut:
  """Of u (G, B, L, H), for launches of so many states."""
  problems, batch, length, width = u.shape
  alike = pl.cdiv(batch, 2)
  pairs, blocks, chunks = problems * alike, pl.cdiv(length, STEPS), 1
  if pairs < mosaic.ENOUGH:
    chunks = max(1, min(pl.cdiv(mosaic.WANTED, pairs), length // mosaic.CHUNK))
  return Cut(pairs, alike, length, _up(width, UNIT), states, pl.cdiv(blocks, chunks))


def _up(n: int, unit: int) -> int:
  return pl.cdiv(n, unit) * unit


def _wide(x: jax.Array) -> jax.Array:
  """Zeros behind the last axis."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _up(x.shape[-1], UNIT) - x.shape[-1])])


def _matrices(parts: Pair) -> jax.Array:
  """(G, 2, m, n) in bfloat16 of a pair of (G, m, n)."""
  both = jnp.stack(parts, axis=1).astype(jnp.bfloat16)
  return _wide(_wide(both).swapaxes(2, 3)).swapaxes(2, 3)


def _output(C: Pair, k: int, directions: int) -> Pair:
  """The real matrices that take the parts of the states of direction k to Re(C x)."""
  return tuple(jnp.split(x, directions, axis=-1)[k] for x in (C[0], -C[1]))


def _rows_of_two(a: Pair) -> Pair:
  """(G, 2, P): a decay as the threads of two rows have it."""
  return tuple(jnp.stack([_wide(x)] * 2, axis=1) for x in a)


def _paired(state: Pair) -> Pair:
  """(pairs, 2, P) of (G, B, P)."""
  return tuple(_even(_wide(x)).reshape(-1, 2, _up(x.shape[-1], UNIT)) for x in state)


def _unpaired(state: Pair, like: Pair) -> Pair:
  problems, batch, states = like[0].shape
  return tuple(x.reshape(problems, -1, x.shape[-1])[:, :batch, :states] for x in state)


def _even(x: jax.Array) -> jax.Array:
  """A row of zeros more where the batch (G, B, ...) is odd."""
  return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2))


def _sequence(u: jax.Array, cut: Cut, machine: Machine) -> jax.Array:
  """(rows, L, H) of (G, B, L, H), with time in whole tiles of eight.

  Beyond these TMA reads zeros and writes nothing. The interpreter wants whole blocks.
  """
  steps = cut.room * STEPS if machine.interpret else max(STEPS, _up(cut.length, GROUP))
  u = jnp.pad(_even(_wide(u)), [(0, 0), (0, 0), (0, steps - cut.length), (0, 0)])
  return u.reshape(-1, *u.shape[2:])


def _cropped(y: jax.Array, like: jax.Array) -> jax.Array:
  problems, batch, length, width = like.shape
  return y.reshape(problems, -1, *y.shape[1:])[:, :batch, :length, :width]


def _part(x: Any, own: slice) -> Any:
  return jax.tree.map(lambda z: z[..., own], x)


def _joined(parts: list[Any]) -> Any:
  """The inverse, of all parts."""
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)
