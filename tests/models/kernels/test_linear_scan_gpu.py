"""The GPU kernel of `linear_scan` where its blocks and chunks end, and whether it compiles.

For the rest see `test_linear_scan.py`. It has not run on a GPU.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels.linear_scan import gpu, reference

INTERPRET = jax.default_backend() != "gpu"  # there the kernel itself runs
REAL, PAIR = 1, 2
CASES = [  # (B, L, N), steps of a block, of a chunk at least; parts, per step, reverse, dtype of b
  ((1, 8, 128), 8, 99, REAL, True, False, "float32"),
  ((2, 21, 5), 8, 99, PAIR, True, True, "float32"),  # ragged in time, a channel of padding
  ((1, 17, 130), 8, 99, REAL, False, True, "bfloat16"),  # one step beyond, ragged in channels
  ((1, 19, 8), 16, 99, PAIR, False, False, "bfloat16"),
  ((1, 39, 8), 8, 8, REAL, False, False, "float32"),  # four chunks of one or two blocks
  ((1, 44, 4), 8, 20, PAIR, True, False, "float32"),  # two chunks of three blocks
  ((2, 39, 4), 8, 16, REAL, True, True, "float32"),
  ((1, 37, 4), 8, 18, PAIR, False, True, "bfloat16"),
]


def operands(shape, kind, per_step, dtype=jnp.float32, seed=0):
  """Native numpy (a, b, h0, dy, dh_last), and the same as the tuples that a backend takes."""
  rng = np.random.default_rng(seed)

  def normal(*size):
    return rng.normal(size=size) + (1j * rng.normal(size=size) if kind == PAIR else 0)

  size = shape if per_step else shape[-1:]
  a = rng.uniform(0.5, 1, size) * (np.exp(1j * rng.uniform(-3, 3, size)) if kind == PAIR else 1)
  state = (shape[0], shape[2])
  values = a, normal(*shape), normal(*state), normal(*shape), normal(*state)
  single = jnp.float32
  given = [parts(x, d) for x, d in zip(values, (single, dtype, single, dtype, single), strict=True)]
  return list(map(native, given)), given


def parts(x, dtype=jnp.float32):
  each = (x.real, x.imag) if np.iscomplexobj(x) else (x,)
  return tuple(jnp.asarray(part, dtype) for part in each)


def native(x):
  each = [np.asarray(part, np.float64) for part in x]
  return each[0] if len(each) == 1 else each[0] + 1j * each[1]


def near(got, want, tolerance):
  error = native(got) - want
  assert np.sqrt(np.mean(np.abs(error) ** 2)) <= tolerance * np.sqrt(np.mean(np.abs(want) ** 2))


@pytest.fixture
def blocks(monkeypatch):
  def smaller(steps, chunk):
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "CHUNK", chunk)

  return smaller


@pytest.mark.parametrize("shape, steps, chunk, kind, per_step, reverse, dtype", CASES)
def test_blocks_and_chunks(shape, steps, chunk, kind, per_step, reverse, dtype, blocks):
  """In interpreted blocks what lies beyond the edge of an array is NaN."""
  blocks(steps, chunk)
  (a, b, h0, dy, dh_last), given = operands(shape, kind, per_step, dtype)

  @jax.jit
  def run(a, b, h0, dy, dh_last):
    y, h_last = gpu.forward(a, b, h0, reverse=reverse, interpret=INTERPRET)
    none, only = gpu.forward(a, b, h0, reverse=reverse, states=False, interpret=INTERPRET)
    assert none == ()
    return (
      y,
      h_last,
      only,
      gpu.backward(a, y, h0, dy, dh_last, reverse=reverse, interpret=INTERPRET),
    )

  y, h_last, only, gradients = run(*given)
  want, want_last = reference.linear_scan(a, b, h0, reverse=reverse)
  tolerance = 4e-3 if dtype == "bfloat16" else 2e-6
  near(y, want, tolerance)
  near(h_last, want_last, 2e-6)
  near(only, want_last, 2e-6)
  expected = reference.gradients(a, b, h0, dy, dh_last, reverse=reverse)
  for got, right in zip(gradients, expected, strict=True):
    near(got, right, tolerance)


def test_every_step_is_in_one_chunk():
  for length, steps, chunks in itertools.product((8, 31, 64, 1000), (8, 24), (1, 2, 3, 7)):
    cut = gpu.Blocks(1, length, 4, steps, min(chunks, -(-length // steps)))
    for descending in (False, True):
      order = range(cut.chunks)[:: -1 if descending else 1]
      turns = [(c, k) for c in order for k in range(cut.grid[3])]
      found = [(*map(int, cut.block(c, jnp.int32(k), descending)), k) for c, k in turns]
      # A block that comes twice comes first, and finds the carry reset both times.
      once = [block for block, first, k in found if not (first and k)]
      want = range(cut.blocks)[:: -1 if descending else 1]
      assert once == list(want)


@pytest.mark.parametrize("shape", [(2, 37, 128), (2, 37, 64), (2, 37, 256), (2, 40, 128)])
def test_no_contiguous_block_is_written_beyond_its_array(shape):
  """Mosaic GPU writes one as so many bytes, where others end with the axis."""
  cut = gpu.Blocks(*shape, 8, 2)
  y, h = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (2, 2, shape[2])))
  rows = gpu._room(cut.sequence(False), y).shape
  assert rows == ((2, 40, 128) if shape[2] == 128 else shape)
  assert gpu._room(gpu.STATE, h).shape == (2, 2, max(shape[2], 128))


def test_nothing_that_is_not_finite_passes_to_earlier_chunks(blocks):
  blocks(8, 8)
  _, (a, b, h0, *_) = operands((1, 32, 4), REAL, True)
  run = jax.jit(partial(gpu.forward, reverse=False, interpret=INTERPRET))
  clean, spoilt = run(a, b, h0)[0][0], run((a[0].at[0, 17, 1].set(jnp.nan),), b, h0)[0][0]
  touched = np.isnan(spoilt)
  assert touched[0, 17:, 1].all() and touched.sum() == 15
  np.testing.assert_array_equal(np.where(touched, 0, spoilt), np.where(touched, 0, clean))


def test_refusals():
  one, state = (jnp.ones((1, 8, 128)),), (jnp.ones((1, 128)),)
  assert gpu.refusal(one, one, state) is None
  half = (one[0].astype(jnp.float16),)
  assert "float16 of b; it needs float32 or bfloat16" in gpu.refusal(one, half, state)
  many = (jax.ShapeDtypeStruct((300, 300, 8, 128), jnp.float32),)
  assert gpu.refusal(one, many, state) == "90000 rows of the batch; it takes 65535"
  with jax.enable_x64(True):
    assert "float64 of the carry" in gpu.refusal(one, one, (jnp.ones((1, 128), jnp.float64),))


def everything(reverse, a, b, h0, dy, dh_last):
  y, h_last = gpu.forward(a, b, h0, reverse=reverse)
  _, only = gpu.forward(a, b, h0, reverse=reverse, states=False)
  return y, h_last, only, gpu.backward(a, y, h0, dy, dh_last, reverse=reverse)


def abstract(shape, kind, per_step, dtype):
  def each(shape, dtype=jnp.float32):
    return (jax.ShapeDtypeStruct(shape, dtype),) * kind

  state = each((shape[0], shape[2]))
  a = each(shape if per_step else shape[2:])
  return a, each(shape, dtype), state, each(shape, dtype), state


# One launch, or three with chunks of unequal length; N in whole blocks, and not even in 16 bytes.
KINDS = list(itertools.product(((64, 1000, 128), (3, 2000, 250)), (REAL, PAIR), (False, True)))


def variants(kinds):
  """Each with a direction and a dtype, so that all of them meet."""
  types = itertools.cycle(("float32", "bfloat16", "bfloat16", "float32"))
  for i, (kind, dtype) in enumerate(zip(kinds, types)):  # noqa: B905
    yield pytest.param(*kind, bool(i % 2) ^ (i > 3), dtype)


@pytest.mark.parametrize("shape, kind, per_step, reverse, dtype", list(variants(KINDS)))
def test_lowers_for_cuda(shape, kind, per_step, reverse, dtype):
  given = abstract(shape, kind, per_step, dtype)
  lowered = jax.jit(partial(everything, reverse)).trace(*given).lower(lowering_platforms=("cuda",))
  launches = 3 if shape[0] == 64 else 3 + 2 + 3
  assert lowered.as_text().count("mosaic_gpu_v2") == launches


@pytest.mark.parametrize("per_step", [False, True])
def test_lowers_under_vmap_and_with_64_bits(per_step):
  given = abstract((2, 40, 8), REAL, per_step, jnp.float32)
  stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), given)
  with jax.enable_x64(True):
    mapped = jax.jit(jax.vmap(partial(everything, False))).trace(*stacked)
    assert "mosaic_gpu_v2" in mapped.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape, kind, per_step, reverse, dtype", list(variants(KINDS)))
def test_compiles_for_an_h100_without_spills(shape, kind, per_step, reverse, dtype, spills):
  found = spills(partial(everything, reverse), *abstract(shape, kind, per_step, dtype))
  assert found and set(found) == {0}
