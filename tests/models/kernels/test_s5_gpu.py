"""The GPU kernel of `s5_apply` where its blocks, chunks and groups of states end, and whether it
compiles. More is in `test_s5.py`. It has not run on a GPU.

What is not fused is the scan's kernel between XLA's products, which those tests have.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from models.kernels import mosaic, s5_apply
from models.kernels.s5 import gpu, reference

INTERPRET = jax.default_backend() != "gpu"  # there the kernel itself runs
FORWARD, REVERSE, BOTH = (False,), (True,), (False, True)
CASES = {  # (B, L, H, P), directions, steps of a chunk at least
  "chunks, the last shorter, of an odd batch": ((1, 75, 5, 6), REVERSE, 32),
  "a ragged block, in two directions": ((2, 40, 8, 64), BOTH, 99),
  "two states a thread, then two groups of them; wide": ((2, 33, 70, 70), REVERSE, 99),
}


def problem(shape, reverses, seed=0):
  """Native numpy operands and cotangents, and what a backend takes."""
  batch, length, width, states = shape
  rng, ways = np.random.default_rng(seed), len(reverses)

  def z(*shape, size=1.0):
    return size * (rng.normal(size=shape) + 1j * rng.normal(size=shape))

  def low(*shape):
    return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)

  a = [rng.uniform(0.5, 1, states) * np.exp(1j * rng.uniform(-3, 3, states)) for _ in reverses]
  u, dy = low(batch, length, width), low(batch, length, width)
  B, C = z(states, width, size=width**-0.5), z(width, ways * states, size=states**-0.5)
  starts, ends = ([z(batch, states)] + [np.zeros((batch, states))] * (ways - 1) for _ in range(2))
  D = rng.normal(size=width)
  values = u, a, [np.ones(states)] * ways, B, C, D, starts[0], dy, ends[0]
  nothing = (None,) * ways
  given = tuple(map(pair, a)), nothing, pair(B), pair(C), jnp.asarray(D, jnp.float32)
  given = jnp.asarray(u, jnp.bfloat16), *given, tuple(map(pair, starts))
  return values, given, (jnp.asarray(dy, jnp.bfloat16), tuple(map(pair, ends)))


def pair(x):
  return jnp.asarray(x.real, jnp.float32), jnp.asarray(np.imag(x), jnp.float32)


def near(got, want, tolerance):
  got = got[0] + 1j * np.asarray(got[1]) if isinstance(got, tuple) else np.asarray(got, np.float64)
  error = np.sqrt(np.mean(np.abs(got - want) ** 2))
  assert error <= tolerance * np.sqrt(np.mean(np.abs(want) ** 2))


@pytest.mark.parametrize("case", CASES)
def test_blocks(case, monkeypatch):
  shape, reverses, chunk = CASES[case]
  monkeypatch.setattr(mosaic, "CHUNK", chunk)
  values, given, cotangents = problem(shape, reverses)
  want = reference.s5_apply(*values[:-2], reverses=reverses)
  right = reference.gradients(*values, reverses=reverses)
  options = {"reverses": reverses, "interpret": INTERPRET}
  assert gpu.refusal(*given) is None and gpu.fused(*given[:4])

  y, x_last, saved = jax.jit(partial(gpu.forward, **options))(*given)
  near(y, want[0], 8e-3)  # the factors of the products are rounded too
  near(x_last[0], want[1], 8e-3)
  grads = jax.jit(partial(gpu.backward, **options))(saved, *given, *cotangents)
  names = "u", "a", "scale", "B", "C", "D", "x0"
  for name, got in zip(names, grads, strict=True):
    if name == "a":
      for one, expected in zip(got, right["a"], strict=True):
        near(one, expected, 1.5e-2)
    elif name != "scale":
      near(got[0] if name == "x0" else got, right[name], 1.5e-2)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="a matter of the interpreter")
def test_two_groups_of_threads_wait_for_each_other(monkeypatch):
  """The backward kernel as it is compiled; in the other tests one group does the work of both."""
  found = {"interpret": InterpretGPUParams(detect_races=True)}
  monkeypatch.setattr(mosaic.Machine, "options", lambda machine: found)
  monkeypatch.setattr(mosaic, "launched", lambda call, out, interpret: call)
  _, given, (dy, dx_last) = problem((2, 70, 5, 6), FORWARD)
  _, _, saved = gpu.forward(*given, reverses=FORWARD, interpret=INTERPRET)
  assert not gpu_callbacks.get_races().races_found
  u, a, _, B, C, D, _ = given
  operands = jax.tree.map(lambda x: x[None], (saved, u, a, B, C, D, dy, dx_last))
  one, two = (
    gpu._backward(*operands, reverses=FORWARD, machine=mosaic.Machine(True, n)) for n in (1, 2)
  )
  assert not gpu_callbacks.get_races().races_found
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_through_the_interface_under_remat():
  _, (u, (a,), _, B, C, D, (x0,)), _ = problem((2, 40, 5, 6), FORWARD)
  name = "mosaic_gpu_interpreted" if INTERPRET else "mosaic_gpu"

  @partial(jax.value_and_grad, argnums=(0, 1))
  def plain(u, B, function=lambda f: f):
    run = function(lambda u, B: s5_apply(u, a, B, C, D, x0, implementation=name)[0])
    return (run(u, B).astype(jnp.float32) ** 2).sum()

  again = jax.jit(partial(plain, function=jax.checkpoint))(u, B)
  jax.tree.map(np.testing.assert_array_equal, again, jax.jit(plain)(u, B))


def test_what_is_not_finite_stays_behind_and_results_repeat():
  _, given, _ = problem((2, 40, 5, 6), FORWARD)
  run = jax.jit(partial(gpu.forward, reverses=FORWARD, interpret=INTERPRET))
  clean, again = run(*given), run(*given)
  jax.tree.map(np.testing.assert_array_equal, clean, again)
  spoilt = run(given[0].at[0, 20, 3].set(jnp.nan), *given[1:])[0]
  np.testing.assert_array_equal(spoilt[1], clean[0][1])
  np.testing.assert_array_equal(spoilt[0, :20], clean[0][0, :20])
  assert np.isnan(spoilt[0, 20:].astype(jnp.float32)).all()


def test_every_block_is_in_one_chunk():
  for length, turns in ((1, 1), (70, 2), (96, 2), (1000, 3), (1024, 32)):
    cut = gpu.Cut(1, 1, length, 64, 64, turns)
    for descending in (False, True):
      order = range(cut.chunks)[:: -1 if descending else 1]
      found = [int(cut.block(c, k, descending)) for c in order for k in range(int(cut.turns_of(c)))]
      assert found == list(range(cut.blocks)[:: -1 if descending else 1])


def test_refusals_and_what_is_fused():
  given = [jnp.ones((2, 8, 4), jnp.bfloat16), ((jnp.ones(6),) * 2,), (None,)]
  given += [
    (jnp.ones((6, 4)),) * 2,
    (jnp.ones((4, 6)),) * 2,
    jnp.ones(4),
    ((jnp.ones((2, 6)),) * 2,),
  ]
  assert gpu.refusal(*given) is None and gpu.fused(*given[:4])
  assert "float16 of u; it needs" in gpu.refusal(given[0].astype(jnp.float16), *given[1:])
  many = jax.ShapeDtypeStruct((70000, 8, 4), jnp.bfloat16)
  assert gpu.refusal(many, *given[1:]) == "70000 rows of the batch; it takes 65535"
  by_step = ((jnp.ones((2, 8, 6)),) * 2,)
  wide = jax.ShapeDtypeStruct((2, 8, 200), jnp.bfloat16)
  assert not gpu.fused(given[0].astype(jnp.float32), *given[1:4])
  assert not gpu.fused(given[0], by_step, *given[2:4])
  assert not gpu.fused(*given[:2], by_step, given[3])
  assert not gpu.fused(wide, *given[1:4])
  with jax.enable_x64(True):
    assert "float64 of the states" in gpu.refusal(*given[:5], jnp.ones(4, jnp.float64), given[6])


def everything(reverses, u, a, B, C, D, x0, dy, dx_last):
  operands = u, a, (None,) * len(a), B, C, D, x0
  y, last, saved = gpu.forward(*operands, reverses=reverses)
  return y, last, gpu.backward(saved, *operands, dy, dx_last, reverses=reverses)


def abstract(shape, ways, dtype):
  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  def both(*shape):
    return (array(*shape),) * 2

  batch, length, width, states = shape
  u, state = array(batch, length, width, dtype=dtype), (both(batch, states),) * ways
  matrices = both(states, width), both(width, ways * states), array(width)
  return u, (both(states),) * ways, *matrices, state, u, state


KINDS = [  # (B, L, H, P), directions, dtype of u; launches
  ((128, 1000, 64, 64), FORWARD, "bfloat16", 2),
  ((128, 1001, 128, 64), REVERSE, "bfloat16", 2),
  ((128, 1024, 40, 100), BOTH, "bfloat16", 2 + 4),
  ((3, 2000, 128, 128), FORWARD, "bfloat16", 2 * (3 + 3)),
  ((4, 1000, 512, 256), FORWARD, "float32", 3 + 3),
]


@pytest.mark.parametrize("shape, reverses, dtype, launches", KINDS)
def test_lowers_for_cuda(shape, reverses, dtype, launches):
  given = abstract(shape, len(reverses), dtype)
  lowered = jax.jit(partial(everything, reverses)).trace(*given).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == launches


def test_lowers_under_vmap_and_with_64_bits():
  given = abstract((3, 40, 8, 6), 1, jnp.bfloat16)
  stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), given)
  with jax.enable_x64(True):
    mapped = jax.jit(jax.vmap(partial(everything, FORWARD))).trace(*stacked)
    assert mapped.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize("shape, reverses, dtype, launches", KINDS)
def test_compiles_for_an_h100_without_spills(shape, reverses, dtype, launches, spills):
  found = spills(partial(everything, reverses), *abstract(shape, len(reverses), dtype))
  assert found and not any(found)
