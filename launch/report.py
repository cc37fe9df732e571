"""What a run tells a person: the table of arms, the verdicts, the plots."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
from matplotlib.figure import Figure

from launch import metrics
from launch.lab import slug
from launch.study import Study, interval

COLOURS = {"held": "green", "refuted": "red", "undecided": "yellow"}
INK = {"held": "#1a7f37", "refuted": "#c62828", "undecided": "#9a6700"}


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One row an arm: mean and interval of every metric, parameters, steps, seconds.

  A list of flat dictionaries, so that `pandas.DataFrame(table(results))` is the table.
  """
  rows = []
  for path, arm in results["arms"].items():
    study, _, name = path.partition("/")
    row: dict[str, Any] = {"study": study, "arm": name}
    for metric, values in arm["metrics"].items():
      mean, low, high = interval(values)
      row |= {metric: mean, f"{metric} low": low, f"{metric} high": high}
    rows.append(row | {k: arm[k] for k in ("params", "steps", "wall_s")})
  return rows


def drawn(study: Study, arms: Mapping[str, Any]) -> list[str]:
  """The metrics that a study is about: asked for, or claimed, or all there are."""
  there = dict.fromkeys(m for arm in arms.values() for m in arm["metrics"])
  claimed = [m for c in study.claims for m in (c.metric, c.against_metric) if m]
  wanted = list(study.plot) or list(dict.fromkeys(claimed)) or list(there)
  return [m for m in wanted if m in there]


