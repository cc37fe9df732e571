"""Every implementation of `long_conv` against the float64 oracle and against identities."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from models.kernels import dispatch, long_conv, spectrum
from models.kernels.long_conv import dft, interface, reference

H = 3
NAMES = ("u", "k", "D", "k_backward", "pre", "post")

# Taps of the two kernels, for a length; and the gates that are given.
VARIANTS = {
  "causal": (lambda n: n, None, ""),
  "short kernel": (lambda n: 1 + n // 3, None, ""),
  "one tap": (lambda n: 1, None, ""),
  "long kernel": (lambda n: 2 * n + 3, None, ""),
  "bidirectional": (lambda n: n, lambda n: n, ""),
  "long behind": (lambda n: 2, lambda n: n + 5, ""),
  "short behind": (lambda n: n, lambda n: 1, ""),
  "gated": (lambda n: n, None, "pre post"),
  "first gate": (lambda n: n, lambda n: n, "pre"),
  "second gate": (lambda n: n, lambda n: n, "post"),
}


def interpreted(name):
  return name.endswith("_interpreted")


def _runs(name):
  if interpreted(name) and jax.default_backend() != "cpu":
    return False  # where kernels run they are not interpreted as well
  operands = jnp.ones((1, 8, H)), jnp.ones((H, 8)), None, None, None
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
  if interpreted(implementation):
    pytest.skip("interpreted")
  return implementation


def problem(variant, batch=2, length=11, *, seed=0):
  """Operands and the cotangent `dy` by name, float64 that float32 holds exactly."""
  ahead, behind, gates = VARIANTS[variant]
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)

  shape = (batch, length, H)
  values = {"u": draw(*shape), "k": draw(H, ahead(length)), "D": draw(H)}
  if behind is not None:
    values["k_backward"] = draw(H, behind(length))
  return values | {name: draw(*shape) for name in gates.split()} | {"dy": draw(*shape)}


def put(values, dtype=jnp.float32):
  operands = {name: jnp.asarray(x, dtype) for name, x in values.items()}
  return operands, operands.pop("dy")


@partial(jax.jit, static_argnames="implementation")
def apply(operands, implementation=None):
  return long_conv(
    operands["u"],
    operands["k"],
    operands["D"],
    k_backward=operands.get("k_backward"),
    gates=(operands.get("pre"), operands.get("post")),
    implementation=implementation,
  )


@partial(jax.jit, static_argnames="implementation")
def with_gradients(operands, dy, implementation=None):
  y, pullback = jax.vjp(partial(apply, implementation=implementation), operands)
  return y, pullback(dy)[0]


def oracle(values):
  operands = [values.get(name) for name in NAMES]
  grads = reference.gradients(*operands, values["dy"])
  return reference.long_conv(*operands), {name: grads[name] for name in NAMES if name in values}


def assert_near(got, want, tolerance, name=""):
  assert got.shape == want.shape, name
  if want.size:
    scale = np.sqrt(np.mean(want**2)) + 1e-30
    error = np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2))
    assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


CASES = [(variant, (2, 11)) for variant in VARIANTS]
CASES += [("bidirectional", (3, n)) for n in (1, 2, 128, 129)]
CASES += [("long behind", (3, 1)), ("gated", (0, 7)), ("causal", (1, 1000)), ("gated", (2, 600))]


@pytest.mark.parametrize("variant, shape", CASES)
def test_oracle(variant, shape, implementation):
  if interpreted(implementation) and shape[1] > 11:
    pytest.skip("see test_long_conv_tpu.py, test_long_conv_toeplitz.py")
  values = problem(variant, *shape)
  y, grads = with_gradients(*put(values), implementation=implementation)
  want_y, want = oracle(values)
  assert y.dtype == np.float32
  assert_near(y, want_y, 2e-6, "y")
  assert set(grads) == set(want)
  for name, x in want.items():
    # Sums that cancel, over one value or a few, are exact only to the size of their terms.
    assert_near(grads[name], x, 2e-6 if x.size > 2 * H else 2e-5, name)


def test_the_oracle_s_two_ways_agree(monkeypatch):
  values = problem("first gate", 2, 40)
  direct = jax.tree.leaves(oracle(values))
  monkeypatch.setattr(reference, "DIRECT", 0)
  for x, want in zip(jax.tree.leaves(oracle(values)), direct, strict=True):
    np.testing.assert_allclose(x, want, atol=1e-12)


def test_finite_differences(compiled):
  with jax.enable_x64(True):
    operands, _ = put(problem("first gate", 2, 5) | problem("gated", 2, 5), jnp.float64)
    function = jax.jit(partial(apply, implementation=compiled))
    assert function(operands).dtype == np.float64
    check_grads(function, (operands,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_second_derivatives(compiled):
  """Both ways, against those of a sum over pairs of positions."""
  operands, _ = put(problem("bidirectional", 1, 4))

  def by_pairs(operands):
    c = jnp.concatenate([operands["k_backward"][:, 2::-1], operands["k"]], axis=1)
    t = np.arange(4)
    v = operands["u"]
    return jnp.einsum("hts,bsh->bth", c[:, t[:, None] - t + 3], v) + operands["D"] * v

  def hessian(function, jacobian):
    loss = jax.grad(lambda o: (function(o) ** 3).sum())
    return jax.tree.leaves(jax.jit(jacobian(loss))(operands))

  want = hessian(by_pairs, jax.jacfwd)
  for jacobian in (jax.jacfwd, jax.jacrev):
    have = hessian(partial(apply, implementation=compiled), jacobian)
    for x, y in zip(have, want, strict=True):
      np.testing.assert_allclose(x, y, atol=2e-3)


def test_an_impulse_returns_the_kernels(implementation):
  operands, _ = put(problem("bidirectional", 1, 9))
  at = 4
  impulse = jnp.zeros((1, 9, H)).at[0, at].set(1)
  y = apply(operands | {"u": impulse, "D": jnp.zeros(H)}, implementation)[0].T
  np.testing.assert_allclose(y[:, at:], operands["k"][:, : 9 - at], atol=1e-6)
  np.testing.assert_allclose(y[:, :at], operands["k_backward"][:, :at][:, ::-1], atol=1e-6)


def test_shifts_commute_and_nothing_wraps_round(implementation):
  operands, _ = put(problem("causal", 2, 16))
  u = operands["u"].at[:, 10:].set(0)
  y = apply(operands | {"u": u}, implementation)
  shifted = apply(operands | {"u": jnp.roll(u, 6, axis=1)}, implementation)
  np.testing.assert_allclose(shifted[:, 6:], y[:, :10], atol=1e-5)
  np.testing.assert_allclose(shifted[:, :6], 0, atol=1e-5)


def test_the_future_does_not_reach_the_past(implementation):
  operands, _ = put(problem("causal", 2, 16))
  y = apply(operands, implementation)
  perturbed = apply(operands | {"u": operands["u"].at[:, 9].add(1)}, implementation)
  np.testing.assert_allclose(perturbed[:, :9], y[:, :9], atol=1e-5)
  assert np.abs(perturbed[:, 9:] - y[:, 9:]).min() > 1e-4


def test_a_nan_stays_in_its_sequence_and_feature(implementation):
  operands, dy = put(problem("gated", 2, 16))
  clean, grads = with_gradients(operands, dy, implementation)
  spoilt, spoilt_grads = with_gradients(
    operands | {"u": operands["u"].at[1, 6, 2].set(jnp.nan)}, dy, implementation
  )
  other = np.ones((2, H), bool)
  other[1, 2] = False
  # Two sequences that share a transform share its rounding.
  shared = implementation == "pallas_tpu_interpreted"
  near = {"rtol": 1e-5, "atol": 1e-5} if shared else {"rtol": 0}
  for have, want in ((spoilt, clean), (spoilt_grads["u"], grads["u"])):
    np.testing.assert_allclose(have.swapaxes(1, 2)[other], want.swapaxes(1, 2)[other], **near)
  assert np.isnan(spoilt[1, :, 2]).all()
  assert np.isnan(spoilt_grads["k"][2]).all()
  np.testing.assert_array_equal(spoilt_grads["k"][:2], grads["k"][:2])


def test_vmap_over_seeds_and_remat(implementation):
  seeds = [put(problem("first gate", seed=seed)) for seed in range(2)]
  run = partial(with_gradients, implementation=implementation)
  mapped = jax.vmap(run)(*jax.tree.map(lambda *x: jnp.stack(x), *seeds))

  @jax.jit
  def remat(operands, dy):
    y, pullback = jax.vjp(jax.checkpoint(partial(apply, implementation=implementation)), operands)
    return y, pullback(dy)[0]

  for i, seed in enumerate(seeds):
    want = jax.tree.leaves(run(*seed))
    for have, again, x in zip(
      jax.tree.leaves(mapped), jax.tree.leaves(remat(*seed)), want, strict=True
    ):
      np.testing.assert_allclose(have[i], x, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(again, x, rtol=1e-5, atol=1e-5)


def test_vmap_over_one_operand(compiled):
  operands, _ = put(problem("causal"))
  kernels = jnp.stack([operands["k"], 2 * operands["k"]], axis=-1)
  run = lambda k: apply(operands | {"k": k}, compiled)  # noqa: E731
  mapped = jax.jit(jax.vmap(run, in_axes=-1))(kernels)
  np.testing.assert_allclose(mapped[1], run(2 * operands["k"]), atol=1e-5)


def test_transposed_inputs_and_reproducible_gradients(compiled):
  operands, dy = put(problem("bidirectional", 3, 33))
  run = partial(with_gradients, implementation=compiled)
  first = run(operands, dy)
  turned = jax.tree.map(lambda x: jnp.asarray(np.asfortranarray(x)), operands)
  for again in (run(operands, dy), run(turned, dy)):
    jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("variant", ["bidirectional", "gated"])
def test_bfloat16(variant, implementation):
  """Kernels stay float32; the errors are those of rounding what goes in and out."""
  values = problem(variant, 2, 100)
  operands, dy = put(values)
  low = {k: x if k[0] in "kD" else x.astype(jnp.bfloat16) for k, x in operands.items()}
  y, grads = with_gradients(low, dy.astype(jnp.bfloat16), implementation)
  assert y.dtype == jnp.bfloat16
  assert {k: x.dtype for k, x in grads.items()} == {k: x.dtype for k, x in low.items()}
  want_y, want = oracle(values)
  assert_near(y, want_y, 8e-3, "y")
  for name, x in want.items():
    assert_near(grads[name], x, 1.2e-2, name)


def test_the_backward_pass_keeps_the_operands_alone():
  operands, _ = put(problem("gated", 2, 64))
  _, pullback = jax.vjp(apply, operands)
  shapes = {x.shape for x in jax.tree.leaves(pullback) if hasattr(x, "shape")}
  assert shapes <= {(2, 64, H), (H, 64), (), (1,)}  # (1,): which tap D is added to


# FFTs


@pytest.mark.parametrize("size", [2, 10, 90, 2048])
def test_fft_by_matrix_products(size):
  rng = np.random.default_rng(size)
  for length in (size, 1 + size // 2):
    x = rng.normal(size=(2, length)).astype(np.float32)
    want = np.fft.rfft(x, size)
    np.testing.assert_allclose(dft.rfft(x, size), want, atol=1e-6 * np.abs(want).max())
    back = dft.irfft(jnp.asarray(want, jnp.complex64), size)
    np.testing.assert_allclose(back[:, :length], x, atol=1e-5)
    np.testing.assert_allclose(back[:, length:], 0, atol=1e-5)


# Sharding, over the eight CPU devices of tests/conftest.py


def mesh():
  if jax.device_count() < 8:
    pytest.skip("needs eight devices")
  return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


SHARDINGS = {  # of (B, L, H) and of (H, T)
  "batch": (P("x"), P()),
  "features": (P(None, None, "x"), P("x")),
  "both": (P("y", None, "x"), P("x")),
  "time": (P("y", "x"), P()),
  "time of all": (P("x", "y"), P("y", "x")),
}


@pytest.mark.parametrize("axes", SHARDINGS)
def test_sharded(axes, compiled):
  rng = np.random.default_rng(0)
  u, k = rng.normal(size=(8, 40, 16)), rng.normal(size=(2, 16, 40))
  values = {"u": u, "k": k[0], "D": k[0, :, 0], "k_backward": k[1]}
  operands, dy = put(values | {"dy": np.cos(u)})
  expected = with_gradients(operands, dy, compiled)
  sequences, kernels = SHARDINGS[axes]
  place = {n: sequences if n == "u" else P(*kernels[: x.ndim]) for n, x in operands.items()}
  place = jax.tree.map(partial(NamedSharding, mesh()), place)
  run = jax.jit(
    partial(with_gradients, implementation=compiled),
    in_shardings=(place, place["u"]),
    out_shardings=(place["u"], place),
  )
  compiled = run.lower(operands, dy).compile()
  sharded = jax.device_put((operands, dy), (place, place["u"]))
  for have, want in zip(
    jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
  if "time" not in axes:
    moved = set(re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text()))
    assert not moved


@pytest.mark.parametrize("axes", [{"x", "y"}, {"x"}])
def test_shard_map(axes, compiled):
  """Over all axes of a mesh, and over some of them."""
  operands, _ = put(problem("causal", 8, 16))
  run = lambda u, k: long_conv(u, k, implementation=compiled)  # noqa: E731
  specs = {"in_specs": (P("x"), P()), "out_specs": P("x"), "axis_names": axes}
  mapped = jax.shard_map(run, mesh=mesh(), **specs)
  have = jax.jit(mapped)(operands["u"], operands["k"])
  np.testing.assert_allclose(have, run(operands["u"], operands["k"]), atol=1e-5)


# Errors


def test_errors_name_the_operand():
  operands, _ = put(problem("gated"))
  u, k, pre = (operands[name] for name in ("u", "k", "pre"))
  with pytest.raises(ValueError, match=r"u_BLH: shape \(11, 3\); accepted: \(B, L, H\)"):
    long_conv(u[0], k)
  with pytest.raises(ValueError, match=r"k_HT: shape \(2, 11\); accepted: \(3, T >= 1\)"):
    long_conv(u, k[:2])
  with pytest.raises(ValueError, match=r"k_HT: shape \(3, 0\); accepted: \(3, T >= 1\)"):
    long_conv(u, k[:, :0])
  with pytest.raises(ValueError, match=r"D_H: shape \(3, 1\); accepted: \(3\)"):
    long_conv(u, k, k[:, :1])
  with pytest.raises(ValueError, match="k_backward: shape"):
    long_conv(u, k, k_backward=k[0])
  with pytest.raises(ValueError, match=r"gates: shape \(2, 5, 3\); accepted: \(2, 11, 3\)"):
    long_conv(u, k, gates=(None, pre[:, :5]))
  with pytest.raises(TypeError, match="dtype int32; accepted: floating point"):
    long_conv(u.astype(jnp.int32), k)
  with pytest.raises(ValueError, match="implementation='fast': unknown; available here: fft, dft,"):
    long_conv(u, k, implementation="fast")


def test_every_platform_has_an_implementation():
  operands, _ = put(problem("causal"))
  chosen = dispatch.choose(interface.IMPLEMENTATIONS, None, *operands.values())
  assert chosen == {"cpu": "fft", "cuda": "fft", "rocm": "fft", "tpu": "dft"}


@pytest.mark.parametrize("by", ["fft", "dft"])
@pytest.mark.parametrize("variant", ["causal", "long kernel", "first gate", "second gate"])
def test_by_a_spectrum(variant, by):
  """The same values and gradients, these by way of the spectrum, from one for all lengths."""
  operands, dy = put(problem(variant))
  gates = operands.pop("pre", None), operands.pop("post", None)
  run = partial(long_conv, gates=gates, implementation=by)

  def straight(operands):
    operands = dict(operands)
    u, k, D = (operands.pop(name) for name in ("u", "k", "D"))
    return run(u, k, D, **operands)

  def by_spectrum(operands):
    operands = dict(operands)
    u, k, D = (operands.pop(name) for name in ("u", "k", "D"))
    return run(u, spectrum(k, D, length=u.shape[1] + 3, **operands))

  want, pull = jax.vjp(straight, operands)
  got, pull_by = jax.vjp(by_spectrum, operands)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for name, slope in pull(dy)[0].items():
    np.testing.assert_allclose(pull_by(dy)[0][name], slope, atol=1e-4, err_msg=name)


def test_a_spectrum_is_an_operand_like_others():
  (operands, _), (u2, _) = put(problem("causal")), put(problem("causal", 1, 7, seed=1))
  found = jax.jit(partial(spectrum, length=11))(operands["k"], operands["D"])
  run = jax.jit(long_conv)
  for u in (operands["u"], u2["u"], operands["u"].astype(jnp.bfloat16)):
    want = long_conv(u, operands["k"], operands["D"])
    got = run(u, found)
    assert got.dtype == u.dtype
    np.testing.assert_allclose(
      np.float64(got), np.float64(want), atol=2e-5 if u.dtype == jnp.float32 else 6e-2
    )
  assert run(operands["u"][:0], found).shape == (0, 11, H)
  with pytest.raises(ValueError, match=r"u_BLH: shape \(2, 12, 3\); accepted: \(B, up to 11, 3\)"):
    long_conv(jnp.ones((2, 12, H)), found)
  with pytest.raises(ValueError, match="given with a spectrum"):
    long_conv(operands["u"], found, operands["D"])
  with pytest.raises(ValueError, match="available here: fft, dft"):
    long_conv(operands["u"], found, implementation="pallas_tpu_interpreted")
  with pytest.raises(ValueError, match="length=0; accepted: at least 1"):
    spectrum(operands["k"], length=0)
