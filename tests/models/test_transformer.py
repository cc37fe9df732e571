"""The Transformer against float64 numpy, and every two ways that have to agree."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from launch import mesh as meshes
from models import recurrent, sequence
from models.attention import attention_mask, dense, segment_positions
from models.transformer import (
  Transformer,
  init_cache,
  stack_layers,
  unstack_layers,
)

B, L, V, H = 3, 6, 11, 8

GPT = Transformer(V, H, 2, 2, max_length=16)
LLAMA = Transformer(
  V, H, 2, 4, kv_heads=2, mlp=12, position="rotary", rotary_base=100.0, norm="rms",
  activation="swiglu", use_bias=False,
)  # fmt: skip
BERT = Transformer(
  V, H, 2, 2, mask="full", max_length=16, types=2, prenorm=False, embed_norm=True, epsilon=1e-12,
  activation="gelu_exact", head="mlm",
)  # fmt: skip
SINES = Transformer(V, H, 2, 2, position="sinusoidal", activation="relu", head="untied")
GEGLU = Transformer(V, H, 2, 2, mask="prefix", position="none", activation="geglu", norm="rms")
VIT = Transformer(None, H, 2, 2, mask="full", max_length=16)
MODELS = {
  "gpt": GPT, "llama": LLAMA, "bert": BERT, "sines": SINES, "geglu": GEGLU, "vit": VIT,
}  # fmt: skip


# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(shape=(B, L), seed=0):
  return jax.random.randint(jax.random.key(seed), shape, 0, V)


def data(model, seed=0):
  """Inputs and what else the model's call needs."""
  fields = {"prefix": jnp.array([2, 0, 6])} if model.mask == "prefix" else {}
  if model.vocab is None:
    return jax.random.normal(jax.random.key(seed), (B, L, 5)), fields
  return tokens(seed=seed), fields


def arbitrary(model, *args, seed=0, **fields):
  """Unboxed variables away from initial values, where norms are the identity and biases zero."""
  variables = jax.eval_shape(functools.partial(model.init, **fields), jax.random.key(0), *args)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    value = rng.normal(size=leaf.shape)
    if name == "kernel":
      value /= np.sqrt(leaf.shape[-2])
    return jnp.asarray(0.5 + np.abs(value) if name == "scale" else value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(variables))


@functools.cache
def example(name):
  inputs, fields = data(MODELS[name])
  return MODELS[name], arbitrary(MODELS[name], inputs, **fields), inputs, fields


@functools.partial(jit, static_argnums=0, static_argnames=("logits", "hidden", "train"))
def evaluate(model, variables, *args, rngs=None, **fields):
  return model.apply(variables, *args, rngs=rngs, **fields)


close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def all_close(a, b):
  jax.tree.map(close, a, b)


# The definition


