"""S5 and S4D against the paper's constants and against float64 recurrences in numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import ssm

B, L, H = 2, 9, 3

# Imaginary parts of HiPPO-N, first halves, largest first.
SPECTRA = {
  2: [-0.8660],
  4: [-4.6033, -0.5565],
  8: [-19.8574, -5.3542, -1.9578, -0.4275],
  16: [-80.9661, -25.6292, -13.8343, -8.3621],
}


def inputs(shape=(B, L, H), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def parameters(layer, features=H, seed=1):
  variables = jax.jit(layer.init)(jax.random.key(seed), jnp.zeros((1, 2, features)))
  return nn.meta.unbox(variables)["params"]


@functools.partial(jax.jit, static_argnums=0)
def run(layer, params, u, **fields):
  return layer.apply({"params": params}, u, **fields)


def complexes(x):
  x = np.asarray(x, np.float64)
  return x[..., 0] + 1j * x[..., 1]


# HiPPO


@pytest.mark.parametrize("size", SPECTRA)
def test_spectrum_of_hippo_normal(size):
  eigenvalues, _ = ssm.hippo_normal(size)
  np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-12)
  np.testing.assert_allclose(eigenvalues.imag[:4][: size // 2], SPECTRA[size], atol=5e-5)


@pytest.mark.parametrize(("size", "largest"), [(32, 325.4), (128, 5214.7)])
def test_largest_frequency_of_hippo_normal(size, largest):
  assert np.abs(ssm.hippo_normal(size)[0].imag).max() == pytest.approx(largest, abs=0.05)


@pytest.mark.parametrize(("size", "tolerance"), [(8, 1e-13), (128, 1e-11)])
def test_hippo_normal_is_the_normal_part_of_hippo_legs(size, tolerance):
  eigenvalues, v = ssm.hippo_normal(size)
  p = np.sqrt(np.arange(size) + 0.5)
  normal = ssm.hippo_legs(size) + np.outer(p, p)
  np.testing.assert_allclose(v @ np.diag(eigenvalues) @ v.conj().T, normal, atol=tolerance)
  np.testing.assert_allclose(v.conj().T @ v, np.eye(size), atol=1e-12)
  np.testing.assert_allclose(eigenvalues[: size // 2], eigenvalues[: size // 2 - 1 : -1].conj())


def test_hippo_legs_entries():
  root = np.sqrt
  expected = [[-1, 0, 0], [-root(3), -2, 0], [-root(5), -root(15), -3]]
  np.testing.assert_allclose(ssm.hippo_legs(3), expected)


def test_half_the_states_and_a_factor_of_two_are_the_whole_real_system():
  rng = np.random.default_rng(0)
  size, step = 8, 0.05
  eigenvalues, v = ssm.hippo_normal(size)
  b, c = rng.normal(size=(size, H)), rng.normal(size=(H, size))
  u = rng.normal(size=(L, H))
  decay = np.exp(eigenvalues * step)

  def simulate(keep):
    x, ys = np.zeros(size, complex)[:keep], []
    for u_t in u:
      x = decay[:keep] * x + (v.conj().T @ b)[:keep] @ u_t
      ys.append((c @ v)[:, :keep] @ x)
    return np.array(ys)

  whole = simulate(size)
  np.testing.assert_allclose(whole.imag, 0, atol=1e-12)
  np.testing.assert_allclose(2 * simulate(size // 2).real, whole.real, atol=1e-12)


# Discretisation


def test_expm1_ratio_is_accurate_in_float32_at_every_magnitude():
  angle = np.linspace(np.pi / 2, np.pi, 7)
  size = np.logspace(-30, 2, 65)[:, None]
  z = size * np.exp(1j * angle)
  z = z.real.astype(np.float32) + 1j * z.imag.astype(np.float32)
  series = 1 + z / 2 + z**2 / 6 + z**3 / 24 + z**4 / 120
  with np.errstate(all="ignore"):
    exact = np.where(np.abs(z) < 1e-3, series, np.expm1(z) / z)
  re, im = jax.jit(ssm.expm1_ratio)(jnp.float32(z.real), jnp.float32(z.imag))
  assert np.max(np.abs(np.asarray(re) + 1j * np.asarray(im) - exact) / np.abs(exact)) < 1e-6


def test_expm1_ratio_at_zero_and_at_infinity_has_finite_values_and_gradients():
  for x, y in [(0.0, 0.0), (-1e-25, 1e-25), (-1e10, 1e15)]:
    value, gradient = jax.value_and_grad(lambda z: sum(ssm.expm1_ratio(*z)))((x, y))
    assert np.isfinite([value, *gradient]).all()
  gradient = jax.grad(lambda z: ssm.expm1_ratio(*z)[0])((0.0, 0.0))
  np.testing.assert_allclose(gradient, (0.5, 0.0))


@pytest.mark.parametrize("name", ["zoh", "bilinear"])
def test_discretisation(name):
  lam, step = np.array([-0.5 - 20j, -0.3 + 1j, -2.0 + 0j]), np.array([0.01, 0.1, 0.5])
  z = lam * step
  decay, scale = {
    "zoh": (np.exp(z), (np.exp(z) - 1) / lam),
    "bilinear": ((1 + z / 2) / (1 - z / 2), step / (1 - z / 2)),
  }[name]
  pairs = ssm.DISCRETIZATIONS[name]((jnp.array(lam.real), jnp.array(lam.imag)), jnp.array(step))
  for pair, expected in zip(pairs, (decay, scale), strict=True):
    np.testing.assert_allclose(pair[0] + 1j * pair[1], expected, rtol=2e-6)


# S5: parameters


def shapes(layer, features=H):
  variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, features)))
  return {k: v.shape for k, v in nn.meta.unbox(variables)["params"].items()}


def test_parameter_names_and_shapes():
  always = {
    "Lambda_re": (4,),
    "Lambda_im": (4,),
    "B": (4, H, 2),
    "D": (H,),
    "log_step": (4, 1),
  }
  one, two = {"C": (H, 4, 2)}, {"C1": (H, 4, 2), "C2": (H, 4, 2)}
  assert shapes(ssm.S5(8)) == always | one
  assert shapes(ssm.S5(8, bidirectional=True)) == always | two
  complex_normal = functools.partial(ssm.S5, 8, c_init="complex_normal")
  assert shapes(complex_normal()) == always | one
  assert shapes(complex_normal(bidirectional=True)) == always | {"C": (H, 8, 2)}
  assert shapes(ssm.S5(8, spectrum="gaussian")) == shapes(ssm.S5(8))
  assert shapes(ssm.S5(4, conj_sym=False)) == always | one


def test_initial_blocks_are_copies_and_b_and_c_are_in_the_eigenbasis():
  size, blocks = 12, 3
  p = parameters(ssm.S5(size, blocks))
  eigenvalues, v = ssm.hippo_normal(4)
  lam = np.asarray(p["Lambda_re"]) + 1j * np.asarray(p["Lambda_im"])
  np.testing.assert_allclose(lam, np.tile(eigenvalues[:2], blocks), rtol=1e-6)
  # B came from a real B0: B0 = V Btilde over both conjugate halves is 2 Re of the stored half.
  b0 = 2 * np.real(np.kron(np.eye(blocks), v[:, :2]) @ complexes(p["B"]))
  again = np.kron(np.eye(blocks), v[:, :2]).conj().T @ b0
  np.testing.assert_allclose(again, complexes(p["B"]), atol=1e-6)
  # So did C, from a complex C0: its rows lie in the span of the kept rows of V.
  kept = np.kron(np.eye(blocks), v[:, :2])
  draw = nn.initializers.lecun_normal()(jax.random.key(5), (H, size, 2))
  made = ssm.transformed_c(v[:, :2], blocks, "lecun_normal")(jax.random.key(5), (H, 6, 2))
  np.testing.assert_allclose(complexes(made), complexes(draw) @ kept, atol=1e-6)


def test_initial_standard_deviations():
  """The sqrt(H) between the two LeCun options, and the fan-in P (not H) of B."""
  size, features = 256, 96

  def deviation(name):
    fields = {} if name == "lecun_normal" else {"c_init": name}
    return np.std(parameters(ssm.S5(size, **fields), features)["C"])

  assert deviation("trunc_standard_normal") == pytest.approx(0.0614, rel=0.03)
  assert deviation("lecun_normal") == pytest.approx(0.00639, rel=0.03)
  assert deviation("complex_normal") == pytest.approx(np.sqrt(0.5), rel=0.03)
  p = parameters(ssm.S5(size), features)
  assert np.std(p["B"]) == pytest.approx(np.sqrt(0.5 / size), rel=0.03)
  assert np.std(p["D"]) == pytest.approx(1, rel=0.2)


def test_initial_step_sizes_are_log_uniform():
  p = parameters(ssm.S5(2000, 1000, dt_min=1e-4, dt_max=1e-2))
  log_step = np.asarray(p["log_step"])
  assert np.log(1e-4) <= log_step.min() < np.log(1.1e-4)
  assert np.log(0.9e-2) < log_step.max() <= np.log(1e-2)
  assert log_step.mean() == pytest.approx(np.log(1e-3), abs=0.2)


def test_gaussian_spectrum_changes_nothing_but_the_spectrum():
  hippo = parameters(ssm.S5(512, 4))
  gaussian = parameters(ssm.S5(512, 4, spectrum="gaussian"))
  differ = {k for k in hippo if not np.array_equal(hippo[k], gaussian[k])}
  assert differ == {"Lambda_im"}
  assert np.std(gaussian["Lambda_im"]) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"state": 10, "blocks": 3}, "blocks=3; accepted: a divisor of state=10"),
    ({"state": 12, "blocks": 4}, "blocks of 3; accepted: blocks of even size"),
    ({"state": 8, "spectrum": "legs"}, "spectrum='legs'; accepted: hippo, gaussian"),
    ({"state": 8, "c_init": "normal"}, "c_init='normal'; accepted: trunc_standard_normal"),
    ({"state": 8, "discretization": "euler"}, "discretization='euler'; accepted: zoh, bilinear"),
  ],
)
def test_mistakes_in_s5_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    parameters(ssm.S5(**fields))


def test_parameters_carry_logical_axis_names():
  variables = jax.eval_shape(ssm.S5(8, bidirectional=True).init, jax.random.key(0), inputs())
  names = {k: v.names for k, v in variables["params"].items()}
  assert names["B"] == ("state", "embed", None)
  assert names["C1"] == names["C2"] == ("embed", "state", None)
  assert names["Lambda_re"] == names["Lambda_im"] == ("state",)
  assert names["D"] == ("embed",)
  assert names["log_step"] == ("state", None)


# S5: outputs


def recurrence(layer, p, u, dt=None, rescale=1.0):
  """S5 in float64 numpy, step by step, both directions."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  re = np.minimum(p["Lambda_re"], -1e-4) if layer.clip_eigs else p["Lambda_re"]
  lam = re + 1j * p["Lambda_im"]
  dt = np.ones(u.shape[:2]) if dt is None else np.asarray(dt, np.float64)
  b = complexes(p["B"])
  c = np.concatenate([complexes(p[k]) for k in ("C", "C1", "C2") if k in p], axis=1)

  def scan(u_LH, dt_L):
    x, xs = np.zeros(len(lam), complex), []
    for u_t, gap in zip(u_LH, dt_L, strict=True):
      step = gap * rescale * np.exp(p["log_step"][:, 0])
      z = lam * step
      if layer.discretization == "zoh":
        decay, scale = np.exp(z), (np.exp(z) - 1) / lam
      else:
        decay, scale = (1 + z / 2) / (1 - z / 2), step / (1 - z / 2)
      x = decay * x + scale * (b @ u_t)
      xs.append(x)
    return np.array(xs)

  ys = []
  for u_LH, dt_L in zip(np.asarray(u, np.float64), dt, strict=True):
    x = scan(u_LH, dt_L)
    if layer.bidirectional:
      backward = scan(u_LH[::-1], np.append(dt_L[1:], 1.0)[::-1])[::-1]
      x = np.concatenate([x, backward], axis=1)
    y = (2 if layer.conj_sym else 1) * (x @ c.T).real
    ys.append(y + p["D"] * u_LH)
  return np.array(ys)


