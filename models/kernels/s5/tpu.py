"""S5 as one Pallas kernel for TPUs in each direction: the states never leave fast memory.

    grid (batch rows / R, time / T)      time innermost, in order of the recurrence

    u (R, T, H) ──matmul B──► drive (T R, P) ──loop over time──► x (T R, P) ──matmul C──► y
                              re and im apart   R rows at once     scratch       + D u

What a block writes is its `y` and the one state that entered it. The backward kernel walks over the
blocks the other way, makes drive and states of a block again from that state, and sums the
gradients of B, C, D and of a constant decay in fast memory; XLA adds them up over the programs, in
a fixed order. In the scratch the rows of the batch take turns, so that one step of eight of them
fills whole registers; where P is at most half the lanes of a register, the states of several rows
share its lanes, which costs the matrix unit zeros that it has time for.

A program runs one direction of time. A bidirectional layer is two, the second adding to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.kernels import rows
from models.kernels.rows import Row

Pair = tuple[jax.Array, ...]

LANES = 128  # of a register
STEPS = 256  # time steps of a block, halved until it fits
CHAINS = 8  # rows of the batch, or packs of them, whose recurrences run side by side
MEMORY = 40 * 2**20  # bytes of fast memory; a core has 64 MiB (v5p) or 128 MiB (v5e, v6e)
ORDER = pltpu.CompilerParams(
  dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
)


class Cut(NamedTuple):
  """How (B, L, H) is cut."""

  length: int
  width: int  # H
  lanes: int  # W, of the states of a chain: q P and zeros up to whole registers
  packed: int  # q, rows of the batch in the lanes of one chain
  states: int  # P
  packs: int  # B / q
  chains: int  # packs of a program
  steps: int  # T

  def for_chains(self, action: Callable[[jax.Array], None], together: int = 2) -> None:
    """A loop: one chain at a time leaves the matrix unit idle in between where a chain has little
    for it to do, all of them unrolled take several times as long to compile."""
    together = min(together, self.chains)

    def some(i: jax.Array, _: None) -> None:
      for c in range(together):
        action(i * together + c)

    lax.fori_loop(0, self.chains // together, some, None)

  @property
  def grid(self) -> tuple[int, int]:
    return self.packs // self.chains, pl.cdiv(self.length, self.steps)

  def valid(self, block: jax.Array) -> jax.Array | int:
    """How many steps of a block are inside the sequence."""
    return rows.valid(self.length, self.steps, block)


class Operands(NamedTuple):
  """Those of one direction, or what belongs to them: specifications, references, gradients.

  Pairs are () where there is no such operand.
  """

  u: Any  # (G, q, L, H)
  a: Any  # a pair of (1, W), or of (G, L, W)
  scale: Any  # likewise
  B: Any  # a pair of (q, H, W): for each row of a pack zeros but for its own lanes
  C: Any  # a pair of (q, W, H), of which the imaginary part is negated


def refusal(
  u: jax.Array, a: Any, scale: Any, B: Pair, C: Pair, D: jax.Array, x0: Any
) -> str | None:
  """Why the kernels cannot run these operands."""
  if D.dtype != jnp.float32:
    return f"dtype {D.dtype} of the states; it needs float32"
  if u.dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {u.dtype} of u; it needs float32 or bfloat16"
  if 0 in u.shape or 0 in B[0].shape:
    return f"u of shape {u.shape}, B of {B[0].shape}; it needs at least one of each"
  if _held(Cut(16, u.shape[2], pl.cdiv(B[0].shape[0], LANES) * LANES, 1, 1, 1, 1, 16), 4) > MEMORY:
    return f"B of shape {B[0].shape}: its gradients do not fit into fast memory"
  return None


def forward(
  u: jax.Array,
  a: tuple[Pair, ...],
  scale: tuple[Pair | None, ...],
  B: Pair,
  C: Pair,
  D: jax.Array,
  x0: tuple[Pair, ...],
  *,
  reverses: tuple[bool, ...],
  interpret: bool = False,
) -> tuple[jax.Array, tuple[Pair, ...], Any]:
  """See `interface.py`; kept is the state that enters each block."""
  y: Any = None
  lasts, marks = [], []
  for k, reverse in enumerate(reverses):
    cut, operands = _operands(k, u, a, scale, B, C, len(reverses))
    # Until the last direction has been added the sum is not rounded.
    dtype = u.dtype if k == len(reverses) - 1 else D.dtype
    y, last, mark = _forward_call(cut, operands, D, x0[k], y, dtype, reverse, interpret)
    lasts.append(last)
    marks.append(mark)
  return y.reshape(u.shape), tuple(lasts), tuple(marks)


def backward(
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
  interpret: bool = False,
) -> tuple[Any, ...]:
  """See `interface.py`."""
  du: Any = None
  found = []
  for k, reverse in enumerate(reverses):
    cut, operands = _operands(k, u, a, scale, B, C, len(reverses))
    dtype = u.dtype if k == len(reverses) - 1 else D.dtype
    du, *others = _backward_call(
      cut,
      operands,
      D,
      saved[k],
      dy.reshape(operands.u.shape),
      dx_last[k],
      du,
      dtype,
      reverse,
      interpret,
    )
    found.append(others)
  da, dscale, dBs, dCs, dDs, dx0s = zip(*found, strict=True)
  dB = tuple(sum(parts) for parts in zip(*dBs, strict=True))
  dC = tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*dCs, strict=True))
  return du.reshape(u.shape), da, dscale, dB, dC, dDs[0], dx0s


def _operands(
  k: int,
  u: jax.Array,
  a: tuple[Pair, ...],
  scale: tuple[Pair | None, ...],
  B: Pair,
  C: Pair,
  directions: int,
) -> tuple[Cut, Operands]:
  """Those of direction k, packed."""
  batch, length, width = u.shape
  states = B[0].shape[0]
  by_step = any(x[0].ndim > 1 for x in (a[k], scale[k]) if x is not None)
  packs = (1,) if by_step else (16, 8, 4, 2, 1)
  q = next(q for q in packs if batch % q == 0 and (q == 1 or q * states <= LANES))
  groups, lanes = batch // q, pl.cdiv(q * states, LANES) * LANES
  chains = next(n for n in (CHAINS, 4, 2, 1) if groups % n == 0 and (n == 1 or n * lanes <= 4096))
  steps = min(STEPS, pl.cdiv(length, 16) * 16)
  cut = Cut(length, width, lanes, q, states, groups, chains, steps)
  sequences = sum(2 for x in (a[k], scale[k]) if x is not None and x[0].ndim > 1)
  while cut.steps > 16 and _held(cut, u.dtype.itemsize, sequences) > MEMORY:
    cut = cut._replace(steps=cut.steps // 32 * 16)

  low = u.dtype if u.dtype.itemsize < 4 else jnp.float32
  C_k = [jnp.split(part, directions, axis=-1)[k] for part in (C[0], -C[1])]
  at = [jnp.eye(q)[i] for i in range(q)]
  packed_B = [_wide(jnp.stack([jnp.kron(row, part.T) for row in at]), lanes) for part in B]
  packed_C = [_wide(jnp.stack([jnp.kron(row, part) for row in at]), lanes) for part in C_k]

  def decay(x: Pair | None) -> Pair:
    if x is None:
      return ()
    return tuple(_wide(jnp.tile(p, q)[None] if p.ndim == 1 else p, lanes) for p in x)

  return cut, Operands(
    u.reshape(groups, q, length, width),
    decay(a[k]),
    decay(scale[k]),
    tuple(x.astype(low) for x in packed_B),
    tuple(x.astype(low).swapaxes(1, 2) for x in packed_C),
  )


def _wide(x: jax.Array, lanes: int) -> jax.Array:
  """Zeros behind the last axis."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes - x.shape[-1])])


