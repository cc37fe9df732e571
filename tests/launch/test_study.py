import numpy as np
import pytest
from scipy import stats

from launch import Claim, ConfigurationError, Study, judge
from launch.study import difference, interval, paired

LOW, HIGH = [0.50, 0.52, 0.51], [0.70, 0.71, 0.69]


def test_intervals_agree_with_scipy():
  x, y = np.array([1.0, 2.5, 2.0, 4.0]), np.array([0.5, 0.25, 1.0])
  low, high = stats.t.interval(0.95, 3, x.mean(), stats.sem(x))
  np.testing.assert_allclose(interval(x), (x.mean(), low, high))
  welch = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
  np.testing.assert_allclose(difference(x, y), (x.mean() - y.mean(), welch.low, welch.high))
  same = stats.ttest_rel(x[:3], y).confidence_interval()
  np.testing.assert_allclose(paired(x[:3], y)[1:], (same.low, same.high))


def test_the_interval_covers_at_its_rate():
  random = np.random.RandomState(0)
  inside = 0
  for _ in range(2000):
    _, low, high = difference(1 + random.randn(4), 3 * random.randn(4))
    inside += low <= 1 <= high
  assert 0.93 < inside / 2000 < 0.98


@pytest.mark.parametrize(
  ("margins", "verdict"),
  [
    ({"at_least": 0.1}, "held"),
    ({"at_least": 0.19}, "undecided"),
    ({"at_least": 0.3}, "refuted"),
    ({"at_most": 0.3}, "held"),
    ({"at_most": 0.1}, "refuted"),
    ({"at_least": 0.3, "refuted_below": 0.0}, "undecided"),
    ({"at_most": 0.1, "refuted_above": 0.5}, "undecided"),
    ({"at_least": 0.1, "at_most": 0.3}, "held"),
    ({"at_least": -0.3, "at_most": 0.1}, "refuted"),
  ],
)
def test_verdicts_of_a_difference(margins, verdict):
  claim = Claim("c", "m", "a", "b", **margins)
  result = judge(claim, {"a": {"m": HIGH}, "b": {"m": LOW}})
  assert result["verdict"] == verdict
  assert result["estimate"] == pytest.approx(0.19)
  assert result["seeds"] == 3


def test_a_ratio_is_judged_on_logarithms():
  claim = Claim("c", "m", "a", "b", ratio=True, at_most=0.9)
  result = judge(claim, {"a": {"m": LOW}, "b": {"m": HIGH}})
  assert result["verdict"] == "held"
  assert result["estimate"] == pytest.approx(stats.gmean(LOW) / stats.gmean(HIGH))
  swapped = judge(claim, {"a": {"m": HIGH}, "b": {"m": LOW}})
  np.testing.assert_allclose(swapped["interval"][0], 1 / result["interval"][1])


def test_two_metrics_of_one_arm_are_paired():
  claim = Claim("c", "m", "a", "a", against_metric="n", at_least=0.05)
  noisy = {"m": [0.1, 0.5, 0.9], "n": [0.0, 0.4, 0.8]}
  assert judge(claim, {"a": noisy})["verdict"] == "held"


def test_what_cannot_be_judged_is_undecided():
  claim = Claim("c", "m", "a", "b", at_least=0.0)
  for arms in ({}, {"a": {"m": HIGH}}, {"a": {"m": HIGH}, "b": {"m": [0.1, float("nan")]}}):
    assert judge(claim, arms)["verdict"] == "undecided"
    assert judge(claim, arms)["estimate"] is None
  one = judge(claim, {"a": {"m": [1.0]}, "b": {"m": [0.0]}})
  assert one["verdict"] == "undecided"
  assert one["interval"] == [None, None]


def test_claims_are_checked_when_written():
  with pytest.raises(ConfigurationError, match="no margin"):
    Claim("c", "m", "a")
  with pytest.raises(ConfigurationError, match="needs an arm"):
    Claim("c", "m", "a", ratio=True, at_most=1.0)
  with pytest.raises(ConfigurationError, match="unknown arm 'b'"):
    Study("s", arms={"a": {}}, claims=[Claim("c", "m", "a", "b", at_least=0.0)])