LAYERS = {
  "plain": ssm.S5(8, 2),
  "bilinear": ssm.S5(8, discretization="bilinear"),
  "clipped": ssm.S5(8, clip_eigs=True),
  "bidirectional": ssm.S5(8, bidirectional=True, c_init="trunc_standard_normal"),
  "both, complex C": ssm.S5(8, bidirectional=True, c_init="complex_normal"),
  "every state": ssm.S5(6, conj_sym=False, spectrum="gaussian"),
}
GAPS = 0.2 + jnp.abs(inputs((B, L), seed=7)).at[:, 0].set(0.8)


@pytest.mark.parametrize("name", LAYERS)
def test_s5_is_the_recurrence(name):
  layer, u = LAYERS[name], inputs()
  p = parameters(layer)
  np.testing.assert_allclose(run(layer, p, u), recurrence(layer, p, u), atol=2e-5)
  irregular = run(layer, p, u, dt=GAPS, step_rescale=2.0)
  np.testing.assert_allclose(irregular, recurrence(layer, p, u, GAPS, 2.0), atol=2e-5)


def test_s5_regular_gaps_are_no_gaps():
  for layer in (LAYERS["plain"], LAYERS["bidirectional"]):
    p = parameters(layer)
    regular = run(layer, p, inputs())
    ones = run(layer, p, inputs(), dt=jnp.ones((B, L)))
    np.testing.assert_allclose(ones, regular, atol=1e-6)
    twice = run(layer, p, inputs(), step_rescale=2.0)
    spread = run(layer, p, inputs(), dt=jnp.full((B, L), 2.0))
    if not layer.bidirectional:  # whose last gap, seen from the end, is 1 by definition
      np.testing.assert_allclose(spread, twice, atol=1e-6)
    assert np.abs(twice - regular).max() > 1e-3


