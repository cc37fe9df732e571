"""Decoding against full forward passes, brute force, numpy and the frequencies of softmax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from launch import mesh as meshes
from models.decoding import beam_search, generate, restrict, sample
from models.transformer import Transformer, stack_layers

V, H, L, T = 7, 8, 4, 5

LLAMA = Transformer(V, H, 2, 4, kv_heads=2, position="rotary", norm="rms", activation="swiglu")
MODELS = {
  "llama": LLAMA,
  "scanned": LLAMA.clone(scan=True),
  "learned": Transformer(V, H, 2, 2, max_length=L + T - 1),
  "prefix": LLAMA.clone(mask="prefix", position="none"),
}
LENGTHS = jnp.array([2, 4, 1])
PROMPTS = jax.random.randint(jax.random.key(3), (3, L), 0, V)
# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def arbitrary(model, seed=0):
  """Variables of a model that is neither sure nor uniform, and does not repeat itself."""
  fields = {"prefix": LENGTHS} if model.mask == "prefix" else {}
  plain = model.clone(scan=False)
  shapes = jax.eval_shape(functools.partial(plain.init, **fields), jax.random.key(0), PROMPTS)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jnp.float32(rng.normal(size=x.shape) / np.sqrt(len(x) / 2)), nn.meta.unbox(shapes)
  )["params"]
  return {"params": stack_layers(params) if model.scan else params}


@functools.cache
def example(name):
  return MODELS[name], arbitrary(MODELS[name])


@functools.partial(jit, static_argnums=0)
def log_softmax(model, variables, text, **fields):
  return jax.nn.log_softmax(model.apply(variables, text, **fields))


def continued(model, variables, row, tokens):
  """(T, V) log-probabilities behind prompt `row` and each of the tokens, by one full forward."""
  n = int(LENGTHS[row])
  text = jnp.concatenate([PROMPTS[row, :n], tokens])[None, :-1]
  text = jnp.pad(text, ((0, 0), (0, L + T - 1 - text.shape[1])))  # causal: no matter
  prefix = {"prefix": LENGTHS[row : row + 1]} if model.mask == "prefix" else {}
  return log_softmax(model, variables, text, **prefix)[0, n - 1 : n - 1 + len(tokens)]


@functools.partial(jit, static_argnums=0, static_argnames=("steps", "eos", "pad"))
def run(model, variables, prompts, lengths, key, **fields):
  return generate(model, variables, prompts, lengths, key, **fields)


@functools.partial(jit, static_argnums=0, static_argnames=("steps", "beams", "eos", "pad"))
def search(model, variables, prompts, lengths, **fields):
  return beam_search(model, variables, prompts, lengths, **fields)


KEY = jax.random.key(1)
GREEDY = {"steps": T, "temperature": 0.0}


# Sampling


LOGITS = jax.random.normal(jax.random.key(0), (4, 9)) * 2


@pytest.mark.parametrize("top_k", [None, 1, 3, 20])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
def test_what_may_be_drawn(top_k, top_p):
  """The k largest, then of these the fewest that hold `top_p` of their probability."""
  kept = np.isfinite(restrict(LOGITS, top_k=top_k, top_p=top_p))
  for row, keep in zip(np.asarray(LOGITS, np.float64), kept, strict=True):
    order = np.argsort(-row)[:top_k]
    p = np.exp(row[order]) / np.exp(row[order]).sum()
    expected, total = set(), 0.0
    for token, share in zip(order, p, strict=True):
      expected.add(token)
      total += share
      if top_p is not None and total >= top_p:
        break
    assert set(np.flatnonzero(keep)) == expected


def test_of_equals_the_first_are_kept_and_limits_may_be_traced():
  equal = jnp.zeros((1, 6))
  np.testing.assert_array_equal(np.isfinite(restrict(equal, top_k=2))[0], [1, 1, 0, 0, 0, 0])
  traced = jit(lambda k, p: restrict(LOGITS, top_k=k, top_p=p))(3, 0.7)
  np.testing.assert_array_equal(traced, restrict(LOGITS, top_k=3, top_p=0.7))


@pytest.mark.parametrize(
  "fields", [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 2.0, "top_p": 0.8}]
)
def test_frequencies_are_those_of_softmax(fields):
  """A chi-square test with a fixed key; p-values below 1e-3 would be a mistake."""
  logits = LOGITS[0] / 2
  draws = 20_000
  tokens = jit(lambda key: sample(jnp.tile(logits, (draws, 1)), key, **fields))(KEY)
  limits = {k: v for k, v in fields.items() if k != "temperature"}
  p = np.float64(jax.nn.softmax(restrict(logits / fields.get("temperature", 1.0), **limits)))
  seen = np.bincount(tokens, minlength=len(p))
  assert (seen[p == 0] == 0).all()
  assert scipy.stats.chisquare(seen[p > 0], draws * p[p > 0] / p.sum()).pvalue > 1e-3


def test_temperature():
  greedy = jnp.argmax(LOGITS, -1)
  np.testing.assert_array_equal(sample(LOGITS, KEY, temperature=0), greedy)
  warm = jnp.array([0.0, 1.0, 0.0, 1e-3])
  tokens = jit(
    lambda t: jax.vmap(lambda k: sample(LOGITS, k, temperature=t))(jax.random.split(KEY))
  )(warm)
  for row in (0, 2, 3):
    np.testing.assert_array_equal(tokens[:, row], greedy[row])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"top_k": 0}, "top_k=0; accepted: 1 or more"),
    ({"top_p": 0.0}, r"top_p=0.0; accepted: above 0, up to 1"),
    ({"top_p": 1.5}, r"top_p=1.5; accepted: above 0, up to 1"),
  ],
)
def test_mistakes_in_limits(fields, message):
  with pytest.raises(ValueError, match=message):
    sample(LOGITS, KEY, **fields)


# Generation


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_full_forwards(name):
  model, variables = example(name)
  tokens, log_probs = run(model, variables, PROMPTS, LENGTHS, KEY, **GREEDY)
  assert tokens.shape == log_probs.shape == (3, T) and tokens.dtype == jnp.int32
  for row in range(3):
    expected = continued(model, variables, row, tokens[row])
    np.testing.assert_array_equal(tokens[row], expected.argmax(-1))
    np.testing.assert_allclose(log_probs[row], expected.max(-1), atol=1e-4)


def test_log_probs_are_the_models_whatever_is_drawn():
  model, variables = example("llama")
  fields = {"steps": T, "temperature": 3.0, "top_k": 5}
  tokens, log_probs = run(model, variables, PROMPTS, LENGTHS, KEY, **fields)
  assert len(np.unique(tokens)) > 2
  for row in range(3):
    expected = continued(model, variables, row, tokens[row])
    np.testing.assert_allclose(
      log_probs[row], jnp.take_along_axis(expected, tokens[row][:, None], -1)[:, 0], atol=1e-4
    )


def test_ragged_prompts_are_prompts_alone():
  model, variables = example("learned")
  together = run(model, variables, PROMPTS, LENGTHS, KEY, **GREEDY)
  junk = jnp.where(jnp.arange(L) < LENGTHS[:, None], PROMPTS, V - 1 - PROMPTS)
  np.testing.assert_array_equal(run(model, variables, junk, LENGTHS, KEY, **GREEDY)[0], together[0])
  for row in range(3):
    n = int(LENGTHS[row])
    alone = run(model, variables, PROMPTS[row : row + 1, :n], LENGTHS[row : row + 1], KEY, **GREEDY)
    np.testing.assert_array_equal(alone[0][0], together[0][row])
    np.testing.assert_allclose(alone[1][0], together[1][row], atol=1e-5)


def test_nothing_follows_the_end():
  model, variables = example("llama")
  free, free_log_probs = run(model, variables, PROMPTS, LENGTHS, KEY, **GREEDY)
  eos = int(free[0, 1])
  tokens, log_probs = run(model, variables, PROMPTS, LENGTHS, KEY, eos=eos, pad=9, **GREEDY)
  for row in range(3):
    hits = np.flatnonzero(free[row] == eos)
    n = hits[0] + 1 if len(hits) else T
    np.testing.assert_array_equal(tokens[row, :n], free[row, :n])
    np.testing.assert_allclose(log_probs[row, :n], free_log_probs[row, :n], atol=1e-6)
    np.testing.assert_array_equal(tokens[row, n:], 9)
    np.testing.assert_array_equal(log_probs[row, n:], 0)
  assert (np.asarray(tokens) == 9).any()


def test_one_program_serves_all_lengths_and_temperatures():
  model, variables = example("llama")
  count = 0

  @jax.jit
  def program(lengths, temperature):
    nonlocal count
    count += 1
    return generate(model, variables, PROMPTS, lengths, KEY, steps=2, temperature=temperature)[0]

  program(LENGTHS, 1.0)
  tokens = program(LENGTHS[::-1], 0.0)
  assert count == 1
  expected = run(model, variables, PROMPTS, LENGTHS[::-1], KEY, steps=2, temperature=0.0)[0]
  np.testing.assert_array_equal(tokens, expected)


def test_seeds_are_a_mapped_axis_and_rollouts_pass_no_gradient():
  """A policy gradient over seeds: sampling inside the loss, by the parameters it differentiates."""
  model = MODELS["llama"].clone(layers=1)
  seeds = [arbitrary(model, seed) for seed in range(2)]
  keys = jax.random.split(KEY, 2)

  def loss(variables, key):
    tokens, log_probs = generate(model, variables, PROMPTS, LENGTHS, key, steps=3, eos=0)
    logits = model.apply(variables, tokens)
    score = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()
    return score + log_probs.mean(), tokens

  step = jax.value_and_grad(loss, has_aux=True)
  (_, tokens), together = jit(jax.vmap(step))(jax.tree.map(lambda *x: jnp.stack(x), *seeds), keys)
  one = jit(step)

  def given(variables, tokens):
    logits = model.apply(variables, tokens)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()

  for i in range(2):
    (_, alone), gradient = one(seeds[i], keys[i])
    np.testing.assert_array_equal(tokens[i], alone)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3),
      jax.tree.map(lambda x, i=i: x[i], together),
      gradient,
    )
  constant = jit(jax.grad(given))(seeds[1], alone)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), gradient, constant
  )


def test_a_prompt_may_be_embeddings():
  model, variables = example("llama")
  soft = model.apply(variables, PROMPTS, method="embed")
  np.testing.assert_array_equal(
    run(model, variables, soft, LENGTHS, KEY, **GREEDY)[0],
    run(model, variables, PROMPTS, LENGTHS, KEY, **GREEDY)[0],
  )


@pytest.mark.parametrize("name", ["llama", "scanned"])
def test_sharded_is_unsharded(name):
  if jax.device_count() < 8:
    pytest.skip("needs eight devices")
  model, variables = example(name)
  prompts, lengths = jnp.tile(PROMPTS[:2], (2, 1)), jnp.tile(LENGTHS[:2], 2)

  def decode(variables, prompts, lengths):
    greedy = generate(model, variables, prompts, lengths, KEY, **GREEDY)
    return greedy, beam_search(model, variables, prompts, lengths, steps=3, beams=2)

  expected = jit(decode)(variables, prompts, lengths)
  mesh = meshes.make({"data": 2, "tensor": 2, "fsdp": 2})
  boxed = jax.eval_shape(model.init, jax.random.key(0), PROMPTS)
  placed = meshes.variables_shardings(boxed, mesh, (*meshes.RULES, ("kv_heads", "tensor")))
  rows = meshes.batch_sharding(mesh, meshes.RULES, ("batch",), 0)
  with meshes.use(mesh, meshes.RULES):
    step = jit(decode, in_shardings=(placed, rows, rows))
    sharded = step(*jax.device_put((variables, prompts, lengths), (placed, rows, rows)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), sharded, expected)


def test_mistakes():
  model, variables = example("learned")
  with pytest.raises(ValueError, match="length=9; accepted: up to max_length=8"):
    generate(model, variables, PROMPTS, LENGTHS, KEY, steps=T + 1)
  with pytest.raises(ValueError, match="lengths: 0; accepted: 1 to 4"):
    generate(model, variables, PROMPTS, LENGTHS - 1, KEY, steps=T)
  with pytest.raises(ValueError, match="lengths: 5; accepted: 1 to 4"):
    beam_search(model, variables, PROMPTS, LENGTHS + 1, steps=T, beams=2)


# Beam search


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_is_greedy(name):
  model, variables = example(name)
  tokens, log_probs = run(model, variables, PROMPTS, LENGTHS, KEY, eos=2, **GREEDY)
  beams, scores = search(model, variables, PROMPTS, LENGTHS, steps=T, beams=1, eos=2)
  np.testing.assert_array_equal(beams[:, 0], tokens)
  np.testing.assert_allclose(scores[:, 0], log_probs.sum(-1), atol=1e-4)


@pytest.mark.parametrize(("eos", "length_penalty"), [(None, 0.0), (2, 0.0), (0, 1.5)])
def test_a_beam_that_holds_everything_finds_the_best(eos, length_penalty):
  """Three tokens, three steps: 27 beams against every continuation there is."""
  model = LLAMA.clone(vocab=3, layers=1)
  variables = arbitrary(model)
  prompts = PROMPTS % 3
  tokens, scores = search(
    model, variables, prompts, LENGTHS, steps=3, beams=27, eos=eos, length_penalty=length_penalty
  )
  every = np.array(list(itertools.product(range(3), repeat=3)))
  for row in range(3):
    n = int(LENGTHS[row])
    text = np.concatenate([np.tile(prompts[row, :n], (27, 1)), every], 1)[:, :-1]
    text = np.pad(text, ((0, 0), (0, L + 2 - text.shape[1])))
    log_probs = np.asarray(log_softmax(model, variables, jnp.asarray(text)))[:, n - 1 : n + 2]
    found = {}
    for candidate, log_prob in zip(every, log_probs, strict=True):
      ends = np.flatnonzero(candidate == eos)
      count = ends[0] + 1 if len(ends) else 3
      text = (*candidate[:count], *[0] * (3 - count))
      total = sum(log_prob[t, candidate[t]] for t in range(count))
      found[(text, count)] = total / ((5 + count) / 6) ** length_penalty
    best = sorted(found.items(), key=lambda item: -item[1])
    np.testing.assert_allclose(scores[row, : len(best)], [s for _, s in best], atol=1e-4)
    assert (scores[row, len(best) :] == -np.inf).all()
    for (text, _), score in best[:3]:
      at = int(np.abs(scores[row] - score).argmin())
      np.testing.assert_array_equal(tokens[row, at], text)


def test_beams_are_sorted_and_no_worse_than_greedy():
  model, variables = example("scanned")
  _, log_probs = run(model, variables, PROMPTS, LENGTHS, KEY, **GREEDY)
  tokens, scores = search(model, variables, PROMPTS, LENGTHS, steps=T, beams=4)
  assert tokens.shape == (3, 4, T) and (np.diff(scores, axis=1) <= 0).all()
  assert (scores[:, 0] >= log_probs.sum(-1) - 1e-4).all()
  for row in range(3):
    assert len({tuple(np.asarray(beam)) for beam in tokens[row]}) == 4
    for beam, score in zip(tokens[row], scores[row], strict=True):
      expected = continued(model, variables, row, beam)
      total = jnp.take_along_axis(expected, beam[:, None], -1).sum()
      np.testing.assert_allclose(score, total, atol=1e-4)