def gelu_tanh(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
  return x * scipy.special.ndtr(x)


ACTIVATIONS = {
  "gelu": gelu_tanh, "gelu_exact": gelu_exact, "relu": lambda x: np.maximum(x, 0),
  "swiglu": lambda x: x * scipy.special.expit(x), "geglu": gelu_tanh,
}  # fmt: skip


def oracle(model, params, inputs, prefix=None, types=None):
  """Logits of one sequence (or features without a vocabulary) in float64, head by head."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  length = len(inputs)

  def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)

  def norm(p, x):
    x = x - (x.mean(-1, keepdims=True) if model.norm == "layer" else 0)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.epsilon) * p["scale"] + p.get(
      "bias", 0
    )

  def turn(x):
    if model.position != "rotary":
      return x
    half = x.shape[-1] // 2
    rate = model.rotary_base ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(length)[:, None] * rate)
    return np.concatenate([z.real, z.imag], -1)

  def attention(p, x):
    kv_heads = model.kv_heads or model.heads
    q = linear(p["query"], x).reshape(length, model.heads, -1)
    k, v = (linear(p[name], x).reshape(length, kv_heads, -1) for name in ("key", "value"))
    allowed = np.ones((length, length)) if model.mask == "full" else np.tril(np.ones((length,) * 2))
    allowed[:, : prefix or 0] = 1
    ys = []
    for n in range(model.heads):
      group = n // (model.heads // kv_heads)
      scores = turn(q[:, n]) @ turn(k[:, group]).T / np.sqrt(q.shape[-1])
      e = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
      ys.append(e / e.sum(-1, keepdims=True) @ v[:, group])
    return linear(p["out"], np.concatenate(ys, -1))

  def mlp(p, x):
    act, up = ACTIVATIONS[model.activation], linear(p["up"], x)
    return linear(p["down"], act(linear(p["gate"], x)) * up if "gate" in p else act(up))

  if model.vocab is None:
    x = linear(p["projection"], np.asarray(inputs, np.float64))
  else:
    x = p["embedding"][inputs]
  if model.position == "learned":
    x = x + p["position_embedding"][:length]
  if model.position == "sinusoidal":
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, H, 2) / H)
    x = x * np.sqrt(H)
    x[:, ::2] += np.sin(angle)
    x[:, 1::2] += np.cos(angle)
  if model.types:
    x = x + p["type_embedding"][types]
  if model.embed_norm:
    x = norm(p["embedding_norm"], x)
  for i in range(model.layers):
    layer = p[f"layer_{i}"]
    for name, sublayer in (("attention", attention), ("mlp", mlp)):
      if model.prenorm:
        x = x + sublayer(layer[name], norm(layer[f"{name}_norm"], x))
      else:
        x = norm(layer[f"{name}_norm"], x + sublayer(layer[name], x))
  if model.prenorm:
    x = norm(p["final_norm"], x)
  if model.vocab is None:
    return x
  if model.head == "mlm":
    x = norm(p["mlm_norm"], gelu_exact(linear(p["mlm_dense"], x)))
  head = p["unembedding"] if model.head == "untied" else p["embedding"].T
  return x @ head + p.get("mlm_bias", 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_is_its_definition(name):
  model, variables, inputs, fields = example(name)
  types = {"types": tokens(seed=5) % 2} if model.types else {}
  y = evaluate(model, variables, inputs, **fields, **types)
  assert y.dtype == jnp.float32 and y.shape == (B, L, H if model.vocab is None else V)
  for b in range(B):
    rows = {k: np.asarray(v)[b] for k, v in (fields | types).items()}
    close(y[b], oracle(model, variables["params"], np.asarray(inputs[b]), **rows), atol=1e-4)


SIZES = {
  "SmolLM2-135M": (
    Transformer(
      49_152, 576, 30, 9, kv_heads=3, mlp=1536, position="rotary", norm="rms",
      activation="swiglu", use_bias=False,
    ),
    134_515_008,
  ),
  "GPT-2": (Transformer(50_257, 768, 12, 12, max_length=1024), 124_439_808),
  "BERT-base, masked LM": (
    BERT.clone(vocab=30_522, features=768, layers=12, heads=12, max_length=512), 109_514_298,
  ),
  "MiniLM-L6, features": (
    BERT.clone(vocab=30_522, features=384, layers=6, heads=12, max_length=512, head=None),
    22_565_376,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("scan", [False, True])
def test_parameter_counts(name, scan):
  model, count = SIZES[name]
  shapes = jax.eval_shape(model.clone(scan=scan).init, jax.random.key(0), jnp.zeros((1, 8), int))
  assert sequence.parameter_count(shapes) == count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_names_its_axes(name, scan):
  inputs, fields = data(MODELS[name])
  init = functools.partial(MODELS[name].clone(scan=scan).init, **fields)
  flat = jax.tree_util.tree_flatten_with_path(
    jax.eval_shape(init, jax.random.key(0), inputs)["params"],
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )[0]
  for path, leaf in flat:
    assert len(leaf.names) == leaf.value.ndim, path
    assert (leaf.names[0] == "layers") == (scan and path[0].key == "layer")
    known = {"embed", "mlp", "heads", "kv_heads", "vocab", "layers", None}
    assert set(leaf.names) <= known and ("embed" in leaf.names or "bias" in path[-1].key), path


# Who sees whom


@functools.partial(jit, static_argnums=0)
def dependence(model, variables, x_BLH, **fields):
  """(B, L, L) bool: whether the output at a position changes with the input at another."""
  outputs = functools.partial(model.apply, variables, logits=False, **fields)
  moved = jax.vmap(lambda key: outputs(x_BLH.at[:, key, 0].add(1.0)), out_axes=2)(jnp.arange(L))
  return jnp.abs(moved - outputs(x_BLH)[:, :, None]).max(-1) > 1e-6


SEEN = {
  "causal": (GPT, {}),
  "full": (GPT.clone(mask="full"), {}),
  "prefix": (GEGLU, {"prefix": jnp.array([3, 0, 6])}),
  "lengths": (GPT.clone(mask="full"), {"lengths": jnp.array([4, 6, 1])}),
  "segments": (GPT, {"segments": jnp.array([[1, 1, 1, 2, 2, 0], [1] * 6, [1, 2, 2, 2, 2, 3]])}),
}


@pytest.mark.parametrize("name", SEEN)
def test_outputs_depend_on_what_the_mask_shows(name):
  model, fields = SEEN[name]
  model = model.clone(layers=1)
  variables = arbitrary(model, tokens(), **fields)
  x = jax.random.normal(jax.random.key(1), (B, L, H))
  mask = attention_mask(model.mask, L, **fields)
  expected = np.ones((B, L, L), bool) if mask is None else np.broadcast_to(mask, (B, 1, L, L))[:, 0]
  np.testing.assert_array_equal(
    dependence(model, variables, x, **fields), expected | np.eye(L, dtype=bool)
  )


@pytest.mark.parametrize("name", ["gpt", "llama", "geglu"])
def test_packed_sequences_are_separate_ones(name):
  """Logits and gradients of three in a row with padding behind, and of the three as a batch."""
  model, alone = MODELS[name].clone(layers=1), tokens((3, 3))
  row = jnp.concatenate([alone.reshape(1, 9), jnp.zeros((1, 2), int)], axis=1)
  segments = jnp.array([[1] * 3 + [2] * 3 + [3] * 3 + [0] * 2])
  together, apart = {"segments": segments}, {}
  if model.mask == "prefix":
    apart["prefix"] = jnp.array([2, 0, 3])
    together["prefix"] = jnp.array([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]], bool)
  variables = arbitrary(model, row, **together)

  @jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def packed(variables):
    logits = model.apply(variables, row, **together)[:, :9].reshape(3, 3, V)
    return (logits**2).sum(), logits

  @jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def separate(variables):
    logits = model.apply(variables, alone, **apart)
    return (logits**2).sum(), logits

  jax.tree.map(functools.partial(close, atol=1e-3), packed(variables), separate(variables))
  given = evaluate(model, variables, row, positions=segment_positions(segments), **together)
  all_close(given, evaluate(model, variables, row, **together))


@pytest.mark.parametrize("name", ["gpt", "bert", "vit"])
def test_padding_changes_nothing(name):
  model, variables, inputs, _ = example(name)
  lengths = jnp.array([4, 6, 1])
  y = evaluate(model, variables, inputs, lengths=lengths)
  other = jnp.roll(inputs, 1, axis=0)
  real = sequence.length_mask(lengths, L)
  changed = jnp.where(real.reshape(real.shape + (1,) * (inputs.ndim - 2)), inputs, other)
  np.testing.assert_array_equal(
    jnp.where(real[..., None], y, 0),
    jnp.where(real[..., None], evaluate(model, variables, changed, lengths=lengths), 0),
  )
  close(y[:1, :4], evaluate(model, variables, inputs[:1, :4]))


def test_rows_of_padding_are_finite_and_so_are_gradients():
  model, inputs = BERT.clone(layers=1), tokens()
  variables = arbitrary(model, inputs)

  @jit
  @jax.value_and_grad
  def loss(variables):
    return (model.apply(variables, inputs, lengths=jnp.array([0, 6, 0])) ** 2).sum()

  assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(variables)))


# Two ways


def test_scanned_layers_are_unrolled_layers():
  """Outputs, hidden states and gradients; with and without recomputation."""
  model, variables, inputs, _ = example("llama")

  def run(model, variables):
    def loss(variables):
      y, hidden = model.apply(variables, inputs, hidden=True)
      return (y**2).mean(), (y, hidden)

    return jit(jax.value_and_grad(loss, has_aux=True))(variables)

  expected, gradient = run(model, variables)
  stacked = {"params": stack_layers(variables["params"])}
  for remat in (False, "dots_saveable"):
    result, scanned = run(model.clone(scan=True, remat=remat), stacked)
    all_close(result, expected)
    all_close(unstack_layers(scanned["params"]), gradient["params"])
  all_close(run(model.clone(remat=True), variables), (expected, gradient))


def test_stacked_parameters_are_those_of_the_scanned_model():
  fields = {"prefix": jnp.array([1, 1, 1])}

  def shapes(model):
    return jax.eval_shape(functools.partial(model.init, **fields), jax.random.key(0), tokens())

  plain, scanned = shapes(GEGLU)["params"], shapes(GEGLU.clone(scan=True))["params"]
  stacked = jax.eval_shape(stack_layers, plain)
  assert nn.get_partition_spec(stacked) == nn.get_partition_spec(scanned)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, scanned)
  back = jax.eval_shape(unstack_layers, scanned)
  assert nn.get_partition_spec(back) == nn.get_partition_spec(plain)
  p = arbitrary(GEGLU.clone(layers=12), tokens(), **fields)["params"]  # layer_10 is not layer_2
  jax.tree.map(np.testing.assert_array_equal, unstack_layers(stack_layers(p)), p)


CACHED = {
  "gpt": GPT, "llama": LLAMA, "scanned": LLAMA.clone(scan=True), "geglu": GEGLU,
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_continues_each_row_from_its_end(name):
  """Prompts of different lengths, then tokens two and one at a time: the logits of whole rows."""
  model, text = CACHED[name], tokens((B, 10), seed=1)
  lengths = jnp.array([2, 5, 1])
  prefix = {"prefix": lengths} if model.mask == "prefix" else {}
  variables = arbitrary(model, text, **prefix)
  whole = evaluate(model, variables, text, **prefix)
  prompt = jnp.where(sequence.length_mask(lengths, 5), text[:, :5], 7)
  cache = init_cache(model, B, 9)
  y, cache = evaluate(model, variables, prompt, lengths=lengths, cache=cache, **prefix)
  for b, n in enumerate(lengths):
    close(y[b, :n], whole[b, :n])
  for count in (2, 1, 1):
    at = cache.filled[:, None] + jnp.arange(count)
    y, cache = evaluate(model, variables, jnp.take_along_axis(text, at, 1), cache=cache)
    close(y, jnp.take_along_axis(whole, at[..., None], 1))
  np.testing.assert_array_equal(cache.filled, lengths + 4)


def test_a_bfloat16_cache():
  model, variables, inputs, _ = example("llama")
  cache = init_cache(model, B, L, jnp.bfloat16)
  y, cache = evaluate(model, variables, inputs, cache=cache)
  assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.bfloat16.dtype}
  np.testing.assert_allclose(y, evaluate(model, variables, inputs), atol=0.2)


def test_hidden_states():
  for name in ("gpt", "vit"):
    model, variables, inputs, _ = example(name)
    y, hidden = evaluate(model, variables, inputs, hidden=True)
    features = evaluate(model, variables, inputs, logits=False)
    assert hidden.shape == (model.layers + 1, B, L, H)
    np.testing.assert_array_equal(hidden[-1], features)
    if model.vocab is not None:
      close(model.apply(variables, features, method="unembed"), y)


def test_embeddings_may_take_the_place_of_tokens():
  for name in ("gpt", "sines"):
    model, variables, inputs, _ = example(name)
    x = model.apply(variables, inputs, method="embed")
    all_close(evaluate(model, variables, x), evaluate(model, variables, inputs))
  plain = VIT.clone(project=False)
  assert "projection" not in arbitrary(plain, jnp.zeros((1, L, H)))["params"]


def test_seeds_are_a_mapped_axis():
  model, inputs = LLAMA.clone(layers=1, dropout=0.3), tokens()
  seeds = [arbitrary(model, inputs, seed=i) for i in range(3)]
  keys = jax.random.split(jax.random.key(0), 3)

  def loss(variables, key):
    y = model.apply(variables, inputs, train=True, rngs={"dropout": key})
    return (y**2).mean()

  run = jax.value_and_grad(loss)
  together = jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *seeds), keys)
  one = jit(run)
  for i in range(3):
    all_close(jax.tree.map(lambda x, i=i: x[i], together), one(seeds[i], keys[i]))


@pytest.mark.parametrize(
  ("sizes", "name"),
  [
    ({"data": 2, "tensor": 2, "fsdp": 2}, "scanned"),
    ({"data": 2, "sequence": 2, "tensor": 2}, "bert"),
  ],
)
def test_sharded_is_unsharded(sizes, name):
  """Outputs and gradients on a mesh, with parameters where their names put them."""
  if jax.device_count() < 8:
    pytest.skip("needs eight devices")
  model = {"bert": BERT.clone(layers=1), **CACHED}[name]
  text = tokens((4, L))
  boxed = jax.eval_shape(model.init, jax.random.key(0), text)
  variables = arbitrary(model, text)
  segments = jnp.array([[1, 1, 2, 2, 2, 0]] * 4)

  def loss(variables, text):
    y = model.apply(variables, text, segments=segments)
    return (y**2).mean(), y

  run = jax.value_and_grad(loss, has_aux=True)
  expected = jit(run)(variables, text)
  mesh = meshes.make(sizes)
  rules = (*meshes.RULES, ("kv_heads", "tensor"))
  placed = meshes.variables_shardings(boxed, mesh, rules)
  rows = meshes.batch_sharding(mesh, rules, ("batch", None), 0)
  with meshes.use(mesh, rules):
    step = jit(run, in_shardings=(placed, rows), out_shardings=(None, placed))
    sharded = step(jax.device_put(variables, placed), jax.device_put(text, rows))
  all_close(sharded, expected)
  up = sharded[1]["params"]["layer" if model.scan else "layer_0"]["mlp"]["up"]["kernel"]
  assert up.sharding.spec[-1] == "tensor"


# Training, precision


def test_dropout_is_of_training_only():
  model, variables, inputs, _ = example("gpt")
  model = model.clone(dropout=0.5)

  def train(seed, model=model):
    rngs = {"dropout": jax.random.key(seed)}
    return evaluate(model, variables, inputs, train=True, rngs=rngs)

  plain = evaluate(GPT, variables, inputs)
  np.testing.assert_array_equal(evaluate(model, variables, inputs), plain)
  np.testing.assert_array_equal(train(0), train(0))
  assert np.abs(train(0) - train(1)).max() > 0.1
  with pytest.raises(Exception, match="dropout"):
    model.apply(variables, inputs, train=True)
  scanned = {"params": stack_layers(variables["params"])}
  y = evaluate(
    model.clone(scan=True), scanned, inputs, train=True, rngs={"dropout": jax.random.key(0)}
  )
  assert np.abs(y - plain).max() > 0.1


def test_a_dropout_rate_a_layer():
  """What the first layer gives is not touched by the second's rate."""
  model, variables, inputs, _ = example("gpt")
  model = model.clone(dropout=(0.0, 0.9))
  rngs = {"dropout": jax.random.key(0)}
  hidden = evaluate(model, variables, inputs, hidden=True, train=True, rngs=rngs)[1]
  plain = evaluate(GPT, variables, inputs, hidden=True)[1]
  np.testing.assert_array_equal(hidden[:2], plain[:2])
  assert np.abs(hidden[2] - plain[2]).max() > 0.1


def test_bfloat16_is_close_and_its_logits_are_float32():
  model, inputs = LLAMA.clone(embed_init=nn.initializers.normal(1.0)), tokens()
  variables = nn.meta.unbox(jit(model.init)(jax.random.key(0), inputs))
  low = model.clone(dtype=jnp.bfloat16)

  def loss(model, variables):
    y, hidden = model.apply(variables, inputs, hidden=True)
    return (y * jnp.cos(jnp.arange(V))).sum(), (y, hidden)

  run = jit(jax.value_and_grad(loss, 1, has_aux=True), static_argnums=0)
  (_, (y, hidden)), gradient = run(low, variables)
  (_, (exact, _)), exact_gradient = run(model, variables)
  assert y.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
  assert np.linalg.norm(y - exact) < 0.03 * np.linalg.norm(exact)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact_gradient), strict=True):
    assert a.dtype == jnp.float32
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b) + 0.02
  assert (y != y.astype(jnp.bfloat16)).any()  # not rounded on the way