def _held(cut: Cut, itemsize: int, sequences: int = 0) -> int:
  """Bytes of fast memory of the backward kernel, which holds more than the forward one."""
  lanes, rows_ = cut.lanes, cut.chains * cut.steps
  matrices = 4 * cut.packed * cut.width * lanes * (itemsize + 2 * 4)
  blocks = rows_ * (cut.packed * cut.width * (2 * 4 * itemsize + 4) + 2 * 4 * sequences * lanes)
  return matrices + blocks + rows_ * lanes * 4 * (10 if sequences else 8)


def _forward_call(
  cut: Cut,
  operands: Operands,
  D: jax.Array,
  x0: Pair,
  y: jax.Array | None,
  dtype: Any,
  reverse: bool,
  interpret: bool,
) -> tuple[jax.Array, Pair, Pair]:
  """(y, x_last, the states that enter the blocks); adds to `y` where there is one, else D u."""
  specs = _Specs(cut, reverse)
  state = jax.ShapeDtypeStruct((cut.packs, 1, cut.lanes), jnp.float32)
  marks = jax.ShapeDtypeStruct((cut.packs, cut.grid[1], 1, cut.lanes), jnp.float32)
  u = operands.u
  base = D[None] if y is None else y.reshape(u.shape)
  with rows.indices_of_32_bits(interpret):
    y, x_last, marks = pl.pallas_call(
      partial(_forward, cut=cut, reverse=reverse, adds=y is not None),
      grid=cut.grid,
      in_specs=(
        specs.operands(operands, specs.whole),
        specs.whole(base) if y is None else specs.sequence,
        (specs.state,) * 2,
      ),
      out_specs=(specs.sequence, (specs.state,) * 2, (specs.mark,) * 2),
      out_shape=(jax.ShapeDtypeStruct(u.shape, dtype), (state,) * 2, (marks,) * 2),
      scratch_shapes=(specs.carry(), specs.block(), specs.block(), *specs.by_time(operands)),
      compiler_params=ORDER,
      cost_estimate=_cost(cut, operands, dtype.itemsize, matrices=4),
      interpret=interpret,
      name="s5",
    )(operands, base, _packed(x0, cut))
  return y, _unpacked(x_last, x0, cut), marks


