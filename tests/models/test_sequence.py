"""Blocks, encoder and heads: the paper's sizes, padding, dropout, norms, seeds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import recurrent, sequence, ssm

B, L, H = 3, 8, 4

S5 = functools.partial(ssm.S5, 4)
BOTH = functools.partial(ssm.S5, 4, bidirectional=True)


class Same(nn.Module):
  """A mixer that leaves everything as it is, so that a test sees the block alone."""

  @nn.compact
  def __call__(self, u_BLH, *, dt=None, step_rescale=1.0):
    return u_BLH


def inputs(shape=(B, L, H), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def arbitrary(model, *args, **fields):
  """Unboxed variables away from initial values, where norms are the identity and biases zero."""
  variables = jax.eval_shape(functools.partial(model.init, **fields), jax.random.key(0), *args)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    value = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0] if leaf.ndim > 1 else 4)
    if name in ("var", "scale", "Lambda_re"):
      value = (-0.5 if name == "Lambda_re" else 1) * (0.5 + np.abs(value))
    return jnp.asarray(value - 1 if name == "log_step" else value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(variables))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, variables, *args, **fields):
  return model.apply(variables, *args, **fields)


def classifier(mixer=S5, *, pooling="mean", vocab=None, classes=3, layers=2, **fields):
  encoder_fields = {k: fields.pop(k) for k in ("remat", "dtype") if k in fields}
  block = functools.partial(sequence.Block, mixer=mixer, **fields)
  encoder = sequence.Encoder(block, H, layers, vocab=vocab, **encoder_fields)
  return sequence.Classifier(encoder, classes, pooling)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, *args, **fields):
  return model.apply(
    variables,
    *args,
    train=True,
    mutable=["batch_stats"],
    rngs={"dropout": jax.random.key(3)},
    **fields,
  )


# Sizes of the paper


def paper(state, blocks, features, layers, classes, vocab=None, c_init="lecun_normal", glu=2):
  mixer = functools.partial(ssm.S5, state, blocks, c_init=c_init, bidirectional=True)
  block = functools.partial(sequence.Block, mixer=mixer, activation=f"half_glu{glu}")
  return sequence.Encoder(block, features, layers, vocab=vocab), classes


PAPER = {
  "listops": (paper(16, 8, 128, 8, 10, vocab=20), 188_490),
  "text": (paper(192, 12, 256, 6, 2, vocab=135), 1_321_154),
  "image": (paper(384, 3, 512, 6, 10, glu=1), 5_133_706),
  "pathfinder": (paper(256, 8, 192, 6, 2, c_init="trunc_standard_normal", glu=1), 1_113_602),
  "pathx": (paper(256, 16, 128, 6, 2, c_init="complex_normal", glu=1), 694_018),
  "speech": (paper(128, 16, 96, 6, 35, glu=1), 283_523),
}


@pytest.mark.parametrize("task", PAPER)
def test_parameter_counts_of_the_paper(task):
  (encoder, classes), count = PAPER[task]
  model = sequence.Classifier(encoder, classes)
  one = jnp.zeros((1, 16), jnp.int32) if encoder.vocab else jnp.zeros((1, 16, 1))
  assert sequence.parameter_count(jax.eval_shape(model.init, jax.random.key(0), one)) == count


def test_parameter_count_of_retrieval():
  encoder, classes = paper(256, 16, 128, 6, 2, 98, c_init="trunc_standard_normal", glu=1)
  model = sequence.Retrieval(encoder, classes)
  documents = jnp.zeros((1, 2, 16), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), documents)
  assert sequence.parameter_count(variables) == 772_098


# Block


def block(**fields):
  return sequence.Block(**{"mixer": Same, "norm": "layer"} | fields)


IDENTITY = {"scale": jnp.ones(H), "bias": jnp.zeros(H)}


def normalised(x):
  x = np.asarray(x, np.float64)
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def gelu(x):
  return jax.nn.gelu(x, approximate=True)


def test_activations():
  x = inputs()
  z = normalised(x)
  g = gelu(z)
  p = arbitrary(block(activation="full_glu"), x)

  def linear(name):
    return g @ p["params"][name]["kernel"] + p["params"][name]["bias"]

  p["params"]["norm"] = IDENTITY
  gate = jax.nn.sigmoid(linear("gate"))
  expected = {
    "half_glu1": g * gate,
    "half_glu2": z * gate,
    "full_glu": linear("value") * gate,
    "gelu": g,
  }
  for name, update in expected.items():
    y = evaluate(block(activation=name), p, x)
    np.testing.assert_allclose(y, x + update, atol=1e-5)
  names = {name: set(arbitrary(block(activation=name), x)["params"]) for name in expected}
  assert names == {
    "half_glu1": {"norm", "gate"},
    "half_glu2": {"norm", "gate"},
    "full_glu": {"norm", "gate", "value"},
    "gelu": {"norm"},
  }


def test_norm_before_and_after():
  x = inputs()
  p = {"params": {"norm": IDENTITY}}
  before = evaluate(block(activation="gelu"), p, x)
  np.testing.assert_allclose(before, x + gelu(normalised(x)), atol=1e-5)
  after = evaluate(block(activation="gelu", prenorm=False), p, x)
  np.testing.assert_allclose(after, normalised(x + gelu(x)), atol=1e-5)


def test_batch_norm_is_over_batch_and_time_and_leaves_padding_out():
  model = block(activation="gelu", norm="batch", prenorm=False, momentum=0.9)
  x, lengths = inputs(), np.array([8, 3, 5])
  mask = sequence.length_mask(jnp.asarray(lengths), L)
  initial = {"mean": jnp.zeros(H), "var": jnp.ones(H)}
  variables = {"params": {"norm": IDENTITY}, "batch_stats": {"norm": initial}}
  y, updated = train(model, variables, jnp.where(mask[..., None], x, 1e3), mask=mask)
  r = np.asarray(x + gelu(x), np.float64)
  real = np.concatenate([r[i, :n] for i, n in enumerate(lengths)])
  mean, var = real.mean(0), real.var(0)
  for i, n in enumerate(lengths):
    np.testing.assert_allclose(y[i, :n], (r[i, :n] - mean) / np.sqrt(var + 1e-5), atol=1e-4)
  stats = updated["batch_stats"]["norm"]
  np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4)
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)
  assert sequence.Block(mixer=Same).momentum == 0.95


def test_dropout_is_shared_over_time_and_not_over_the_batch():
  model = block(activation="gelu", dropout=0.5)
  x = jnp.ones((64, L, H)) * jnp.arange(1.0, H + 1)
  variables = arbitrary(model, x)
  dropped = np.asarray(train(model, variables, x)[0] == x)
  assert (dropped == dropped[:, :1]).all()
  assert 0.35 < dropped[:, 0].mean() < 0.65
  assert len(np.unique(dropped[:, 0], axis=0)) > 4
  assert not (model.apply(variables, x) == x).any()


def test_mistakes_in_block_fields():
  with pytest.raises(ValueError, match="activation='glu'; accepted: half_glu1, half_glu2"):
    arbitrary(block(activation="glu"), inputs())
  with pytest.raises(ValueError, match="norm='rms'; accepted: batch, layer"):
    arbitrary(block(norm="rms"), inputs())


def test_block_passes_gaps_and_step_scale_to_the_mixer():
  model = sequence.Block(BOTH, activation="gelu", norm="layer")
  x, dt = inputs(), 1 + jnp.abs(inputs((B, L)))
  variables = arbitrary(model, x)
  variables["params"]["norm"] = IDENTITY
  z = jnp.float32(normalised(x))
  mixed = evaluate(BOTH(), {"params": variables["params"]["mixer"]}, z, dt=dt, step_rescale=2.0)
  y = evaluate(model, variables, x, dt=dt, step_rescale=2.0)
  np.testing.assert_allclose(y, x + gelu(mixed), atol=1e-5)


# Encoder


def test_tokens_are_a_dense_layer_on_one_hot_vectors():
  vocab = 50
  tokens = jax.random.randint(jax.random.key(0), (B, L), 0, vocab)
  variables = arbitrary(sequence.Tokens(vocab, H), tokens)
  expected = evaluate(nn.Dense(H), variables, jax.nn.one_hot(tokens, vocab))
  y = evaluate(sequence.Tokens(vocab, H), variables, tokens)
  np.testing.assert_allclose(y, expected, atol=1e-6)
  outside = sequence.Tokens(vocab, H).apply(variables, jnp.full((1, 1), vocab))
  np.testing.assert_array_equal(outside[0, 0], variables["params"]["bias"])
  p = nn.meta.unbox(sequence.Tokens(vocab, 100).init(jax.random.key(0), tokens))["params"]
  assert np.std(p["kernel"]) == pytest.approx(vocab**-0.5, rel=0.05)


def test_an_embedding_is_standard_normal_without_bias():
  model = sequence.Tokens(500, 40, embedding=True)
  tokens = jnp.array([[3, 499, 500]])
  (table,) = jax.tree.leaves(nn.meta.unbox(model.init(jax.random.key(0), tokens)))
  assert (abs(float(table.mean())) < 0.03) and (abs(float(table.std()) - 1) < 0.03)
  y = model.apply({"params": {"kernel": table}}, tokens)
  np.testing.assert_array_equal(y[0], [table[3], table[499], jnp.zeros(40)])


def test_mistakes_in_encoder_inputs():
  with pytest.raises(ValueError, match="vocab=None: inputs are int32 tokens"):
    arbitrary(classifier(), jnp.zeros((B, L), jnp.int32))
  with pytest.raises(ValueError, match=r"inputs: float32\[3, 8\]; accepted: int \[B, L\] or float"):
    arbitrary(classifier(vocab=5), jnp.zeros((B, L)))


MIXERS = {
  "s5": S5,
  "s5, both": BOTH,
  "s4d": functools.partial(ssm.S4D, 4),
  "s4d, both": functools.partial(ssm.S4D, 4, bidirectional=True),
  "gru": recurrent.GRU,
}


PADDED = {name: {"mixer": mixer} for name, mixer in MIXERS.items()} | {
  "last": {"mixer": BOTH, "pooling": "last"},
  "layer norm": {"mixer": BOTH, "norm": "layer", "prenorm": False},
}


@pytest.mark.parametrize("name", PADDED)
def test_logits_do_not_depend_on_padding(name):
  """Not on its amount, and not on what it holds, in evaluation and in training."""
  model = classifier(dropout=0.2, layers=1, **PADDED[name])
  x, lengths = inputs(), jnp.array([5, 8, 2])
  variables = arbitrary(model, x, lengths=lengths)
  more = jnp.concatenate([x, inputs((B, 3, H), seed=9)], axis=1)
  more = jnp.where(sequence.length_mask(lengths, L + 3)[..., None], more, 7.0)

  @jax.jit
  def outputs(x):
    return model.apply(variables, x, lengths=lengths), train(model, variables, x, lengths=lengths)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, outputs(more), outputs(x))


def test_logits_do_not_depend_on_gaps_at_padding():
  model = classifier(BOTH, layers=1)
  x, lengths, dt = inputs(), jnp.array([5, 8, 2]), 1 + jnp.abs(inputs((B, L)))
  variables = arbitrary(model, x)
  logits = evaluate(model, variables, x, lengths=lengths, dt=dt)
  whole = evaluate(model, variables, x[:1, :5], dt=dt[:1, :5])
  np.testing.assert_allclose(logits[:1], whole, atol=1e-5)


def test_pooling():
  x, lengths = inputs(), jnp.array([5, 8, 1])
  mean, last = sequence.pool(x, lengths), sequence.pool(x, lengths, "last")
  for i, n in enumerate(lengths):
    np.testing.assert_allclose(mean[i], x[i, :n].mean(0), atol=1e-6)
    np.testing.assert_array_equal(last[i], x[i, n - 1])
  np.testing.assert_allclose(sequence.pool(x), x.mean(1), atol=1e-6)
  np.testing.assert_array_equal(sequence.pool(x, None, "last"), x[:, -1])
  with pytest.raises(ValueError, match="pooling='max'; accepted: mean, last"):
    sequence.pool(x, None, "max")


def test_a_causal_stack_with_layer_norm_is_causal():
  encoder = classifier(S5, norm="layer").encoder
  variables = arbitrary(encoder, inputs())
  gradient = jax.jit(jax.grad(lambda x: (evaluate(encoder, variables, x)[:, 3] ** 2).sum()))(
    inputs()
  )
  np.testing.assert_array_equal(gradient[:, 4:], 0)
  assert np.abs(gradient[:, :4]).min() > 0


def gradients(model, variables, x, key):
  def loss(p):
    rest = {k: v for k, v in variables.items() if k != "params"}
    y, _ = model.apply(
      {"params": p} | rest, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return (y**2).sum()

  return jax.grad(loss)(variables["params"])


@pytest.mark.parametrize("activation", ["half_glu1", "half_glu2", "full_glu"])
def test_gradients_are_finite_and_reach_every_parameter(activation):
  model = classifier(BOTH, activation=activation, dropout=0.1)
  variables = arbitrary(model, inputs())
  key = jax.random.key(0)
  grads = jax.jit(functools.partial(gradients, model))(variables, inputs(), key)
  for path, g in jax.tree.leaves_with_path(grads):
    assert np.isfinite(g).all(), path
    assert np.abs(g).max() > 0, path


def test_recomputation_changes_nothing():
  plain, remat = classifier(dropout=0.3), classifier(dropout=0.3, remat=True)
  x, key = inputs(), jax.random.key(0)
  variables = arbitrary(plain, x)
  assert jax.tree.map(jnp.shape, arbitrary(remat, x)) == jax.tree.map(jnp.shape, variables)
  grads = [jax.jit(functools.partial(gradients, m))(variables, x, key) for m in (plain, remat)]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *grads)
  traced = jax.make_jaxpr(functools.partial(gradients, remat))(variables, x, key)
  assert "remat" in str(traced)


def test_a_vmap_over_seeds_is_a_loop_and_normalises_each_seed_by_itself():
  model = classifier(BOTH, dropout=0.3)
  x, keys = inputs((2, B, L, H)), jax.random.split(jax.random.key(0), 2)
  x = x.at[1].add(5.0)
  variables = [arbitrary(model, x[0])]
  variables.append(jax.tree.map(lambda leaf: leaf * 1.1, variables[0]))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)

  def step(variables, x, key):
    _, updated = model.apply(
      variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return gradients(model, variables, x, key), updated

  mapped, one = jax.jit(jax.vmap(step))(stacked, x, keys), jax.jit(step)
  for i in range(2):
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
      mapped,
      one(variables[i], x[i], keys[i]),
    )


def test_compute_dtype_leaves_parameters_and_statistics_in_float32():
  model = classifier(BOTH, dtype=jnp.bfloat16)
  variables = arbitrary(model, inputs())
  encoded = evaluate(
    model.encoder,
    {k: v["encoder"] for k, v in variables.items()},
    inputs(),
    lengths=jnp.array([5, 8, 2]),
  )
  assert encoded.dtype == jnp.bfloat16
  logits, updated = train(model, variables, inputs())
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves((variables, updated))} == {jnp.dtype("float32")}
  exact, _ = train(classifier(BOTH), variables, inputs())
  np.testing.assert_allclose(logits, exact, atol=0.1)


def test_every_parameter_carries_logical_axis_names():
  variables = jax.eval_shape(
    classifier(BOTH, activation="full_glu").init, jax.random.key(0), inputs()
  )
  leaves = jax.tree.leaves_with_path(
    variables["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
  )
  known = {"embed", "state", "mlp", "vocab", None}
  for path, leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned), path
    assert len(leaf.names) == leaf.value.ndim, path
    assert set(leaf.names) <= known, path


# Pairs and frames


def test_retrieval_compares_the_pooled_documents():
  mixer = functools.partial(ssm.S5, 4)
  block = functools.partial(sequence.Block, mixer=mixer)
  model = sequence.Retrieval(sequence.Encoder(block, H, 1, vocab=5))
  tokens = jax.random.randint(jax.random.key(0), (B, 2, L), 0, 5)
  lengths = jnp.array([[8, 3], [2, 5], [4, 4]])
  variables = arbitrary(model, tokens)
  p = variables["params"]
  encoder = {k: v["encoder"] for k, v in variables.items()}

  def document(i):
    x = evaluate(model.encoder, encoder, tokens[:, i], lengths=lengths[:, i])
    return sequence.pool(x, lengths[:, i])

  a, b = document(0), document(1)
  pair = jnp.concatenate([a, b, a - b, a * b], axis=-1)
  hidden = jax.nn.gelu(pair @ p["compare"]["kernel"] + p["compare"]["bias"])
  expected = hidden @ p["decoder"]["kernel"] + p["decoder"]["bias"]
  logits = evaluate(model, variables, tokens, lengths=lengths)
  assert logits.shape == (B, 2)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match=r"inputs: \[3, 8\]; accepted: \[B, 2, L\]"):
    model.apply(variables, tokens[:, 0])


def regressor(gaps="ssm", **fields):
  block = functools.partial(sequence.Block, mixer=S5, norm="layer", prenorm=False)
  return sequence.FrameRegressor(sequence.Encoder(block, H, 1), 2, gaps, **fields)


def test_frame_encoder_is_two_convolutions():
  x = inputs((B, 24, 24, 1))
  p = arbitrary(sequence.FrameEncoder(30), x)["params"]

  def conv(x, name, size, stride):
    kernel = p[name]["kernel"].reshape(size, size, -1, 12)
    layer = nn.Conv(12, (size, size), strides=stride, padding=size // 2)
    x = nn.relu(layer.apply({"params": {"kernel": kernel, "bias": p[name]["bias"]}}, x))
    return nn.max_pool(x, (2, 2), (2, 2))

  expected = conv(conv(x, "conv_0", 5, 1), "conv_1", 3, 2).reshape(B, -1)
  expected = nn.relu(expected @ p["dense"]["kernel"] + p["dense"]["bias"])
  assert p["dense"]["kernel"].shape == (108, 30)
  features = evaluate(sequence.FrameEncoder(30), {"params": p}, x)
  np.testing.assert_allclose(features, expected, atol=1e-4)
  odd = arbitrary(sequence.FrameEncoder(30), inputs((B, 11, 9, 2)))["params"]
  assert odd["dense"]["kernel"].shape == (12, 30)


def test_gaps_between_frames():
  frames, dt = inputs((B, L, 8, 8, 1)), 1 + jnp.abs(inputs((B, L)))
  outputs = {}
  for gaps in sequence.GAPS:
    model = regressor(gaps)
    variables = arbitrary(model, frames, dt=dt)
    width = 31 if gaps == "append" else 30
    assert variables["params"]["encoder"]["linear"]["kernel"].shape == (width, H)
    outputs[gaps] = [evaluate(model, variables, frames, dt=d) for d in (dt, jnp.ones((B, L)))]
    mean, variance = outputs[gaps][0]
    assert mean.shape == variance.shape == (B, L, 2)
    assert variance.min() > 0
  for gaps in ("ssm", "append"):
    assert np.abs(outputs[gaps][0][0] - outputs[gaps][1][0]).max() > 1e-4
  np.testing.assert_array_equal(*(o[0] for o in outputs["ignore"]))
  # With equal gaps, telling the mixer of them or not is the same.
  np.testing.assert_allclose(outputs["ssm"][1][0], outputs["ignore"][0][0], atol=1e-5)
  with pytest.raises(ValueError, match="dt=None under gaps='ssm'"):
    regressor().apply({}, frames)
  with pytest.raises(ValueError, match="gaps='drop'; accepted: ssm, append, ignore"):
    regressor("drop").apply({}, frames)


def test_variance_is_positive_and_smooth():
  v = jnp.array([-80.0, -1.0, 0.0, 2.0])
  np.testing.assert_allclose(sequence.positive(v), [np.exp(-80.0), np.exp(-1.0), 1, 3], rtol=1e-6)
  np.testing.assert_allclose(
    jax.vmap(jax.grad(sequence.positive))(v), [np.exp(-80.0), np.exp(-1.0), 1, 1], rtol=1e-6
  )
  assert np.isfinite(jax.grad(sequence.positive)(1e5))


def test_uniform_linear_layers_are_those_of_pytorch():
  model = block(activation="full_glu", linear_init="uniform")
  variables = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2, 100))))
  for name in ("gate", "value"):
    for leaf in variables["params"][name].values():
      assert 0.09 < jnp.abs(leaf).max() < 0.1  # 1 / sqrt(100)
      assert abs(float(leaf.mean())) < 0.03
  with pytest.raises(ValueError, match="linear_init='uniforn'; accepted: lecun, uniform"):
    block(activation="full_glu", linear_init="uniforn").init(
      jax.random.key(0), jnp.zeros((1, 2, 4))
    )


def test_dropout_that_is_not_tied_differs_along_time():
  x = jnp.repeat(inputs((B, 1, H)), L, axis=1)
  for tied, same in ((True, True), (False, False)):
    model = block(activation="gelu", dropout=0.5, tied_dropout=tied)
    variables = model.init(jax.random.key(0), x)
    y, _ = model.apply(
      variables,
      x,
      train=True,
      rngs={"dropout": jax.random.key(1)},
      mutable=["batch_stats"],
    )
    assert bool((y == y[:, :1]).all()) == same


def test_scalar_norm_is_over_channels_with_one_scale_and_shift():
  x = inputs()
  variables = {"params": {"scale": jnp.float32(1.5), "shift": jnp.float32(-0.25)}}
  y = sequence.ScalarNorm().apply(variables, x)
  x = np.asarray(x, np.float64)
  mean, std = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(y, 1.5 / std * (x - mean - 0.25), rtol=1e-4, atol=1e-5)


def test_the_final_norm_follows_the_blocks():
  x = inputs((B, L, 3))
  plain = sequence.Encoder(functools.partial(sequence.Block, mixer=S5), features=H, layers=1)
  variables = plain.init(jax.random.key(0), x)
  before = plain.apply(variables, x)
  normed = plain.clone(final_norm="layer")
  both = normed.init(jax.random.key(0), x)
  after = normed.apply(both, x)
  np.testing.assert_allclose(after, normalised(np.asarray(before)), rtol=1e-3, atol=1e-4)


def test_a_language_model_predicts_from_what_came_before():
  mixer = functools.partial(ssm.S4D, state=4)
  encoder = sequence.Encoder(
    functools.partial(sequence.Block, mixer=mixer, norm="layer"), features=H, layers=2, vocab=11
  )
  model = sequence.LanguageModel(encoder, 11)
  tokens = jax.random.randint(jax.random.key(0), (B, L), 0, 11)
  variables = model.init(jax.random.key(1), tokens)
  logits = model.apply(variables, tokens)
  assert (logits.shape, logits.dtype) == ((B, L, 11), jnp.float32)
  changed = model.apply(variables, tokens.at[:, 5].add(1) % 11)
  np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-5)
  assert float(jnp.abs(changed[:, 5:] - logits[:, 5:]).max()) > 1e-2
