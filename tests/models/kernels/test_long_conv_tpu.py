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


@pytest.mark.parametrize("case", CASES)
def test_blocks(case, convolution):
  shape, taps, gates, dtype, want_cut = CASES[case]
  given, dy, compare = convolution(shape, taps, gates, dtype)
  assert tpu.refusal(*given) is None
  assert tpu._cut(*given[:3], 4, 2)[2:-1] == want_cut
  y = tpu.forward(*given, interpret=INTERPRET)
  gradients = tpu.backward(*given, dy, interpret=INTERPRET)
  compare(y, gradients, 2e-6 if dtype == f32 else 8e-3)


def test_float32_in_three_passes():
  """By jax's own setting; between bfloat16 and six passes."""
  rng = np.random.default_rng(3)
  u, dy, k = (jnp.asarray(rng.normal(size=x), f32) for x in ((2, 200, 2), (2, 200, 2), (2, 200)))
  given = u, k, None, None, None
  u64, dy64, k64 = (np.asarray(x, np.float64) for x in (u, dy, k))
  want = reference.long_conv(u64, k64, np.zeros(2))
  grads = reference.gradients(u64, k64, np.zeros(2), None, None, None, dy64)
  errors = {}
  for name in ("highest", "high"):
    with jax.default_matmul_precision(name):
      y = tpu.forward(*given, interpret=INTERPRET)
      du, dk, *_ = tpu.backward(*given, dy, interpret=INTERPRET)
    pairs = (y, want), (du, grads["u"]), (dk, grads["k"])
    errors[name] = [np.abs(x - z).max() / np.abs(z).max() for x, z in pairs]
  assert max(errors["highest"]) < 2e-6
  assert min(errors["high"]) > 2e-6 and max(errors["high"]) < 3e-5, errors


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_a_sequence_is_its_own(size, near):
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
