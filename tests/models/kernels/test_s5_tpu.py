"""The TPU kernel of `s5_apply`: where blocks end and rows are packed. More is in `test_s5.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels.s5 import reference, tpu

INTERPRET = jax.default_backend() != "tpu"  # there the kernel itself runs
CASES = {  # (B, L, H, P), by step, what u has: how the rows of the batch and time are cut
  "three packs of one row, ragged": ((3, 37, 5, 70), False, jnp.float32),
  "one pack of four rows": ((4, 32, 8, 6), False, jnp.bfloat16),
  "eight chains of two rows, ragged": ((16, 19, 4, 64), False, jnp.float32),
  "two panels of lanes": ((2, 33, 4, 130), False, jnp.float32),
  "by step, ragged": ((4, 37, 6, 9), True, jnp.bfloat16),
}


def z(rng, *shape, size=1.0):
  return size * (rng.normal(size=shape) + 1j * rng.normal(size=shape))


def pair(x):
  return jnp.asarray(x.real, jnp.float32), jnp.asarray(x.imag, jnp.float32)


def near(got, want, tolerance):
  got = got[0] + 1j * np.asarray(got[1]) if isinstance(got, tuple) else np.asarray(got, np.float64)
  error = np.sqrt(np.mean(np.abs(got - want) ** 2))
  assert error <= tolerance * np.sqrt(np.mean(np.abs(want) ** 2))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_blocks(case, reverse, monkeypatch):
  monkeypatch.setattr(tpu, "STEPS", 16)
  (batch, length, width, states), by_step, dtype = CASES[case]
  rng = np.random.default_rng(0)
  shape = (batch, length, states) if by_step else (states,)
  a = rng.uniform(0.5, 1, shape) * np.exp(1j * rng.uniform(-3, 3, shape))
  scale = z(rng, *shape) if by_step else np.ones(states)
  u, dy = (
    np.asarray(jnp.asarray(rng.normal(size=(batch, length, width)), dtype), np.float64)
    for _ in range(2)
  )
  B, C = z(rng, states, width, size=width**-0.5), z(rng, width, states, size=states**-0.5)
  D, x0, dx_last = rng.normal(size=width), z(rng, batch, states), z(rng, batch, states)
  options = {"reverses": (reverse,)}
  want = reference.s5_apply(u, (a,), (scale,), B, C, D, x0, **options)
  want_grads = reference.gradients(u, (a,), (scale,), B, C, D, x0, dy, dx_last, **options)

  given = (
    jnp.asarray(u, dtype),
    (pair(a),),
    (pair(scale) if by_step else None,),
    pair(B),
    pair(C),
    jnp.asarray(D, jnp.float32),
    (pair(x0),),
  )
  assert tpu.refusal(*given) is None
  y, x_last, saved = tpu.forward(*given, **options, interpret=INTERPRET)
  exact = 3e-6 if dtype == jnp.float32 else 8e-3  # the factors of the products are rounded too
  near(y, want[0], exact)
  near(x_last[0], want[1], exact)
  names = ("u", "a", "scale", "B", "C", "D", "x0")
  grads = tpu.backward(
    saved, *given, jnp.asarray(dy, dtype), (pair(dx_last),), **options, interpret=INTERPRET
  )
  for name, got in zip(names, grads, strict=True):
    if name == "x0":
      near(got[0], want_grads[name], 2 * exact)
    elif name in ("a", "scale"):
      if by_step or name == "a":
        near(got[0], want_grads[name][0], 2 * exact)
    else:
      near(got, want_grads[name], 2 * exact)


@pytest.mark.parametrize(("name", "least", "most"), [("highest", 0, 1e-6), ("high", 1e-6, 3e-5)])
def test_float32_as_precise_as_jax_is_told(name, least, most):
  rng = np.random.default_rng(1)
  a = rng.uniform(0.5, 1, 6) * np.exp(1j * rng.uniform(-3, 3, 6))
  u, B, C = rng.normal(size=(2, 20, 8)), z(rng, 6, 8), z(rng, 8, 6)
  D, x0 = rng.normal(size=8), z(rng, 2, 6)
  want, _ = reference.s5_apply(u, (a,), (np.ones(6),), B, C, D, x0, reverses=(False,))
  given = jnp.asarray(u, jnp.float32), (pair(a),), (None,), pair(B), pair(C)
  with jax.default_matmul_precision(name):
    y, *_ = tpu.forward(
      *given, jnp.asarray(D, jnp.float32), (pair(x0),), reverses=(False,), interpret=INTERPRET
    )
  assert least < np.abs(y - want).max() / np.abs(want).max() < most


def test_refusals():
  given = [jnp.ones((2, 8, 4)), ((jnp.ones(6),) * 2,), (None,)]
  given += [(jnp.ones((6, 4)),) * 2, (jnp.ones((4, 6)),) * 2, jnp.ones(4), (jnp.ones((2, 6)),) * 2]
  assert tpu.refusal(*given) is None
  assert "float16 of u" in tpu.refusal(given[0].astype(jnp.float16), *given[1:])
  assert "at least one of each" in tpu.refusal(jnp.ones((2, 0, 4)), *given[1:])
  large = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  assert "do not fit" in tpu.refusal(
    jax.ShapeDtypeStruct((2, 8, 4096), jnp.float32), *given[1:3], (large,) * 2, *given[4:]
  )
