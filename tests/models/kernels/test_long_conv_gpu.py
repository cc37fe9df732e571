"""The GPU kernels of `long_conv`: how sequences are cut, what keeps them apart, and whether they
compile. They have not run on a GPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels import long_conv, mosaic
from models.kernels.long_conv import gpu, reference

INTERPRET = jax.default_backend() != "gpu"  # there the kernel itself runs
f32, bf16 = jnp.float32, jnp.bfloat16
CASES = {  # (B, L, H), taps of both kernels, gates, programs: T, Q, P, parts, blocks of a part
  "an odd batch": ((3, 40, 2), (40, 39), "both", 264, (1, 1, 2, 1, 1)),
  "pairs in a stack, one block of padding": ((17, 300, 1), (300, None), "pre", 2, (1, 1, 4, 2, 2)),
  "a whole tile, a short kernel": ((4, 2048, 1), (90, 2047), "", 1, (1, 1, 1, 1, 2)),
  "one step beyond": ((3, 2049, 1), (2049, 2048), "", 1, (2, 1, 1, 1, 2)),
  "two tiles wide": ((3, 4097, 1), (4097, None), "", 1, (2, 2, 1, 1, 2)),
}


@jax.jit
def run(u, k, dy, *others):
  """y, du, dk, and the other gradients; `others` are k_backward, pre, post."""
  given = u, k, *(others or (None,) * 3)
  gradients = gpu.backward(*given, dy, interpret=INTERPRET)
  # Two warpgroups are interpreted slowly, and du comes from the same kernel.
  forward = gpu.forward if u.shape[1] <= 2048 or not INTERPRET else lambda *given, interpret: None
  return forward(*given, interpret=INTERPRET), *gradients


@pytest.mark.parametrize("case", CASES)
def test_blocks(case, convolution, monkeypatch):
  shape, taps, gates, programs, want_cut = CASES[case]
  monkeypatch.setattr(gpu, "WANTED", programs)
  given, dy, compare = convolution(shape, taps, gates, bf16, post_dtype=f32)
  assert gpu.refusal(*given) is None
  assert gpu._cut(given[0])[2:] == want_cut
  u, k, *others = given
  y, *gradients = run(u, k, dy, *others)
  compare(y, gradients, 8e-3)


@pytest.mark.skipif(not INTERPRET, reason="a matter of the interpreter")
def test_warpgroups_wait_for_each_other(monkeypatch):
  """The interpreter finds no memory that one writes while the other may be reading it."""
  races = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
  params = dataclasses.replace(mosaic.interpreter(), detect_races=True)
  monkeypatch.setattr(mosaic, "interpreter", lambda: params)
  monkeypatch.setattr(mosaic, "launched", lambda call, out, interpret: call)
  monkeypatch.setattr(gpu, "WANTED", 1)
  gpu._call.cache_clear()
  cut = gpu._cut(jax.ShapeDtypeStruct((4, 3000, 1), bf16))
  x = jnp.ones((1, cut.blocks, cut.tiles, 64, 64), bf16)
  spectrum = jnp.ones((1, 2 * cut.tiles, 64, 64), bf16)
  gpu._convolve(x, spectrum, cut, True).block_until_ready()
  gpu._call.cache_clear()
  assert cut.tall == cut.each == 2
  assert not races.get_races().races_found


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_a_sequence_is_its_own(size, near):
  """Two that share a transform are rounded as if each had its own, gradients too."""
  rng = np.random.default_rng(1)
  u, dy = (rng.normal(size=(2, 30, 3)) for _ in range(2))
  k = rng.normal(size=(3, 30))
  u[1, :, 0] *= size
  dy[1, :, 1] *= size
  k[2] *= size
  given = [jnp.asarray(x, t) for x, t in ((u, bf16), (k, f32), (dy, bf16))]
  u, k, dy = (np.asarray(x, np.float64) for x in given)
  y, du, dk, *_ = run(*given)
  want = u, k, np.zeros(3), None, None, None
  want_y, grads = reference.long_conv(*want), reference.gradients(*want, dy)
  for h in range(3):
    near(dk[h], grads["k"][h], 8e-3, "k")
    for b in range(2):
      near(y[b, :, h], want_y[b, :, h], 8e-3, "y")
      near(du[b, :, h], grads["u"][b, :, h], 8e-3, "u")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_sequence_and_feature(bad, near):
  """Of inputs and cotangents; a kernel's in its feature."""
  rng = np.random.default_rng(2)
  u, dy, k = (rng.normal(size=shape) for shape in ((2, 30, 3), (2, 30, 3), (3, 30)))

  def found(u, k, dy):
    return run(*(jnp.asarray(x, t) for x, t in ((u, bf16), (k, f32), (dy, bf16))))[:3]

  clean = found(u, k, dy)
  jax.tree.map(np.testing.assert_array_equal, clean, found(u, k, dy))
  lost = [np.zeros(x.shape, bool) for x in clean]
  u[0, 3, 0], dy[1, 4, 1], k[2, 5] = bad, bad, bad
  lost[0][0, :, 0] = lost[0][:, :, 2] = True
  lost[1][1, :, 1] = lost[1][:, :, 2] = True
  lost[2][:2] = True
  for have, want, gone in zip(found(u, k, dy), clean, lost, strict=True):
    np.testing.assert_array_equal(np.isnan(have), gone)
    near(have[~gone], np.asarray(want[~gone], np.float64), 8e-3, "the rest")


