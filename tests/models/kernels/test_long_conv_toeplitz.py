"""The direct TPU kernel of `long_conv` around its blocks; more is in `test_long_conv.py`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels import dispatch, long_conv
from models.kernels.long_conv import interface, reference, toeplitz

INTERPRET = jax.default_backend() != "tpu"  # there the kernel itself runs
f32, bf16 = jnp.float32, jnp.bfloat16
CASES = {  # (B, L, H), taps of both kernels, gates, dtype, ROWS: h, first, taps, low, tiles
  "one tap": ((1, 130, 1), (1, None), "", f32, 512, (8, 0, 1, 0, 1)),
  "a block, one step beyond": ((2, 129, 1), (128, None), "pre", f32, 512, (8, 0, 1, 0, 2)),
  "a lag of a block": ((2, 257, 3), (129, 129), "", f32, 512, (8, -2, 4, -2, 4)),
  "of two tiles more": ((10, 300, 5), (130, None), "", bf16, 512, (8, 0, 2, 0, 3)),
  "parts of a sequence": ((2, 1500, 1), (140, 5), "both", bf16, 8, (16, -1, 3, -1, 4)),
  "a lag that is never reached": ((3, 128, 2), (128, 127), "", bf16, 512, (8, -1, 2, 0, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks(case, convolution, monkeypatch):
  shape, taps, gates, dtype, most, want_cut = CASES[case]
  monkeypatch.setattr(toeplitz, "ROWS", most)
  given, dy, compare = convolution(shape, taps, gates, dtype)
  assert toeplitz._cut(*given[:3], 1)[:5] == want_cut
  forward, backward = (
    jax.jit(partial(way, interpret=INTERPRET)) for way in (toeplitz.forward, toeplitz.backward)
  )
  y = None if gates == "both" else forward(*given)  # else it is in the gradient of the second gate
  compare(y, backward(*given, dy), 1e-6 if dtype == f32 else 8e-3)


def test_a_kernel_longer_than_the_sequence(near):
  rng = np.random.default_rng(1)
  u, k = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 40, 2), (2, 300)))
  name = "pallas_tpu_toeplitz_interpreted"
  y, pullback = jax.vjp(lambda u, k: long_conv(u, k, implementation=name), u, k)
  _, dk = pullback(y)
  none = np.zeros(2), None, None, None
  u64, k64 = np.float64(u), np.float64(k)
  near(y, reference.long_conv(u64, k64, *none[:1]), 1e-6, "y")
  want = reference.gradients(u64, k64, *none, np.asarray(y, np.float64))["k"]
  near(dk, want, 1e-6, "k")
  assert not dk[:, 40:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_what_its_tiles_reach(bad):
  """Of an input its block and the next, of a cotangent its block and the one before; of a kernel
  its feature."""
  rng = np.random.default_rng(2)
  u, dy, k = (rng.normal(size=shape) for shape in ((2, 500, 3), (2, 500, 3), (3, 100)))

  @jax.jit
  def run(u, k, dy):
    operands = [jnp.asarray(x, f32) for x in (u, k)] + [None] * 3
    y = toeplitz.forward(*operands, interpret=INTERPRET)
    return (y, *toeplitz.backward(*operands, jnp.asarray(dy, f32), interpret=INTERPRET)[:2])

  clean = run(u, k, dy)
  spoilt_u, spoilt_dy, spoilt_k = u.copy(), dy.copy(), k.copy()
  spoilt_u[0, 130, 0], spoilt_dy[1, 260, 1], spoilt_k[2, 5] = bad, bad, bad
  spoilt = run(spoilt_u, spoilt_k, spoilt_dy)
  lost_y, lost_du, lost_dk = lost = [np.zeros(x.shape, bool) for x in clean]
  lost_y[0, 128:384, 0] = lost_y[:, :, 2] = True
  lost_du[1, 128:384, 1] = lost_du[:, :, 2] = True
  lost_dk[:2] = True
  for have, want, gone in zip(spoilt, clean, lost, strict=True):
    np.testing.assert_array_equal(np.isfinite(have), ~gone)
    np.testing.assert_array_equal(have[~gone], want[~gone])


def test_which_kernels_it_leaves_to_the_dft():
  def worthwhile(batch, length, taps, dtype=bf16, behind=None):
    operands = _shapes(batch, length, taps, dtype, behind)
    assert toeplitz.refusal(*operands) is None
    return toeplitz.worthwhile(*operands)

  assert worthwhile(1, 8192, 257) and worthwhile(1, 1024, 129) and worthwhile(16, 1024, 513)
  assert worthwhile(4, 1024, 513, f32) and worthwhile(1, 8192, 129, behind=128)
  assert not worthwhile(1, 1024, 130) and not worthwhile(16, 1024, 514)
  assert not worthwhile(1, 8192, 129, behind=129)


def test_what_is_not_worthwhile_runs_when_it_is_named(monkeypatch):
  monkeypatch.setattr(dispatch, "_platform", lambda: "tpu")
  monkeypatch.setattr(dispatch, "whole", lambda: True)
  table, operands = interface.IMPLEMENTATIONS, _shapes(1, 1024, 130)
  name = "pallas_tpu_toeplitz"
  assert dispatch.choose(table, None, *_shapes(1, 1024, 129))["tpu"] == name
  assert dispatch.choose(table, None, *operands)["tpu"] == "pallas_tpu"
  dispatch.check(table, name, *operands)
  assert dispatch.choose(table, name, *operands)["tpu"] == name


def test_refusals():
  u, k = jnp.ones((2, 8, 4)), jnp.ones((4, 8))
  assert toeplitz.refusal(u, k, None, None, None) is None
  assert "float16 of a sequence" in toeplitz.refusal(u.astype(jnp.float16), k, None, None, None)
  assert "float16 of a sequence" in toeplitz.refusal(u, k, None, None, u.astype(jnp.float16))
  assert "10000000 steps and 256 taps" in toeplitz.refusal(*_shapes(1, 10_000_000, 3))
  assert "fast memory" in toeplitz.refusal(*_shapes(1, 100_000, 100_000))
  with jax.enable_x64(True):
    wide = jnp.ones((4, 8), jnp.float64)
    assert "float64 of the kernels" in toeplitz.refusal(u, wide, None, None, None)


def _shapes(batch, length, taps, dtype=bf16, behind=None):
  u, k = jax.ShapeDtypeStruct((batch, length, 4), dtype), jax.ShapeDtypeStruct((4, taps), f32)
  return u, k, behind and jax.ShapeDtypeStruct((4, behind), f32), None, None


def test_one_program_with_64_bits_on():
  u, k = jnp.ones((2, 20, 1), f32), jnp.ones((1, 20), f32)
  with jax.enable_x64(True):
    y = toeplitz.forward(u, k, None, None, None, interpret=INTERPRET)
  assert y.dtype == f32
  np.testing.assert_allclose(y[0, :, 0], np.arange(1, 21), rtol=1e-5)
