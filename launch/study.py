"""Study and Claim: what is compared, and what would refute it, as data."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from launch.errors import ConfigurationError

CONFIDENCE = 0.95

Verdict = Literal["held", "refuted", "undecided"]
Values = Sequence[float] | np.ndarray
ArmMetrics = Mapping[str, Sequence[float]]  # metric -> a value a seed


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement about a metric of one arm, alone or against another arm.

  The estimate is the mean over seeds of `of`; with `against`, the difference of the two means; with
  `against` and `ratio`, the ratio of their geometric means. Its 95 % interval is Student's (Welch's
  for two arms, paired by seed for two metrics of one arm, on logarithms for ratios).

  Held: the whole interval satisfies `at_least` / `at_most`. Refuted: the whole interval is beyond
  `refuted_below` / `refuted_above`, which are the same margins unless given. Else undecided.

  Attributes:
    name: what is claimed, in words.
    metric: such as `test/accuracy`.
    of: the arm it is about.
    against: the arm it is compared with.
    against_metric: the metric of that arm, where it is another one.
    at_least: lower margin.
    at_most: upper margin.
    ratio: compare by ratio, for positive metrics.
    refuted_below: refutes when the whole interval is below; default `at_least`.
    refuted_above: refutes when the whole interval is above; default `at_most`.
  """

  name: str
  metric: str
  of: str
  against: str | None = None
  against_metric: str | None = None
  at_least: float | None = None
  at_most: float | None = None
  ratio: bool = False
  refuted_below: float | None = None
  refuted_above: float | None = None

  def __post_init__(self) -> None:
    if self.at_least is None and self.at_most is None:
      raise ConfigurationError(f"claim {self.name!r} has no margin; give at_least or at_most")
    if self.ratio and self.against is None:
      raise ConfigurationError(f"claim {self.name!r} is a ratio and needs an arm `against`")

  @property
  def statement(self) -> str:
    """The rule in words, written from the data that judges it."""
    what = f"{self.metric} of {self.of}"
    if self.against is not None:
      other = self.against_metric or self.metric
      what += f" {'over' if self.ratio else 'minus'} {other} of {self.against}"
    bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
    bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
    rule = f"{what} is {' and '.join(bounds)}"
    if self.refuted_below is not None:
      rule += f"; refuted below {self.refuted_below:g}"
    if self.refuted_above is not None:
      rule += f"; refuted above {self.refuted_above:g}"
    return rule

  @property
  def margin(self) -> float | list[float]:
    bounds = [b for b in (self.at_least, self.at_most) if b is not None]
    return bounds[0] if len(bounds) == 1 else bounds


@dataclasses.dataclass(frozen=True)
class Study:
  """One comparison.

  Attributes:
    name: what `--study` calls it.
    arms: name -> overrides (dotted keys of the configuration): method, baselines, ablations.
    claims: what is judged.
    config: overrides that all arms share.
    seeds: how many seeds, or which ones.
    scales: patterns of the scales that it belongs to.
    optional: run only when named (tuning, long ablations).
    run: `run(config, lab) -> {metric: [a value a seed]}` in place of the experiment's own.
    plot: metrics to draw; default: those of the claims.
  """

  name: str
  arms: Mapping[str, Mapping[str, Any]]
  claims: Sequence[Claim] = ()
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: int | Sequence[int] = 3
  scales: Sequence[str] = ("laptop",)
  optional: bool = False
  run: Callable[..., ArmMetrics] | None = None
  plot: Sequence[str] = ()

  def __post_init__(self) -> None:
    names = [claim.name for claim in self.claims]
    if len(set(names)) < len(names):
      raise ConfigurationError(f"study {self.name!r}: two claims have the same name")
    for claim in self.claims:
      for arm in filter(None, (claim.of, claim.against)):
        if arm not in self.arms:
          raise ConfigurationError(
            f"study {self.name!r}: claim {claim.name!r} names the unknown arm {arm!r}"
          )

  def at(self, scale: str) -> bool:
    return any(fnmatch.fnmatchcase(scale, pattern) for pattern in self.scales)


def interval(values: Values) -> tuple[float, float, float]:
  """Mean of one sample and its Student interval; (mean, -inf, inf) for a single value."""
  x = np.asarray(values, np.float64)
  mean = float(x.mean())
  if len(x) < 2:
    return mean, -math.inf, math.inf
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
  return mean, mean - half, mean + half


def difference(of: Values, against: Values) -> tuple[float, float, float]:
  """Difference of two means and Welch's interval; unbounded when a sample has a single value."""
  x, y = np.asarray(of, np.float64), np.asarray(against, np.float64)
  estimate = float(x.mean() - y.mean())
  if min(len(x), len(y)) < 2:
    return estimate, -math.inf, math.inf
  vx, vy = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
  if vx + vy == 0:
    return estimate, estimate, estimate
  freedom = (vx + vy) ** 2 / (vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1))
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(vx + vy))
  return estimate, estimate - half, estimate + half


def paired(of: Values, against: Values) -> tuple[float, float, float]:
  """Mean difference seed by seed and its Student interval, for two measurements of one model."""
  return interval(np.asarray(of, np.float64) - np.asarray(against, np.float64))


def judge(claim: Claim, arms: Mapping[str, ArmMetrics]) -> dict[str, Any]:
  """Verdict, estimate and interval of a claim; undecided where an arm or a value is missing."""
  of = arms.get(claim.of, {}).get(claim.metric)
  against = arms.get(claim.against or "", {}).get(claim.against_metric or claim.metric)
  missing = of is None or (claim.against is not None and against is None)
  if of is None or missing or not np.isfinite(np.array([*of, *(against or ())], float)).all():
    return {"verdict": "undecided", "estimate": None, "interval": [None, None], "seeds": 0}
  compare = paired if claim.of == claim.against else difference
  if against is None:
    estimate, low, high = interval(of)
  elif claim.ratio:
    if min(*of, *against) <= 0:
      return {"verdict": "undecided", "estimate": None, "interval": [None, None], "seeds": len(of)}
    estimate, low, high = (float(np.exp(v)) for v in compare(np.log(of), np.log(against)))
  else:
    estimate, low, high = compare(of, against)
  ends = [value if math.isfinite(value) else None for value in (low, high)]
  return {
    "verdict": _verdict(claim, low, high),
    "estimate": estimate,
    "interval": ends,
    "seeds": min(len(of), len(against)) if against is not None else len(of),
  }


def _verdict(claim: Claim, low: float, high: float) -> Verdict:
  below = claim.at_least if claim.refuted_below is None else claim.refuted_below
  above = claim.at_most if claim.refuted_above is None else claim.refuted_above
  if (below is not None and high < below) or (above is not None and low > above):
    return "refuted"
  if (claim.at_least is None or low >= claim.at_least) and (
    claim.at_most is None or high <= claim.at_most
  ):
    return "held"
  return "undecided"
