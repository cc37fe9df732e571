"""The words and tables of a report, for the terminal and as markdown."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
from rich.markup import escape

from launch.errors import ConfigurationError
from launch.lab import slug
from launch.study import Study, interval

COLOURS = {"held": "green", "refuted": "red", "undecided": "yellow"}
SYMBOLS = {"held": "✓", "refuted": "✗", "undecided": "?"}
LAST = ("params", "steps", "seeds", "wall")
COMMAND = "python -m launch.report --readme"
SUMMARY, IN_FULL = (
  f"<!-- from {COMMAND} README.md -->",
  f"<!-- in full, from {COMMAND} experiments/results/README.md -->",
)
END = "<!-- end of results -->"


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


def drawn(study: Study, there: Iterable[str]) -> list[str]:
  """The metrics that a study is about: asked for, or claimed, or all of those that are there."""
  there = list(dict.fromkeys(there))
  claimed = [m for c in study.claims for m in (c.metric, c.against_metric) if m]
  wanted = list(study.plot) or list(dict.fromkeys(claimed)) or there
  return [m for m in wanted if m in there]


def measured(arms: Mapping[str, Any]) -> list[str]:
  return list(dict.fromkeys(m for arm in arms.values() for m in arm["metrics"]))


def arms_of(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
  """The finished arms of a study."""
  found = {a: results["arms"].get(f"{study.name}/{a}") for a in study.arms}
  return {a: result for a, result in found.items() if result is not None}


def claims_of(study: Study, results: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [c for c in results["claims"] if c["study"] == study.name]


def counts(claims: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """How many claims have each verdict."""
  verdicts = [c["verdict"] for c in claims]
  return {v: verdicts.count(v) for v in COLOURS}


def show(
  console: rich.console.Console,
  studies: Sequence[Study],
  results: Mapping[str, Any],
  root: pathlib.Path,
) -> None:
  """Prints the arms, the claims and where the plots are."""
  for study in studies:
    shown = drawn(study, measured(arms_of(study, results)))
    title = f"{results['experiment']} {results['scale']}: {study.name}"
    console.print(_grid(title, arm_rows(study, results, shown)))
    for arm, result in arms_of(study, results).items():
      for seed, why in result.get("failed", {}).items():
        console.print(f"   failed  {escape(arm)}, seed {seed}: {escape(why)}", highlight=False)
    for claim in claims_of(study, results):
      colour = COLOURS[claim["verdict"]]
      console.print(f"[{colour}]{claim['verdict']:>9}[/]  {escape(claim['name'])}", highlight=False)
      console.print(f"           {escape(claim['statement'])}", highlight=False)
      console.print(f"           {found(claim)}", highlight=False, markup=False)
    console.print(f"plot: {root / slug(study.name) / 'plot.png'}", highlight=False, soft_wrap=True)
  console.print(f"verdict: {root / 'verdict.json'}", highlight=False, soft_wrap=True)
  console.print(f"page: python -m launch.report {root}", highlight=False, soft_wrap=True)


def arm_rows(
  study: Study,
  results: Mapping[str, Any],
  shown: Sequence[str],
  notes: Mapping[str, str] | None = None,
) -> list[list[str]]:
  """A head and a row an arm; `notes` says of arms without a result why they have none."""
  rows = [["arm", *shown, *LAST]]
  arms = arms_of(study, results)
  for name in study.arms:
    if name in arms:
      arm = arms[name]
      seeds = max((len(v) for v in arm["metrics"].values()), default=0)
      numbers = [f"{arm['params']:,}", f"{arm['steps']:,}", str(seeds), f"{arm['wall_s']:,.0f} s"]
      rows.append([name, *(spread(arm["metrics"].get(m)) for m in shown), *numbers])
    elif notes and name in notes:
      rows.append([f"{name} ({notes[name]})", *["-"] * (len(rows[0]) - 1)])
  return rows


def _grid(title: str, rows: list[list[str]]) -> rich.table.Table:
  """A table whose first row is the head; turned on its side when it is wide."""
  if len(rows[0]) > 8:
    rows = [list(column) for column in zip(*rows, strict=True)]
  grid = rich.table.Table(title=escape(title))
  for index, head in enumerate(rows[0]):
    grid.add_column(escape(head), justify="right" if index else "left")
  for row in rows[1:]:
    grid.add_row(*map(escape, row))
  return grid


def spread(values: Sequence[float] | None) -> str:
  """`mean ± half the 95 % interval` over seeds."""
  if values is None:
    return "-"
  finite = [v for v in np.array(values, float) if np.isfinite(v)]
  if not finite:
    return "not finite"
  mean, low, high = interval(finite)
  text = f"{mean:.4g} ± {(high - low) / 2:.2g}" if np.isfinite(low) else f"{mean:.4g}"
  return text if len(finite) == len(values) else f"{text} ({len(finite)} of {len(values)} seeds)"


def found(claim: Mapping[str, Any]) -> str:
  """The estimate of a judged claim, its interval and its seeds."""
  if claim["estimate"] is None:
    return "not judged: an arm has not been run, or has no finite value"
  low, high = ("unbounded" if end is None else f"{end:.4g}" for end in claim["interval"])
  return f"estimate {claim['estimate']:.4g}, 95 % interval [{low}, {high}], {claim['seeds']} seeds"


# Markdown


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
  """A table whose first row is the head."""
  lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
  return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _cell(text: str) -> str:
  return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def claim_rows(claims: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """A head and a row a claim."""
  rows = [["claim", "verdict", "estimate [95 % interval]", "margin", "seeds"]]
  for claim in claims:
    estimate = "-"
    if claim["estimate"] is not None:
      low, high = ("unbounded" if end is None else f"{end:.3g}" for end in claim["interval"])
      estimate = f"{claim['estimate']:.3g} [{low}, {high}]"
    margin = claim["statement"].rpartition(" is ")[2]  # the rule that Claim.statement ends with
    verdict = f"{SYMBOLS[claim['verdict']]} {claim['verdict']}"
    name = f"{claim['study']}: {claim['name']}"
    rows.append([name, verdict, estimate, margin, str(claim["seeds"])])
  return rows


def readme(text: str, every: Sequence[Mapping[str, Any]]) -> str:
  """`text` with `every` results between its markers: verdicts counted, or every claim in full.

  Raises:
    ConfigurationError: the markers are not there.
  """
  begin = IN_FULL if IN_FULL in text else SUMMARY
  before, opened, rest = text.partition(begin)
  _, closed, after = rest.partition(END)
  if not opened or not closed:
    raise ConfigurationError(
      f"--readme: expected the lines {SUMMARY!r} (or {IN_FULL!r}) and {END!r} in the file"
    )
  total = counts([claim for results in every for claim in results["claims"]])
  words = f"{sum(total.values())} claims: " + ", ".join(f"{n} {v}" for v, n in total.items())
  rows = in_full(every) if begin == IN_FULL else summary(every)
  return f"{before}{begin}\n{words}.\n\n{markdown_table(rows)}\n{END}{after}"


def summary(every: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """One row an experiment: how many claims had which verdict."""
  rows = [["experiment", *COLOURS, "repeated by"]]
  for results in every:
    name, found = results["experiment"], counts(results["claims"])
    verdicts = [str(found.get(verdict, 0)) for verdict in COLOURS]
    rows.append([f"[{name}](experiments/{name}.py)", *verdicts, f"`{results['command']}`"])
  return rows


def in_full(every: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  rows = claim_rows([])
  for results in every:
    name = results["experiment"]
    rows.append([f"[**{name}**](../{name}.py) `{results['command']}`", "", "", "", ""])
    rows += claim_rows(results["claims"])[1:]
  return rows