def test_s5_rescaled_steps_see_the_same_continuous_system():
  """A held input sampled at half the rate, with steps of twice the size, leaves the same states."""
  layer = ssm.S5(8)
  p = parameters(layer) | {"D": jnp.zeros(H)}
  coarse = inputs((B, 6, H))
  fine = jnp.repeat(coarse, 2, axis=1)
  at_full_rate = run(layer, p, fine)[:, 1::2]
  at_half_rate = run(layer, p, coarse, step_rescale=2.0)
  np.testing.assert_allclose(at_half_rate, at_full_rate, atol=1e-5)


def test_clipped_eigenvalues_have_no_gradient():
  layer = ssm.S5(8, clip_eigs=True)
  p = parameters(layer)
  p = p | {"Lambda_re": p["Lambda_re"].at[0].set(0.2)}
  gradient = jax.jit(jax.grad(lambda p: (run(layer, p, inputs()) ** 2).sum()))(p)
  assert gradient["Lambda_re"][0] == 0
  assert (gradient["Lambda_re"][1:] != 0).all()
  clipped = p | {"Lambda_re": p["Lambda_re"].at[0].set(-1e-4)}
  np.testing.assert_array_equal(run(layer, p, inputs()), run(layer, clipped, inputs()))


def test_zero_gaps_keep_the_state_and_the_gradient_finite():
  layer = ssm.S5(8)
  p = parameters(layer) | {"D": jnp.zeros(H)}
  dt = GAPS.at[:, 4].set(0)
  y = run(layer, p, inputs(), dt=dt)
  np.testing.assert_allclose(y[:, 4], y[:, 3], atol=1e-6)
  grads = jax.jit(jax.grad(lambda p, dt: run(layer, p, inputs(), dt=dt).sum(), (0, 1)))(p, dt)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# S4D