def test_through_the_interface_under_vmap_and_remat(near):
  """Gradients of all operands, D and the gates too, against those by XLA's FFT."""
  rng = np.random.default_rng(3)
  shapes = {"u": (2, 21, 2), "k": (2, 21), "D": (2,), "behind": (2, 20), "gate": (2, 21, 2)}
  low = {"u", "gate"}
  operands = {
    n: jnp.asarray(rng.normal(size=(2, *s)), bf16 if n in low else f32) for n, s in shapes.items()
  }

  def loss(operands, name):
    gates = operands["gate"], operands["gate"]
    call = partial(long_conv, k_backward=operands["behind"], gates=gates, implementation=name)
    y = jax.checkpoint(call)(*(operands[n] for n in ("u", "k", "D")))
    return (y.astype(f32) ** 2).sum()

  have, want = (
    jax.jit(jax.vmap(jax.value_and_grad(partial(loss, name=name))))(operands)
    for name in ("mosaic_gpu_interpreted" if INTERPRET else "mosaic_gpu", "fft")
  )
  for x, y in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    near(x, np.asarray(y, np.float64), 2e-2, x.shape)


def test_with_64_bits_on():
  u, k = jnp.ones((2, 20, 1), bf16), jnp.ones((1, 20), f32)
  with jax.enable_x64(True):
    y = gpu.forward(u, k, None, None, None, interpret=INTERPRET)
  assert y.dtype == bf16
  np.testing.assert_allclose(np.asarray(y[0, :, 0], f32), np.arange(1, 21), rtol=2e-2)


def test_refusals():
  u, k = jnp.ones((2, 8, 4), bf16), jnp.ones((4, 8))
  assert gpu.refusal(u, k, None, None, None) is None
  assert "float32 of the sequences" in gpu.refusal(u.astype(f32), k, None, None, None)
  long = jax.ShapeDtypeStruct((1, 8193, 1), bf16), jax.ShapeDtypeStruct((1, 9), f32)
  assert gpu.refusal(*long, None, None, None) == "8193 steps; it takes 8192"
  with jax.enable_x64(True):
    wide = jnp.ones((4, 8), jnp.float64)
    assert "float64 of the kernels" in gpu.refusal(u, wide, None, None, None)
  if INTERPRET:
    with pytest.raises(ValueError, match="'mosaic_gpu': runs on cuda, not on cpu; available"):
      long_conv(u, k, implementation="mosaic_gpu")


def everything(u, k, k_backward, pre, post, dy):
  given = u, k, k_backward, pre, post
  return gpu.forward(*given), gpu.backward(*given, dy)


def abstract(batch, length, width, *, gates=True):
  sequence = jax.ShapeDtypeStruct((batch, length, width), bf16)
  kernel = jax.ShapeDtypeStruct((width, length), f32)
  gate = sequence if gates else None
  return sequence, kernel, kernel, gate, gate, sequence


# Sequences of one, two and four tiles; the last leaves the gradient of the kernels to XLA.
SHAPES = {(64, 2000, 768): 4, (2, 100, 96): 4, (9, 4096, 30): 4, (64, 8192, 64): 3}


@pytest.mark.parametrize("shape", SHAPES)
def test_lowers_for_cuda(shape):
  lowered = jax.jit(everything).trace(*abstract(*shape)).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == SHAPES[shape]


def test_lowers_under_vmap_and_with_64_bits():
  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), abstract(2, 40, 8, gates=False)
  )
  with jax.enable_x64(True):
    mapped = jax.jit(jax.vmap(everything)).trace(*given)
    assert mapped.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_for_an_h100_without_spills(shape, spills):
  found = spills(everything, *abstract(*shape, gates=False))
  assert found and not any(found)
