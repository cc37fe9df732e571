"""SGConv and the dense kernel against the paper's construction, tap by tap in numpy float64."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from models import long_conv
from models.long_conv import DenseConv, SGConv
from models.sequence import parameter_count
from objectives.optimizers import by_path

B, L, H = 2, 24, 3


def inputs(shape=(B, L, H), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def variables(layer, features=H, seed=1):
  made = jax.jit(layer.init)(jax.random.key(seed), jnp.zeros((1, 4, features)))
  return nn.meta.unbox(made)


@functools.partial(jax.jit, static_argnums=0)
def run(layer, variables, u):
  return layer.apply(variables, u)


def taps(layer):
  """How many a layer's kernel has in all; a multi-scale one is rarely as long as asked."""
  if isinstance(layer, DenseConv):
    return layer.max_length
  scales = long_conv.number_of_scales(layer.kernel_dim, layer.max_length, layer.init_scale)
  return layer.kernel_dim << layer.init_scale + scales - 1


def kernels(layer, made=None, length=None):
  """The first taps (C, H, length) of lags 0, 1, ... and of -1, -2, ..., from impulse responses."""
  made = variables(layer) if made is None else made
  features = made["params"]["D"].size
  made = made | {"params": made["params"] | {"D": jnp.zeros(features)}}
  length = taps(layer) if length is None else length
  impulses = jnp.zeros((2, length + 1, features)).at[0, 0].set(1).at[1, -1].set(1)
  first, second = np.asarray(run(layer, made, impulses)).swapaxes(1, 2)
  if not layer.bidirectional:
    return first[None, :, :-1]
  return np.stack([first[:, :-1], second[:, -2::-1]])


build = jax.jit(
  long_conv.multiscale_kernel, static_argnames=("init_scale", "length", "interpolation")
)
staircase = jax.jit(long_conv.staircase_conv, static_argnames="init_scale")


def by_tap(w, m, c, j, interpolation="linear"):
  """Tap j of the unnormalised kernel (C, H) in closed form, from w (S, C, H, d)."""
  d = w.shape[-1]
  base = d * 2**c
  i = 0 if j < base else 1 + int(np.floor(np.log2(j / base)))
  start = 0 if i == 0 else base * 2 ** (i - 1)
  s = 2 ** (c + max(0, i - 1))
  r = max((j - start + 0.5) / s - 0.5, 0)
  lo = (j - start) // s if interpolation == "nearest" else int(np.floor(r))
  f = 0 if interpolation == "nearest" else r - lo
  return m ** -float(i) * ((1 - f) * w[i, ..., lo] + f * w[i, ..., min(lo + 1, d - 1)])


# Kernels


SCALES = [
  *((1, 2048, 0, 12), (2, 4096, 0, 12), (1, 4000, 0, 13), (32, 1024, 0, 6), (64, 16384, 1, 8)),
  *((8, 8, 0, 1), (8, 9, 0, 2), (8, 16, 0, 2), (8, 17, 0, 3), (8, 17, 1, 2), (3, 100, 0, 7)),
]


@pytest.mark.parametrize(("d", "length", "c", "scales"), SCALES)
def test_number_of_scales(d, length, c, scales):
  assert long_conv.number_of_scales(d, length, c) == scales
  assert scales == 1 + np.ceil(np.log2(length / d)) - c
  assert d * 2**c * 2 ** (scales - 1) >= length