def arms_of(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
  found = {a: results["arms"].get(f"{study.name}/{a}") for a in study.arms}
  return {a: result for a, result in found.items() if result is not None}


def show(
  console: rich.console.Console,
  studies: Sequence[Study],
  results: Mapping[str, Any],
  root: pathlib.Path,
) -> None:
  """Prints the arms, the claims and where the plots are."""
  for study in studies:
    arms = arms_of(study, results)
    shown = drawn(study, arms)
    title = f"{results['experiment']} {results['scale']}: {study.name}"
    console.print(_grid(title, [["arm", *shown, *LAST], *_rows(arms, shown)]))
    for claim in results["claims"]:
      if claim["study"] == study.name:
        colour = COLOURS[claim["verdict"]]
        console.print(f"[{colour}]{claim['verdict']:>9}[/]  {claim['name']}", highlight=False)
        console.print(f"           {claim['statement']}", highlight=False)
        console.print(f"           {found(claim)}", highlight=False)
    console.print(f"plot: {root / slug(study.name) / 'plot.png'}", highlight=False, soft_wrap=True)
  console.print(f"verdict: {root / 'verdict.json'}", highlight=False, soft_wrap=True)


LAST = ("params", "steps", "seeds", "wall")


def _rows(arms: Mapping[str, Any], shown: Sequence[str]) -> list[list[str]]:
  rows = []
  for name, arm in arms.items():
    seeds = max((len(v) for v in arm["metrics"].values()), default=0)
    numbers = [f"{arm['params']:,}", f"{arm['steps']:,}", str(seeds), f"{arm['wall_s']:.0f} s"]
    rows.append([name, *(spread(arm["metrics"].get(m)) for m in shown), *numbers])
  return rows


def _grid(title: str, rows: list[list[str]]) -> rich.table.Table:
  """A table whose first row is the head; turned on its side when it is wide."""
  if len(rows[0]) > 8:
    rows = [list(column) for column in zip(*rows, strict=True)]
  grid = rich.table.Table(title=title)
  for index, head in enumerate(rows[0]):
    grid.add_column(head, justify="right" if index else "left")
  for row in rows[1:]:
    grid.add_row(*row)
  return grid


def spread(values: Sequence[float] | None) -> str:
  """`mean ± half the 95 % interval` over seeds."""
  if values is None:
    return "-"
  mean, low, high = interval(values)
  return f"{mean:.4g} ± {(high - low) / 2:.2g}" if np.isfinite(low) else f"{mean:.4g}"


def found(claim: Mapping[str, Any]) -> str:
  """The estimate of a judged claim, its interval and its seeds."""
  if claim["estimate"] is None:
    return "not judged: an arm has not been run, or has no finite value"
  low, high = ("unbounded" if end is None else f"{end:.4g}" for end in claim["interval"])
  return f"estimate {claim['estimate']:.4g}, 95 % interval [{low}, {high}], {claim['seeds']} seeds"


def plot_study(study: Study, results: Mapping[str, Any], directory: pathlib.Path) -> None:
  """Saves `plot.png`: a row a metric; curves over training, final values by arm; the verdicts."""
  arms = arms_of(study, results)
  shown = drawn(study, arms)
  if not shown:
    return
  claims = [c for c in results["claims"] if c["study"] == study.name]
  panels = _panels(shown)
  heights = [3.1] * len(panels) + [0.1 + 0.62 * len(claims)]
  figure = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
  grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
  figure.suptitle(f"{results['experiment']} ({results['scale']}): {study.name}")
  colours = {a: f"C{i % 10}" for i, a in enumerate(arms)}
  for row, (metric, sizes) in enumerate(panels.items()):
    if sizes:
      curves = {a: _by_size(arm, metric, sizes) for a, arm in arms.items()}
      axes = figure.add_subplot(grid[row, :])
      _curves(axes, curves, metric, colours)
      axes.set_xscale("log", base=2)
      axes.set_xticks(sizes, [str(size) for size in sizes])
      axes.set(xlabel="size", ylim=(0, None))
      continue
    curves = {a: curve(directory / slug(a) / "metrics.jsonl", metric) for a in arms}
    has_curves = any(len(steps) > 1 for steps, _ in curves.values())
    if has_curves:
      _curves(figure.add_subplot(grid[row, 0]), curves, metric, colours)
    place = grid[row, 1] if has_curves else grid[row, :]
    _final(figure.add_subplot(place), arms, metric, colours)
  _verdicts(figure.add_subplot(grid[-1, :]), claims)
  directory.mkdir(parents=True, exist_ok=True)
  figure.savefig(directory / "plot.png", dpi=150)


def _panels(shown: Sequence[str]) -> dict[str, list[int]]:
  """Metrics that differ by a number at their end, `time/256` and `time/1024`, share a panel."""
  panels: dict[str, list[int]] = {}
  for metric in shown:
    name, _, size = metric.rpartition("/")
    panels.setdefault(name if size.isdigit() else metric, []).extend(
      [int(size)] if size.isdigit() else []
    )
  return panels


def _by_size(arm: Mapping[str, Any], metric: str, sizes: Sequence[int]):
  there = [size for size in sizes if f"{metric}/{size}" in arm["metrics"]]
  return np.array(there), np.array([arm["metrics"][f"{metric}/{size}"] for size in there])


def curve(path: pathlib.Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps (n,) and values (n, S) of a metric over an arm's training."""
  records = [r for r in metrics.read(path) if metric in r]
  return np.array([r["step"] for r in records]), np.array([r[metric] for r in records])


def _curves(axes, curves, metric, colours) -> None:
  for arm, (steps, values) in curves.items():
    if len(steps) > 1:
      axes.plot(steps, values.mean(axis=1), color=colours[arm], label=arm, linewidth=1.6)
      low, high = values.min(axis=1), values.max(axis=1)
      axes.fill_between(steps, low, high, color=colours[arm], alpha=0.15, linewidth=0)
  axes.set(xlabel="update", ylabel=metric, title="mean and range over seeds")
  axes.grid(alpha=0.25)
  axes.legend(frameon=False, fontsize="small")


def _final(axes, arms, metric, colours) -> None:
  for place, (name, arm) in enumerate(arms.items()):
    values = arm["metrics"].get(metric)
    if values:
      mean, low, high = interval(values)
      if np.isfinite(low):
        axes.plot([low, high], [place, place], color=colours[name], linewidth=6, alpha=0.3)
      axes.plot([mean], [place], "|", color=colours[name], markersize=16, markeredgewidth=2.5)
      axes.plot(values, [place] * len(values), "o", color=colours[name], markersize=4)
  axes.set_yticks(range(len(arms)), list(arms))
  axes.set_ylim(len(arms) - 0.5, -0.5)
  axes.set(xlabel=metric, title="at the end: seeds, mean, 95 % interval")
  axes.grid(alpha=0.25, axis="x")


def _verdicts(axes, claims) -> None:
  axes.axis("off")
  for line, claim in enumerate(claims):
    height = 1 - (line + 0.5) / len(claims)
    style = {"va": "center", "transform": axes.transAxes, "fontsize": 9}
    ink = INK[claim["verdict"]]
    axes.text(0.0, height, claim["verdict"], color=ink, fontweight="bold", **style)
    words = f"{claim['name']}\n{claim['statement']}\n{found(claim)}"
    axes.text(0.09, height, words, **style)
