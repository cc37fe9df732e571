"""Every implementation of `linear_scan` against the float64 oracle and against identities."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from models.kernels import dispatch, linear_scan
from models.kernels.linear_scan import interface, reference, xla

KINDS = ("real", "pair", "complex")
VARIANTS = list(itertools.product(KINDS, ("constant", "per step"), (False, True)))
SHAPES = [  # (B, L, N): the sizes at which blocks, lanes and loops end
  (3, 0, 5),
  (0, 7, 128),
  (1, 1, 1),
  (3, 7, 64),
  (1, 8, 127),
  (3, 9, 128),
  (1, 97, 130),
  (3, 127, 5),
  (0, 128, 1),
  (1, 129, 64),
  (3, 1000, 5),
]
# Every variant at one shape, two in turn at each of the others.
CASES = [((2, 11, 3), variant) for variant in VARIANTS]
CASES += [(s, VARIANTS[(2 * i + j * 5) % 12]) for i, s in enumerate(SHAPES) for j in range(2)]
INTERPRETED = [name for name in interface.IMPLEMENTATIONS if name.endswith("_interpreted")]


def _runs(name):
  if name in INTERPRETED and jax.default_backend() != "cpu":
    return False  # where kernels run they are not interpreted as well
  operands = (jnp.ones(128),), (jnp.ones((8, 128, 128)),), (jnp.ones((8, 128)),)
  try:
    dispatch.check(interface.IMPLEMENTATIONS, name, *operands)
  except ValueError:
    return False
  return True


@pytest.fixture(params=filter(_runs, interface.IMPLEMENTATIONS))
def implementation(request):
  return request.param


@pytest.fixture
def compiled(implementation):
  """For what says nothing new of a kernel that is interpreted, which is slow."""
  if implementation in INTERPRETED:
    pytest.skip("interpreted")
  return implementation


def normal(rng, kind, *shape):
  x = rng.normal(size=shape)
  return x if kind == "real" else x + 1j * rng.normal(size=shape)


def problem(kind, decay, shape, *, seed=0, slowest=0.999):
  """Native numpy operands (a, b, h0) and cotangents (dy, dh_last) that float32 holds exactly."""
  rng = np.random.default_rng(seed)
  batch, _, width = shape
  a_shape = (width,) if decay == "constant" else shape
  a = rng.uniform(0.3, slowest, a_shape) * rng.choice([-1.0, 1.0], a_shape)
  if kind != "real":
    a = a * np.exp(1j * rng.uniform(-3, 3, a_shape))
  b, dy = normal(rng, kind, *shape), normal(rng, kind, *shape)
  h0, dh_last = normal(rng, kind, batch, width), normal(rng, kind, batch, width)
  narrow = np.float32 if kind == "real" else np.complex64
  return tuple(x.astype(narrow) for x in (a, b, h0, dy, dh_last))


def put(kind, x):
  """A native numpy array as the operand of `kind`."""
  return (jnp.asarray(x.real), jnp.asarray(x.imag)) if kind == "pair" else jnp.asarray(x)


def take(x):
  """The inverse of `put`."""
  if not isinstance(x, tuple):
    return np.asarray(x)
  z = np.empty(x[0].shape, np.result_type(x[0].dtype, np.complex64))
  z.real, z.imag = x  # not a product with 1j, which spreads NaN
  return z


@partial(jax.jit, static_argnames=("reverse", "implementation"))
def with_gradients(operands, cotangents, *, reverse=False, implementation=None):
  scan = partial(linear_scan, reverse=reverse, implementation=implementation)
  results, pullback = jax.vjp(scan, *operands)
  return *results, *pullback(cotangents)


def oracle(operands, cotangents, *, reverse=False):
  results = reference.linear_scan(*operands, reverse=reverse)
  return *results, *reference.gradients(*operands, *cotangents, reverse=reverse)


def assert_near(got, want, tolerance, name=""):
  """Root mean square of the error relative to that of the expected value."""
  assert got.shape == want.shape, name
  if want.size:
    scale = np.sqrt(np.mean(np.abs(want) ** 2))
    error = np.sqrt(np.mean(np.abs(got - want) ** 2))
    assert error <= tolerance * max(scale, 1e-30), f"{name}: {error / scale:.2e}"


def check_against_oracle(kind, reverse, implementation, values, tolerance):
  operands, cotangents = values[:3], values[3:]
  got = with_gradients(
    tuple(put(kind, x) for x in operands),
    # JAX transposes native complex numbers without conjugation.
    tuple(put(kind, np.conj(x) if kind == "complex" else x) for x in cotangents),
    reverse=reverse,
    implementation=implementation,
  )
  want = oracle(operands, cotangents, reverse=reverse)
  for i, name in enumerate(("y", "h_last", "da", "db", "dh0")):
    have = take(got[i])
    if kind == "complex" and i >= 2:
      have = np.conj(have)
    assert have.dtype in (np.float32, np.complex64)
    assert_near(have, want[i], tolerance, name)


@pytest.mark.parametrize("shape, variant", CASES)
def test_oracle(shape, variant, implementation):
  kind, decay, reverse = variant
  if implementation in INTERPRETED and (shape == (2, 11, 3) or kind == "complex"):
    pytest.skip("see test_linear_scan_tpu.py and test_linear_scan_gpu.py")
  if implementation == "mosaic_gpu_interpreted" and shape not in SHAPES[::2]:
    pytest.skip("half of them, for time")
  # 1e-6 times the root of the memory, which is at most 1 / (1 - 0.999) steps.
  tolerance = 1e-6 * max(1, min(shape[1], 1000)) ** 0.5
  check_against_oracle(kind, reverse, implementation, problem(kind, decay, shape), tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", ["constant", "per step"])
def test_cotangent_of_the_last_state_only(decay, reverse, implementation):
  if implementation in INTERPRETED and reverse:
    pytest.skip("one direction, for time")
  a, b, h0, dy, dh_last = problem("pair", decay, (2, 11, 3))
  values = (a, b, h0, np.zeros_like(dy), dh_last)
  check_against_oracle("pair", reverse, implementation, values, 3e-6)


@pytest.mark.parametrize("decay", ["constant", "per step"])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind, decay, compiled):
  with jax.enable_x64(True):
    wide = np.float64 if kind == "real" else np.complex128
    operands = [put(kind, x.astype(wide)) for x in problem(kind, decay, (2, 5, 3))[:3]]
    for reverse in (False, True):
      scan = jax.jit(partial(linear_scan, reverse=reverse, implementation=compiled))
      y, h_last = scan(*operands)
      assert {x.dtype for x in jax.tree.leaves((y, h_last))} <= {np.dtype(wide), np.dtype("f8")}
      check_grads(scan, operands, order=1, modes=["rev"], atol=2e-5, rtol=2e-5)


def test_float64_agrees_with_the_oracle_to_float64(compiled):
  values = problem("pair", "per step", (2, 50, 3))
  with jax.enable_x64(True):
    operands = [put("pair", x.astype(np.complex128)) for x in values[:3]]
    y, _ = linear_scan(*operands, implementation=compiled)
    assert_near(take(y), reference.linear_scan(*values[:3])[0], 1e-14)


def test_second_derivative():
  with jax.enable_x64(True):
    operands = [jnp.asarray(x, jnp.float64) for x in problem("real", "constant", (1, 4, 2))[:3]]
    check_grads(linear_scan, operands, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_mixed_extremes(implementation):
  """Each channel at its own edge: none may disturb another."""
  tiny = np.finfo(np.float32).tiny
  a = np.array([0, 1, -1, 1 + 1e-3, 1 - 1e-7, 1e-40, 1e-20, 0.5, 1e20], np.float32)
  b, h0 = problem("real", "constant", (2, 129, a.size))[1:3]
  b[..., -1] = 0
  b[..., -2] *= 1e-40
  h0[..., -1] = 1e-30
  if implementation == "associative":  # multiplies decays that no state has met
    a, b, h0 = a[:-1], b[..., :-1], h0[..., :-1]
  for values in (a, np.broadcast_to(a, b.shape)):
    y, h_last = linear_scan(values, b, h0, implementation=implementation)
    with np.errstate(over="ignore"):
      want = [x.astype(np.float32) for x in reference.linear_scan(values, b, h0)]
    for have, expected in zip((y, h_last), want, strict=True):
      # Subnormal numbers may be flushed; the last channel overflows to infinity.
      np.testing.assert_allclose(have, expected, rtol=1e-4, atol=2 * tiny)


def test_unit_circle(compiled):
  a = np.exp(1j * np.linspace(-3, 3, 5)).astype(np.complex64)
  _, b, h0, *_ = problem("pair", "constant", (1, 1000, 5))
  y, _ = linear_scan(put("pair", a), put("pair", b), put("pair", h0), implementation=compiled)
  assert_near(take(y), reference.linear_scan(a, b, h0)[0], 3e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["real", "pair"])
def test_what_is_not_finite_stays_in_its_channel_and_future(kind, reverse, implementation):
  scan = jax.jit(partial(linear_scan, reverse=reverse, implementation=implementation))
  a, b, h0, *_ = problem(kind, "per step", (2, 11, 3))
  row, time, channel = 1, 4, 2
  clean = take(scan(*(put(kind, x) for x in (a, b, h0)))[0])
  for where, bad in itertools.product("ab", (np.nan, np.inf)):
    spoilt = {"a": a.copy(), "b": b.copy()}
    spoilt[where][row, time, channel] = bad
    y = take(scan(*(put(kind, x) for x in (*spoilt.values(), h0)))[0])
    touched = np.zeros(b.shape, bool)
    touched[row, : time + 1, channel] = reverse
    touched[row, time:, channel] |= not reverse
    np.testing.assert_array_equal(y[~touched], clean[~touched])
    assert not np.isfinite(y[row, time, channel])


@pytest.mark.parametrize("kind", ["real", "pair"])
def test_identities(kind, implementation):
  scan = jax.jit(partial(linear_scan, implementation=implementation))
  a, b, h0, b2, h2 = problem(kind, "constant", (2, 11, 3))
  full = np.broadcast_to(a, b.shape)

  def run(a, b, h0):
    return tuple(take(x) for x in scan(*(put(kind, x) for x in (a, b, h0))))

  def same(got, want, name):
    """To the bit, unless the last digit depends on the place of a step in a group or in a tree."""
    if implementation != "xla":
      return assert_near(got, want, 2e-7, name)
    return np.testing.assert_array_equal(got, want, name)

  y, h_last = run(a, b, h0)
  np.testing.assert_array_equal(y[:, -1], h_last)

  for got, want in zip(run(full, b, h0), (y, h_last), strict=True):
    assert_near(got, want, 1e-7, "constant == broadcast")

  first, middle = run(a, b[:, :4], h0)
  second, end = run(a, b[:, 4:], middle)
  same(np.concatenate([first, second], 1), y, "splitting")
  same(end, h_last, "splitting")

  y2, _ = run(a, b2, h2)
  combined, _ = run(a, 2 * b - 3 * b2, 2 * h0 - 3 * h2)
  assert_near(combined, 2 * y - 3 * y2, 1e-6, "linearity")

  shifted, _ = run(a, np.pad(b, ((0, 0), (3, 0), (0, 0)))[:, :11], 0 * h0)
  assert_near(shifted[:, 3:], run(a, b, 0 * h0)[0][:, :8], 1e-7, "time shift")

  operands = [put(kind, x) for x in (full[:, ::-1], b[:, ::-1], h0)]
  backwards, first_state = linear_scan(*operands, reverse=True, implementation=implementation)
  same(take(backwards)[:, ::-1], run(full, b, h0)[0], "reverse")
  np.testing.assert_array_equal(take(first_state), take(backwards)[:, 0])


def test_complex_with_zero_imaginary_part_is_real(compiled):
  for decay in ("constant", "per step"):
    values = problem("real", decay, (2, 11, 3))
    real = with_gradients(values[:3], values[3:], implementation=compiled)
    pairs = [(x, np.zeros_like(x)) for x in values]
    both = with_gradients(tuple(pairs[:3]), tuple(pairs[3:]), implementation=compiled)
    for have, want in zip(both, real, strict=True):
      assert_near(np.asarray(have[0]), np.asarray(want), 1e-6)
      if want is not real[2]:  # da has an imaginary part only through y, which is real
        np.testing.assert_array_equal(have[1], 0)


def test_zero_initial_state_by_default_and_any_leading_axes():
  a, b, h0, *_ = problem("real", "per step", (2, 11, 3))
  y, h_last = linear_scan(a, b)
  same, _ = linear_scan(a, b, np.zeros_like(h0))
  np.testing.assert_array_equal(y, same)
  bare, bare_last = linear_scan(a[0], b[0])
  np.testing.assert_array_equal(bare, y[0])
  np.testing.assert_array_equal(bare_last, h_last[0])
  deep, _ = linear_scan(a.reshape(1, 2, 1, 11, 3), b.reshape(1, 2, 1, 11, 3))
  np.testing.assert_array_equal(deep[0, :, 0], y)


@pytest.mark.parametrize("decay", ["constant", "per step"])
def test_vmap_over_everything_equals_a_loop(decay, implementation):
  def gradients(*values):
    return with_gradients(values[:3], values[3:], implementation=implementation)

  seeds = [problem("pair", decay, (2, 11, 3), seed=seed) for seed in range(3)]
  seeds = [[put("pair", x) for x in values] for values in seeds]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
  mapped = jax.vmap(gradients)(*stacked)
  for i, values in enumerate(seeds):
    for have, want in zip(
      jax.tree.leaves(mapped), jax.tree.leaves(gradients(*values)), strict=True
    ):
      np.testing.assert_allclose(have[i], want, rtol=1e-5, atol=1e-5)
  # Seeds may share operands.
  shared = jax.vmap(partial(linear_scan, seeds[0][0]), in_axes=(0, None))
  y, _ = shared(stacked[1], seeds[0][2])
  np.testing.assert_allclose(take(y)[0], take(linear_scan(*seeds[0][:3])[0]), rtol=1e-5, atol=1e-5)


def test_remat_does_not_change_gradients(compiled):
  operands = [put("pair", x) for x in problem("pair", "per step", (2, 11, 3))[:3]]

  def loss(*operands):
    (re, im), _ = linear_scan(*operands, implementation=compiled)
    return jnp.sum(jnp.sin(re) * im)

  plain = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)
  again = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(*operands)
  for have, want in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-6)


def test_gradients_are_bitwise_reproducible(compiled):
  for decay in ("constant", "per step"):
    values = tuple(put("pair", x) for x in problem("pair", decay, (8, 129, 64)))
    first = with_gradients(values[:3], values[3:], implementation=compiled)
    for _ in range(3):
      again = with_gradients(values[:3], values[3:], implementation=compiled)
      jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("decay", ["constant", "per step"])
@pytest.mark.parametrize("kind", ["real", "pair"])
def test_xla_overwrites_in_place(kind, decay, whole_passes_in_loops):
  shape = (2, 65, 30)
  values = problem(kind, decay, shape)
  operands = tuple(put(kind, x) for x in values)
  low = (operands[0], *jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands[1:2]), operands[2])
  low += (*jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands[3:4]), operands[4])
  seeds = jax.tree.map(lambda x: jnp.stack([x] * 3), operands)

  def gradients(*q):
    return with_gradients(q[:3], q[3:], implementation="xla")

  for function, q in ((gradients, operands), (gradients, low), (jax.vmap(gradients), seeds)):
    assert not whole_passes_in_loops(function, q, shape, (3, *shape))


def test_operands_that_are_not_contiguous(compiled):
  a, b, h0, *_ = problem("real", "per step", (4, 6, 8))
  want, _ = reference.linear_scan(a, b, h0)
  turned = np.asfortranarray(b)
  y, _ = linear_scan(np.asfortranarray(a), turned, h0, implementation=compiled)
  assert_near(np.asarray(y), want, 1e-6)

  @jax.jit
  def time_first(a, b, h0):
    y, _ = linear_scan(a, b.transpose(1, 0, 2), h0[:, ::-1], implementation=compiled)
    return y

  assert_near(np.asarray(time_first(a, b.transpose(1, 0, 2), h0[:, ::-1])), want, 1e-6)


@pytest.mark.parametrize("kind", ["real", "pair"])
def test_bfloat16_inputs_with_a_float32_carry(kind, implementation):
  a, b, h0, dy, dh_last = problem(kind, "constant", (2, 1000, 5), slowest=0.9999)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (put(kind, b), put(kind, dy)))
  got = with_gradients(
    (put(kind, a), low[0], put(kind, h0)),
    (low[1], put(kind, dh_last)),
    implementation=implementation,
  )
  y, h_last, da, db, _ = got
  assert {x.dtype for x in jax.tree.leaves((y, db))} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves((h_last, da))} == {jnp.dtype(jnp.float32)}
  # The oracle takes the rounded inputs, so what is left is the rounding of y and db.
  wide = [take(jax.tree.map(lambda x: x.astype(jnp.float32), x)) for x in low]
  want = oracle((a, wide[0], h0), (wide[1], dh_last))
  for have, expected in zip(got, want, strict=True):
    assert_near(take(jax.tree.map(lambda x: x.astype(jnp.float32), have)), expected, 3e-3)
  assert_near(take(h_last), want[1], 3e-5, "the carry is not rounded")


BAD = [
  (ValueError, "a: shape", (np.ones((5, 3)), np.ones((2, 5, 3)))),
  (ValueError, "a: shape", (np.ones(4), np.ones((2, 5, 3)))),
  (ValueError, "a: shape", (np.ones((1, 5, 3)), np.ones((2, 5, 3)))),
  (ValueError, "b: shape", (np.ones(3), np.ones(3))),
  (ValueError, "h0: shape", (np.ones(3), np.ones((2, 5, 3)), np.ones(3))),
  (ValueError, "all real or all complex", (np.ones(3), np.ones((2, 5, 3)) * 1j)),
  (ValueError, "one shape and dtype", ((np.ones(3), np.ones(4)), np.ones((2, 5, 3)))),
  (ValueError, "sequence of 3", ([np.ones(3)] * 3, np.ones((2, 5, 3)))),
  (TypeError, "b: dtype int32", (np.ones(3), np.ones((2, 5, 3), np.int32))),
  (TypeError, "a: dtype bfloat16", (jnp.ones(3, jnp.bfloat16), np.ones((2, 5, 3)))),
]


@pytest.mark.parametrize("kind, words, operands", BAD)
def test_errors_name_the_operand(kind, words, operands):
  with pytest.raises(kind, match=words):
    linear_scan(*operands)


def test_naming_an_implementation(monkeypatch):
  operands = np.full(3, 0.5, np.float32), np.ones((2, 5, 3), np.float32)
  with pytest.raises(ValueError, match="implementation='fast': unknown; available here: xla"):
    linear_scan(*operands, implementation="fast")

  row = dispatch.Implementation(xla.forward, xla.backward)
  refuses = row._replace(refusal=lambda a, b, h0: f"N = {b[0].shape[-1]} is too small")
  table = {"elsewhere": row._replace(platforms=("tpu",)), "large": refuses, "xla": row}
  monkeypatch.setattr(interface, "IMPLEMENTATIONS", table)
  with pytest.raises(ValueError, match="runs on tpu, not on cpu; available here: xla"):
    linear_scan(*operands, implementation="elsewhere")
  with pytest.raises(ValueError, match="N = 3 is too small; available here: xla"):
    linear_scan(*operands, implementation="large")


def test_the_platform_chooses_when_the_program_is_compiled(monkeypatch):
  """Each platform takes its first row, in both directions, under jit and vmap."""

  def marked(a, b, h0, *, reverse):
    y, h_last = xla.forward(a, b, h0, reverse=reverse)
    return (y[0] + 1,), h_last

  row = dispatch.Implementation(xla.forward, xla.backward)
  table = {
    "tpu": row._replace(platforms=("tpu",)),
    "cpu": row._replace(forward=marked, platforms=("cpu",)),
    "xla": row,
  }
  monkeypatch.setattr(interface, "IMPLEMENTATIONS", table)
  a, b, h0, dy, dh_last = problem("real", "constant", (2, 5, 3))
  run = jax.jit(lambda *operands: linear_scan(*operands)[0])
  want, _ = reference.linear_scan(a, b, h0)
  assert_near(np.asarray(run(a, b, h0)), want + 1, 1e-6)
  assert_near(np.asarray(jax.vmap(run)(a[None], b[None], h0[None])[0]), want + 1, 1e-6)
  _, pullback = jax.vjp(lambda b: linear_scan(a, b, h0, implementation="xla"), b)
  _, marked_pullback = jax.vjp(lambda b: linear_scan(a, b, h0), b)
  np.testing.assert_array_equal(pullback((dy, dh_last))[0], marked_pullback((dy, dh_last))[0])