@pytest.mark.parametrize("interpolation", long_conv.INTERPOLATIONS)
@pytest.mark.parametrize(("scales", "c", "d"), [(1, 0, 3), (5, 0, 4), (4, 1, 5), (6, 0, 1)])
def test_kernel_is_its_closed_form(scales, c, d, interpolation):
  w, m = inputs((scales, 2, H, d)), jnp.linspace(1, 3, H)
  fields = {"init_scale": c, "interpolation": interpolation}
  total = d * 2 ** (c + scales - 1)
  wide = np.asarray(w, np.float64)
  closed = [by_tap(wide, np.asarray(m), c, j, interpolation) for j in range(total)]
  k = build(w, m, **fields)
  assert k.shape == (2, H, total)
  np.testing.assert_allclose(k, np.stack(closed, axis=-1), atol=1e-6)
  for length in (1, total // 2 + 1, total + 5):
    np.testing.assert_allclose(build(w, m, length=length, **fields), k[..., :length], atol=1e-6)


def test_the_first_two_scales_are_equally_long_and_each_later_one_twice_the_last():
  k = build(jnp.ones((4, 1, 1, 2)), jnp.full(1, 2.0))[0, 0]
  # Weighted by m^-i alone: no factor for the length besides.
  np.testing.assert_array_equal(k, np.repeat([1, 0.5, 0.25, 0.125], [2, 2, 4, 8]))


def test_interpolation_has_half_pixel_centres():
  w = jnp.array([0.0, 1.0, 5.0])[None, None, None]
  k = build(jnp.concatenate([w, w, w]))[0, 0]
  np.testing.assert_allclose(k[6:], [0, 0.25, 0.75, 2, 4, 5], atol=1e-6)
  one_value = build(jnp.ones((3, 1, 1, 1)))
  np.testing.assert_array_equal(one_value, np.ones((1, 1, 4)))


def test_gradient_of_a_kernel_is_its_adjoint():
  w, weight, m = inputs((4, 2, H, 3)), inputs((2, H, 24), seed=1), jnp.linspace(1, 3, H)
  value, gradient = jax.jit(jax.value_and_grad(lambda w: (build(w, m) * weight).sum()))(w)
  np.testing.assert_allclose((gradient * w).sum(), value, rtol=1e-5)


def test_positional_decay():
  k = long_conv.positional_decay(5, jnp.array([0.0, 1.0, 2.0]))
  j = np.arange(1, 6)
  np.testing.assert_allclose(k, [np.ones(5), 1 / j, 1 / j**2], rtol=1e-6)


@pytest.mark.parametrize(("c", "scales", "length"), [(0, 6, 40), (2, 3, 21), (0, 1, 1)])
def test_staircase_is_the_convolution_with_its_kernel(c, scales, length):
  u, w = inputs((B, length, H)), inputs((scales, 1, H, 1), seed=1)
  k = build(w, init_scale=c)[0]
  y = staircase(u, w[:, 0, :, 0], init_scale=c)
  np.testing.assert_allclose(y, jax.jit(long_conv.long_conv)(u, k), atol=1e-5)


def test_staircase_in_an_sgconv():
  layer = SGConv(1, L)
  made = variables(layer)
  w_SH = made["params"]["sub_kernels"][:, 0, :, 0]
  heights = w_SH * 0.5 ** jnp.arange(len(w_SH))[:, None] / made["frozen"]["norm"][0, :, 0]
  y = staircase(inputs(), heights) + made["params"]["D"] * inputs()
  np.testing.assert_allclose(run(layer, made, inputs()), y, atol=1e-5)


def test_staircase_loses_no_digits_to_a_large_mean():
  scales, length = 13, 4096
  u = 100 + inputs((1, length, 1))
  heights = 2.0 ** -np.arange(scales)[:, None]
  sums = np.concatenate([[0], np.cumsum(np.asarray(u[0, :, 0], np.float64))])
  want = np.zeros(length)
  for i in range(scales):
    start, end = (2 ** (i - 1) if i else 0), 2**i
    t = 1 + np.arange(length)
    want += heights[i] * (sums[np.maximum(t - start, 0)] - sums[np.maximum(t - end, 0)])
  y = staircase(u, jnp.float32(heights))[0, :, 0]
  np.testing.assert_allclose(y, want, rtol=4e-7)


# Layers

LAYERS = {
  "SGConv": SGConv(4, L),
  "SGConv, both ways": SGConv(3, L, bidirectional=True, decay_min=1.0, decay_max=3.0),
  "SGConv, position": SGConv(4, L, decay="position", decay_min=0.5, decay_max=2.0),
  "SGConv, learnable": SGConv(2, L, decay="learnable", decay_min=0.5, decay_max=2.0),
  "SGConv, cos": SGConv(4, L, init_scale=1, kernel_init="cos", bidirectional=True),
  "DenseConv": DenseConv(L),
  "DenseConv, decay": DenseConv(L, decay=1.0, bidirectional=True),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
def test_initial_kernels_have_norm_one(name):
  """Over all taps, of which there are more than `max_length` where that does not fit."""
  layer = LAYERS[name]
  k = kernels(layer)
  assert k.shape == (2 if layer.bidirectional else 1, H, taps(layer)) and taps(layer) >= L
  np.testing.assert_allclose(np.linalg.norm(k, axis=-1), 1, rtol=1e-5)


@each_layer
def test_outputs_are_the_convolution(name):
  layer = LAYERS[name]
  k, u = kernels(layer), np.asarray(inputs())
  expected = np.asarray(variables(layer)["params"]["D"]) * u
  for t in range(L):
    for s in range(L):
      if s <= t:
        expected[:, t] += k[0, :, t - s] * u[:, s]
      elif layer.bidirectional:  # lag 0 belongs to the first kernel alone
        expected[:, t] += k[1, :, s - t - 1] * u[:, s]
  np.testing.assert_allclose(run(layer, variables(layer), inputs()), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["SGConv", "SGConv, both ways", "SGConv, cos"])
def test_taps_of_sgconv(name):
  layer = LAYERS[name]
  made = variables(layer)
  w = np.asarray(made["params"]["sub_kernels"], np.float64)
  m = np.linspace(layer.decay_min, layer.decay_max, H)
  whole = np.stack([by_tap(w, m, layer.init_scale, j) for j in range(taps(layer))], axis=-1)
  norm = np.linalg.norm(whole, axis=-1, keepdims=True)
  np.testing.assert_allclose(made["frozen"]["norm"], norm, rtol=1e-6)
  np.testing.assert_allclose(kernels(layer), whole / norm, atol=1e-6)


def test_exact_positional_decay():
  """With both bounds 1 the envelope is 1/(j + 1), for SGConv as for a dense kernel."""
  layer, j = SGConv(4, L, decay="position", decay_min=1.0, decay_max=1.0), np.arange(32)
  made = variables(layer)
  flat = build(made["params"]["sub_kernels"]) / made["frozen"]["norm"]
  np.testing.assert_allclose(kernels(layer), flat / (j + 1), atol=1e-6)
  dense = DenseConv(32, decay=1.0)
  made = variables(dense)
  flat = made["params"]["taps"] / made["frozen"]["norm"]
  np.testing.assert_allclose(kernels(dense), flat / (j + 1), atol=1e-6)


def test_random_exponents_are_uniform_and_frozen_unless_learnable():
  bounds = {"decay_min": 0.5, "decay_max": 2.0}
  fixed = variables(SGConv(2, 8, decay="position", **bounds), features=500)
  learnt = variables(SGConv(2, 8, decay="learnable", **bounds), features=500)
  assert "exponent" not in fixed["params"] and "exponent" not in learnt["frozen"]
  for t in (fixed["frozen"]["exponent"], learnt["params"]["exponent"]):
    assert 0.5 <= t.min() < 0.52 and 1.98 < t.max() <= 2.0
    assert t.mean() == pytest.approx(1.25, abs=0.1)


@each_layer
def test_other_lengths_cut_the_kernel_or_pad_it_with_zeros(name):
  layer = LAYERS[name]
  np.testing.assert_allclose(kernels(layer, length=7), kernels(layer)[..., :7], atol=1e-6)
  beyond = kernels(layer, length=taps(layer) + 9)[..., taps(layer) :]
  np.testing.assert_allclose(beyond, 0, atol=1e-6)


@each_layer
def test_the_future_is_not_seen_and_shifts_commute(name):
  layer, t = LAYERS[name], 9
  y = run(layer, variables(layer), inputs())
  difference = run(layer, variables(layer), inputs().at[:, t].add(1)) - y
  if layer.bidirectional:
    assert np.abs(difference[:, :t]).max() > 1e-3
  else:
    np.testing.assert_allclose(difference[:, :t], 0, atol=1e-5)
  np.testing.assert_allclose(difference[0], difference[1], atol=1e-5)  # linear in u
  later = run(layer, variables(layer), inputs().at[:, t + 3].add(1)) - y
  np.testing.assert_allclose(later[:, t + 3 :], difference[:, t:-3], atol=1e-5)


@each_layer
def test_the_norm_is_frozen(name):
  """Updated parameters move the kernel's norm, and no call changes what is frozen."""
  layer = LAYERS[name]
  made = variables(layer)

  @jax.jit
  def step(made):
    loss = lambda p: (layer.apply({**made, "params": p}, inputs()) ** 2).mean()  # noqa: E731
    moved = jax.tree.map(lambda p, g: p - 3 * g, made["params"], jax.grad(loss)(made["params"]))
    moved = made | {"params": moved}
    return moved, layer.apply(moved, inputs()[:, :5], mutable=["frozen"])[1]["frozen"]

  moved, frozen = step(made)
  jax.tree.map(np.testing.assert_array_equal, frozen, made["frozen"])
  assert np.abs(np.linalg.norm(kernels(layer, moved), axis=-1) - 1).max() > 0.01
  # Z divides: twice the weights are twice the kernel.
  weight = "sub_kernels" if isinstance(layer, SGConv) else "taps"
  twice = made | {"params": made["params"] | {weight: 2 * made["params"][weight]}}
  np.testing.assert_allclose(kernels(layer, twice), 2 * kernels(layer), atol=1e-5)
  with pytest.raises(Exception, match="frozen"):
    run(layer, {"params": made["params"]}, inputs())


def test_frozen_variables_survive_a_checkpoint(tmp_path):
  layer = LAYERS["SGConv, position"]
  made = variables(layer)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "saved", made)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "saved", jax.tree.map(jnp.zeros_like, made))
  assert restored["frozen"]["norm"].shape == (1, H, 1)
  np.testing.assert_array_equal(run(layer, restored, inputs()), run(layer, made, inputs()))


