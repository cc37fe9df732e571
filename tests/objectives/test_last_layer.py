"""Refits of the last layer: liblinear's objective, balance, and the merged dense layer."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy import optimize

from experiments.datasets import sources
from models import convnets
from objectives import last_layer


def data(count=200, seed=0):
  """The label is in feature 0, the background in feature 1 and mostly the same, the rest noise."""
  random = np.random.RandomState(seed)
  labels = random.randint(0, 2, count)
  backgrounds = np.where(random.rand(count) < 0.9, labels, 1 - labels)
  x = random.randn(count, 6)
  x[:, 0] += 2 * (2 * labels - 1)
  x[:, 1] = 6 * (2 * backgrounds - 1) + 0.1 * x[:, 1]
  return last_layer.Features(x, labels, 2 * labels + backgrounds)


def test_balance():
  groups = np.array([0] * 50 + [1] * 3 + [3] * 7)
  chosen = last_layer.balanced(groups, np.random.RandomState(0))
  assert np.bincount(groups[chosen]).tolist() == [3, 3, 0, 3]
  assert len(set(chosen)) == 9
  assert set(chosen) != set(last_layer.balanced(groups, np.random.RandomState(1)))


def test_one_regression_minimises_the_l1_objective_with_its_intercept():
  features = data(60)
  features = features.rows(last_layer.balanced(features.groups, np.random.RandomState(0)))
  layer = last_layer.refit(features, 0.3, 1, np.random.RandomState(0))
  sign = 2 * features.labels - 1

  def objective(wb):
    margin = sign * (features.x @ wb[:-1] + wb[-1])
    return np.abs(wb).sum() + 0.3 * np.logaddexp(0, -margin).sum()

  ours = objective(np.append(layer.weights, layer.intercept))
  split = optimize.minimize(  # w = u - v with u, v >= 0
    lambda uv: objective(uv[:7] - uv[7:]) + 0 * uv.sum(),
    np.full(14, 0.01),
    bounds=[(0, None)] * 14,
    options={"maxiter": 5000, "maxfun": 100_000},
  )
  assert ours <= split.fun + 1e-2
  assert (layer.weights == 0).any()  # sparse: L1, not L2


def test_weights_are_averaged_and_not_predictions():
  features = data()
  mean = last_layer.refit(features, 0.3, 5, np.random.RandomState(3))
  random = np.random.RandomState(3)
  each = [last_layer.refit(features, 0.3, 1, random) for _ in range(5)]
  np.testing.assert_allclose(mean.weights, np.mean([e.weights for e in each], 0))
  assert mean.intercept == pytest.approx(np.mean([e.intercept for e in each]))
  assert last_layer.refit(features, 0.3, 1, random, {0: 1.0, 1: 100.0})(features.x).mean() > 1


def test_halves_keep_every_group_and_share_nothing():
  features = data()
  features = features._replace(x=np.arange(200.0)[:, None])
  first, second = last_layer.halves(features, np.random.RandomState(0))
  assert sorted([*first.x[:, 0], *second.x[:, 0]]) == list(range(200))
  difference = np.bincount(first.groups) - np.bincount(second.groups)
  assert set(difference) <= {0, 1}


def test_balanced_refits_forget_the_background():
  features, fresh = data(), data(2000, seed=1)
  biased = last_layer.Layer(np.array([0.1, 1.0, 0, 0, 0, 0]), 0.0)
  assert last_layer.worst_group(biased, fresh) < 0.1
  strengths, random = (1.0, 0.1, 0.01), np.random.RandomState(0)
  by_val = last_layer.from_validation(features, strengths, 20, random)
  by_train = last_layer.from_training(features, data(seed=2), strengths, (1.0, 3.0), 10, random)
  for layer in (by_val, by_train):
    assert last_layer.worst_group(layer, fresh) > 0.9


def test_c_is_chosen_by_the_worst_group_alone(monkeypatch):
  tried = []

  def refit(chosen, c, draws, random, weights=None):
    tried.append((c, draws))
    return last_layer.Layer(np.array([1.0 if c == 0.1 else -1.0, 0, 0, 0, 0, 0]), 0.0)

  monkeypatch.setattr(last_layer, "refit", refit)
  last_layer.from_validation(data(), (1.0, 0.1, 0.01), 20, np.random.RandomState(0))
  assert tried == [(1.0, 1), (0.1, 1), (0.01, 1), (0.1, 20)]


def test_the_dense_layer_does_to_raw_features_what_the_layer_does_to_standardised_ones():
  random = np.random.RandomState(5)
  raw = 3 + 2 * random.randn(40, 6)
  mean, deviation = raw.mean(0), raw.std(0)
  layer = last_layer.Layer(random.randn(6), 0.7)
  dense = last_layer.parameters(layer, mean, deviation)
  logits = raw @ dense["kernel"] + dense["bias"]
  np.testing.assert_allclose(logits[:, 1], layer((raw - mean) / deviation), atol=1e-5)
  np.testing.assert_array_equal(logits[:, 0], np.zeros(40))
  assert dense["kernel"].dtype == dense["bias"].dtype == np.float32


def test_features_are_what_the_last_layer_reads():
  model = convnets.MLP((16, 8), 2)
  x, labels = np.random.RandomState(0).rand(7, 3, 3, 1).astype(np.float32), np.arange(7) % 2
  variables = nn.meta.unbox(model.init(jax.random.key(0), x))
  source = sources.InMemory({"inputs": x, "labels": labels, "groups": labels * 2})
  found = last_layer.extract(model, "layer_2", variables, source, batch=3)
  assert found.x.shape == (7, 8) and found.x.dtype == np.float64 and found.x.min() == 0  # ReLU
  layer = variables["params"]["layer_2"]
  wanted = model.apply(variables, x)
  np.testing.assert_allclose(found.x @ layer["kernel"] + layer["bias"], wanted, atol=1e-5)
  assert found.groups.tolist() == (labels * 2).tolist()


def test_features_of_resnet_are_pooled_and_in_evaluation_mode():
  model = convnets.ResNet(2, (1, 1, 1, 1), bottleneck=True)
  x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  variables = nn.meta.unbox(model.init(jax.random.key(1), x))
  found = last_layer.read_by(model, "classifier", variables, x)
  assert found.shape == (2, 2048)
  alone = last_layer.read_by(model, "classifier", variables, x[:1])
  np.testing.assert_allclose(found[:1], alone, atol=1e-4)  # batch statistics would tell them apart


def test_standardised_by_the_training_set():
  train = data()
  train.x[:, 3] = 5
  standard = last_layer.standardised(train)
  scaled = standard(train)
  np.testing.assert_allclose(scaled.x.mean(0), 0, atol=1e-12)
  np.testing.assert_allclose(scaled.x.std(0), [1, 1, 1, 0, 1, 1])
  other = standard(data(seed=1))
  assert np.abs(other.x.mean(0)).max() > 1e-3 and other.groups is not train.groups


def test_the_linear_control_and_its_accuracies():
  fields = {"inputs": data().x.reshape(200, 2, 3), "labels": data().labels, "groups": data().groups}
  flat = last_layer.flat(fields)
  np.testing.assert_array_equal(flat.x, data().x)
  layer = last_layer.linear(flat)
  hits = (flat.x @ layer.weights + layer.intercept > 0) == flat.labels
  assert last_layer.accuracy(layer, flat) == hits.mean()
  worst = min(hits[flat.groups == g].mean() for g in range(4))
  assert last_layer.worst_group(layer, flat) == worst < hits.mean()
