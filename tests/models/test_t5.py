"""T5: buckets, who sees whom, axes. Its outputs: test_pretrained_parity.py."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.t5 import T5, relative_buckets

# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MODEL = T5(20, 16, 2, 2, head_dim=6, mlp=12, decoder_layers=1, buckets=8, max_distance=6)
INPUTS = jax.random.randint(jax.random.key(0), (3, 7), 0, 20)
TARGETS = jax.random.randint(jax.random.key(1), (3, 5), 0, 20)


@functools.cache
def variables(model=MODEL):
  return nn.meta.unbox(jit(model.init)(jax.random.key(2), INPUTS, TARGETS))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_their_definition(buckets, max_distance, causal):
  def bucket(key, query):
    side = 0 if causal else buckets // 2 * (key > query)
    n = buckets if causal else buckets // 2
    distance = max(query - key, 0) if causal else abs(query - key)
    if distance < n // 2:
      return side + distance
    # A rational power instead of logarithms: exact at the edges.
    steps = sum(
      distance >= n // 2 * (max_distance / (n // 2)) ** (i / (n - n // 2)) - 1e-9
      for i in range(1, n - n // 2)
    )
    return side + n // 2 + steps

  found = relative_buckets(40, 150, buckets=buckets, max_distance=max_distance, causal=causal)
  wanted = [[bucket(key, query) for key in range(150)] for query in range(40)]
  np.testing.assert_array_equal(found, wanted)


def test_every_parameter_names_its_axes():
  boxed = jax.eval_shape(MODEL.clone(tied=False).init, jax.random.key(0), INPUTS, TARGETS)
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  assert all(isinstance(x, nn.LogicallyPartitioned) for x in leaves)


def test_who_sees_whom():
  v, lengths = variables(), jnp.array([7, 4, 2])
  apply = jit(lambda x, y: MODEL.apply(v, x, y, lengths=lengths))
  base = apply(INPUTS, TARGETS)
  # The decoder sees the targets up to its own.
  later = apply(INPUTS, TARGETS.at[:, 3].add(1) % 20)
  np.testing.assert_array_equal(later[:, :3], base[:, :3])
  assert jnp.abs(later[:, 3:] - base[:, 3:]).max(axis=(1, 2)).min() > 1e-3
  # All see the inputs, the padding nobody.
  padded = apply(INPUTS.at[:, 4:].add(1) % 20, TARGETS)
  np.testing.assert_allclose(padded[1:], base[1:], atol=1e-6)
  assert jnp.abs(padded[0] - base[0]).max(axis=-1).min() > 1e-4
  # Padded to the right or not is the same.
  short = jit(MODEL.apply)(v, INPUTS[2:, :2], TARGETS[2:])
  np.testing.assert_allclose(short, base[2:], atol=1e-5)


def test_in_two_parts():
  v = variables()
  memory = jit(functools.partial(MODEL.apply, method="encode"))(v, INPUTS)
  logits = jit(functools.partial(MODEL.apply, method="decode"))(v, TARGETS, memory)
  np.testing.assert_allclose(logits, jit(MODEL.apply)(v, INPUTS, TARGETS), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_initial_logits_are_of_order_one_and_float32(dtype):
  model = T5(50, 64, 2, 4, head_dim=16, dtype=dtype)
  logits = jit(lambda v: model.apply(v, INPUTS, TARGETS))(variables(model))
  assert logits.dtype == jnp.float32
  assert 0.3 < logits.std() < 3


def test_dropout_is_of_training_only():
  model, v = MODEL.clone(dropout=0.5), variables()
  apply = jit(lambda key: model.apply(v, INPUTS, TARGETS, train=True, rngs={"dropout": key}))
  assert not np.array_equal(apply(jax.random.key(0)), apply(jax.random.key(1)))
  plain, kept = (jit(m.apply)(v, INPUTS, TARGETS) for m in (MODEL, model))
  np.testing.assert_array_equal(plain, kept)
