"""Attention against float64 numpy, rotary positions, grouped heads, masks by their definition."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sequence
from models.attention import (
  Attention,
  attention_mask,
  dense,
  rotate,
  segment_positions,
  sinusoids,
)

B, L, H = 2, 6, 8


def inputs(shape=(B, L, H), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def arbitrary(module, *args, **fields):
  """Unboxed parameters, biases too away from their initial zero."""
  variables = jax.eval_shape(functools.partial(module.init, **fields), jax.random.key(0), *args)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0]), x.dtype),
    nn.meta.unbox(variables),
  )


def turned(x, base):
  """Rotary positions as a complex product: x_i + i x_{i + D/2} times exp(i position rate)."""
  half = x.shape[-1] // 2
  rate = base ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(
    1j * np.arange(x.shape[1])[:, None, None] * rate
  )
  return np.concatenate([z.real, z.imag], -1)


def oracle(p, u, heads, kv_heads, allowed, base=None):
  """softmax(Q K' / sqrt(D)) V in float64, head by head."""

  def linear(name, x):
    return x @ np.asarray(p[name]["kernel"], np.float64) + np.asarray(p[name]["bias"], np.float64)

  u = np.asarray(u, np.float64)
  q, k, v = (linear(name, u) for name in ("query", "key", "value"))
  q, k, v = (x.reshape(*u.shape[:2], n, -1) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
  if base is not None:
    q, k = turned(q, base), turned(k, base)
  y = np.zeros(q.shape)
  for n in range(heads):
    kn, vn = k[:, :, n * kv_heads // heads], v[:, :, n * kv_heads // heads]
    scores = q[:, :, n] @ kn.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    e = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
    y[:, :, n] = e / e.sum(-1, keepdims=True) @ vn
  return linear("out", y.reshape(*u.shape[:2], -1))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rotary", [None, 100.0])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(kv_heads, rotary, causal):
  layer = Attention(4, kv_heads, head_dim=6, causal=causal, rotary=rotary)
  u = inputs()
  p = arbitrary(layer, u)
  allowed = np.tril(np.ones((L, L))) if causal else np.ones((L, L))
  expected = oracle(p["params"], u, 4, kv_heads, allowed, rotary)
  np.testing.assert_allclose(jax.jit(layer.apply)(p, u), expected, atol=1e-5)


def test_a_mask_decides_alone():
  layer, u = Attention(2, causal=True), inputs()
  p = arbitrary(layer, u)
  allowed = np.random.default_rng(0).random((B, L, L)) < 0.5
  allowed |= np.eye(L, dtype=bool)
  y = layer.apply(p, u, mask=jnp.asarray(allowed)[:, None])
  np.testing.assert_allclose(y, oracle(p["params"], u, 2, 2, allowed), atol=1e-5)


def test_grouped_heads_are_repeated_heads():
  u, grouped, full = inputs(), Attention(4, 2, rotary=10.0), Attention(4, rotary=10.0)
  p = arbitrary(grouped, u)["params"]

  def repeat(x):
    heads = x.reshape(*x.shape[:-1], 2, H // 4)
    return jnp.repeat(heads, 2, axis=-2).reshape(*x.shape[:-1], H)

  repeated = p | {name: jax.tree.map(repeat, p[name]) for name in ("key", "value")}
  y = grouped.apply({"params": p}, u)
  np.testing.assert_allclose(y, full.apply({"params": repeated}, u), atol=1e-6)


def test_rotary_scores_depend_on_distances_only():
  q, k = inputs((1, L, 2, H)), inputs((1, L, 2, H), 1)
  at = jnp.array([[0, 3, 4, 10, 11, 40]])

  def scores(at):
    return jnp.einsum("blnd,bsnd->bnls", rotate(q, at, 50.0), rotate(k, at, 50.0))

  np.testing.assert_allclose(scores(at + 17), scores(at), atol=1e-4)
  assert np.abs(scores(2 * at) - scores(at)).max() > 0.1
  np.testing.assert_allclose(
    jnp.linalg.norm(rotate(q, at), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
  )
  layer = Attention(2, causal=True, rotary=50.0)
  u = inputs()
  p = arbitrary(layer, u)
  at = jnp.arange(L)[None]
  np.testing.assert_allclose(
    layer.apply(p, u, positions=at + 5), layer.apply(p, u, positions=at), atol=1e-5
  )


def test_sinusoids():
  table = np.asarray(sinusoids(jnp.arange(7), 6))
  for position in range(7):
    for i in range(3):
      angle = position / 10_000 ** (2 * i / 6)
      expected = (np.sin(angle), np.cos(angle))
      np.testing.assert_allclose(table[position, 2 * i : 2 * i + 2], expected, atol=1e-6)
  assert sinusoids(jnp.zeros((2, 3), jnp.int32), 5).shape == (2, 3, 5)


def test_positions_in_segments():
  segments = jnp.array([[1, 1, 1, 2, 2, 0], [3, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(
    segment_positions(segments), [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
  )


def test_masks_by_their_definition():
  """Every rule at once, query by query and key by key."""
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
  leading = np.array([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]], bool)
  counts, lengths, start = np.array([3, 0]), np.array([4, 6]), np.array([2, 0])
  cases = [
    ("full", {}, 0),
    ("causal", {}, 0),
    ("causal", {"start": start, "slots": 9}, 0),
    ("causal", {"lengths": lengths, "start": start, "slots": 9}, 0),
    ("full", {"lengths": lengths}, 0),
    ("full", {"segments": segments}, 0),
    ("causal", {"segments": segments, "lengths": lengths}, 0),
    ("prefix", {"prefix": counts}, 1),
    ("prefix", {"prefix": leading, "segments": segments}, 2),
    ("prefix", {"prefix": counts, "lengths": lengths, "start": start, "slots": 9}, 1),
  ]
  for kind, fields, kinds in cases:
    mask = attention_mask(kind, L, **jax.tree.map(jnp.asarray, fields))
    slots = fields.get("slots", L)
    if mask is None:
      assert kind == "full" and not fields
      continue
    mask = np.broadcast_to(mask, (2, 1, L, slots))
    for b in range(2):
      first = start[b] if "start" in fields else 0
      for query in range(L):
        for key in range(slots):
          ok = kind == "full" or key <= first + query
          ok |= (kinds == 1 and key < counts[b]) or (kinds == 2 and bool(leading[b, key]))
          ok &= "lengths" not in fields or key < first + lengths[b]
          ok &= "segments" not in fields or segments[b, query] == segments[b, key]
          assert mask[b, 0, query, key] == ok, (kind, fields, b, query, key)


def test_attention_is_a_sequence_mixer():
  block = sequence.Block(functools.partial(Attention, 2, causal=True), "gelu", "layer")
  u = inputs()
  p = arbitrary(block, u)
  y = block.apply(p, u)
  changed = block.apply(p, u.at[:, 3, 0].add(1))
  np.testing.assert_array_equal(y[:, :3], changed[:, :3])
  assert (np.abs(y - changed)[:, 3:].max(-1) > 1e-4).all()


def test_a_query_that_sees_nothing_is_finite_and_so_are_gradients():
  layer, u = Attention(2), inputs()
  p = arbitrary(layer, u)
  mask = jnp.zeros((B, 1, L, L), bool)
  value, gradient = jax.value_and_grad(lambda p: (layer.apply(p, u, mask=mask) ** 2).sum())(p)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))
  np.testing.assert_array_equal(gradient["params"]["query"]["kernel"], 0)


def test_dense_takes_another_initialisation():
  p = dense(300, ("embed", "mlp"), kernel_init=nn.initializers.normal(0.5)).init(
    jax.random.key(0), inputs((1, 100))
  )["params"]
  assert p["kernel"].names == ("embed", "mlp") and p["bias"].names == ("mlp",)
  assert np.std(p["kernel"].value) == pytest.approx(0.5, rel=0.05)


MISTAKES = {
  "kv_heads": (Attention(4, 3), {}, "kv_heads=3; accepted: a divisor of heads=4"),
  "heads": (Attention(3), {}, "heads=3; accepted: a divisor of features=8"),
  "odd": (Attention(2, head_dim=3, rotary=10.0), {}, "head_dim=3; accepted: an even number"),
  "dt": (Attention(2), {"dt": jnp.ones((B, L))}, "dt: given; accepted"),
  "rescale": (Attention(2), {"step_rescale": 2.0}, "step_rescale=2.0; accepted"),
  "cache": (Attention(2), {"cache": ()}, "cache: given without mask or start"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
  layer, fields, message = MISTAKES[name]
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), inputs(), **fields)