# Hooks


class Scaled(nn.Module):
  """A projection with a frozen matrix in another collection and a trained scale."""

  features: int
  axes: tuple

  @nn.compact
  def __call__(self, x):
    shape = (x.shape[-1], self.features)
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
    frozen = self.variable("frozen", "kernel", lambda: init(self.make_rng("params"), shape))
    scale = self.param(
      "scale", nn.with_logical_partitioning(nn.initializers.ones, self.axes[1:]), shape[1:]
    )
    return x @ frozen.value.astype(x.dtype) * scale


def scaled(features, axes, *, name=None, dtype=None, use_bias=True):
  return Scaled(features, axes, name=name)


@pytest.mark.parametrize("scan", [False, True])
def test_another_linear_layer(scan):
  """With a collection of its own, stacked under scan too."""
  model = LLAMA.clone(dense=scaled, scan=scan, remat=scan)
  boxed = jit(model.init)(jax.random.key(0), tokens())
  variables = nn.meta.unbox(boxed)
  assert set(variables) == {"params", "frozen"}
  layer = variables["frozen"]["layer" if scan else "layer_0"]
  names = {"query", "key", "value", "out", "up", "gate", "down"}
  assert set(layer["attention"]) | set(layer["mlp"]) == names
  if scan:
    frozen = boxed["frozen"]["layer"]["mlp"]["up"]["kernel"]
    assert frozen.names == ("layers", "embed", "mlp") and frozen.value.shape == (2, H, 12)
    assert np.abs(np.diff(frozen.value, axis=0)).max() > 0.1
    plain = {name: unstack_layers(tree) for name, tree in variables.items() if name == "frozen"}
    plain["params"] = unstack_layers(variables["params"])
    all_close(
      evaluate(model, variables, tokens()),
      evaluate(LLAMA.clone(dense=scaled), plain, tokens()),
    )


