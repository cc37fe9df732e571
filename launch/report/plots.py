"""The plots of a study: on one `plot.png`, and one by one as SVG for the page."""

import functools
import html
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch import metrics
from launch.lab import slug
from launch.report.text import arms_of, claims_of, drawn, found, measured
from launch.study import Study, interval

INK = {"held": "#1a7f37", "refuted": "#c62828", "undecided": "#9a6700"}
# Paul Tol's vibrant scheme, safe for the colour-blind, its grey darkened: each has a contrast above
# 2 on white and on black. Markers and dashes tell arms apart in print.
PALETTE = ("#0077bb", "#ee7733", "#009988", "#ee3377", "#33bbee", "#cc3311", "#808080")
SHAPES = "os^Dv*PX"  # one more than colours: 56 arms differ without their dashes
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {
  "axes.spines.top": False,
  "axes.spines.right": False,
  "text.parse_math": False,  # a dollar in a name is a dollar
  "font.size": 9.5,
  "axes.titlesize": 9.5,
}
THEMED = "#123456"  # becomes the colour of the page's text

Style = dict[str, Any]
Record = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]  # steps (n,), values (n, S)


class Panel(NamedTuple):
  """What is shown, how it is drawn, and how many lines or rows that are."""

  label: str
  draw: Callable[[Axes], None]
  lines: int


def panels(
  study: Study,
  results: Mapping[str, Any],
  directory: pathlib.Path,
  shown: Sequence[str] | None = None,
) -> list[list[Panel]]:
  """A row a metric: curves over training, also of unfinished arms, beside the final values.

  Of an only arm, final values `METHOD/GROUP` of the same group are on one panel.

  Args:
    study: its arms are drawn in their order.
    results: what `verdict.json` holds.
    directory: the study's; without metrics there, the curves are left out.
    shown: metrics; default: those that the study is about.
  """
  arms = arms_of(study, results)
  records = recorded(study, directory)
  if shown is None:
    shown = drawn(study, measured(arms) or names(records))
  styles = _styles(list(study.arms))
  rows: list[list[Panel]] = []
  curves: dict[str, dict[str, Curve]] = {
    m: {a: c for a, rs in records.items() if len((c := curve(rs, m))[0]) > 1} for m in shown
  }
  ends: dict[str, dict[str, Sequence[float]]] = {
    m: {a: arm["metrics"][m] for a, arm in arms.items() if m in arm["metrics"]} for m in shown
  }
  compared: dict[str, list[str]] = {}
  if len(study.arms) == 1:
    compared = _by_group([m for m in shown if ends[m] and not curves[m]])
  for metric, sizes in _by_metric(shown).items():
    if sizes:
      draw = functools.partial(_sizes, arms=arms, metric=metric, sizes=sizes, styles=styles)
      rows.append([Panel(f"{metric} by size: mean and range over seeds", draw, len(arms))])
      continue
    row: list[Panel] = []
    if curves[metric]:
      draw = functools.partial(_training, curves=curves[metric], metric=metric, styles=styles)
      label = f"{metric} over training: mean and range over seeds"
      row.append(Panel(label, draw, len(curves[metric])))
    named, last, marks = metric, ends[metric], styles
    if metric in compared:
      members = compared[metric]
      if metric != members[0]:
        continue
      named = metric.rpartition("/")[2]
      last = {m.rpartition("/")[0]: values for m in members for values in ends[m].values()}
      marks = _styles(list(last))
    if last:
      draw = functools.partial(_final, ends=last, metric=named, styles=marks)
      row.append(Panel(f"{named} at the end: seeds, mean, 95 % interval", draw, len(last)))
    rows.append(row)
  return [row for row in rows if row]


def _styles(arms: Sequence[str]) -> dict[str, Style]:
  return {
    a: {
      "color": PALETTE[i % len(PALETTE)],
      "marker": SHAPES[i % len(SHAPES)],
      "linestyle": DASHES[i // len(PALETTE) % len(DASHES)],
    }
    for i, a in enumerate(arms)
  }


def recorded(study: Study, directory: pathlib.Path) -> dict[str, list[Record]]:
  """Arm -> what its `metrics.jsonl` holds."""
  return {a: metrics.read(directory / slug(a) / "metrics.jsonl") for a in study.arms}


def names(records: Mapping[str, Sequence[Record]]) -> list[str]:
  """The metrics that there are curves of."""
  there = dict.fromkeys(name for arm in records.values() for record in arm for name in record)
  return [name for name in there if name not in ("stage", "step")]


def plot_study(study: Study, results: Mapping[str, Any], directory: pathlib.Path) -> None:
  """Saves `plot.png`: the panels of a study and the verdicts on its claims."""
  rows = panels(study, results, directory)
  if not rows:
    return
  claims = claims_of(study, results)
  heights = [_height(*row) for row in rows] + [0.1 + 0.62 * len(claims)]
  with mpl.rc_context(STYLE):
    figure = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.suptitle(f"{results['experiment']} ({results['scale']}): {study.name}")
    for index, row in enumerate(rows):
      for column, panel in enumerate(row):
        panel.draw(figure.add_subplot(grid[index, column if len(row) > 1 else slice(None)]))
    _verdicts(figure.add_subplot(grid[-1, :]), claims)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
  # Plots are committed with results: 256 colours are a third of the bytes.
  picture = PIL.Image.open(buffer).convert("RGB")
  picture = picture.quantize(method=PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE)
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True, dpi=(150, 150))
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "plot.png").write_bytes(buffer.getvalue())


