"""Deep feature reweighting: the last layer refitted on group-balanced features.

Kirichenko et al., arXiv:2204.02937, section 4. What a network's last layer reads is extracted,

    train, held = (extract(model, "classifier", variables, s) for s in (train_source, held_source))
    standard = standardised(train)
    layer = from_validation(standard(held), (1.0, 0.1), 20, np.random.RandomState(0))
    variables["params"]["classifier"] = parameters(layer, *standard)

standardised with the mean and deviation of the training set, and scikit-learn's liblinear solves

    min |w|_1 + |b| + C sum_i log(1 + exp(-y_i (w x_i + b))),   y_i = +-1

which penalises the intercept too. Random choices are those of the `random` given.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from sklearn.linear_model import LogisticRegression


class Features(NamedTuple):
  """x (N, D) float, labels (N,) in {0, 1}, groups (N,) int."""

  x: np.ndarray
  labels: np.ndarray
  groups: np.ndarray

  def rows(self, index: np.ndarray) -> "Features":
    return Features(self.x[index], self.labels[index], self.groups[index])


class Layer(NamedTuple):
  """Weights (D,) and intercept; above 0 is class 1."""

  weights: np.ndarray
  intercept: float

  def __call__(self, x_ND: np.ndarray) -> np.ndarray:
    return x_ND @ self.weights + self.intercept


class Standard(NamedTuple):
  """Mean and deviation (D,) of features; called, standardises others by them."""

  mean: np.ndarray
  deviation: np.ndarray

  def __call__(self, data: Features) -> Features:
    return data._replace(x=(data.x - self.mean) / self.deviation)


def standardised(train: Features) -> Standard:
  """The statistics of the training set; what does not vary there is only centred."""
  deviation = train.x.std(0)
  return Standard(train.x.mean(0), np.where(deviation == 0, 1, deviation))


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_by(model: nn.Module, layer: str, variables: Any, inputs: jax.Array) -> jax.Array:
  """What the submodule called `layer` reads first, (B, ...), in evaluation mode."""
  found = []

  def keep(call, arguments, options, context):
    if context.method_name == "__call__" and context.module.name == layer:
      found.append(arguments[0])
    return call(*arguments, **options)

  with nn.intercept_methods(keep):
    model.apply(variables, inputs, train=False)
  return found[0]


def extract(
  model: nn.Module, layer: str, variables: Any, source: Any, batch: int = 250
) -> Features:
  """Features, float64, of all examples {"inputs", "labels", "groups"} of a source.

  A source has a length and `gather(indices)`, as in `experiments.datasets.sources`.
  """
  parts = []
  for first in range(0, len(source), batch):
    rows = source.gather(np.arange(first, min(first + batch, len(source))))
    x = np.asarray(read_by(model, layer, variables, rows["inputs"]), np.float64)
    parts.append((x, rows["labels"], rows["groups"]))
  return Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def flat(fields: Mapping[str, np.ndarray]) -> Features:
  """Arrays {"inputs", "labels", "groups"} with their inputs, such as pixels, as features."""
  x = fields["inputs"].reshape(len(fields["labels"]), -1)
  return Features(x, fields["labels"], fields["groups"])


def linear(data: Features) -> Layer:
  """The usual logistic regression (L2, C = 1), for a probe or a control."""
  solver = LogisticRegression(max_iter=1_000).fit(data.x, data.labels)
  return Layer(solver.coef_[0], solver.intercept_[0])


def balanced(groups_N: np.ndarray, random: np.random.RandomState) -> np.ndarray:
  """Indices: of every group that there is, as many at random as the smallest has."""
  members = [np.flatnonzero(groups_N == g) for g in np.unique(groups_N)]
  least = min(map(len, members))
  return np.concatenate([random.permutation(m)[:least] for m in members])


def refit(
  data: Features,
  c: float,
  draws: int,
  random: np.random.RandomState,
  class_weights: Mapping[int, float] | None = None,
) -> Layer:
  """The mean of weights and of intercepts over L1 regressions on balanced subsamples."""
  layers = []
  for _ in range(draws):
    x, labels, _ = data.rows(balanced(data.groups, random))
    solver = LogisticRegression(
      l1_ratio=1.0, C=c, solver="liblinear", class_weight=class_weights, random_state=0
    )
    solver.fit(x, labels)
    layers.append((solver.coef_[0], solver.intercept_[0]))
  return Layer(np.mean([w for w, _ in layers], 0), float(np.mean([b for _, b in layers])))


def accuracy(layer: Layer, data: Features) -> float:
  """Over all examples."""
  return float(((layer(data.x) > 0) == data.labels).mean())


def worst_group(layer: Layer, data: Features) -> float:
  """Accuracy in the group where it is lowest."""
  hits_N = (layer(data.x) > 0) == data.labels
  return float(min(hits_N[data.groups == g].mean() for g in np.unique(data.groups)))


def halves(data: Features, random: np.random.RandomState) -> tuple[Features, Features]:
  """Each group cut into two at random; the first half has the odd one."""
  parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
  for g in np.unique(data.groups):
    members = random.permutation(np.flatnonzero(data.groups == g))
    for side in (0, 1):
      parts[side].append(members[side::2])
  first, second = (np.concatenate(part) for part in parts)
  return data.rows(first), data.rows(second)


def from_validation(
  data: Features, strengths: Sequence[float], draws: int, random: np.random.RandomState
) -> Layer:
  """DFR^Val_Tr: C by the worst group of one half, fitted to the other; then all, `draws` times."""
  fit, held = halves(data, random)
  scores = [worst_group(refit(fit, c, 1, random), held) for c in strengths]
  return refit(data, strengths[int(np.argmax(scores))], draws, random)


def from_training(
  data: Features,
  held: Features,
  strengths: Sequence[float],
  class_weights: Sequence[float],
  draws: int,
  random: np.random.RandomState,
) -> Layer:
  """DFR^Tr_Tr: C and the weight of either class by the worst group of the validation set `held`."""
  weights = [{0: w, 1: 1.0} for w in class_weights] + [{0: 1.0, 1: w} for w in class_weights]
  tried = list(itertools.product(strengths, weights))
  scores = [worst_group(refit(data, c, 1, random, w), held) for c, w in tried]
  c, chosen = tried[int(np.argmax(scores))]
  return refit(data, c, draws, random, chosen)


def parameters(layer: Layer, mean_D: np.ndarray, deviation_D: np.ndarray) -> dict[str, np.ndarray]:
  """A dense layer of two logits that does to raw features what `layer` does to standardised ones.

  `kernel` (D, 2) and `bias` (2,) float32; class 0 has logit 0.
  """
  weights_D = layer.weights / deviation_D
  bias = layer.intercept - weights_D @ mean_D
  kernel = np.stack([np.zeros_like(weights_D), weights_D], 1)
  return {"kernel": kernel.astype(np.float32), "bias": np.array([0, bias], np.float32)}
