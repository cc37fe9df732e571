"""EfficientNet-lite: sizes, statistics, axes. Its outputs: test_pretrained_parity.py."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.efficientnet import EfficientNetLite
from models.sequence import parameter_count

# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
IMAGES = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))


def test_parameter_counts():
  """Millions: 4.7, 5.4, 6.1, 8.2 and 13.0 are those of lite0 to lite4 as published (recalled)."""
  factors = {(1, 1): 4.7, (1, 1.1): 5.4, (1.1, 1.2): 6.1, (1.2, 1.4): 8.2, (1.4, 1.8): 13.0}
  for (width, depth), millions in factors.items():
    model = EfficientNetLite(width=width, depth=depth)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert round(parameter_count(variables) / 1e6, 1) == millions


def test_every_parameter_names_its_axes():
  variables = jax.eval_shape(EfficientNetLite().init, jax.random.key(0), IMAGES)
  leaves = jax.tree.leaves(variables["params"], is_leaf=lambda x: isinstance(x, nn.Partitioned))
  assert all(isinstance(x, nn.LogicallyPartitioned) for x in leaves)


def draw(model):
  """Variables of which only the kernels are random."""
  rng = np.random.default_rng(0)

  def leaf(path, x):
    if path[-1].key == "kernel":
      return rng.normal(size=x.shape, scale=np.prod(x.shape[:-1]) ** -0.5).astype(x.dtype)
    return np.full(x.shape, path[-1].key in ("scale", "var"), x.dtype)

  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
  return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_updates_statistics_and_evaluation_uses_them(dtype):
  model = EfficientNetLite(None, width=0.25, depth=0.3, momentum=0.0, dtype=dtype)
  variables = draw(model)
  train = jit(lambda v: model.apply(v, IMAGES, train=True, mutable="batch_stats"))
  features, updated = train(variables)
  assert features.shape == (4, 1280)
  assert features.dtype == jnp.float32
  # Without momentum the statistics are the batch's, so that evaluation repeats the step.
  evaluate = jit(lambda v: model.apply(v, IMAGES))
  tolerance = 2e-3 if dtype == jnp.float32 else 0.2
  np.testing.assert_allclose(evaluate(variables | updated), features, atol=tolerance)
  assert jnp.abs(evaluate(variables) - features).max() > 0.3


def test_dropout_is_of_training_only():
  model = EfficientNetLite(3, width=0.25, depth=0.3, dropout=0.5)
  variables = draw(model)

  @jit
  def train(key):
    rngs = {"dropout": key}
    return model.apply(variables, IMAGES, train=True, rngs=rngs, mutable="batch_stats")[0]

  assert not np.array_equal(train(jax.random.key(0)), train(jax.random.key(1)))
  assert train(jax.random.key(0)).shape == (4, 3)
