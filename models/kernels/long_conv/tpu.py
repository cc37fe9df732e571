"""Long convolution as one Pallas kernel for TPUs in each direction: DFTs by matrix products.

    grid (features / F, batch rows / R)      one program holds the whole sequences of its block

A sequence of N = N1 128 points, zero-padded, is a matrix of N1 rows of 128: n = 128 n1 + n2,
k = k1 + N1 k2. Two rows of the batch are the real and the imaginary part of one signal X:

    ┌ X0 ┐  left     ┌────┐         right        × spectrum    right         conj.     left   ┌ y0 ┐
    └ X1 ┘ ───────►  │ Y  │ × twiddles ──► Z ────────────────► ────► Y × twiddles ──────────► └ y1 ┘
    h rows   F1       N1 rows         F2                         F2*             F1*, h rows

Rows that are padding are not transformed, of the result only the sequence is made, and nothing is
transposed: the spectrum of the kernel is kept as [k1, k2], the order in which Z arises. Where N1 is
small, the sequences of 128 / N1 features lie on top of each other, and F1 becomes a matrix of
blocks, so that every product fills the matrix unit; where N1 is above 128, a loop makes 128 rows
of Y at a time and adds what becomes of them to the result.

A signal of two sequences would round both as the larger one needs, and share what is not finite.
So each is divided by a power of two near its largest value, or is zero and its result NaN where it
has one that is not finite. The kernels of the features, which share products, are treated alike.

Factors of products are rounded to bfloat16 where sequences are; those of float32 are multiplied in
six passes, or under `jax.default_matmul_precision("high")` in three, which are exact to 1e-5.

The spectrum of the kernels is made when a program sees its features first, in float32, and stays in
fast memory for the whole batch. The backward kernel transforms cotangents and inputs, sums the
spectrum of the kernels' gradient over the batch, and transforms back once for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.kernels import rows
from models.kernels.long_conv import xla
from models.kernels.long_conv.dft import powers
from models.kernels.rows import Row

Optional = jax.Array | None

LANES = 128  # N2, the lanes of a register
ROWS = 128  # of Y at a time
LONGEST = 1024  # N1
MOST = 8  # rows of the batch in a program, stacks in one, and rows of stacks side by side
MEMORY = 48 * 2**20  # bytes of fast memory; a core has 64 MiB (v5p) or 128 MiB (v5e, v6e)
ORDER = pltpu.CompilerParams(
  dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
)
LARGEST = float(np.finfo(np.float32).max)


class Cut(NamedTuple):
  """How (B, L, H) is cut."""

  batch: int  # even
  width: int  # H
  height: int  # h, rows of a sequence
  taps: int  # rows of a kernel: all N1 where it has lags on both sides
  points: int  # N1
  stack: int  # P, features on top of each other
  pieces: int  # Q, of Y
  together: int  # R, rows of the batch in a program
  features: int  # F, stacks in a program
  exact: lax.Precision  # of products of float32 factors

  @property
  def stacks(self) -> int:
    return pl.cdiv(self.width, self.stack)

  @property
  def rows(self) -> int:
    """Of a piece of Y."""
    return self.stack * self.points // self.pieces

  def abreast(self, most: int) -> int:
    """Stacks that are worked at side by side, so that their products wait less for each other."""
    return next(n for n in (4, 2, 1) if n <= most and self.features % n == 0)

  def for_stacks(self, action: Callable[[list[Any]], None], most: int = 2) -> None:
    """action(some stacks), for all of a program."""
    n = self.abreast(most)

    def some(i: jax.Array, _: None) -> None:
      action([i * n + j for j in range(n)])

    lax.fori_loop(0, self.features // n, some, None)

  def own(self, c: Any) -> Any:
    """The features of a stack."""
    return pl.ds(c * self.stack, self.stack)

  def for_pairs(self, action: Callable[[list[tuple[Any, int]]], None]) -> None:
    """action([(stack, first row of the pair), ...])."""
    first = range(0, self.together, 2)
    self.for_stacks(lambda stacks: action([(c, b) for c in stacks for b in first]), self.most)

  @property
  def most(self) -> int:
    """Stacks for `for_pairs`."""
    return MOST // self.together

  def for_pieces(self, action: Callable[[Any], None]) -> None:
    """The first piece sets what the others add to."""
    action(0)
    if self.pieces > 1:
      lax.fori_loop(1, self.pieces, lambda q, _: action(q), None)

  @property
  def grid(self) -> tuple[int, int]:
    return pl.cdiv(self.stacks, self.features), self.batch // self.together


class Matrices(NamedTuple):
  """The constant factors, complex numbers as blocks of real ones. Rows of a signal are the real and
  the imaginary ones, 2 P h, or of a kernel, which is real, P times its."""

  down: Any  # F1, P times on the diagonal: (Q, 2 rows, rows of a signal)
  across: Any  # F2 for [re | im] in the lanes: (256, 256)
  back: Any  # its conjugate
  up: Any  # that of F1, over N: (Q, rows of a signal, 2 rows)
  twiddles: Any  # two (Q, rows, 128)


def refusal(
  u: jax.Array, k: jax.Array, k_backward: Optional, pre: Optional, post: Optional
) -> str | None:
  """Why the kernels cannot run these operands."""
  if (wrong := wrong_dtype(k, u, pre, post)) is not None:
    return wrong
  _, points = _points(u, k, k_backward)
  if points > LONGEST:
    return f"a transform of {points * LANES} points; it takes {LONGEST * LANES}"
  return None


def wrong_dtype(k: jax.Array, *sequences: Optional) -> str | None:
  """Of kernels or sequences, in words."""
  if k.dtype != jnp.float32:
    return f"dtype {k.dtype} of the kernels; it needs float32"
  for x in sequences:
    if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
      return f"dtype {x.dtype} of a sequence; it needs float32 or bfloat16"
  return None


def forward(
  u: jax.Array,
  k: jax.Array,
  k_backward: Optional,
  pre: Optional,
  post: Optional,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `interface.py`. With `interpret` the kernel's steps run one by one on any platform."""
  (y,) = _call((u, pre, post), k, k_backward, [u.dtype], interpret)
  return sequence(y, u)