def test_another_mixer_in_some_layers():
  both = functools.partial(recurrent.GRU, bidirectional=True)
  model = GPT.clone(mixer=(both, None), mask="full")
  lengths = jnp.array([4, 6, 1])
  variables = arbitrary(model, tokens(), lengths=lengths)
  layers = [variables["params"][f"layer_{i}"] for i in range(2)]
  assert [set(p) for p in layers] == [
    {"mixer", "mixer_norm", "mlp", "mlp_norm"}, {"attention", "attention_norm", "mlp", "mlp_norm"},
  ]  # fmt: skip
  real = sequence.length_mask(lengths, L)
  y, changed = (
    evaluate(model, variables, x, lengths=lengths)[real]
    for x in (tokens(), jnp.where(real, tokens(), 7))  # a mixer sees zeros at padding
  )
  np.testing.assert_array_equal(y, changed)
  everywhere = GPT.clone(mixer=recurrent.GRU, scan=True)
  y = evaluate(everywhere, arbitrary(everywhere, tokens()), tokens())
  assert np.isfinite(y).all()


def test_initial_projections_through_dense():
  model = GPT.clone(dense=functools.partial(dense, kernel_init=nn.initializers.zeros))
  variables = nn.meta.unbox(jit(model.init)(jax.random.key(0), tokens()))
  hidden = evaluate(model, variables, tokens(), hidden=True)[1]
  np.testing.assert_array_equal(hidden[0], hidden[1])