def svg(panel: Panel, where: str = "") -> str:
  """A panel as an SVG element, in the colour and typeface of the text around it.

  `where` on the page it will be: keeps its identifiers away from those of other elements.
  """
  ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
  themed: dict[str, Any] = dict.fromkeys((*ink, "grid.color"), THEMED)
  themed |= {"svg.fonttype": "none", "svg.hashsalt": f"{where} {panel.label}"}
  buffer = io.StringIO()
  with mpl.rc_context(STYLE | themed):
    figure = Figure(figsize=(5.2, _height(panel)), layout="constrained")
    panel.draw(figure.subplots())
    figure.savefig(buffer, format="svg", transparent=True)
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  for noise in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r'<style type="text/css">.*?</style>'):
    text = re.sub(noise, "", text, flags=re.DOTALL)
  text = re.sub(r'<g id="[^"]*"', "<g", text)
  text = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", text, count=5)
  text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
  text = re.sub(r"\n\s*", "\n", text.replace("xlink:href", "href")).replace(THEMED, "currentColor")
  return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(panel.label)}"', 1)


def _height(*row: Panel) -> float:
  return max(3.1, 0.9 + 0.22 * max(panel.lines for panel in row))


def _by_metric(shown: Sequence[str]) -> dict[str, list[int]]:
  """Metrics that differ by a number at their end, `time/256` and `time/1024`, share a panel."""
  grouped: dict[str, list[int]] = {}
  for metric in shown:
    name, _, size = metric.rpartition("/")
    grouped.setdefault(name if size.isdigit() else metric, []).extend(
      [int(size)] if size.isdigit() else []
    )
  return grouped


def _by_group(metrics: Sequence[str]) -> dict[str, list[str]]:
  """Metric -> all that have the same name at their end, where there are several."""
  groups: dict[str, list[str]] = {}
  for metric in metrics:
    if "/" in metric:
      groups.setdefault(metric.rpartition("/")[2], []).append(metric)
  return {metric: some for some in groups.values() if len(some) > 1 for metric in some}


def curve(records: Sequence[Record], metric: str) -> Curve:
  """A metric over an arm's training; stages follow one another.

  Stages `train-seed0` and `train-seed1`, of seeds that ran one after another, are one stage; steps
  that not all of its seeds have reached are left out.
  """
  stages: dict[str, dict[int, list[float]]] = {}
  for record in records:
    if metric in record:
      stage = re.sub(r"-seed\d+$", "", record["stage"])
      stages.setdefault(stage, {}).setdefault(record["step"], []).extend(record[metric])
  steps: list[int] = []
  values: list[list[float]] = []
  for points in stages.values():
    seeds, start = max(map(len, points.values())), steps[-1] if steps else 0
    if values and seeds != len(values[0]):
      continue
    steps += [start + step for step, value in points.items() if len(value) == seeds]
    values += [value for value in points.values() if len(value) == seeds]
  return np.array(steps), np.array(values)


def _lines(axes: Axes, curves: Mapping[str, Curve], styles: Mapping[str, Style]) -> None:
  for arm, (steps, values) in curves.items():
    style = styles[arm] | {"markevery": -(-len(steps) // 10), "markersize": 4}
    axes.plot(steps, values.mean(axis=1), label=arm, linewidth=1.6, **style)
    low, high = values.min(axis=1), values.max(axis=1)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
  axes.grid(alpha=0.2)
  if len(curves) <= 10:  # of more, the rows of final values are the legend
    axes.legend(frameon=False, fontsize="small")


def _training(
  axes: Axes, curves: Mapping[str, Curve], metric: str, styles: Mapping[str, Style]
) -> None:
  _lines(axes, curves, styles)
  axes.set(xlabel="update", ylabel=metric, title="mean and range over seeds")


def _sizes(
  axes: Axes,
  arms: Mapping[str, Any],
  metric: str,
  sizes: Sequence[int],
  styles: Mapping[str, Style],
) -> None:
  curves = {}
  for name, arm in arms.items():
    there = [size for size in sizes if f"{metric}/{size}" in arm["metrics"]]
    if there:
      values = np.array([arm["metrics"][f"{metric}/{size}"] for size in there])
      curves[name] = np.array(there), values
  _lines(axes, curves, styles)
  axes.set_xscale("log", base=2)
  axes.set_xticks(sizes, [str(size) for size in sizes])
  axes.set(xlabel="size", ylabel=metric, title="mean and range over seeds", ylim=(0, None))


def _final(
  axes: Axes, ends: Mapping[str, Sequence[float]], metric: str, styles: Mapping[str, Style]
) -> None:
  for place, (name, values) in enumerate(ends.items()):
    colour, shape = styles[name]["color"], styles[name]["marker"]
    mean, low, high = interval(values)
    if np.isfinite(low):
      axes.plot([low, high], [place, place], color=colour, linewidth=6, alpha=0.3)
    axes.plot([mean], [place], "|", color=colour, markersize=16, markeredgewidth=2.5)
    axes.plot(values, [place] * len(values), shape, color=colour, markersize=4)
  axes.set_yticks(range(len(ends)), list(ends))
  axes.set_ylim(len(ends) - 0.5, -0.5)
  axes.set(xlabel=metric, title="at the end: seeds, mean, 95 % interval")
  axes.grid(alpha=0.2, axis="x")


def _verdicts(axes: Axes, claims: Sequence[Mapping[str, Any]]) -> None:
  axes.axis("off")
  for line, claim in enumerate(claims):
    height = 1 - (line + 0.5) / len(claims)
    style: Style = {"va": "center", "transform": axes.transAxes, "fontsize": 9}
    ink = INK[claim["verdict"]]
    axes.text(0.0, height, claim["verdict"], color=ink, fontweight="bold", **style)
    words = f"{claim['name']}\n{claim['statement']}\n{found(claim)}"
    axes.text(0.09, height, words, **style)
