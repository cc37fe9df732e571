"""Streaming: whatever the pieces, mixers and networks give the outputs of the whole sequence."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mixers, sequence
from models.long_conv import DenseConv, SGConv
from models.recurrent import GRU, LRU, RGLRU
from models.ssm import S4D, S5

B, L, H = 2, 11, 4

CUTS = ([5, 1, 5], [1, 5, 5], [1] * L)
GAPS = jax.random.uniform(jax.random.key(7), (B, L), minval=0.2, maxval=2.0)

MIXERS = {
  "S5": S5(8, 2),
  "S5, bilinear": S5(6, conj_sym=False, discretization="bilinear", clip_eigs=True),
  "S4D": S4D(8),
  "LRU": LRU(6),
  "RGLRU": RGLRU(blocks=2),
  "SGConv": SGConv(2, 16),
  "SGConv, shorter than the sequence": SGConv(2, 5, decay="position"),
  "SGConv, of length one": SGConv(1, 1, decay="learnable"),
  "DenseConv": DenseConv(6, decay=1.0),
  "GRU": GRU(7),
}


def inputs(dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (B, L, H)).astype(dtype)


def variables(model, x=None, **fields):
  """Unboxed variables drawn at random, away from norms that are the identity; nothing compiled."""
  init = functools.partial(model.init, **fields)
  abstract = jax.eval_shape(init, jax.random.key(1), inputs() if x is None else x)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    value = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0] if leaf.ndim > 1 else 4)
    if name in ("var", "scale", "norm", "Lambda_re"):
      value = (-0.5 if name == "Lambda_re" else 1) * (0.5 + np.abs(value))
    return jnp.asarray(value - 1 if name == "log_step" else value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract))


@functools.partial(jax.jit, static_argnums=0)
def whole(model, made, x, **fields):
  return model.apply(made, x, **fields)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method", donate_argnums=2)
def extend(model, made, state, x, method="extend", **fields):
  return model.apply(made, state, x, **fields, method=method)


def stream(model, made, state, x, sizes, dt=None, **fields):
  """The outputs of successive chunks side by side; the state of each goes into the next."""
  ends, ys = np.cumsum(sizes), []
  for start, end in zip(ends - sizes, ends, strict=True):
    gaps = {} if dt is None else {"dt": dt[:, start:end]}
    given = state
    state, y = extend(model, made, given, x[:, start:end], **gaps, **fields)
    described = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (given, state)]
    assert described[0] == described[1]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given) if leaf.size)
    ys.append(y)
  return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *ys)


@pytest.mark.parametrize("name", MIXERS)
def test_any_cutting_gives_the_outputs_of_the_whole(name):
  mixer = MIXERS[name]
  made = variables(mixer)
  rescale = {"step_rescale": 1.5} if name.startswith("S5") or name == "S4D" else {}
  expected = whole(mixer, made, inputs(), **rescale)
  for sizes in CUTS:
    y = stream(mixer, made, mixer.initial_state(B, H), inputs(), sizes, **rescale)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_steps_are_the_whole_and_run_inside_a_scan(name):
  """The carry of `lax.scan` also holds a state to one shape and dtype, here under bfloat16."""
  mixer = MIXERS[name]
  made = variables(mixer)

  @jax.jit
  def run(u_BLH):
    step = functools.partial(mixer.apply, made, method="step")
    state, y_LBH = jax.lax.scan(step, mixer.initial_state(B, H), jnp.moveaxis(u_BLH, 1, 0))
    return state, jnp.moveaxis(y_LBH, 0, 1), mixer.apply(made, u_BLH)

  state, y, expected = run(inputs(jnp.bfloat16))
  assert y.dtype == expected.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
  np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (y, expected)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["S5", "S5, bilinear"])
def test_gaps_that_differ(name):
  layer = MIXERS[name]
  made = variables(layer)
  expected = whole(layer, made, inputs(), dt=GAPS)
  assert np.abs(expected - whole(layer, made, inputs())).max() > 1e-2
  for sizes in CUTS:
    y = stream(layer, made, layer.initial_state(B, H), inputs(), sizes, GAPS)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_an_s4d_that_streams_takes_gaps():
  layer = S4D(8)
  made = variables(layer)
  expected = whole(layer, made, inputs(), step_rescale=2.0)
  y = stream(layer, made, layer.initial_state(B, H), inputs(), CUTS[0], jnp.full((B, L), 2.0))
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
  "mixer",
  [
    S5(8, bidirectional=True),
    S4D(8, bidirectional=True),
    SGConv(2, 16, bidirectional=True),
    DenseConv(6, bidirectional=True),
    GRU(bidirectional=True),
  ],
)
def test_two_directions_do_not_stream(mixer):
  made, state = variables(mixer), mixer.initial_state(B, H)
  with pytest.raises(ValueError, match="bidirectional=True: no recurrent form; accepted: False"):
    mixer.apply(made, state, inputs(), method="extend")
  with pytest.raises(ValueError, match="bidirectional=True"):
    mixer.apply(made, state, inputs()[:, 0], method="step")


@pytest.mark.parametrize("name", ["LRU", "RGLRU", "SGConv", "DenseConv"])
def test_sampling_that_cannot_be_honoured(name):
  mixer = MIXERS[name]
  made, state = variables(mixer), mixer.initial_state(B, H)
  for method, arguments in (("__call__", ()), ("extend", (state,))):
    apply = functools.partial(mixer.apply, made, *arguments, inputs(), method=method)
    with pytest.raises(ValueError, match=f"dt: given; {type(mixer).__name__} accepts only None"):
      apply(dt=GAPS)
    with pytest.raises(ValueError, match=r"step_rescale=2.0; .* accepts only 1"):
      apply(step_rescale=2.0)


def encoder(mixer, norm="layer", layers=1, **fields):
  block = functools.partial(sequence.Block, mixer=mixer, norm=norm, dropout=0.1)
  return sequence.Encoder(block, features=H, layers=layers, **fields)


S5_MIXER = functools.partial(S5, 4)


@pytest.mark.parametrize(
  ("mixer", "norm"), [(S5_MIXER, "batch"), (functools.partial(SGConv, 2, 16), "scalar")]
)
def test_a_network_streams_under_every_norm(mixer, norm):
  model = encoder(mixer, norm, remat=True)
  made = variables(model)
  y = stream(model, made, model.initial_state(B), inputs(), CUTS[0])
  np.testing.assert_allclose(y, whole(model, made, inputs()), atol=1e-4)


def test_a_language_model_streams():
  model = sequence.LanguageModel(encoder(RGLRU, layers=2, vocab=5, final_norm="layer"), 5)
  tokens = jax.random.randint(jax.random.key(0), (B, L), 0, 5)
  made = variables(model, tokens)
  expected = whole(model, made, tokens)
  y = stream(model, made, model.initial_state(B), tokens, CUTS[0])
  np.testing.assert_allclose(y, expected, atol=1e-4)
  _, y = extend(model, made, model.initial_state(B), tokens[:, 0], method="step")
  np.testing.assert_allclose(y, expected[:, 0], atol=1e-4)


def test_a_regression_of_frames_streams_with_its_gaps():
  model = sequence.FrameRegressor(encoder(S5_MIXER), 2, hidden=4, convolutional=False)
  frames = jax.random.normal(jax.random.key(0), (B, L, 6, 6, 1))
  made = variables(model, frames, dt=GAPS)
  expected = whole(model, made, frames, dt=GAPS)
  y = stream(model, made, model.initial_state(B), frames, CUTS[0], GAPS)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), y, expected)


def test_what_a_network_cannot_stream():
  with pytest.raises(ValueError, match="pooling='mean': one label a sequence"):
    sequence.Classifier(encoder(S5_MIXER), 3).initial_state(B)

  class Same(nn.Module):
    def __call__(self, u_BLH, *, dt=None, step_rescale=1.0):
      return u_BLH

  with pytest.raises(ValueError, match="mixer: Same; accepted: one with `extend`"):
    encoder(Same).initial_state(B)
  both = encoder(functools.partial(S5, 4, bidirectional=True))
  with pytest.raises(ValueError, match="bidirectional=True"):
    both.apply(variables(both), both.initial_state(B), inputs(), method="extend")


def test_a_state_is_differentiated_and_mapped_over_seeds():
  """The gradient through two chunks is that of the whole; `vmap` over seeds is a loop."""
  layer = RGLRU()
  made = variables(layer)

  def loss(made, u):
    state, first = layer.apply(made, layer.initial_state(B, H), u[:, :4], method="extend")
    _, second = layer.apply(made, state, u[:, 4:], method="extend")
    return (first**2).sum() + (second**2).sum()

  expected = jax.jit(jax.grad(lambda made: (layer.apply(made, inputs()) ** 2).sum()))(made)
  two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), made)
  mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(two, inputs())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), mapped, expected
  )


def test_step_adds_and_takes_away_the_axis_of_time():
  class Sum:
    def extend(self, state, x, *, dt=None):
      return state + x.sum(1), (x, dt)

  state, (y, dt) = mixers.step(Sum(), jnp.zeros((B, H)), jnp.ones((B, H)), dt=jnp.ones(B))
  assert (state.shape, y.shape, dt.shape) == ((B, H), (B, H), (B,))
