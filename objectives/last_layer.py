"""Deep feature reweighting: the last layer refitted on group-balanced features.

Kirichenko et al., arXiv:2204.02937, section 4. Features are standardised by the caller, with the
mean and deviation of the training set; scikit-learn's liblinear solves

    min |w|_1 + |b| + C sum_i log(1 + exp(-y_i (w x_i + b))),   y_i = +-1

which penalises the intercept too. Random choices are those of the `random` given.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