ROWS = {  # of Long Range Arena: fields, H, kernel parameters a layer
  "listops": ((1, 2048), 128, 3_072),
  "text": ((2, 4096), 256, 12_288),
  "retrieval": ((1, 4000), 256, 6_656),
  "image": ((32, 1024), 512, 196_608),
  "pathfinder": ((32, 1024), 256, 98_304),
  "path-x": ((64, 16384, 1), 256, 262_144),
}


@pytest.mark.parametrize("row", ROWS)
def test_parameter_counts(row):
  fields, features, count = ROWS[row]
  layer = SGConv(*fields, bidirectional=True)
  made = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 8, features)))
  assert nn.meta.unbox(made)["params"]["sub_kernels"].size == count
  assert parameter_count(made) == count + features


SHARES = [
  (SGConv(1, 2048), 400, [0.51, 0.21, 0.12, 0.07, 0.05, 0.02]),
  (SGConv(32, 1024), 64, [0.70, 0.18, 0.06, 0.03, 0.02, 0.01]),
  (
    SGConv(64, 16384, 1, decay_min=1.0, decay_max=3.0, kernel_init="cos"),
    64,
    [0.55, 0.12, 0.07, 0.05, 0.04, 0.05, 0.05, 0.07],
  ),
]


@pytest.mark.parametrize(("layer", "features", "shares"), SHARES)
def test_initial_energy_by_scale(layer, features, shares):
  made = variables(layer, features)
  m = jnp.linspace(layer.decay_min, layer.decay_max, features)
  k = build(made["params"]["sub_kernels"], m, init_scale=layer.init_scale)
  energy = np.asarray(k / made["frozen"]["norm"])[0] ** 2
  bounds = [0, *(layer.kernel_dim << layer.init_scale + i for i in range(len(shares)))]
  found = [energy[:, a:b].sum(1).mean() for a, b in itertools.pairwise(bounds)]
  np.testing.assert_allclose(found, shares, atol=0.04)


