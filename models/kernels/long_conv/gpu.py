"""Long convolution as Pallas kernels for GPUs (Mosaic GPU, sm_90a): DFTs by products on wgmma.

    grid (parts of the batch, features)     a program keeps the matrices and its feature's spectrum

A sequence of N = N1 N2 points, zero-padded, is a matrix of rows of N2: n = N2 n1 + n2, k = k1 +
N1 k2. Two rows of the batch are the real and the imaginary part of one signal X; the lower half of
its rows is zero and left out:

    ┌ X0 ┐ left        × twiddles   right     × spectrum   right     × twiddles*    left  ┌ y0 ┐
    └ X1 ┘ ───► Y ─────────────────► ───► Z ──────────────► ───► Y ────────────────► ───► └ y1 ┘
            D                         F2                     F2*                      D^T
    shared memory          in the registers of a warpgroup, 64 rows              shared memory

What a product leaves in registers is a factor of the next one; only the last goes through shared
memory. D = [Re F1, -Im F1; Im F1, Re F1] without the columns of padding is a real matrix, whose
transpose leads back. All is cut into tiles of 64 x 64:

    L <= 2048    64 x 64      one warpgroup. Where 2048 / P steps are enough, D has P blocks, and P
                              pairs of rows of the batch lie on top of each other
    L <= 4096    128 x 64     two warpgroups, one for the upper 64 rows and one for the lower ones
    L <= 8192    128 x 128    the same, two tiles wide, which is too much for registers: Y and Z go
                              through shared memory, twiddles and spectrum stay in global memory

Meanwhile the copy engine (TMA) fetches the next rows. The gradient of the kernels is a sum over the
batch of products of spectra; a second kernel makes it, in float32, in shared memory, in the order
of the batch. Where tiles are two abreast there is no room for it, and XLA's FFT does it.

XLA also makes the spectrum, in float32, multiplies by gates, turns sequences into rows and back,
and keeps the two of a pair apart: each is divided by a power of two near its largest value, or is
zero and its result NaN where it has one that is not finite.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from models.kernels import mosaic, rows
from models.kernels.long_conv import fft, xla
from models.kernels.long_conv.dft import powers
from models.kernels.rows import Row

Optional = jax.Array | None

TILE = 64
SHAPES = ((1, 1), (2, 1), (2, 2))  # tiles of 64 rows and of 64 columns
WANTED = 1056  # warpgroups: four times what an H100 runs at once, so that the last round is short
AXES = ("part", "feature")  # of the grid


class Cut(NamedTuple):
  """How (B, L, H) is cut into blocks of tall x wide tiles: 2 P sequences of a feature each."""

  batch: int
  length: int
  tall: int  # warpgroups of a program
  wide: int
  stack: int  # P
  parts: int  # programs of a feature
  each: int  # blocks of a program

  @property
  def tiles(self) -> int:
    return self.tall * self.wide

  @property
  def first(self) -> int:
    """N1."""
    return self.tall * TILE // self.stack

  @property
  def second(self) -> int:
    """N2."""
    return self.wide * TILE

  @property
  def points(self) -> int:
    return self.first * self.second

  @property
  def blocks(self) -> int:
    """Of a feature."""
    return self.parts * self.each


def refusal(
  u: jax.Array, k: jax.Array, k_backward: Optional, pre: Optional, post: Optional
) -> str | None:
  """Why the kernels cannot run these operands."""
  if k.dtype != jnp.float32:
    return f"dtype {k.dtype} of the kernels; it needs float32"
  if u.dtype != jnp.bfloat16:
    return f"dtype {u.dtype} of the sequences; it needs bfloat16"
  if (length := u.shape[1]) > (most := _steps(*SHAPES[-1])):
    return f"{length} steps; it takes {most}"
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
  cut = _cut(u)
  v, power_BH = _balanced(_times(u, pre))
  spectrum, power_H = _spectrum(k, k_backward, cut)
  y = _convolve(_tiles(v, cut), spectrum, cut, interpret)
  return _times(_sequences(y, cut) * (power_BH * power_H)[:, None], post).astype(u.dtype)


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
  """See `interface.py`. Cotangents are divided by their powers, and inputs multiplied: the gradient
  of the kernels is a sum of products of the two."""
  cut = _cut(u)
  dz, power_BH = _balanced(_times(dy, post))
  v, known_BH = _contained(_times(u, pre) * power_BH[:, None])
  dz, v = _tiles(dz, cut), _tiles(v, cut)
  spectrum, power_H = _spectrum(k, k_backward, cut, conjugate=True)
  dv = _sequences(_convolve(dz, spectrum, cut, interpret), cut)
  dv = dv * (power_BH * power_H)[:, None]

  dk_HN = _correlate(v, dz, cut, interpret)
  dk_HN = jnp.where(known_BH.all(0)[:, None], dk_HN, jnp.nan)
  dk_backward = dpre = dpost = None
  if k_backward is not None:
    dk_backward = dk_HN[:, : -k_backward.shape[1] - 1 : -1]
  if pre is not None:
    dpre = _times(dv, u).astype(pre.dtype)
  if post is not None:  # what it multiplied, once more, by its cotangent
    dpost = forward(u, k, k_backward, pre, dy, interpret=interpret).astype(post.dtype)
  return _times(dv, pre).astype(u.dtype), dk_HN[:, : k.shape[1]], dk_backward, dpre, dpost


def _convolve(x: jax.Array, spectrum: jax.Array, cut: Cut, interpret: bool) -> jax.Array:
  """Blocks (H, blocks, tiles, 64, 64) through the spectra (H, 2 tiles, 64, 64)."""

  def run(x: jax.Array, spectrum: jax.Array) -> jax.Array:
    return _call(_forward, cut, len(x), interpret)(x, *_constants(cut), spectrum)

  return mosaic.batched(run)(x, spectrum)


def _correlate(v: jax.Array, w: jax.Array, cut: Cut, interpret: bool) -> jax.Array:
  """The circular correlations of the sequences in these blocks, summed over the batch: (H, N)."""
  if cut.wide > 1:
    v, w = (fft.rfft(_sequences(x, cut).swapaxes(1, 2), cut.points) for x in (v, w))
    return fft.irfft((jnp.conj(v) * w).sum(0), cut.points)

  def run(v: jax.Array, w: jax.Array) -> jax.Array:
    return _call(_backward, cut, len(v), interpret)(v, w, *_constants(cut))

  sums = mosaic.batched(run)(v, w).sum(1).reshape(-1, 2, cut.stack, cut.first, TILE).sum(2)
  spectrum = lax.complex(sums[:, 0], sums[:, 1]).swapaxes(1, 2).reshape(-1, cut.points)
  # With v = v0 + i v1 and w = w0 + i w1 the products v0 w0 + v1 w1 are the real part of the signal
  # whose spectrum is conj(v) w; the mixed ones are the imaginary part.
  return jnp.fft.ifft(spectrum).real


@functools.cache
def _call(
  kernel: Callable[..., None], cut: Cut, features: int, interpret: bool
) -> Callable[..., jax.Array]:
  """kernel(unit, out, scratch) in programs for all features and parts of the batch, as a function
  of what it takes blocks of, of the matrices and twiddles, and of a spectrum or none."""
  if kernel is _forward:
    streams, spectra, scratch = 1, 1, _shared(2 * cut.tiles)
    out = jax.ShapeDtypeStruct((features, cut.blocks, cut.tiles, TILE, TILE), jnp.bfloat16)
  else:
    streams, spectra, scratch = 2, 0, _shared(2 * cut.tall, jnp.float32)
    out = jax.ShapeDtypeStruct((features, cut.parts, 2 * cut.tall, TILE, TILE), jnp.float32)
  sizes = [2 * cut.tall**2 + 2 * cut.wide**2, 2 * cut.tiles] + [2 * cut.tiles] * spectra
  held = sizes if cut.wide == 1 else sizes[:1]  # in shared memory
  memory: dict[str, Any] = {
    "held": [_shared(tiles) for tiles in held],
    "buffers": [_shared(cut.tiles) for _ in range(streams)],
    "loaded": plgpu.Barrier(num_arrivals=len(held)),
    "ready": plgpu.Barrier(num_arrivals=streams),
    "met": [plgpu.Barrier(num_arrivals=cut.tall)] * (cut.tall > 1),
  }

  def program(*refs: Any, memory: dict[str, Any], scratch: Any) -> None:
    part, feature = map(lax.axis_index, AXES)
    *given, result = refs
    constants = [*given[streams : streams + 2], *(x.at[feature] for x in given[streams + 2 :])]
    unit = Unit(
      cut=cut,
      own=lax.axis_index("warpgroup") if cut.tall > 1 else 0,
      part=part,
      streams=[x.at[feature] for x in given[:streams]],
      constants=[*memory["held"], *constants[len(held) :]],
      memory=memory,
      interpret=interpret,
    )

    @unit.alone
    def _() -> None:
      for source, target in zip(constants, memory["held"], strict=False):
        plgpu.copy_gmem_to_smem(source, target, memory["loaded"])

    unit.fetch(0)
    plgpu.barrier_wait(memory["loaded"])
    kernel(unit, result.at[feature], scratch)
    unit.alone(lambda: plgpu.wait_smem_to_gmem(0))

  call = plgpu.kernel(
    program,
    out_type=out,
    scratch_types={"memory": memory, "scratch": scratch},
    grid=(cut.parts, features),
    grid_names=AXES,
    num_threads=cut.tall if cut.tall > 1 else None,
    thread_name="warpgroup" if cut.tall > 1 else None,
    kernel_name=f"long_conv{kernel.__name__}",
    interpret=mosaic.interpreter() if interpret else None,
  )
  return mosaic.launched(call, out, interpret)


class Unit(NamedTuple):
  """A warpgroup of a program, and what it works with."""

  cut: Cut
  own: Any  # its row of tiles
  part: Any  # of the batch
  streams: list[Any]  # where blocks are taken from
  constants: list[Any]  # matrices, twiddles, spectrum: tiles
  memory: dict[str, Any]
  interpret: bool

  def alone(self, action: Callable[[], None]) -> None:
    """One warpgroup of the program does it."""
    pl.when(self.own == 0)(action)

  def meet(self) -> None:
    """What the warpgroups have read and written so far is so for all, and for the copy engine."""
    plgpu.commit_smem()
    for barrier in self.memory["met"]:
      plgpu.barrier_arrive(barrier)
      plgpu.barrier_wait(barrier)

  def for_blocks(self, action: Callable[..., None]) -> None:
    """action(i, *buffers), which calls fetch(i + 1) when all warpgroups have read these."""

    def block(i: jax.Array, _: None) -> None:
      plgpu.barrier_wait(self.memory["ready"])
      action(i, *self.memory["buffers"])

    lax.fori_loop(0, self.cut.each, block, None)

  def fetch(self, i: Any) -> None:
    """Starts the copies of block i, if there is one."""

    @self.alone
    def _() -> None:
      @pl.when(i < self.cut.each)
      def _() -> None:
        for stream, buffer in zip(self.streams, self.memory["buffers"], strict=True):
          plgpu.copy_gmem_to_smem(stream.at[self.block(i)], buffer, self.memory["ready"])

  def block(self, i: Any) -> Any:
    return self.part * self.cut.each + i

  def down(self, x: Any) -> list[Row]:
    """Its rows of D x, with twiddles."""
    cut = self.cut
    found: list[Row] = []
    for c in range(cut.wide):
      tiles = [x.at[_late(b * cut.wide + c)] for b in range(cut.tall)]
      y = self.products(
        *([(self.d(part, self.own, b), tile) for b, tile in enumerate(tiles)] for part in (0, 1))
      )
      found.append(_low(self.times(y, 1, c)))
    return found

  def across(self, x: list[Row], back: bool = False) -> Iterator[Row]:
    """Those rows times F2, or its conjugate, tile by tile."""
    for c in range(self.cut.wide):
      joint, plus, minus = [], [], []
      for a, (re, im) in enumerate(x):
        p, q = (im, re) if back else (re, im)
        cosines, sines = (self.f2(part, a, c) for part in (0, 1))
        joint += [(p, cosines), (q, sines)]
        plus.append((q, cosines))
        minus.append((p, sines))
      first, second, third = self.products(joint, plus, minus)
      yield (second - third, first) if back else (first, second - third)

  def up(self, y: Any) -> list[jax.Array]:
    """Its rows of D^T y."""
    cut = self.cut
    found: list[jax.Array] = []
    for c in range(cut.wide):
      above = [(part, b) for part in (0, 1) for b in range(cut.tall)]
      pairs = [(self.d(part, b, self.own), y.at[self.at(part, c, b)]) for part, b in above]
      found += self.products(pairs, turned=True)
    return found

  def products(self, *sums: list[tuple[Any, Any]], turned: bool = False) -> Row:
    """For each list of pairs (x, y) the sum of x y, or with `turned` of x^T y; x is in registers or
    in shared memory, y there."""
    if self.interpret:  # the interpreter of jax 0.10 has neither x in registers nor x^T
      dot = partial(lax.dot, preferred_element_type=jnp.float32)
      each = ([dot(x[...].T if turned else x[...], y[...]) for x, y in pairs] for pairs in sums)
      return tuple(functools.reduce(operator.add, found) for found in each)

    def run(*totals: Any) -> Row:
      for total, pairs in zip(totals, sums, strict=True):
        for x, y in pairs:
          plgpu.wgmma(total, x.T if turned else x, y)
      plgpu.wgmma_wait(0)
      return tuple(total[...] for total in totals)

    return pl.run_scoped(run, *(plgpu.ACC((TILE, TILE), jnp.float32) for _ in sums))

  def times(self, x: Row, which: int, c: int, conjugate: bool = False) -> Row:
    """A tile of its row, times that of the twiddles (1) or of the spectrum (2)."""
    constant = tuple(self.load(self.constants[which].at[self.at(part, c)]) for part in (0, 1))
    return rows.times(x, rows.conj(constant) if conjugate else constant)

  def load(self, tile: Any) -> jax.Array:
    if self.interpret or self.cut.wide == 1:
      return tile[...].astype(jnp.float32)
    layout = plgpu.Layout.WGMMA
    x = plgpu.load(tile, **mosaic.WHOLE, layout=layout, optimized=False)
    return x.astype(jnp.float32)

  def d(self, part: int, b: Any, a: Any) -> Any:
    """A tile of D."""
    tall = self.cut.tall
    return self.constants[0].at[_late((part * tall + b) * tall + a)]

  def f2(self, part: int, a: int, c: int) -> Any:
    """A tile of the real part of F2 (0), or of minus its imaginary part (1)."""
    wide = self.cut.wide
    return self.constants[0].at[_late(2 * self.cut.tall**2 + (part * wide + a) * wide + c)]

  def at(self, part: int, c: int, row: Any = None) -> jax.Array:
    """Where a tile lies in what has tiles [part, row, column]."""
    row = self.own if row is None else row
    return _late((part * self.cut.tall + row) * self.cut.wide + c)

  def put(self, y: Any, c: int, x: Row) -> Row:
    """Writes a tile of its row of y, [part, row, column]; where it then is."""
    wide = y.shape[0] // (2 * self.cut.tall)
    places = tuple(y.at[_late((part * self.cut.tall + self.own) * wide + c)] for part in (0, 1))
    for place, value in zip(places, x, strict=True):
      place[...] = value
    return places


def _forward(unit: Unit, out: Any, y: Any) -> None:
  """The kernel of `_convolve`. The result, half as large as Y, takes its place."""
  cut = unit.cut

  @unit.for_blocks
  def _(i: jax.Array, x: Any) -> None:
    signal = unit.down(x)
    unit.alone(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
    unit.meet()
    if cut.wide == 1:
      unit.fetch(i + 1)
      product = [_low(unit.times(z, 2, 0)) for z in unit.across(signal)]
    else:  # through the memory of Y, and for half of Z that of X
      signal = [unit.put(y, c, z) for c, z in enumerate(signal)]
      plgpu.commit_smem()
      found = enumerate(unit.across(signal))
      product = [unit.put(y if c else x, c, _low(unit.times(z, 2, c))) for c, z in found]
      plgpu.commit_smem()
    for c, z in enumerate(unit.across(product, back=True)):
      unit.put(y, c, _low(unit.times(z, 1, c, conjugate=True)))
    unit.meet()
    if cut.wide > 1:
      unit.fetch(i + 1)
    result = unit.up(y)
    unit.meet()
    for c, tile in enumerate(result):
      y.at[unit.at(0, c)][...] = tile.astype(y.dtype)
    unit.meet()

    @unit.alone
    def _() -> None:
      plgpu.copy_smem_to_gmem(y.at[pl.ds(0, cut.tiles)], out.at[unit.block(i)])


def _backward(unit: Unit, out: Any, sums: Any) -> None:
  """The kernel of `_correlate`."""
  places = [sums.at[part * unit.cut.tall + unit.own] for part in (0, 1)]
  for place in places:
    zero = jnp.zeros((TILE, TILE), jnp.float32)
    place[...] = zero if unit.interpret else plgpu.layout_cast(zero, plgpu.Layout.WGMMA)

  @unit.for_blocks
  def _(i: jax.Array, v: Any, w: Any) -> None:
    (second,) = unit.across(unit.down(w))
    signal = unit.down(v)
    unit.meet()
    unit.fetch(i + 1)
    (first,) = unit.across(signal)
    for place, found in zip(places, rows.times(rows.conj(first), second), strict=True):
      place[...] += found

  unit.meet()

  @unit.alone
  def _() -> None:
    for tile in range(2 * unit.cut.tall):
      plgpu.copy_smem_to_gmem(sums.at[tile], out.at[unit.part, tile])


def _late(index: Any) -> jax.Array:
  """The index, hidden from the compiler, which would else make the addresses of all tiles before
  the loop and keep them in registers."""
  return lax.optimization_barrier(jnp.int32(index))


def _low(x: Row) -> Row:
  """As factors of products."""
  return tuple(part.astype(jnp.bfloat16) for part in x)


def _shared(tiles: int, dtype: Any = jnp.bfloat16) -> Any:
  """Shared memory for tiles, in the order in which wgmma and registers want them."""
  lines = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM((tiles, TILE, TILE), dtype, transforms=lines)


def _steps(tall: int, wide: int) -> int:
  """Steps of a sequence in so many tiles: half its points, the rest is padding."""
  return tall * wide * TILE * TILE // 2


def _cut(u: jax.Array) -> Cut:
  batch, length, width = u.shape
  shape = next(shape for shape in SHAPES if length <= _steps(*shape))
  stack = 1
  while 2 * stack < batch and shape == (1, 1) and 2 * stack * max(length, TILE) <= _steps(1, 1):
    stack *= 2
  blocks = pl.cdiv(batch, 2 * stack)
  each = pl.cdiv(blocks, pl.cdiv(WANTED, width * shape[0]))
  return Cut(batch, length, *shape, stack, pl.cdiv(blocks, each), each)


def _times(x: jax.Array, gate: Optional) -> jax.Array:
  """In float32."""
  x = x.astype(jnp.float32)
  return x if gate is None else x * gate.astype(jnp.float32)


def _balanced(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x over powers of two, one for each line along axis 1, zero where that is NaN; and these."""
  size = jnp.abs(x).max(1)
  known = jnp.isfinite(size)
  power = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.frexp(size)[1], -125, 125))
  return jnp.where(known[:, None], x / power[:, None], 0), jnp.where(known, power, jnp.nan)


