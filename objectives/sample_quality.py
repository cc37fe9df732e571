"""How far generated examples are from real ones, by the features of a classifier.

Features are (N, D) arrays on the host; everything is float64. Distances between sets of different
sizes are not comparable: the Fréchet distance of n samples is biased upwards by about 1/n.
"""

import numpy as np
from sklearn.metrics.pairwise import polynomial_kernel


def frechet_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
  """Squared Wasserstein distance of the normals fitted to two sets (FID, arXiv:1706.08500).

  Raises: ValueError for sets of fewer than two rows or of different widths.
  """
  _check(x_ND, y_MD)
  fits = ((np.mean(f, axis=0), np.atleast_2d(np.cov(f, rowvar=False))) for f in _wide(x_ND, y_MD))
  return gaussian_distance(*next(fits), *next(fits))


def gaussian_distance(
  mean_D: np.ndarray, cov_DD: np.ndarray, other_D: np.ndarray, other_DD: np.ndarray
) -> float:
  """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), the trace of the root by singular values."""
  roots = [_root(c) for c in (cov_DD, other_DD)]
  overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
  return float(
    ((mean_D - other_D) ** 2).sum() + np.trace(cov_DD) + np.trace(other_DD) - 2 * overlap
  )


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
  """Squared maximum mean discrepancy under (x.y / D + 1)^3 (KID, arXiv:1801.01401), unbiased.

  It may be negative. Raises: ValueError as `frechet_distance`.
  """
  _check(x_ND, y_MD)
  x_ND, y_MD = _wide(x_ND, y_MD)

  def within(f: np.ndarray) -> float:
    kernel = polynomial_kernel(f, degree=3)
    return (kernel.sum() - np.trace(kernel)) / (len(f) * (len(f) - 1))

  return float(within(x_ND) + within(y_MD) - 2 * polynomial_kernel(x_ND, y_MD, degree=3).mean())


DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance}


def class_entropies(p_NC: np.ndarray) -> tuple[float, float]:
  """(mean entropy of a sample's class probabilities, entropy of their mean), in nats.

  Low and high are good: samples that are clearly of a class, and classes all covered. The
  difference is the logarithm of the Inception score (arXiv:1606.03498).
  """

  def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)

  p_NC = np.asarray(p_NC, np.float64)
  return float(entropy(p_NC).mean()), float(entropy(p_NC.mean(axis=0)))


def _root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _wide(*sets: np.ndarray) -> list[np.ndarray]:
  return [np.asarray(f, np.float64) for f in sets]


def _check(x_ND: np.ndarray, y_MD: np.ndarray) -> None:
  if x_ND.ndim != 2 or y_MD.ndim != 2 or x_ND.shape[1] != y_MD.shape[1]:
    raise ValueError(f"features: {x_ND.shape}, {y_MD.shape}; accepted: (N, D) and (M, D)")
  if min(len(x_ND), len(y_MD)) < 2:
    raise ValueError(f"examples={min(len(x_ND), len(y_MD))}; accepted: at least 2 in each set")
