"""Judges: their features are those of classifiers that read held-out images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets import judges, pictures
from launch.task import State


def test_the_mlp_reads_held_out_digits_and_its_features_are_its_own():
  train, test = (pictures.load("mnist_5k", s, 8, texture=0.1) for s in ("train", "test"))
  network = judges.perceptron(train)
  x = test.fields["inputs"].reshape(len(test), -1)
  assert network.score(x, test.fields["labels"]) > 0.85
  variables = judges.variables("mlp", train)
  features = judges.features("mlp", variables, test)
  assert features.shape == (1000, 32)
  wanted = network.predict_proba(x)
  np.testing.assert_allclose(judges.probabilities(train, features), wanted, atol=1e-3)


def test_drawn_features_land_in_their_places():
  """Behind those of the batches before, one row for each model; padded with nothing."""
  train = pictures.load("mnist_5k", "train", 8, texture=0.1)
  variables = judges.variables("mlp", train)

  def draw(scale, noise, key):
    return scale * noise

  arguments = (draw, ["one", "two"], (8, 8, 1), 6, 2)
  init, update = judges.drawing("mlp", lambda key: jnp.ones(()), *arguments)
  made = nn.meta.unbox(init(jax.random.key(0)))
  shapes = [jax.tree.map(np.shape, tree) for tree in (variables, made["judge"])]
  assert shapes[0] == shapes[1]
  params = {"one": jnp.float32(1), "two": jnp.float32(2)}
  rest = judges.start(variables, 2, 6, 32)
  assert jax.tree.map(np.shape, rest["drawn"]) == jax.tree.map(np.shape, made["drawn"])
  state = State(step=0, key=None, params=params, variables=rest, opt_state=())
  noise = pictures.noise(6, (8, 8, 1)).gather(range(6))["inputs"]
  for step in (0, 2):
    batch = {"inputs": noise[2 * step : 2 * step + 2]}
    state, _ = update(state.replace(step=step), batch, jax.random.key(1))
  drawn = state.variables["drawn"]["features"]
  assert not drawn[:, 2:4].any()
  for row, scale in zip(drawn, (1, 2), strict=True):
    wanted = judges.MODULES["mlp"].apply(variables, scale * noise)
    np.testing.assert_allclose(row[:2], wanted[:2], atol=1e-5)
    np.testing.assert_allclose(row[4:], wanted[4:], atol=1e-5)
  with pytest.raises(ValueError, match="samples=5; accepted: a multiple of batch_size=2"):
    judges.drawing("mlp", lambda key: 0, draw, ["one"], (8, 8, 1), 5, 2)