def _backward_call(
  cut: Cut,
  operands: Operands,
  D: jax.Array,
  marks: Pair,
  dy: jax.Array,
  dx_last: Pair,
  du: jax.Array | None,
  dtype: Any,
  reverse: bool,
  interpret: bool,
) -> tuple[Any, ...]:
  """The gradients of a direction; du is added to the one there is, or else to D dy."""
  specs = _Specs(cut, not reverse)
  programs, q, states = cut.grid[0], cut.packed, dx_last[0].shape[-1]
  state = jax.ShapeDtypeStruct((cut.packs, 1, cut.lanes), jnp.float32)

  def total(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((programs, *x.shape), jnp.float32)

  def slope(x: jax.Array) -> jax.ShapeDtypeStruct:
    return total(x) if x.shape[0] == 1 and x.ndim == 2 else jax.ShapeDtypeStruct(x.shape, x.dtype)

  base = D[None] if du is None else du.reshape(dy.shape)
  shapes = Operands(
    jax.ShapeDtypeStruct(dy.shape, dtype),
    tuple(map(slope, operands.a)),
    tuple(map(slope, operands.scale)),
    tuple(map(total, operands.B)),
    tuple(map(total, operands.C)),
  )
  with rows.indices_of_32_bits(interpret):
    slopes, dD, dx0 = pl.pallas_call(
      partial(_backward, cut=cut, reverse=reverse, adds=du is not None),
      grid=cut.grid,
      in_specs=(
        specs.operands(operands, specs.whole),
        specs.whole(base) if du is None else specs.sequence,
        specs.sequence,
        (specs.mark,) * 2,
        (specs.state,) * 2,
      ),
      out_specs=(specs.operands(operands, specs.total), specs.total(D[None]), (specs.state,) * 2),
      out_shape=(shapes, total(D[None]), (state,) * 2),
      scratch_shapes=(
        specs.carry(),
        *(specs.block() for _ in range(3)),
        *specs.by_time(operands),
        specs.block() if operands.scale else [],
      ),
      compiler_params=ORDER,
      cost_estimate=_cost(cut, operands, 3 * dtype.itemsize // 2, matrices=10),
      interpret=interpret,
      name="s5_backward",
    )(operands, base, dy, marks, _packed(dx_last, cut))

  def unpacked(x: jax.Array) -> jax.Array:
    """Of (programs, 1, W) the sum of all rows."""
    return x.sum((0, 1))[: q * states].reshape(q, states).sum(0)

  def decay(pair: Pair, given: Pair) -> Pair | None:
    if not given:
      return None
    return tuple(
      x[..., :states] if g.ndim == 3 else unpacked(x) for x, g in zip(pair, given, strict=True)
    )

  own = [slice(i * states, (i + 1) * states) for i in range(q)]
  dB = tuple(sum(x[:, i, :, own[i]].sum(0) for i in range(q)).T for x in slopes.B)
  dC = [sum(x[:, i, own[i]].sum(0) for i in range(q)).T for x in slopes.C]
  return (
    slopes.u,
    decay(slopes.a, operands.a),
    decay(slopes.scale, operands.scale),
    dB,
    (dC[0], -dC[1]),
    dD.sum((0, 1)),
    _unpacked(dx0, dx_last, cut),
  )


def _forward(
  operands: Operands, base: Any, x0: Any, y: Any, x_last: Any, marks: Any,
  carry: Any, drive: Any, states: Any, decays: Any, scales: Any,
  *, cut: Cut, reverse: bool, adds: bool,
) -> None:  # fmt: skip
  """The kernel: references to blocks, in, out and scratch."""
  k = pl.program_id(1)
  pl.when(k == 0)(partial(rows.copy, x0, carry))
  for mark, x in zip(marks, carry, strict=True):
    mark[:, 0] = x[...]
  n = cut.valid(cut.grid[1] - 1 - k if reverse else k)
  low = operands.B[0].dtype
  scratch = drive, states, decays, scales, ()
  start = tuple(x[:, 0] for x in carry)
  _keep(carry, _states(n, operands, start, *scratch, reverse, cut))

  @cut.for_chains
  def _(c: jax.Array) -> None:
    x = [_chain(part, c, cut).astype(low) for part in states]
    for i in range(cut.packed):
      own = [_own(part, i, cut) for part in x]
      out = sum(_dot(part, C[i], "ik,kj->ij") for part, C in zip(own, operands.C, strict=True))
      more = base[c, i] if adds else base[...] * operands.u[c, i].astype(jnp.float32)
      y[c, i] = (out + more).astype(y.dtype)

  pl.when(k == cut.grid[1] - 1)(partial(rows.copy, carry, x_last))


def _backward(
  operands: Operands, base: Any, dy: Any, marks: Any, dx_last: Any,
  slopes: Operands, dD: Any, dx0: Any,
  carry: Any, drive: Any, states: Any, slope: Any, decays: Any, scales: Any, unscaled: Any,
  *, cut: Cut, reverse: bool, adds: bool,
) -> None:  # fmt: skip
  """The kernel. Rows beyond the sequence hold anything: they are zeroed before they meet a sum."""
  k = pl.program_id(1)
  n = cut.valid(k if reverse else cut.grid[1] - 1 - k)
  ragged = not isinstance(n, int)
  low = operands.B[0].dtype
  totals = [x for pair in (slopes.a, slopes.scale) for x in pair if x.shape[1] == 1]
  totals += [*slopes.B, *slopes.C, dD]

  @pl.when(k == 0)
  def _() -> None:
    rows.copy(dx_last, carry)
    stale = [panel for scratch in (states, slope, drive) for part in scratch for panel in part]
    for x in (*totals, *(stale if ragged else ())):
      x[...] = jnp.zeros_like(x)

  def inside(x: jax.Array) -> jax.Array:
    """(T, H), zero beyond the sequence."""
    t = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(t < n, x, jnp.zeros_like(x)) if ragged else x

  # The states of the block once more.
  start = tuple(mark[:, 0, 0] for mark in marks)
  _states(n, operands, start, drive, states, decays, scales, unscaled, reverse, cut)

  # The recurrence of the gradients, from `slope` into `drive`.
  _driven(dy, operands.C, slope, cut, "ik,jk->ij")
  ends = tuple(x[:, 0] for x in carry)
  _keep(carry, _recur_back(n, decays or operands.a, slope, drive, ends, not reverse, cut))

  # Products with the state before each step.
  first = n - 1 if reverse else 0

  @partial(cut.for_chains, together=1)
  def _(c: jax.Array) -> None:
    t = lax.broadcasted_iota(jnp.int32, (cut.steps, cut.lanes), 0)
    g = tuple(jnp.where(t < n, _chain(x, c, cut), 0.0) for x in drive)
    before = tuple(
      jnp.where(t == first, mark[c, 0], pltpu.roll(_chain(x, c, cut), back, 0))
      for x, mark in zip(states, marks, strict=True)
      for back in [cut.steps - 1 if reverse else 1]
    )
    _add(slopes.a, c, rows.times(g, rows.conj(before)))
    v = g
    if operands.scale:
      mine = tuple(jnp.where(t < n, _chain(x, c, cut), 0.0) for x in unscaled)
      _add(slopes.scale, c, rows.times(g, rows.conj(mine)))
      turn = tuple(x[c] if len(x.shape) == 3 else x[...] for x in operands.scale)
      v = tuple(jnp.where(t < n, x, 0.0) for x in rows.times(rows.conj(turn), g))
    v = tuple(x.astype(low) for x in v)
    x = tuple(_chain(part, c, cut).astype(low) for part in states)
    for i in range(cut.packed):
      u_i, dy_i = inside(operands.u[c, i]), inside(dy[c, i])
      own = [_own(part, i, cut) for part in v]
      out = sum(_dot(part, B[i], "ik,jk->ij") for part, B in zip(own, operands.B, strict=True))
      more = base[c, i] if adds else base[...] * dy_i.astype(jnp.float32)
      slopes.u[c, i] = (out + more).astype(slopes.u.dtype)
      for total, part in zip(slopes.B, v, strict=True):
        total[0, i] += _dot(u_i, part, "ki,kj->ij")
      for total, part in zip(slopes.C, x, strict=True):
        total[0, i] += _dot(part, dy_i, "ki,kj->ij")
      product = u_i.astype(jnp.float32) * dy_i.astype(jnp.float32)
      dD[0] += product.sum(axis=0, keepdims=True)

  pl.when(k == cut.grid[1] - 1)(partial(rows.copy, carry, dx0))


def _states(
  n: Any, operands: Operands, start: Row, drive: Any, states: Any, decays: Any, scales: Any,
  unscaled: Any, reverse: bool, cut: Cut,
) -> Row:  # fmt: skip
  """Those of a block into `states`, the drive into `drive`, and as it was without its scale into
  `unscaled` where that is wanted; the last states."""
  _interleave(operands.a, decays, cut)
  _interleave(operands.scale, scales, cut)
  _driven(operands.u, operands.B, drive, cut)
  if operands.scale:
    for panels, kept in zip(drive, unscaled, strict=False):
      rows.copy(panels, kept)
    _scale(scales or operands.scale, drive)
  return _recur(n, decays or operands.a, drive, states, start, reverse, cut)


def _recur(n: Any, a: Any, source: Any, target: Any, start: Row, descending: bool, cut: Cut) -> Row:
  """x_t = a_t x_{t-1} + source_t into target, all chains side by side; the last states."""
  decay = _decay(a, cut)

  def step(t: jax.Array, _: int | None, x: Row) -> Row:
    x = rows.add(rows.times(decay(t), x), _at(source, t, cut))
    _set(target, t, x, cut)
    return x

  return rows.steps(n, step, start, descending=descending)


def _recur_back(
  n: Any, a: Any, source: Any, target: Any, start: Row, descending: bool, cut: Cut
) -> Row:
  """g_t = source_t + c_{t+1}, c_t = conj(a_t) g_t, g into target; the last c."""
  decay = _decay(a, cut)

  def step(t: jax.Array, _: int | None, c: Row) -> Row:
    g = rows.add(_at(source, t, cut), c)
    _set(target, t, g, cut)
    return rows.times(rows.conj(decay(t)), g)

  return rows.steps(n, step, start, descending=descending)


def _decay(a: Any, cut: Cut) -> Callable[[Any], Row]:
  if isinstance(a[0], list):
    return lambda t: _at(a, t, cut)
  constant = tuple(jnp.broadcast_to(part[...], (cut.chains, cut.lanes)) for part in a)
  return lambda t: constant


# A scratch is one list of panels for each part, (T chains, 128), the chains taking turns: a step of
# eight chains is one register of each panel.


def _at(x: Any, t: Any, cut: Cut) -> Row:
  """All chains at time t, (chains, W)."""
  where = pl.ds(pl.multiple_of(t * cut.chains, cut.chains), cut.chains)
  return tuple(jnp.concatenate([panel[where] for panel in part], axis=1) for part in x)


def _set(x: Any, t: Any, values: Row, cut: Cut) -> None:
  where = pl.ds(pl.multiple_of(t * cut.chains, cut.chains), cut.chains)
  for part, value in zip(x, values, strict=True):
    for p, panel in enumerate(part):
      panel[where] = value[:, _lanes(p)]


def _chain(panels: Any, c: jax.Array, cut: Cut) -> jax.Array:
  """Chain c, (T, W)."""
  where = pl.ds(c, cut.steps, stride=cut.chains)
  return jnp.concatenate([panel[where] for panel in panels], axis=1)


def _set_chain(panels: Any, c: jax.Array, value: jax.Array, cut: Cut) -> None:
  for p, panel in enumerate(panels):
    panel[pl.ds(c, cut.steps, stride=cut.chains)] = value[:, _lanes(p)]


def _lanes(p: int) -> slice:
  return slice(p * LANES, (p + 1) * LANES)


def _interleave(sequences: Any, target: Any, cut: Cut) -> None:
  """Operands that differ by step, as the recurrence wants them; nothing without a target."""

  @cut.for_chains
  def _(c: jax.Array) -> None:
    for panels, sequence in zip(target, sequences, strict=False):
      _set_chain(panels, c, sequence[c], cut)


def _driven(x: Any, matrices: Any, target: Any, cut: Cut, equation: str = "ik,kj->ij") -> None:
  """x_i M_i for each part of M, in the lanes of each row i of a pack."""

  @cut.for_chains
  def _(c: jax.Array) -> None:
    for panels, M in zip(target, matrices, strict=True):
      product = _dot(x[c, 0], M[0], equation)
      for i in range(1, cut.packed):
        product = _own(_dot(x[c, i], M[i], equation), i, cut, product)
      _set_chain(panels, c, product, cut)


def _own(x: jax.Array, i: int, cut: Cut, others: Any = 0) -> jax.Array:
  """(T, W) in the lanes of row i of a pack, `others` elsewhere: what is not finite stays there."""
  if cut.packed == 1:
    return x
  lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
  mine = (lane >= i * cut.states) & (lane < (i + 1) * cut.states)
  return jnp.where(mine, x, jnp.asarray(others, x.dtype))


def _scale(scale: Any, drive: Any) -> None:
  """Multiplies the drive by a scale: panels, or a pair of (1, W)."""
  for p, parts in enumerate(zip(*drive, strict=True)):
    factor = tuple(part[p][...] if isinstance(part, list) else part[:, _lanes(p)] for part in scale)
    for ref, value in zip(parts, rows.times(factor, tuple(x[...] for x in parts)), strict=True):
      ref[...] = value


def _keep(carry: Any, values: Row) -> None:
  for ref, value in zip(carry, values, strict=True):
    ref[:, 0] = value


def _add(total: Any, c: jax.Array, product: Row) -> None:
  """The product of chain c: summed over time for a constant operand, else as it is."""
  for ref, value in zip(total, product, strict=True):
    if ref.shape[1] == 1:
      ref[0] += value.sum(axis=0, keepdims=True)
    else:
      ref[c] = value


def _dot(x: jax.Array, z: jax.Array, equation: str) -> jax.Array:
  """Two matrices, the products summed in float32; of float32 factors as precise as jax is told."""
  axes = {"ik,kj->ij": (1, 0), "ik,jk->ij": (1, 1), "ki,kj->ij": (0, 0)}[equation]
  return rows.dot(x, z, axes, rows.precision(lax.Precision.DEFAULT))


def _packed(state: Pair, cut: Cut) -> Pair:
  """(B, P) as (G, 1, W)."""
  return tuple(_wide(x.reshape(cut.packs, 1, -1), cut.lanes) for x in state)


def _unpacked(state: Pair, like: Pair, cut: Cut) -> Pair:
  used = cut.packed * like[0].shape[-1]
  return tuple(x[..., :used].reshape(like[0].shape) for x in state)


class _Specs:
  """Block specifications of a grid over packs and blocks of time, `reverse`d or not."""

  def __init__(self, cut: Cut, reverse: bool) -> None:
    def time(k: jax.Array) -> jax.Array:
      return cut.grid[1] - 1 - k if reverse else k

    self.cut = cut
    self.sequence = pl.BlockSpec(
      (cut.chains, cut.packed, cut.steps, cut.width), lambda i, k: (i, 0, time(k), 0)
    )
    self.by_step = pl.BlockSpec((cut.chains, cut.steps, cut.lanes), lambda i, k: (i, time(k), 0))
    self.state = pl.BlockSpec((cut.chains, 1, cut.lanes), lambda i, k: (i, 0, 0))
    self.mark = pl.BlockSpec((cut.chains, 1, 1, cut.lanes), lambda i, k: (i, time(k), 0, 0))

  def whole(self, x: jax.Array) -> pl.BlockSpec:
    """One copy of an operand that all programs read."""
    zero = (0,) * x.ndim
    return pl.BlockSpec(x.shape, lambda i, k: zero, pipeline_mode=pl.Buffered(1))

  def total(self, x: jax.Array) -> pl.BlockSpec:
    zero = (0,) * x.ndim
    return pl.BlockSpec((1, *x.shape), lambda i, k: (i, *zero))

  def operands(self, x: Operands, fixed: Callable[[jax.Array], pl.BlockSpec]) -> Operands:
    """`fixed` specifies what does not differ by step: `whole` operands, `total` gradients."""

    def of(part: jax.Array) -> pl.BlockSpec:
      return self.by_step if part.ndim == 3 else fixed(part)

    return Operands(
      self.sequence,
      tuple(map(of, x.a)),
      tuple(map(of, x.scale)),
      tuple(map(fixed, x.B)),
      tuple(map(fixed, x.C)),
    )

  def carry(self) -> list[Any]:
    return [pltpu.VMEM((self.cut.chains, 1, self.cut.lanes), jnp.float32)] * 2

  def block(self) -> list[Any]:
    panel = pltpu.VMEM((self.cut.chains * self.cut.steps, LANES), jnp.float32)
    return [[panel] * (self.cut.lanes // LANES)] * 2

  def by_time(self, x: Operands) -> list[Any]:
    """Scratch for the decays and for the scales that differ by step."""
    return [self.block() if pair and pair[0].ndim == 3 else [] for pair in (x.a, x.scale)]


def _cost(cut: Cut, operands: Operands, out: int, matrices: int) -> pl.CostEstimate:
  """`matrices` products of (L, H) by (H, P) for each row; states do not count as moved."""
  steps = cut.packs * cut.packed * cut.length
  inputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands))
  return pl.CostEstimate(
    flops=steps * cut.lanes // cut.packed * (2 * matrices * cut.width + 8),
    transcendentals=0,
    bytes_accessed=inputs + steps * cut.width * out,
  )