def backward(
  u: jax.Array,
  k: jax.Array,
  k_backward: Optional,
  pre: Optional,
  post: Optional,
  dy: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Optional, Optional, Optional]:
  """See `interface.py`."""
  results = [x.dtype for x in (u, pre) if x is not None]
  du, *dpre, dk = _call((u, pre, post, dy), k, k_backward, results, interpret)
  dk_HN = dk.reshape(dk.shape[0], -1)
  dk_backward = dpost = None
  if k_backward is not None:
    dk_backward = dk_HN[:, : -k_backward.shape[1] - 1 : -1]
  if post is not None:  # what it multiplied, once more, by its cotangent
    dpost = forward(u, k, k_backward, pre, dy, interpret=interpret).astype(post.dtype)
  return (
    sequence(du, u),
    dk_HN[:, : k.shape[1]],
    dk_backward,
    sequence(dpre[0], u) if dpre else None,
    dpost,
  )


def _call(
  sequences: tuple[Any, ...],
  k: jax.Array,
  k_backward: Optional,
  results: list[Any],
  interpret: bool,
) -> list[jax.Array]:
  """Of (u, pre, post) the result, as (B, H, h, 128); of (u, pre, post, dy) the gradients, of the
  dtypes `results`, and last that of the kernels as `_circular` makes them."""
  back, u = len(sequences) == 4, sequences[0]
  signals = 1 + back
  cut = _cut(u, k, k_backward, len(results) + sum(x is not None for x in sequences), signals)
  stacked = [_rows(x, cut) for x in sequences]
  kernels = _circular(k, k_backward, cut)
  matrices = _matrices(cut, cut.height, 2, u.dtype)
  exact = _matrices(cut, cut.taps, 1, jnp.float32)
  shape = stacked[0][0].shape
  out = [jax.ShapeDtypeStruct(shape, dtype) for dtype in results]
  features = cut.features * cut.stack
  sequence = pl.BlockSpec((cut.together, features, cut.height, LANES), lambda j, i: (i, j, 0, 0))
  kernel_ = pl.BlockSpec((features, cut.taps, LANES), lambda j, i: (j, 0, 0))

  def whole(x: jax.Array) -> pl.BlockSpec:
    """One copy of what all programs read."""
    return pl.BlockSpec(x.shape, lambda j, i: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))

  spectrum = pltpu.VMEM((cut.features, cut.pieces, cut.rows, LANES), jnp.float32)
  count = cut.together // 2 * cut.abreast(cut.most)
  pairs = (count, 2 * cut.stack * cut.height, LANES)
  scratch: list[Any] = [
    [spectrum] * 2,
    pltpu.VMEM((cut.features, cut.stack, 1, LANES), jnp.float32),
    [pltpu.VMEM(pairs, u.dtype)] * signals,
    pltpu.VMEM(pairs, jnp.float32),
  ]
  if back:
    out.append(jax.ShapeDtypeStruct(kernels.shape, jnp.float32))
    scratch.append([spectrum] * 2)
  operands = (*stacked, kernels, matrices, exact)
  with rows.indices_of_32_bits(interpret):
    return pl.pallas_call(
      partial(_backward if back else _forward, cut=cut),
      grid=cut.grid,
      in_specs=(
        *(jax.tree.map(lambda _: sequence, x) for x in stacked),
        kernel_,
        *jax.tree.map(whole, (matrices, exact)),
      ),
      out_specs=[sequence] * len(results) + [kernel_] * back,
      out_shape=out,
      scratch_shapes=scratch,
      compiler_params=ORDER,
      cost_estimate=_cost(cut, (*operands, *out), signals + 1),
      interpret=interpret,
      name="long_conv_backward" if back else "long_conv",
    )(*operands)


