"""Distances between sets of features: closed forms, invariances, bias."""

import numpy as np
import pytest
import scipy.linalg

from objectives import sample_quality as quality

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(300, 5)), RNG.normal(size=(200, 5)) @ RNG.normal(size=(5, 5)) + 0.5


def test_frechet_distance_is_its_definition():
  """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), with SciPy's matrix root."""
  a, b = np.cov(X, rowvar=False), np.cov(Y, rowvar=False)
  root = scipy.linalg.sqrtm(a @ b).real
  wanted = ((X.mean(0) - Y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
  assert quality.frechet_distance(X, Y) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_of_normals_in_closed_form():
  mean, other = np.array([1.0, 2.0]), np.array([0.0, 0.5])
  a, b = np.array([1.0, 4.0]), np.array([9.0, 0.25])
  wanted = 1 + 1.5**2 + (1 - 3) ** 2 + (2 - 0.5) ** 2
  got = quality.gaussian_distance(mean, np.diag(a), other, np.diag(b))
  assert got == pytest.approx(wanted)
  singular = quality.gaussian_distance(mean, np.diag([1.0, 0.0]), other, np.diag([4.0, 0.0]))
  assert singular == pytest.approx(1 + 1.5**2 + 1)


@pytest.mark.parametrize("distance", [quality.frechet_distance, quality.kernel_distance])
def test_invariances(distance):
  value = distance(X, Y)
  assert distance(Y, X) == pytest.approx(value)
  turn = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
  assert distance(X @ turn, Y @ turn) == pytest.approx(value)
  assert distance(X[::-1], Y[RNG.permutation(200)]) == pytest.approx(value)
  assert distance(X.astype(np.float32), Y.astype(np.float32)) == pytest.approx(value, rel=1e-4)


def test_shifts_and_scales_of_the_frechet_distance():
  assert quality.frechet_distance(X, X) == pytest.approx(0, abs=1e-9)
  assert quality.frechet_distance(X, X + 2) == pytest.approx(5 * 4)
  moved = quality.frechet_distance(3 * X + 1, 3 * Y + 1)
  assert moved == pytest.approx(9 * quality.frechet_distance(X, Y))


def test_kernel_distance_is_its_definition():
  def kernel(a, b):
    return (a @ b / 5 + 1) ** 3

  x, y = X[:7], Y[:6]
  same = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
  other = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 30
  cross = np.mean([kernel(a, b) for a in x for b in y])
  assert quality.kernel_distance(x, y) == pytest.approx(same + other - 2 * cross)


def test_the_kernel_distance_is_unbiased_and_the_frechet_distance_is_not():
  pairs = [RNG.normal(size=(2, 40, 3)) for _ in range(300)]
  kernel = np.array([quality.kernel_distance(a, b) for a, b in pairs])
  assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(300)
  small = np.mean([quality.frechet_distance(a, b) for a, b in pairs])
  large = np.mean([quality.frechet_distance(*RNG.normal(size=(2, 160, 3))) for _ in range(100)])
  assert small > 3 * large > 0


def test_class_entropies():
  sure = np.eye(4)[[0, 1, 2, 3]]
  assert quality.class_entropies(sure) == pytest.approx((0, np.log(4)))
  assert quality.class_entropies(sure[:1].repeat(3, axis=0)) == pytest.approx((0, 0))
  assert quality.class_entropies(np.full((3, 4), 0.25)) == pytest.approx((np.log(4), np.log(4)))


def test_mistakes():
  with pytest.raises(ValueError, match=r"features: \(300, 5\), \(200, 4\); accepted"):
    quality.frechet_distance(X, Y[:, :4])
  with pytest.raises(ValueError, match="examples=1; accepted: at least 2"):
    quality.kernel_distance(X, Y[:1])