# Mistakes

FLOATS = jnp.zeros((B, L, 5))
MISTAKES = {
  "mask": (GPT.clone(mask="band"), {}, "mask='band'; accepted: causal, full, prefix"),
  "position": (GPT.clone(position="alibi"), {}, "position='alibi'; accepted: learned"),
  "norm": (GPT.clone(norm="batch"), {}, "norm='batch'; accepted: layer, rms"),
  "activation": (GPT.clone(activation="tanh"), {}, "activation='tanh'; accepted: gelu"),
  "head": (GPT.clone(head="linear"), {}, "head='linear'; accepted: tied, untied, mlm, None"),
  "remat": (GPT.clone(remat="some"), {}, "remat='some'; accepted: False, True, dots_saveable"),
  "no length": (GPT.clone(max_length=None), {}, "max_length=None; accepted: a number"),
  "length": (GPT.clone(max_length=5), {}, "length=6; accepted: up to max_length=5"),
  "positions": (GPT, {"positions": 11 + jnp.arange(L)[None]}, "positions: 16; accepted: 0 to 15"),
  "token": (GPT.clone(vocab=4), {}, "inputs: [0-9]+; accepted: 0 to 3"),
  "dropouts": (GPT.clone(dropout=(0.1,)), {}, "dropout: 1 given; accepted: one for each of 2"),
  "scanned": (GPT.clone(mixer=(None, None), scan=True), {}, "mixer: 2 given; accepted: one for"),
  "types": (GPT, {"types": tokens()}, "types: given; accepted: None"),
  "prefix": (GPT, {"prefix": jnp.ones(B, int)}, r"prefix: \(3,\); accepted: None, under mask='c"),
  "no prefix": (GEGLU, {}, r"prefix: None; accepted: \(B,\), under mask='prefix' without seg"),
  "packed prefix": (
    GEGLU,
    {"prefix": jnp.ones(B, int), "segments": tokens()},
    r"prefix: \(3,\); accepted: \(B, L\), under mask='prefix' with segments",
  ),
  "full": (BERT, {"inputs": FLOATS}, r"inputs: float32\[3, 6, 5\]; accepted: float \[B, L, 8\] or"),
  "vit": (VIT, {}, r"inputs: int32\[3, 6\]; accepted: float \[B, L, d\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
  model, fields, message = MISTAKES[name]
  fields = {"inputs": tokens()} | fields
  with pytest.raises(ValueError, match=message):
    model.init(jax.random.key(0), **fields)


def test_mistakes_with_caches():
  model, variables, inputs, _ = example("gpt")
  with pytest.raises(ValueError, match="mask='full'; accepted for a cache: causal or prefix"):
    init_cache(BERT, B, L)
  with pytest.raises(ValueError, match="mixer: given; accepted for a cache"):
    init_cache(GPT.clone(mixer=recurrent.GRU), B, L)
  with pytest.raises(ValueError, match="length=17; accepted: up to max_length=16"):
    init_cache(GPT, B, 17)
  with pytest.raises(ValueError, match="cache: end: 6; accepted: 0 to 5"):
    model.apply(variables, inputs, cache=init_cache(model, B, 5))
  with pytest.raises(ValueError, match="segments: given with a cache"):
    model.apply(variables, inputs, segments=inputs, cache=init_cache(model, B, L))
  with pytest.raises(ValueError, match="vocab=None with head=tied; accepted: both"):
    VIT.init(jax.random.key(0), FLOATS, method="unembed")


def test_a_token_outside_of_the_vocabulary_is_nan_under_jit():
  model, variables, _, _ = example("gpt")
  y = evaluate(model, variables, jnp.array([[1, V, 2], [0, -1, 2], [0, 1, 2]]))
  np.testing.assert_array_equal(np.isnan(y).any((1, 2)), [True, True, False])