def _forward(
  u: Any, pre: Any, post: Any, kernels: Any, matrices: Matrices, exact: Matrices, y: Any,
  spectrum: Any, scale: Any, signals: Any, sums: Any, *, cut: Cut,
) -> None:  # fmt: skip
  """The kernel: references to blocks, in, out and scratch. Of gates there are none or one."""
  _prepare(kernels, exact, spectrum, scale, cut)

  @cut.for_pairs
  def _(pairs: list[tuple[Any, int]]) -> None:
    powers = []
    for p, (c, b) in enumerate(pairs):
      parts = [_balanced(_gated(u[0], pre, (row, cut.own(c)))) for row in (b, b + 1)]
      _pack(signals[0], p, [x for x, _ in parts])
      powers += [power for _, power in parts]

    @cut.for_pieces
    def _(q: Any) -> None:
      z = _transform([signals[0][p] for p in range(len(pairs))], q, matrices, cut)
      z = [rows.times(x, _at(spectrum, c, q)) for x, (c, _) in zip(z, pairs, strict=True)]
      for p, x in enumerate(_transform_back(z, q, matrices, cut)):
        _add(sums, p, q, x)

    for p, (c, b) in enumerate(pairs):
      for part in (0, 1):
        at = b + part, cut.own(c)
        out = _unpacked(sums, p, part, cut) * (powers[2 * p + part] * scale[c])
        y[at] = _times(out, post, at).astype(y.dtype)


