"""The TPU kernel of `long_conv`: how sequences are cut; more is in `test_long_conv.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels.long_conv import reference, tpu

INTERPRET = jax.default_backend() != "tpu"  # there the kernel itself runs
f32, bf16 = jnp.float32, jnp.bfloat16
CASES = {  # (B, L, H), taps of both kernels, gates, dtype: h, rows of taps, N1, P, Q, R, F
  "two stacks, both ragged": ((2, 40, 11), (40, 39), "", f32, (8, 16, 16, 8, 1, 2, 2)),
  "an odd batch": ((3, 1024, 2), (1024, None), "both", f32, (8, 8, 16, 8, 1, 4, 1)),
  "one step beyond": ((1, 1025, 1), (1025, 1024), "", f32, (16, 32, 32, 4, 1, 2, 1)),
  "a short kernel": ((2, 2100, 3), (90, None), "pre", bf16, (24, 8, 32, 4, 1, 2, 1)),
  "two blocks of the batch": ((10, 300, 1), (300, None), "", bf16, (8, 8, 16, 8, 1, 2, 1)),
  "no stacks": ((2, 5000, 1), (5000, 4999), "", f32, (40, 80, 80, 1, 1, 2, 1)),
  "two pieces": ((2, 9000, 2), (9000, None), "", bf16, (72, 72, 160, 1, 2, 2, 2)),
}


def near(got, want, tolerance, name):
  error = np.asarray(got, np.float64) - want
  assert got.shape == want.shape, name
  assert np.sqrt(np.mean(error**2)) <= tolerance * np.sqrt(np.mean(want**2)), name


@pytest.mark.parametrize("case", CASES)
def test_blocks(case):
  shape, taps, gates, dtype, want_cut = CASES[case]
  rng = np.random.default_rng(0)

  def draw(*shape, dtype=f32):
    x = jnp.asarray(rng.normal(size=shape), dtype)
    return x, np.asarray(x, np.float64)

  (u, u64), (dy, dy64) = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
  (k, k64), (behind, behind64) = (draw(shape[2], n) if n else (None, None) for n in taps)
  pre, pre64 = draw(*shape, dtype=dtype) if gates else (None, None)
  post, post64 = draw(*shape, dtype=dtype) if gates == "both" else (None, None)
  given = u, k, behind, pre, post
  assert tpu.refusal(*given) is None
  cut = tpu._cut(u, k, behind, 4, 2)
  assert cut[2:-1] == want_cut

  want = u64, k64, np.zeros(shape[2]), behind64, pre64, post64
  exact = 2e-6 if dtype == f32 else 8e-3
  near(tpu.forward(*given, interpret=INTERPRET), reference.long_conv(*want), exact, "y")
  grads = tpu.backward(*given, dy, interpret=INTERPRET)
  want_grads = reference.gradients(*want, dy64)
  for name, x, operand in zip(("u", "k", "k_backward", "pre", "post"), grads, given, strict=True):
    if operand is None:
      assert x is None
    else:
      near(x, want_grads[name], exact, name)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_a_sequence_is_its_own(size):
  """Two that share a transform are rounded as if each had its own, gradients too."""
  rng = np.random.default_rng(1)
  u, dy = (rng.normal(size=(2, 60, 2)) for _ in range(2))
  u[1, :, 0] *= size
  dy[1, :, 1] *= size
  k = rng.normal(size=(2, 60))
  operands = jnp.asarray(u, f32), jnp.asarray(k, f32), None, None, None
  rounded = [None if x is None else np.asarray(x, np.float64) for x in operands]
  rounded.insert(2, np.zeros(2))
  y = tpu.forward(*operands, interpret=INTERPRET)
  du, dk, *_ = tpu.backward(*operands, jnp.asarray(dy, f32), interpret=INTERPRET)
  want = reference.long_conv(*rounded)
  grads = reference.gradients(*rounded, np.asarray(jnp.asarray(dy, f32), np.float64))
  for b in range(2):
    for h in range(2):
      near(y[b, :, h], want[b, :, h], 2e-6, "y")
      near(du[b, :, h], grads["u"][b, :, h], 2e-6, "u")
      near(dk[h], grads["k"][h], 2e-6, "k")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_sequence_and_feature(bad):
  """Of inputs and cotangents; a kernel's in its feature. All of them share products here."""
  rng = np.random.default_rng(2)
  u, dy, k = (rng.normal(size=shape) for shape in ((2, 30, 3), (2, 30, 3), (3, 30)))

  def run(u, k, dy):
    operands = [jnp.asarray(x, f32) for x in (u, k)] + [None] * 3
    y = tpu.forward(*operands, interpret=INTERPRET)
    return (y, *tpu.backward(*operands, jnp.asarray(dy, f32), interpret=INTERPRET)[:2])

  y, du, dk = run(u, k, dy)
  spoilt_u, spoilt_dy, spoilt_k = u.copy(), dy.copy(), k.copy()
  spoilt_u[0, 3, 0], spoilt_dy[1, 4, 1], spoilt_k[2, 5] = bad, bad, bad
  have_y, have_du, have_dk = run(spoilt_u, spoilt_k, spoilt_dy)
  lost_y, lost_du, lost_dk = (np.zeros(x.shape, bool) for x in (y, du, dk))
  lost_y[0, :, 0] = lost_y[:, :, 2] = True
  lost_du[1, :, 1] = lost_du[:, :, 2] = True
  lost_dk[0] = lost_dk[1] = True
  for have, want, lost in ((have_y, y, lost_y), (have_du, du, lost_du), (have_dk, dk, lost_dk)):
    np.testing.assert_array_equal(np.isnan(have), lost)
    np.testing.assert_allclose(have[~lost], want[~lost], atol=1e-5)


def test_one_program_with_64_bits_on():
  u, k = jnp.ones((2, 20, 1), f32), jnp.ones((1, 20), f32)
  with jax.enable_x64(True):
    y = tpu.forward(u, k, None, None, None, interpret=INTERPRET)
  assert y.dtype == f32
  np.testing.assert_allclose(y[0, :, 0], np.arange(1, 21), rtol=1e-5)


def test_refusals():
  u, k = jnp.ones((2, 8, 4)), jnp.ones((4, 8))
  assert tpu.refusal(u, k, None, None, None) is None
  assert "float16 of a sequence" in tpu.refusal(u.astype(jnp.float16), k, None, None, None)
  assert "float16 of a sequence" in tpu.refusal(u, k, None, None, u.astype(jnp.float16))
  long = jax.ShapeDtypeStruct((1, 65537, 1), f32), jax.ShapeDtypeStruct((1, 65537), f32)
  assert "133120 points; it takes 131072" in tpu.refusal(*long, None, None, None)
  with jax.enable_x64(True):
    wide = jnp.ones((4, 8), jnp.float64)
    assert "float64 of the kernels" in tpu.refusal(u, wide, None, None, None)
