"""Every implementation of `s5_apply` against the float64 oracle and against identities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from models.kernels import dispatch, linear_scan, s5_apply
from models.kernels.s5 import interface, reference

H, P = 5, 6
NAMES = ("u", "a", "B", "C", "D", "x0", "scale", "a_reverse", "scale_reverse")

# What differs: the decay, the scale, those of the second direction, and which way it runs.
VARIANTS = {
  "constant": ("constant", None, None, "forward"),
  "constant, reverse": ("constant", None, None, "reverse"),
  "constant, bidirectional": ("constant", None, None, "bidirectional"),
  "scale": ("constant", "constant", None, "bidirectional"),
  "two scales": ("constant", "constant", "constant", "bidirectional"),
  "per step": ("per step", "per step", None, "forward"),
  "per step, reverse": ("per step", "per step", None, "reverse"),
  "gaps": ("per step", "per step", "per step", "bidirectional"),
  "only the second scaled": ("constant", None, "per step", "bidirectional"),
}


INTERPRETED = [name for name in interface.IMPLEMENTATIONS if name.endswith("_interpreted")]
OF_ITS_PARTS = ("constant, reverse", "scale", "two scales", "per step", "only the second scaled")
PLATFORM = dispatch._platform()
# Where kernels run they are not interpreted as well.
HERE = [
  n
  for n, row in interface.IMPLEMENTATIONS.items()
  if PLATFORM in row.platforms and (PLATFORM == "cpu" or n not in INTERPRETED)
]


@pytest.fixture(params=HERE)
def implementation(request):
  return request.param


@pytest.fixture
def compiled(implementation):
  """For what says nothing new of a kernel that is interpreted, which is slow."""
  if implementation in INTERPRETED:
    pytest.skip("interpreted")
  return implementation


def problem(variant, batch=2, length=11, *, seed=0):
  """Native numpy operands by name, all of which float32 holds exactly; None where not given."""
  decay, scale, second, direction = VARIANTS[variant]
  rng = np.random.default_rng(seed)
  shapes = {"constant": (P,), "per step": (batch, length, P)}

  def z(*shape, size=1.0):
    return (size * (rng.normal(size=shape) + 1j * rng.normal(size=shape))).astype(np.complex64)

  def a(kind):
    radius, angle = rng.uniform(0.3, 0.99, shapes[kind]), rng.uniform(-3, 3, shapes[kind])
    return (radius * np.exp(1j * angle)).astype(np.complex64)

  width = 2 * P if direction == "bidirectional" else P
  return {
    "u": rng.normal(size=(batch, length, H)).astype(np.float32),
    "a": a(decay),
    "B": z(P, H, size=H**-0.5),
    "C": z(H, width, size=P**-0.5),
    "D": rng.normal(size=H).astype(np.float32),
    "x0": z(batch, P),
    "scale": None if scale is None else z(*shapes[scale]),
    "a_reverse": None if second is None else a(second),
    "scale_reverse": None if second is None else z(*shapes[second]),
    "dy": rng.normal(size=(batch, length, H)).astype(np.float32),
    "dx_last": z(batch, P),
  }


def put(x):
  if x is None or not np.iscomplexobj(x):
    return x if x is None else jnp.asarray(x)
  return jnp.asarray(x.real), jnp.asarray(x.imag)


def take(x):
  return np.asarray(x[0]) + 1j * np.asarray(x[1]) if isinstance(x, tuple) else np.asarray(x)


def apply(operands, *, variant, implementation=None):
  u, a, B, C, D, x0 = (operands[name] for name in NAMES[:6])
  direction = VARIANTS[variant][3]
  return s5_apply(
    u,
    a,
    B,
    C,
    D,
    x0,
    **{name: operands[name] for name in NAMES[6:]},
    reverse=direction == "reverse",
    bidirectional=direction == "bidirectional",
    implementation=implementation,
  )


@partial(jax.jit, static_argnames=("variant", "implementation"))
def with_gradients(operands, cotangents, *, variant, implementation=None):
  function = partial(apply, variant=variant, implementation=implementation)
  results, pullback = jax.vjp(function, operands)
  return *results, pullback(cotangents)[0]


def oracle(values, variant):
  """Results and gradients by name, with the defaults of the interface filled in."""
  direction = VARIANTS[variant][3]
  reverses = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
  values = {k: x if x is None else x.astype(np.result_type(x, "f8")) for k, x in values.items()}
  one = np.ones(P)
  first = one if values["scale"] is None else values["scale"]
  a, scale = [values["a"]], [first]
  if direction == "bidirectional":
    a.append(values["a"] if values["a_reverse"] is None else values["a_reverse"])
    scale.append(first if values["scale_reverse"] is None else values["scale_reverse"])
  u, _, B, C, D, x0 = (values[name] for name in NAMES[:6])
  operands = (u, tuple(a), tuple(scale), B, C, D, x0)
  y, x_last = reference.s5_apply(*operands, reverses=reverses)
  grads = reference.gradients(*operands, values["dy"], values["dx_last"], reverses=reverses)
  # An operand of both directions collects both gradients.
  for name in ("a", "scale"):
    found = grads[name]
    alone = len(found) == 1 or values[f"{name}_reverse"] is not None
    grads[name] = found[0] if alone else found[0] + found[1]
    grads[f"{name}_reverse"] = found[-1]
  return y, x_last, {name: grads[name] for name in NAMES if values[name] is not None}


def assert_near(got, want, tolerance, name=""):
  assert got.shape == want.shape, name
  if want.size:
    scale = np.sqrt(np.mean(np.abs(want) ** 2))
    error = np.sqrt(np.mean(np.abs(got - want) ** 2))
    assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


def jax_operands(values):
  return {name: put(values[name]) for name in NAMES}, (put(values["dy"]), put(values["dx_last"]))


CASES = [(variant, (2, 11)) for variant in VARIANTS]
CASES += [("constant, bidirectional", shape) for shape in ((3, 0), (0, 7), (1, 1), (3, 257))]


@pytest.mark.parametrize("variant, shape", CASES)
def test_oracle(variant, shape, implementation):
  if implementation == "pallas_tpu_interpreted" and 0 in shape:
    pytest.skip("its blocks are not empty")
  if implementation == "mosaic_gpu_interpreted" and variant in OF_ITS_PARTS:
    pytest.skip("in float32 that is XLA's products and the scan's kernel, which others test")
  values = problem(variant, *shape)
  operands, cotangents = jax_operands(values)
  y, x_last, grads = with_gradients(
    operands, cotangents, variant=variant, implementation=implementation
  )
  want_y, want_last, want_grads = oracle(values, variant)
  assert y.dtype == np.float32
  assert_near(np.asarray(y), want_y, 3e-6, "y")
  assert_near(take(x_last), want_last, 3e-6, "x_last")
  for name, want in want_grads.items():
    assert_near(take(grads[name]), want, 5e-6, name)


def test_finite_differences(compiled):
  with jax.enable_x64(True):
    values = problem("gaps", 2, 4)
    operands, _ = jax_operands(
      {k: None if x is None else x.astype(np.result_type(x, "f8")) for k, x in values.items()}
    )
    function = jax.jit(partial(apply, variant="gaps", implementation=compiled))
    assert function(operands)[0].dtype == np.float64
    check_grads(function, (operands,), order=1, modes=["rev"], atol=2e-5, rtol=2e-5)


def test_equals_its_parts(implementation):
  """A product, a scan and a product; and a bidirectional layer is the sum of two."""
  values, _ = jax_operands(problem("constant, bidirectional"))
  u, a, B, C, D, x0 = (values[name] for name in NAMES[:6])
  forwards, backwards = (tuple(c[:, part] for c in C) for part in (slice(P), slice(P, None)))
  drive = tuple(u @ part.T for part in B)
  (re, im), last = linear_scan(a, drive, x0)
  run = partial(s5_apply, implementation=implementation)
  y, x_last = run(u, a, B, forwards, D, x0)
  np.testing.assert_allclose(y, re @ forwards[0].T - im @ forwards[1].T + D * u, atol=1e-5)
  np.testing.assert_allclose(take(x_last), take(last), atol=1e-5)

  second, _ = run(u, a, B, backwards, 0 * D, reverse=True)
  both, both_last = run(u, a, B, C, D, x0, bidirectional=True)
  np.testing.assert_allclose(both, y + second, atol=1e-5)
  np.testing.assert_allclose(take(both_last), take(x_last), atol=1e-6)

  head, middle = run(u[:, :4], a, B, forwards, D, x0)
  tail, end = run(u[:, 4:], a, B, forwards, D, middle)
  np.testing.assert_allclose(jnp.concatenate([head, tail], 1), y, atol=1e-5)
  np.testing.assert_allclose(take(end), take(x_last), atol=1e-5)

  flipped, _ = run(u[:, ::-1], a, B, forwards, D, x0, reverse=True)
  np.testing.assert_allclose(flipped[:, ::-1], y, atol=1e-5)


def test_folding_the_scale_into_B_changes_nothing(compiled):
  values, _ = jax_operands(problem("scale"))
  u, a, B, C, D, x0, scale = (values[name] for name in NAMES[:7])
  run = partial(s5_apply, bidirectional=True, implementation=compiled)
  folded, _ = run(u, a, B, C, D, x0, scale=scale)
  full = tuple(jnp.broadcast_to(part, (*u.shape[:2], P)) for part in scale)
  stepwise, _ = run(
    u, tuple(jnp.broadcast_to(x, full[0].shape) for x in a), B, C, D, x0, scale=full
  )
  np.testing.assert_allclose(folded, stepwise, atol=1e-5)


def test_the_future_cannot_reach_the_past(implementation):
  values, _ = jax_operands(problem("constant"))
  spoilt = {**values, "u": values["u"].at[1, 6, 2].set(jnp.nan)}
  run = jax.jit(partial(apply, variant="constant", implementation=implementation))
  (y, _), (clean, _) = run(spoilt), run(values)
  np.testing.assert_array_equal(y[0], clean[0])
  np.testing.assert_array_equal(y[1, :6], clean[1, :6])
  assert np.isnan(y[1, 6:]).all()


def test_vmap_over_seeds_and_remat(compiled):
  seeds = [jax_operands(problem("gaps", seed=seed)) for seed in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
  run = partial(with_gradients, variant="gaps", implementation=compiled)
  mapped = jax.vmap(run)(*stacked)

  @jax.jit
  def remat(operands, cotangents):
    function = jax.checkpoint(partial(apply, variant="gaps", implementation=compiled))
    results, pullback = jax.vjp(function, operands)
    return *results, pullback(cotangents)[0]

  for i, seed in enumerate(seeds):
    want = jax.tree.leaves(run(*seed))
    for have, again, x in zip(
      jax.tree.leaves(mapped), jax.tree.leaves(remat(*seed)), want, strict=True
    ):
      np.testing.assert_allclose(have[i], x, rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(again, x, rtol=1e-5, atol=1e-5)


def test_gradients_are_bitwise_reproducible(compiled):
  operands, cotangents = jax_operands(problem("constant, bidirectional", 4, 257))
  run = partial(with_gradients, variant="constant, bidirectional", implementation=compiled)
  first = run(operands, cotangents)
  for _ in range(3):
    jax.tree.map(np.testing.assert_array_equal, run(operands, cotangents), first)


def test_bfloat16_inputs_with_float32_states(implementation):
  values = problem("constant", 2, 257)
  operands, cotangents = jax_operands(values)
  low = {**operands, "u": operands["u"].astype(jnp.bfloat16)}
  y, x_last, grads = with_gradients(
    low,
    (cotangents[0].astype(jnp.bfloat16), cotangents[1]),
    variant="constant",
    implementation=implementation,
  )
  assert y.dtype == grads["u"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves((x_last, grads["a"], grads["B"]))} == {jnp.dtype("f4")}
  want_y, want_last, want = oracle(values, "constant")
  # Two roundings of factors and one of the result, 2^-9 each at most.
  assert_near(np.asarray(y, np.float32), want_y, 8e-3, "y")
  assert_near(take(x_last), want_last, 8e-3, "x_last")
  for name, x in want.items():
    have = jax.tree.map(lambda x: x.astype(jnp.float32), grads[name])
    assert_near(take(have), x, 1.5e-2, name)
  # Under vmap the products are batched, which some versions of XLA refuse for bfloat16.
  run = partial(with_gradients, variant="constant", implementation=implementation)
  seeds = (low, (cotangents[0].astype(jnp.bfloat16), cotangents[1]))
  mapped, _, _ = jax.vmap(run)(*jax.tree.map(lambda x: jnp.stack([x, x]), seeds))
  assert_near(np.asarray(mapped[1], np.float32), np.asarray(y, np.float32), 4e-3)


@pytest.mark.parametrize("variant", ["constant", "constant, bidirectional", "gaps"])
def test_xla_overwrites_in_place(variant, whole_passes_in_loops):
  operands = jax_operands(problem(variant, 2, 65))
  run = partial(with_gradients, variant=variant, implementation="xla")
  shapes = [(2, 65, 2, P), (2, 65, P), (130, 2 * P)]
  assert not whole_passes_in_loops(run, operands, *shapes)
  seeds = jax.tree.map(lambda x: jnp.stack([x] * 3), operands)
  assert not whole_passes_in_loops(jax.vmap(run), seeds, *((3, *shape) for shape in shapes))


def test_errors_name_the_operand():
  values, _ = jax_operands(problem("constant"))
  u, a, B, C, D = (values[name] for name in NAMES[:5])
  with pytest.raises(ValueError, match=r"u_BLH: shape \(11, 5\); accepted: \(B, L, H\)"):
    s5_apply(u[0], a, B, C, D)
  with pytest.raises(ValueError, match=r"a: shape \(4,\); accepted: \(6,\) or \(2, 11, 6\)"):
    s5_apply(u, tuple(x[:4] for x in a), B, C, D)
  with pytest.raises(ValueError, match=r"C: shape \(5, 6\); accepted: \(5, 12\)"):
    s5_apply(u, a, B, C, D, bidirectional=True)
  with pytest.raises(ValueError, match=r"D: shape \(3,\); accepted: \(5,\)"):
    s5_apply(u, a, B, C, D[:3])
  with pytest.raises(ValueError, match="a pair"):
    s5_apply(u, a, B[0], C, D)
  with pytest.raises(ValueError, match=r"a: shape .*accepted: a pair"):
    s5_apply(u, a[0], B, C, D)
  with pytest.raises(ValueError, match="bidirectional=False"):
    s5_apply(u, a, B, C, D, a_reverse=a)
  with pytest.raises(ValueError, match="one of them"):
    s5_apply(u, a, B, C, D, reverse=True, bidirectional=True)
  with pytest.raises(TypeError, match="a: dtype bfloat16; accepted: float32, float64"):
    s5_apply(u, tuple(x.astype(jnp.bfloat16) for x in a), B, C, D)
  with pytest.raises(TypeError, match="u_BLH: dtype int32"):
    s5_apply(u.astype(jnp.int32), a, B, C, D)
  with pytest.raises(ValueError, match="implementation='fused': unknown; available here: xla"):
    s5_apply(u, a, B, C, D, implementation="fused")
  # Eight devices and no mesh: XLA may have to cut the operands, so that no kernel is chosen.
  assert set(dispatch.choose(interface.IMPLEMENTATIONS, None, u, at_once=True).values()) == {"xla"}