def _backward(
  u: Any, pre: Any, post: Any, dy: Any, kernels: Any, matrices: Matrices, exact: Matrices,
  *results: Any, cut: Cut,
) -> None:  # fmt: skip
  """The kernel. Cotangents are divided by their powers, and inputs multiplied: the gradient of the
  kernels is a sum of products of the two."""
  *slopes, dk, spectrum, scale, signals, sums, totals = results
  _prepare(kernels, exact, spectrum, scale, cut)

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    for total in totals:
      total[...] = jnp.zeros_like(total)

  @cut.for_pairs
  def _(pairs: list[tuple[Any, int]]) -> None:
    powers, marks = [], []
    for p, (c, b) in enumerate(pairs):
      both = []
      for row in (b, b + 1):
        dz, power = _balanced(_gated(dy[0], post, (row, cut.own(c))))
        v, mark = _contained(_gated(u[0], pre, (row, cut.own(c))) * power)
        both.append((dz, v))
        powers.append(power)
        marks.append(mark)
      for signal, parts in zip(signals, zip(*both, strict=True), strict=True):
        _pack(signal, p, parts)

    @cut.for_pieces
    def _(q: Any) -> None:
      dz, v = (_transform([x[p] for p in range(len(pairs))], q, matrices, cut) for x in signals)
      back = []
      for p, (c, _) in enumerate(pairs):
        mark = marks[2 * p] + marks[2 * p + 1]
        mark = jnp.broadcast_to(mark, (cut.stack, cut.rows // cut.stack, LANES))
        found = rows.times(rows.conj(v[p]), dz[p])
        for total, part in zip(totals, found, strict=True):
          total[c, q] += part + mark.reshape(part.shape)
        back.append(rows.times(dz[p], rows.conj(_at(spectrum, c, q))))
      for p, x in enumerate(_transform_back(back, q, matrices, cut)):
        _add(sums, p, q, x)

    for p, (c, b) in enumerate(pairs):
      for part in (0, 1):
        at = b + part, cut.own(c)
        dv = _unpacked(sums, p, part, cut) * (powers[2 * p + part] * scale[c])
        for slope, gate in zip(slopes, (pre, u), strict=False):
          slope[at] = _times(dv, gate, at).astype(slope.dtype)

  @pl.when(pl.program_id(1) == cut.grid[1] - 1)
  def _() -> None:
    # With v = v0 + i v1 and w = w0 + i w1 the products v0 w0 + v1 w1 are the real part of the
    # signal whose spectrum is conj(v) w; the mixed ones are the imaginary part.
    @cut.for_stacks
    def _(stacks: list[Any]) -> None:
      @cut.for_pieces
      def _(q: Any) -> None:
        spectra: list[Row] = []
        marks = []
        for c in stacks:
          parts = (part.reshape(cut.stack, -1, LANES) for part in _at(totals, c, q))
          (re, mark), (im, other) = map(_contained, parts)
          spectra.append((re.reshape(cut.rows, LANES), im.reshape(cut.rows, LANES)))
          marks.append(mark + other)
        found = _transform_back(spectra, q, exact, cut)
        for c, x, mark in zip(stacks, found, marks, strict=True):
          _add(dk, cut.own(c), q, x.reshape(cut.stack, cut.taps, LANES) + mark)


def _prepare(kernels: Any, exact: Matrices, spectrum: Any, scale: Any, cut: Cut) -> None:
  """The spectrum of the kernels, each over a power of two, and these, once for the batch."""

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    @cut.for_stacks
    def _(stacks: list[Any]) -> None:
      signals = []
      for c in stacks:
        k, power = _balanced(kernels[cut.own(c)])
        scale[c] = jnp.broadcast_to(power, scale.shape[1:])
        signals.append(k.reshape(cut.stack * cut.taps, LANES))

      @cut.for_pieces
      def _(q: Any) -> None:
        for c, z in zip(stacks, _transform(signals, q, exact, cut), strict=True):
          for part, x in zip(spectrum, z, strict=True):
            part[c, q] = x


def _transform(signals: list[jax.Array], q: Any, matrices: Matrices, cut: Cut) -> list[Row]:
  """Piece q of the spectra of some signals; together they fill the matrix unit."""
  turn = tuple(part[q] for part in matrices.twiddles)
  low, wide = matrices.across.dtype, []
  for x in signals:
    y = _dot(matrices.down[q], x, cut)
    parts = rows.times((y[: cut.rows], y[cut.rows :]), turn)
    wide.append(jnp.concatenate(parts, axis=1).astype(low))
  return _each(_dot(jnp.concatenate(wide, axis=0), matrices.across[...], cut), cut)


def _transform_back(spectra: list[Row], q: Any, matrices: Matrices, cut: Cut) -> list[jax.Array]:
  """What piece q of their spectra adds to some signals."""
  turn = rows.conj(tuple(part[q] for part in matrices.twiddles))
  low = matrices.back.dtype
  wide = jnp.concatenate([jnp.concatenate(z, axis=1).astype(low) for z in spectra], axis=0)
  return [
    _dot(matrices.up[q], jnp.concatenate(rows.times(y, turn), axis=0).astype(low), cut)
    for y in _each(_dot(wide, matrices.back[...], cut), cut)
  ]


def _at(parts: Any, c: Any, q: Any) -> Row:
  return tuple(part[c, q] for part in parts)


def _each(z: jax.Array, cut: Cut) -> list[Row]:
  """The signals, which lie on top of each other, with their parts side by side in the lanes."""
  parts = [z[i : i + cut.rows] for i in range(0, z.shape[0], cut.rows)]
  return [(part[:, :LANES], part[:, LANES:]) for part in parts]


def _dot(x: jax.Array, y: jax.Array, cut: Cut) -> jax.Array:
  return rows.dot(x, y, (1, 0), cut.exact)


def _add(out: Any, at: Any, q: Any, x: jax.Array) -> None:
  """Piece 0 sets out[at], the others are added."""
  out[at] = x if isinstance(q, int) else out[at] + x


def _times(x: jax.Array, gate: Any, at: tuple[Any, Any]) -> jax.Array:
  return x * gate[0][at].astype(jnp.float32) if gate else x


def _gated(x: Any, gate: Any, at: tuple[Any, Any]) -> jax.Array:
  return _times(x[at].astype(jnp.float32), gate, at)


def _pack(signal: Any, p: int, parts: Any) -> None:
  """Two (P, h, 128), the real part on top of the imaginary one."""
  signal[p] = jnp.concatenate(parts, axis=0).reshape(signal.shape[1:]).astype(signal.dtype)


def _unpacked(sums: Any, p: int, part: int, cut: Cut) -> jax.Array:
  """(P, h, 128), of a pair the real part or the imaginary one."""
  height = cut.stack * cut.height
  x = sums[p, part * height : (part + 1) * height]
  return x.reshape(cut.stack, cut.height, LANES)


def _balanced(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x (P, n, 128) over powers of two (P, 1, 1), zero where the power is NaN; and the powers."""
  known, size = _size(x)
  exponent = lax.bitcast_convert_type(size, jnp.int32) & 0x7F800000
  exponent = jnp.clip(exponent, 1 << 23, 253 << 23)  # neither it nor its inverse is subnormal
  power = lax.bitcast_convert_type(exponent, jnp.float32)
  inverse = lax.bitcast_convert_type((254 << 23) - exponent, jnp.float32)
  return jnp.where(known, x * inverse, 0.0), jnp.where(known, power, jnp.nan)


def _contained(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x (P, n, 128), zero where it is not finite, and (P, 1, 1) of 0, or NaN in that case."""
  known, _ = _size(x)
  return jnp.where(known, x, 0.0), jnp.where(known, 0.0, jnp.nan)


def _size(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Whether all of (n, 128) is finite, and the largest magnitude."""
  size = jnp.abs(x)
  size = jnp.where(size <= LARGEST, size, jnp.inf).max((1, 2), keepdims=True)
  return size <= LARGEST, size


def _cut(u: jax.Array, k: jax.Array, k_backward: Optional, sequences: int, signals: int) -> Cut:
  batch, _, width = u.shape
  height, points = _points(u, k, k_backward)
  pieces = pl.cdiv(points, ROWS)
  points = pl.cdiv(points, 16 * pieces) * 16 * pieces
  cut = Cut(
    batch=batch + batch % 2,
    width=width,
    height=height,
    taps=points if k_backward is not None else pl.cdiv(k.shape[1], 8 * LANES) * 8,
    points=points,
    stack=max(1, ROWS // points),
    pieces=pieces,
    together=2,
    features=1,
    exact=lax.Precision.HIGH if u.dtype == jnp.bfloat16 else rows.precision(lax.Precision.HIGHEST),
  )
  for together in range(MOST, 0, -2):
    if cut.batch % together == 0:
      cut = cut._replace(together=together)
      if _held(cut, sequences, signals) <= MEMORY:
        break
  for features in (MOST, 4, 2):
    more = cut._replace(features=features)
    if features <= cut.stacks and _held(more, sequences, signals) <= MEMORY:
      return more
  return cut


def _points(u: jax.Array, k: jax.Array, k_backward: Optional) -> tuple[int, int]:
  """The rows of a sequence, and those that its transform needs so that no tap wraps round."""
  back = 0 if k_backward is None else k_backward.shape[1]
  least = u.shape[1] + max(k.shape[1] - 1, back)
  height = pl.cdiv(u.shape[1], 8 * LANES) * 8
  return height, pl.cdiv(max(pl.cdiv(least, LANES), height), 16) * 16


def _held(cut: Cut, sequences: int, signals: int) -> int:
  """Bytes of fast memory: the matrices, two buffers of each block, and scratch."""
  row, points = cut.stack * LANES * 4, cut.points * cut.stack
  matrices = 2 * 2 * points * cut.stack * (2 * cut.height + cut.taps) * 4
  sequence = cut.together * cut.height * row
  features = 2 * sequences * sequence + 2 * signals * (cut.taps + cut.points) * row
  scratch = (signals + 1) * cut.abreast(cut.most) * sequence
  return matrices + cut.features * features + scratch


def _rows(x: Optional, cut: Cut) -> tuple[jax.Array, ...]:
  """(B, L, H) as (B, H, h, 128), zeros behind the batch and the length; () where there is none."""
  return () if x is None else (in_rows(x, cut.batch, cut.height),)


def in_rows(x: jax.Array, size: int, height: int) -> jax.Array:
  """(B, L, H) as (size, H, height, 128), zeros behind the batch and the length."""
  batch, length, width = x.shape
  x = jnp.pad(x, ((0, size - batch), (0, height * LANES - length), (0, 0)))
  return x.swapaxes(1, 2).reshape(size, width, height, LANES)


def sequence(x: jax.Array, like: jax.Array) -> jax.Array:
  """(B, L, H) again."""
  batch, length, width = like.shape
  return x.reshape(x.shape[0], width, -1).swapaxes(1, 2)[:batch, :length]


def _circular(k: jax.Array, k_backward: Optional, cut: Cut) -> jax.Array:
  """The kernels (H, rows, 128): all N points, lag -j at N - j, or those that hold taps."""
  c_HN = xla.circular(k, k_backward, cut.points * LANES)
  c_HN = jnp.pad(c_HN, ((0, 0), (0, cut.taps * LANES - c_HN.shape[1])))
  return c_HN.reshape(cut.width, cut.taps, LANES)


@functools.cache
def _factors(points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """F1, F2 and the twiddles [k1, n2], complex64."""
  sizes = (points, points, points), (LANES, LANES, LANES), (points, LANES, points * LANES)
  first, second, turn = (powers(*size).astype(np.complex64) for size in sizes)
  return first, second, turn


def _matrices(cut: Cut, height: int, parts: int, dtype: Any) -> Matrices:
  """For signals of `height` rows, complex ones (2 parts) or real ones (1)."""
  first, second, turn = _factors(cut.points)
  first = np.kron(np.eye(cut.stack), first[:, :height]).reshape(cut.pieces, cut.rows, -1)
  down = np.block([[first.real, -first.imag], [first.imag, first.real]])
  down = down[..., : parts * first.shape[-1]]
  across = np.block([[second.real, second.imag], [-second.imag, second.real]])
  turn = np.tile(turn, (cut.stack, 1)).reshape(cut.pieces, cut.rows, LANES)
  return Matrices(
    jnp.asarray(down, dtype),
    jnp.asarray(across, dtype),
    jnp.asarray(across.T, dtype),
    jnp.asarray(down.swapaxes(1, 2) / (cut.points * LANES), dtype),
    (jnp.asarray(turn.real, jnp.float32), jnp.asarray(turn.imag, jnp.float32)),
  )


def _cost(cut: Cut, moved: Any, transforms: int) -> pl.CostEstimate:
  points = cut.stacks * cut.batch * cut.pieces * cut.rows * LANES
  return pl.CostEstimate(
    flops=2 * transforms * points * (cut.stack * cut.height * 2 + 2 * LANES),
    transcendentals=0,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moved)),
  )
