"""Long convolution with a short kernel, directly, as one Pallas kernel for TPUs in each direction.

    grid (features / F, batch rows / R)      one program holds the whole sequences of its block

A sequence is a matrix of blocks of 128 steps. The taps of lags 128 d - 127 .. 128 d + 127 make a
Toeplitz tile T_d of 128 x 128, and

    y_c = sum_d x_{c-d} T_d          dx_c = sum_d dy_{c+d} T_d'          G_d = sum_c x_c' dy_{c+d}

Blocks of all sequences are the rows of one product for each tile. A kernel of T taps has
ceil((T - 1) / 128) + 1 tiles, however long the sequence; its gradient is the sum of the diagonals
of the G_d, over the batch in order. Tiles are made when a program sees its features first, from
blocks of the kernel whose row i is turned by i lanes, and stay in fast memory for the whole batch.

Sequences come as for the DFTs of `tpu.py`, (B, H, blocks, 128): one copy of each, into which the
compiler puts the gates. Nothing is transformed, so that sizes do not mix, and what is not finite
reaches the blocks that its tiles reach, also a little before it; of a kernel, its feature.

Which of the two is faster, `worthwhile` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.kernels import rows
from models.kernels.long_conv.tpu import LANES, ORDER, in_rows, sequence, wrong_dtype

Optional = jax.Array | None

ROWS = 512  # blocks of a product
MOST = 8  # rows of the batch in a program, and features
MEMORY = 40 * 2**20  # bytes of fast memory; a core has 64 MiB (v5p) or 128 MiB (v5e, v6e)


class Cut(NamedTuple):
  """How (B, L, H) is cut, and kernels."""

  height: int  # h, blocks of a sequence, with padding
  first: int  # block of the kernel, negative where it has lags behind
  taps: int  # blocks of the kernel
  low: int  # the first tile
  tiles: int
  before: int  # blocks of zeros in front of a sequence, in whole registers
  behind: int
  part: int  # blocks of a sequence that are worked at together
  together: int  # R, rows of the batch in a program
  features: int  # F, in a program

  @property
  def lags(self) -> range:
    return range(self.low, self.low + self.tiles)

  def for_features(self, action: Callable[[Any], None]) -> None:
    """action(f), two at a time where there are many, which wait less together."""
    n = 2 if self.features % 4 == 0 else 1

    def some(i: jax.Array, _: None) -> None:
      for j in range(n):
        action(i * n + j)

    lax.fori_loop(0, self.features // n, some, None)

  @property
  def abreast(self) -> int:
    """Rows of the batch that are worked at together."""
    return _divisor(self.together, max(1, ROWS // self.height))

  def for_parts(self, action: Callable[[Any, Any], None]) -> None:
    """action(rows of the batch, first block)."""
    n, parts = self.abreast, self.height // self.part

    def some(i: jax.Array, _: None) -> None:
      start = pl.multiple_of(lax.rem(i, parts) * self.part, rows.GROUP)
      action(pl.ds(lax.div(i, parts) * n, n), start)

    if (count := self.together // n * parts) == 1:
      action(pl.ds(0, n), 0)
    else:
      lax.fori_loop(0, count, some, None)


def refusal(
  u: jax.Array, k: jax.Array, k_backward: Optional, pre: Optional, post: Optional
) -> str | None:
  """Why the kernels cannot run these operands."""
  if (wrong := wrong_dtype(k, u, pre, post)) is not None:
    return wrong
  cut = _cut(u, k, k_backward, 2)
  if _held(cut, 2, u.dtype.itemsize) > MEMORY:
    taps = cut.tiles * LANES
    return f"{u.shape[1]} steps and {taps} taps; it takes what fits into fast memory"
  return None


def worthwhile(
  u: jax.Array, k: jax.Array, k_backward: Optional, pre: Optional, post: Optional
) -> bool:
  """Whether these kernels are faster than those of `tpu.py`, forward and backward together.

  Bundles of a sequence on v5e, forward + backward, with its share of what is made for a feature
  (loops of `schedules.py`), for eight rows of the batch or two:

      L, taps        tiles   bfloat16   by DFT      float32     by DFT
      1024, 128          2    12 + 32   38 + 60     38 + 96     157 + 247
      1024, 256          3    18 + 49   38 + 60     54 + 142    157 + 247
      1024, 512          5    31 + 75   38 + 60     89 + 225    157 + 247
      2048, 512          5    39 + 82   71 + 114
      2048, 1024         9   69 + 152   71 + 114
      8192, 128          2    37 + 76   191 + 306
      8192, 512          5   93 + 190   191 + 306   484 + 927   830 + 1271
      8192, 1024         9  168 + 351   191 + 306
      1024, 256; two     3   53 + 166   64 + 112
      8192, 256; two     3   93 + 210   323 + 577

  What is made for a feature grows with its tiles, and must be made up for by its blocks, of which
  each costs six products in float32. The bounds for one row and for four lie between these cases.
  """
  cut = _cut(u, k, k_backward, 2)
  blocks = u.shape[0] * cut.height * (4 if u.dtype == jnp.float32 else 1)
  return cut.tiles <= (5 if blocks >= 128 else 3 if blocks >= 32 else 2)


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
  (y,) = _call([_times(u, pre)], k, k_backward, interpret)
  return _times(y, post)


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
  v = _times(u, pre)
  dv, dc = _call([v, _times(dy, post)], k, k_backward, interpret)
  zero = dc.shape[1] - pl.cdiv(k.shape[1], LANES) * LANES
  dk_backward = dpre = dpost = None
  if k_backward is not None:
    dk_backward = dc[:, zero - k_backward.shape[1] : zero][:, ::-1]
  if pre is not None:
    dpre = _times(dv, u).astype(pre.dtype)
  if post is not None:
    dpost = _times(_call([v], k, k_backward, interpret)[0], dy).astype(post.dtype)
  return _times(dv, pre), dc[:, zero : zero + k.shape[1]], dk_backward, dpre, dpost


def _call(
  sequences: list[jax.Array], k: jax.Array, k_backward: Optional, interpret: bool
) -> list[jax.Array]:
  """Of [v] the convolution, of [v, its cotangent] the gradients: of v, and of the kernels, (H, n)
  from the lag 128 `first`."""
  back, (batch, _, width) = len(sequences) == 2, sequences[0].shape
  dtype = sequences[0].dtype
  cut = _cut(sequences[0], k, k_backward, len(sequences))
  block = pl.BlockSpec((cut.together, cut.features, cut.height, LANES), lambda j, i: (i, j, 0, 0))
  kernel = pl.BlockSpec((cut.features, cut.taps, LANES), lambda j, i: (j, 0, 0))
  stacked = [in_rows(x, batch, cut.height) for x in sequences]
  kernels = _blocks(k, k_backward, cut)
  out = [jax.ShapeDtypeStruct(stacked[0].shape, dtype)]
  tiles = cut.features, cut.tiles, LANES, LANES
  padded = cut.together, cut.before + cut.height + cut.behind, LANES
  scratch = [pltpu.VMEM(tiles, dtype), pltpu.VMEM(padded, jnp.float32)]
  if back:
    out.append(jax.ShapeDtypeStruct(kernels.shape, jnp.float32))
    scratch.append(pltpu.VMEM(tiles, jnp.float32))
  with rows.indices_of_32_bits(interpret):
    y, *dc = pl.pallas_call(
      partial(_backward if back else _forward, cut=cut),
      grid=(pl.cdiv(width, cut.features), batch // cut.together),
      in_specs=[block] * len(stacked) + [kernel],
      out_specs=[block] + [kernel] * back,
      out_shape=out,
      scratch_shapes=scratch,
      compiler_params=ORDER,
      cost_estimate=_cost(cut, stacked[0], (*stacked, kernels, *out), 1 + back),
      interpret=interpret,
      name="long_conv_toeplitz_backward" if back else "long_conv_toeplitz",
    )(*stacked, kernels)
  return [sequence(y, sequences[0]), *(x.reshape(width, -1) for x in dc)]


def _forward(v: Any, kernels: Any, y: Any, tiles: Any, padded: Any, *, cut: Cut) -> None:
  """The kernel: references to blocks, in, out and scratch."""
  _prepare(kernels, tiles, padded, cut)

  @cut.for_features
  def _(f: Any) -> None:
    padded[:, cut.before : cut.before + cut.height] = v[:, f].astype(jnp.float32)

    @cut.for_parts
    def _(b: Any, c: Any) -> None:
      total: Any = 0.0
      for d in cut.lags:
        x = _shifted(padded, b, c, -d, v.dtype, cut)
        total += _dot(x, tiles[f, d - cut.low], (1, 0))
      _put(y, b, f, c, total, cut)


def _backward(
  v: Any, dz: Any, kernels: Any, dv: Any, dc: Any, tiles: Any, padded: Any, totals: Any, *,
  cut: Cut,
) -> None:  # fmt: skip
  """The kernel. The gradients G_d are summed over the batch in `totals`."""
  _prepare(kernels, tiles, padded, cut)

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    totals[...] = jnp.zeros_like(totals)

  @cut.for_features
  def _(f: Any) -> None:
    padded[:, cut.before : cut.before + cut.height] = dz[:, f].astype(jnp.float32)

    @cut.for_parts
    def _(b: Any, c: Any) -> None:
      x = v[b, f, pl.ds(c, cut.part)].reshape(-1, LANES).T
      total: Any = 0.0
      for d in cut.lags:
        g = _shifted(padded, b, c, d, v.dtype, cut)
        total += _dot(g, tiles[f, d - cut.low], (1, 1))
        totals[f, d - cut.low] += _dot(x, g, (1, 0))
      _put(dv, b, f, c, total, cut)

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _() -> None:
    @cut.for_features
    def _(f: Any) -> None:
      g = {d: totals[f, d - cut.low] for d in cut.lags}
      for e in range(cut.first, cut.first + cut.taps):
        mixed = _mixed(g.get(e, 0.0), g.get(e + 1, 0.0))
        dc[f, e - cut.first : e - cut.first + 1] = _diagonals(mixed)


def _prepare(kernels: Any, tiles: Any, padded: Any, cut: Cut) -> None:
  """The tiles, once for the batch, and the zeros around sequences."""
  for start, size in ((0, cut.before), (cut.before + cut.height, cut.behind)):
    if size:
      padded[:, start : start + size] = jnp.zeros((cut.together, size, LANES), jnp.float32)

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    @cut.for_features
    def _(f: Any) -> None:
      before: Any = 0.0
      for e in range(cut.first, cut.first + cut.taps + 1):
        at = e - cut.first
        turned = _circulant(kernels[f, at : at + 1]) if at < cut.taps else 0.0
        if e in cut.lags:
          tiles[f, e - cut.low] = _mixed(turned, before).astype(tiles.dtype)
        before = turned


def _circulant(x: jax.Array) -> jax.Array:
  """(1, 128) to (128, 128), whose row i is x turned by i lanes."""
  x = jnp.broadcast_to(x, (rows.GROUP, LANES))
  x = pltpu.roll(x, 0, 1, stride=1, stride_axis=0)
  return jnp.concatenate([pltpu.roll(x, i, 1) for i in range(0, LANES, rows.GROUP)], axis=0)


def _diagonals(x: jax.Array) -> jax.Array:
  """Its adjoint: sum_i x[i, (i + j) % 128], as (1, 128)."""
  n = LANES
  while n > 1:
    n //= 2
    x = x[:n] + pltpu.roll(x[n:], LANES - n, 1)
  return x


def _mixed(x: Any, y: Any) -> jax.Array:
  """(128, 128): x from the diagonal to the right, y to the left of it."""
  i, j = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
  return jnp.where(i <= j, x, y)


def _shifted(padded: Any, b: Any, c: Any, d: int, dtype: Any, cut: Cut) -> jax.Array:
  """The blocks d after those of a part, (rows, 128)."""
  near = padded.at[b, pl.ds(c, cut.before + cut.part + cut.behind)]
  return near[:, pl.ds(cut.before + d, cut.part)].reshape(-1, LANES).astype(dtype)


def _put(y: Any, b: Any, f: Any, c: Any, x: jax.Array, cut: Cut) -> None:
  y[b, f, pl.ds(c, cut.part)] = x.reshape(-1, cut.part, LANES).astype(y.dtype)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """The product over these axes, summed in float32; of float32 factors in six passes, or three."""
  return rows.dot(x, y, axes, rows.precision(lax.Precision.HIGHEST))


def _cut(v: jax.Array, k: jax.Array, k_backward: Optional, signals: int) -> Cut:
  batch, length, _ = v.shape
  behind = 0 if k_backward is None else k_backward.shape[1]
  ahead, blocks = k.shape[1], pl.cdiv(length, LANES)
  first, most = -pl.cdiv(behind, LANES), blocks - 1
  low, high = max(first, -most), min(pl.cdiv(ahead - 1, LANES), most)
  before, after = (pl.cdiv(n, rows.GROUP) * rows.GROUP for n in (high, -low))
  if signals == 2:  # cotangents go the other way
    before, after = after, before
  height = pl.cdiv(blocks, rows.GROUP) * rows.GROUP
  parts = pl.cdiv(height, ROWS)
  part = pl.cdiv(height, parts * rows.GROUP) * rows.GROUP
  cut = Cut(
    height=part * parts,
    first=first,
    taps=pl.cdiv(ahead, LANES) - first,
    low=low,
    tiles=high - low + 1,
    before=before,
    behind=after,
    part=part,
    together=1,
    features=1,
  )
  for together, features in itertools.product(range(MOST, 0, -1), (MOST, 4, 2, 1)):
    more = cut._replace(together=together, features=features)
    fits = _held(more, signals, v.dtype.itemsize) <= MEMORY
    if fits and batch % together == 0 and features <= v.shape[2]:
      return more
  return cut


def _divisor(n: int, most: int) -> int:
  return next(m for m in range(most, 0, -1) if n % m == 0)


def _held(cut: Cut, signals: int, size: int) -> int:
  """Bytes of fast memory: two buffers of each block, and scratch."""
  sequences = 2 * 2 * signals * cut.together * cut.height * size
  tiles = cut.tiles * LANES * (size + 4 * (signals - 1))
  padded = cut.together * (cut.before + cut.height + cut.behind) * 4
  return (cut.features * (sequences + tiles) + padded) * LANES


def _times(x: jax.Array, gate: Optional) -> jax.Array:
  """In the dtype of x."""
  if gate is None:
    return x
  return (x.astype(jnp.float32) * gate.astype(jnp.float32)).astype(x.dtype)


def _blocks(k: jax.Array, k_backward: Optional, cut: Cut) -> jax.Array:
  """The kernels (H, blocks, 128), in the order of lags, the first 128 `first`."""
  parts = [k] if k_backward is None else [k_backward[:, ::-1], k]
  behind = sum(x.shape[1] for x in parts[:-1])
  front = -cut.first * LANES - behind
  c = jnp.concatenate(parts, axis=1)
  c = jnp.pad(c, ((0, 0), (front, cut.taps * LANES - front - c.shape[1])))
  return c.reshape(c.shape[0], cut.taps, LANES)


def _cost(cut: Cut, x: jax.Array, moved: Any, products: int) -> pl.CostEstimate:
  return pl.CostEstimate(
    flops=2 * products * x.size * cut.tiles * LANES,
    transcendentals=0,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
  )
