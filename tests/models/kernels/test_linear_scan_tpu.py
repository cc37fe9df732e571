"""The TPU kernel of `linear_scan` where its blocks end; for the rest see `test_linear_scan.py`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels.linear_scan import reference, tpu

INTERPRET = jax.default_backend() != "tpu"  # there the kernel itself runs
CUTS = {  # (B, L, N), T, D: what a program holds
  "one block": ((1, 16, 128), 16, 128),
  "ragged in time": ((2, 37, 5), 16, 128),
  "one step beyond": ((1, 33, 8), 16, 128),
  "ragged in channels": ((1, 24, 300), 16, 128),
  "rows share a program": ((4, 40, 128), 16, 512),
}


def operands(shape, kind, per_step, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*size):
    return rng.normal(size=size) + (1j * rng.normal(size=size) if kind == 2 else 0)

  size = shape if per_step else shape[-1:]
  a = rng.uniform(0.5, 1, size) * (np.exp(1j * rng.uniform(-3, 3, size)) if kind == 2 else 1)
  state = (shape[0], shape[2])
  return a, normal(*shape), normal(*state), normal(*shape), normal(*state)


def parts(x, dtype=jnp.float32):
  each = (x.real, x.imag) if np.iscomplexobj(x) else (x,)
  return tuple(jnp.asarray(part, dtype) for part in each)


def native(x):
  each = [np.asarray(part, np.float64) for part in x]
  return each[0] if len(each) == 1 else each[0] + 1j * each[1]


@pytest.mark.parametrize("per_step, reverse", itertools.product((False, True), repeat=2))
@pytest.mark.parametrize("cut", CUTS)
def test_blocks(cut, per_step, reverse, monkeypatch):
  shape, steps, lanes = CUTS[cut]
  monkeypatch.setattr(tpu, "STEPS", steps)
  monkeypatch.setattr(tpu, "LANES", lanes)
  # Real or complex, full or half width: each cut meets all four.
  kind = 1 + (per_step ^ (len(cut) % 2))
  dtype = jnp.bfloat16 if per_step ^ reverse else jnp.float32
  a, b, h0, dy, dh_last = operands(shape, kind, per_step)
  b, dy = (native(parts(x, dtype)) for x in (b, dy))
  y, h_last = tpu.forward(
    parts(a), parts(b, dtype), parts(h0), reverse=reverse, interpret=INTERPRET
  )
  want, want_last = reference.linear_scan(a, b, h0, reverse=reverse)
  tolerance = 4e-3 if dtype == jnp.bfloat16 else 2e-6
  near(y, want, tolerance)
  near(h_last, want_last, 2e-6)
  gradients = tpu.backward(
    parts(a), y, parts(h0), parts(dy, dtype), parts(dh_last), reverse=reverse, interpret=INTERPRET
  )
  expected = reference.gradients(a, b, h0, dy, dh_last, reverse=reverse)
  for got, right in zip(gradients, expected, strict=True):
    near(got, right, tolerance)


def near(got, want, tolerance):
  error = native(got) - want
  assert np.sqrt(np.mean(np.abs(error) ** 2)) <= tolerance * np.sqrt(np.mean(np.abs(want) ** 2))


def test_what_lies_beyond_the_sequence_is_never_read(monkeypatch):
  """Interpreted blocks hold NaN beyond the edge of the array."""
  monkeypatch.setattr(tpu, "STEPS", 16)
  a, b, h0, dy, dh_last = (parts(x) for x in operands((1, 19, 5), 1, True))
  y, h_last = tpu.forward(a, b, h0, reverse=True, interpret=INTERPRET)
  results = y, h_last, tpu.backward(a, y, h0, dy, dh_last, reverse=True, interpret=INTERPRET)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def test_refusals():
  one, state = (jnp.ones((1, 8, 128)),), (jnp.ones((1, 128)),)
  assert tpu.refusal(one, one, state) is None
  half = (one[0].astype(jnp.float16),)
  assert "float16 of b; it needs float32 or bfloat16" in tpu.refusal(one, half, state)
  with jax.enable_x64(True):
    assert "float64 of the carry" in tpu.refusal(one, one, (jnp.ones((1, 128), jnp.float64),))