def test_cosines_are_permuted_anew_for_each_scale_and_shared_by_directions():
  w = variables(SGConv(8, 64, kernel_init="cos", bidirectional=True), features=16)
  w = np.asarray(w["params"]["sub_kernels"])
  np.testing.assert_array_equal(w[:, 0], w[:, 1])
  rows = np.cos(2 * np.pi * np.outer(np.arange(16), np.linspace(0, 1, 8)))
  key = lambda x: sorted(map(tuple, x.round(3) + 0.0))  # noqa: E731
  for i in range(len(w)):
    np.testing.assert_allclose(key(w[i, 0]), key(rows), atol=2e-3)
  assert not np.allclose(w[0], w[1])


def test_arms_start_alike():
  """D and the kernel's norm do not depend on how the kernel is parameterised."""
  multi, dense = (variables(layer)["params"] for layer in (SGConv(4, L), DenseConv(L)))
  np.testing.assert_array_equal(multi["D"], dense["D"])
  assert dense["taps"].shape == (1, H, L)
  assert np.std(variables(DenseConv(500), 20)["params"]["taps"]) == pytest.approx(1, rel=0.03)


def test_kernels_have_a_name_of_their_own_for_the_optimizer():
  made = variables(LAYERS["SGConv"])["params"] | {"gate": {"kernel": 0}}
  labels = by_path(made, [("(^|/)(sub_kernels|taps)$", "kernel")], "rest")
  assert labels == {"sub_kernels": "kernel", "D": "rest", "gate": {"kernel": "rest"}}