def test_s4d_spectra():
  n = np.arange(4)
  np.testing.assert_allclose(ssm.s4d_spectrum("lin", 8), -0.5 + 1j * np.pi * n)
  inv = -0.5 + 1j / np.pi * 8 * (8 / (2 * n + 1) - 1)
  np.testing.assert_allclose(ssm.s4d_spectrum("inv", 8), inv)
  np.testing.assert_allclose(ssm.s4d_spectrum("legs", 8), ssm.hippo_normal(8)[0][:4])


def test_s4d_parameters():
  always = {"log_A_re": (H, 4), "A_im": (H, 4), "D": (H,), "log_step": (H, 1)}
  assert shapes(ssm.S4D(8)) == always | {"C": (H, 4, 2)}
  assert shapes(ssm.S4D(8, bidirectional=True)) == always | {"C1": (H, 4, 2), "C2": (H, 4, 2)}
  p = parameters(ssm.S4D(64, "inv"), features=200)
  lam = -np.exp(p["log_A_re"]) + 1j * np.asarray(p["A_im"])
  np.testing.assert_allclose(lam, np.tile(ssm.s4d_spectrum("inv", 64), (200, 1)), rtol=1e-6)
  assert np.std(p["C"]) == pytest.approx(np.sqrt(0.5), rel=0.03)
  assert np.log(1e-3) <= np.min(p["log_step"]) < np.max(p["log_step"]) <= np.log(1e-1)


def test_mistakes_in_s4d():
  with pytest.raises(ValueError, match="state=7; accepted: a positive even number"):
    parameters(ssm.S4D(7))
  with pytest.raises(ValueError, match="spectrum='hippo'; accepted: legs, lin, inv"):
    parameters(ssm.S4D(8, "hippo"))
  with pytest.raises(ValueError, match="dt: given"):
    run(ssm.S4D(8), parameters(ssm.S4D(8)), inputs(), dt=GAPS)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 16, 50])