def _contained(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x, each line along axis 1 zero where not all of it is finite; and whether it is."""
  known = jnp.isfinite(x).all(1)
  return jnp.where(known[:, None], x, 0), known


def _tiles(x: jax.Array, cut: Cut) -> jax.Array:
  """(B, L, H) as bfloat16 blocks (H, blocks, tiles, 64, 64); in the first half of the rows of a
  block are the sequences that are real parts."""
  more = (
    cut.blocks * 2 * cut.stack - cut.batch,
    _steps(cut.tall, cut.wide) // cut.stack - cut.length,
  )
  x = jnp.pad(x.astype(jnp.bfloat16), ((0, more[0]), (0, more[1]), (0, 0))).transpose(2, 0, 1)
  x = x.reshape(x.shape[0], cut.blocks, cut.tall, TILE, cut.wide, TILE)
  return x.swapaxes(3, 4).reshape(*x.shape[:2], cut.tiles, TILE, TILE)


def _sequences(x: jax.Array, cut: Cut) -> jax.Array:
  """(B, L, H) again, float32."""
  x = x.reshape(*x.shape[:2], cut.tall, cut.wide, TILE, TILE).swapaxes(3, 4)
  x = x.reshape(x.shape[0], cut.blocks * 2 * cut.stack, -1).transpose(1, 2, 0)
  return x[: cut.batch, : cut.length].astype(jnp.float32)


def _spectrum(
  k: jax.Array, k_backward: Optional, cut: Cut, conjugate: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Of the kernels over N and over powers of two, as tiles (H, 2 tiles, 64, 64); and these."""
  c_HN, power_H = _balanced(xla.circular(k, k_backward, cut.points))
  spectrum = jnp.fft.fft(c_HN, cut.points) / cut.points
  spectrum = spectrum.reshape(-1, cut.second, cut.first).swapaxes(1, 2)  # [k1, k2]
  parts = jnp.stack([spectrum.real, -spectrum.imag if conjugate else spectrum.imag], axis=1)
  parts = jnp.tile(parts, (1, 1, cut.stack, 1)).reshape(-1, 2 * cut.tall, TILE, cut.wide, TILE)
  return parts.swapaxes(2, 3).reshape(-1, 2 * cut.tiles, TILE, TILE).astype(jnp.bfloat16), power_H


def _constants(cut: Cut) -> tuple[jax.Array, jax.Array]:
  """Tiles [part, row, column]: D with the cosines and sines of F2, and the twiddles [k1, n2]."""
  first = np.kron(np.eye(cut.stack), powers(cut.first, cut.first, cut.first)[:, : cut.first // 2])
  d = np.hstack([first.real, -first.imag]), np.hstack([first.imag, first.real])
  second = np.conj(powers(cut.second, cut.second, cut.second))
  turns = np.tile(powers(cut.first, cut.second, cut.points), (cut.stack, 1))
  return _in_tiles(*d, second.real, second.imag), _in_tiles(turns.real, turns.imag)


def _in_tiles(*matrices: np.ndarray) -> jax.Array:
  cut = [x.reshape(-1, TILE, x.shape[1] // TILE, TILE).swapaxes(1, 2) for x in matrices]
  return jnp.asarray(np.concatenate([x.reshape(-1, TILE, TILE) for x in cut]), jnp.bfloat16)