@pytest.mark.parametrize("name", ["SGConv, both ways", "SGConv, learnable", "DenseConv, decay"])
def test_gradients_agree_with_finite_differences(name):
  layer, u, weight = LAYERS[name], inputs(), inputs(seed=3)
  made = variables(layer)
  loss = jax.jit(lambda p: (layer.apply({**made, "params": p}, u) * weight).sum())
  p = made["params"]
  gradient = jax.jit(jax.grad(loss))(p)
  for field, value in p.items():
    direction = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
    eps = 1e-2 / np.linalg.norm(direction)
    ends = [loss(p | {field: value + sign * eps * direction}) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * eps)
    np.testing.assert_allclose((gradient[field] * direction).sum(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["SGConv, position", "DenseConv, decay"])
def test_a_vmap_over_seeds_is_a_loop(name):
  layer = LAYERS[name]
  keys, u = jax.random.split(jax.random.key(5), 2), inputs((2, B, L, H))

  @jax.jit
  def start_and_differentiate(key, u):
    made = nn.meta.unbox(layer.init(key, u))
    loss = lambda p: (layer.apply({**made, "params": p}, u) ** 2).sum()  # noqa: E731
    return made, jax.grad(loss)(made["params"])

  mapped = jax.vmap(start_and_differentiate)(keys, u)
  for i, key in enumerate(keys):
    alone = start_and_differentiate(key, u[i])
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["SGConv", "DenseConv"])
def test_bfloat16_inputs(name):
  layer = LAYERS[name]
  y = run(layer, variables(layer), inputs().astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  exact = run(layer, variables(layer), inputs())
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)


def test_variables_carry_logical_axis_names():
  def names(layer):
    made = jax.eval_shape(layer.init, jax.random.key(0), inputs())
    return {f"{c}/{k}": v.names for c, part in made.items() for k, v in part.items()}

  shared = {"params/D": ("embed",), "frozen/norm": (None, "embed", None)}
  assert names(LAYERS["SGConv, position"]) == shared | {
    "params/sub_kernels": (None, None, "embed", None),
    "frozen/exponent": ("embed",),
  }
  assert names(LAYERS["DenseConv"]) == shared | {"params/taps": (None, "embed", None)}


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (SGConv(0, 8), "kernel_dim=0, init_scale=0, max_length=8; accepted: kernel_dim >= 1"),
    (SGConv(8, 8, 1), r"init_scale=1, max_length=8; accepted:.* <= max_length"),
    (SGConv(2, 8, decay="exponential"), "decay='exponential'; accepted: scale, position"),
    (SGConv(2, 8, kernel_init="zeros"), "kernel_init='zeros'; accepted: randn, cos"),
    (SGConv(2, 8, interpolation="cubic"), "interpolation='cubic'; accepted: linear, nearest"),
  ],
)
def test_mistakes_in_fields(layer, message):
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), inputs())


@pytest.mark.parametrize("name", ["SGConv", "DenseConv"])
def test_irregular_sampling_is_refused(name):
  layer = LAYERS[name]
  made = variables(layer)
  with pytest.raises(ValueError, match=f"dt: given; {name} accepts only None"):
    layer.apply(made, inputs(), dt=jnp.ones((B, L)))
  for rescale in (2.0, jnp.ones(())):
    with pytest.raises(ValueError, match=f"step_rescale=.*; {name} accepts only 1"):
      layer.apply(made, inputs(), step_rescale=rescale)