def test_vandermonde_kernel_is_the_sum_of_powers(length):
  rng = np.random.default_rng(length)
  w = rng.normal(size=(H, 4)) + 1j * rng.normal(size=(H, 4))
  z = -rng.uniform(0.01, 0.5, (H, 4)) + 1j * rng.normal(size=(H, 4))
  expected = 2 * (w[..., None] * np.exp(z[..., None] * np.arange(length))).sum(1).real
  pairs = [(jnp.float32(x.real), jnp.float32(x.imag)) for x in (w, z)]
  kernel = ssm.vandermonde_kernel(*pairs, length)
  np.testing.assert_allclose(kernel, expected, atol=2e-5)


def s4d_kernel(p, c, length, rescale):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  lam = -np.exp(p["log_A_re"]) + 1j * p["A_im"]
  z = lam * rescale * np.exp(p["log_step"])
  w = complexes(c) * (np.exp(z) - 1) / lam
  return 2 * (w[..., None] * np.exp(z[..., None] * np.arange(length))).sum(1).real


@pytest.mark.parametrize("spectrum", ["legs", "lin", "inv"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_s4d_is_its_convolution(spectrum, bidirectional):
  layer, u = ssm.S4D(8, spectrum, bidirectional=bidirectional), inputs()
  p = parameters(layer)
  past = s4d_kernel(p, p["C1" if bidirectional else "C"], L, 1.5)
  expected = np.asarray(p["D"]) * np.asarray(u, np.float64)
  for t in range(L):
    for s in range(t + 1):
      expected[:, t] += past[:, t - s] * u[:, s]
  if bidirectional:
    future = s4d_kernel(p, p["C2"], L, 1.5)
    for t in range(L):
      for s in range(t + 1, L):
        expected[:, t] += future[:, s - t - 1] * u[:, s]
  y = run(layer, p, u, step_rescale=1.5)
  np.testing.assert_allclose(y, expected, atol=2e-5)


# Both


@pytest.mark.parametrize("layer", [ssm.S5(8), ssm.S4D(8)])
def test_outputs_do_not_depend_on_later_inputs(layer):
  variables = {"params": parameters(layer)}
  t = 4
  gradient = jax.grad(lambda u: (layer.apply(variables, u)[:, t] ** 2).sum())(inputs())
  # An FFT mixes all positions: there the future enters at the size of rounding errors.
  np.testing.assert_allclose(
    gradient[:, t + 1 :], 0, atol=1e-5 if isinstance(layer, ssm.S4D) else 0
  )
  assert np.abs(gradient[:, : t + 1]).min() > 1e-5


@pytest.mark.parametrize("layer", [ssm.S5(8, bidirectional=True), ssm.S4D(8, bidirectional=True)])
def test_bidirectional_layers(layer):
  p = parameters(layer)
  gradient = jax.jit(jax.grad(lambda u: (run(layer, p, u)[:, 4] ** 2).sum()))(inputs())
  assert np.abs(gradient).min() > 1e-6


@pytest.mark.parametrize("layer", [ssm.S5(8, 2, bidirectional=True), ssm.S4D(8)])
def test_gradients_agree_with_finite_differences(layer):
  u, weight = inputs(), inputs(seed=3)
  p = parameters(layer)
  loss = jax.jit(lambda p: (layer.apply({"params": p}, u) * weight).sum())
  gradient = jax.jit(jax.grad(loss))(p)
  for name, value in p.items():
    direction = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
    eps = 1e-2 / np.linalg.norm(direction)
    ends = [loss(p | {name: value + sign * eps * direction}) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * eps)
    given = (gradient[name] * direction).sum()
    np.testing.assert_allclose(given, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layer", [ssm.S5(8, bidirectional=True), ssm.S4D(8)])
def test_a_vmap_over_seeds_is_a_loop(layer):
  seeds = [parameters(layer, seed=seed) for seed in (1, 2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
  u = inputs((2, B, L, H))
  gradient = jax.grad(lambda p, u: (layer.apply({"params": p}, u) ** 2).sum())
  mapped, one = jax.jit(jax.vmap(gradient))(stacked, u), jax.jit(gradient)
  for i, p in enumerate(seeds):
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one(p, u[i])), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [ssm.S5(8), ssm.S4D(8)])
def test_bfloat16_inputs_give_bfloat16_outputs_near_the_float32_ones(layer):
  exact = run(layer, parameters(layer), inputs())
  y = run(layer, parameters(layer), inputs().astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)
