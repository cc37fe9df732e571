"""Runs as one HTML page that needs nothing else: no script, no other file, no network."""

import base64
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import ml_collections
from markupsafe import Markup

from launch import config as configs
from launch.lab import slug
from launch.report import plots, text
from launch.report.workdirs import Run
from launch.study import Study

TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
TEMPLATES.globals["symbols"] = text.SYMBOLS
GAUGE = 240  # width, in the units of the template


def page(runs: Sequence[Run]) -> str:
  """The page: an index where there are several runs; then claims, arms, plots, configuration."""
  described = [_run(run, f"run-{index}") for index, run in enumerate(runs)]
  title = described[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
  return TEMPLATES.get_template("page.html").render(title=title, runs=described).lstrip()


def _run(run: Run, anchor: str) -> dict[str, Any]:
  results = run.results
  apart = ("experiment", "scale", "arms", "claims", "command", "versions")
  facts = {k: v for k, v in results.items() if k not in apart}
  if "wall_s" in facts:
    facts["wall time"] = f"{facts.pop('wall_s'):,.0f} s"
  if results["versions"]:
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
  anchors = {s.name: f"{anchor}-{index}" for index, s in enumerate(run.studies)}
  return {
    "anchor": anchor,
    "name": f"{results['experiment']} {results['scale']}",
    "title": run.title,
    "path": run.path,
    "unfinished": run.unfinished,
    "counts": text.counts(results["claims"]),
    "claims": [
      {**claim, "anchor": anchors[s.name], "found": text.found(claim), "gauge": _gauge(claim, s)}
      for s in run.studies
      for claim in text.claims_of(s, results)
    ],
    "studies": [_study(run, s, anchors[s.name]) for s in run.studies],
    "repeat": _repeat(results),
    "is_workdir": run.path.is_dir(),
    "facts": facts | {"read from": run.path},
  }


def _repeat(results: Mapping[str, Any]) -> str:
  """The commands that repeat a run; from its commit, where that is one and without changes."""
  commit = results.get("commit", "")
  checkout = [f"git checkout {commit}"] if commit.isalnum() and commit != "unknown" else []
  return "\n".join([*checkout, results["command"]]) if results["command"] else ""


def _gauge(claim: Mapping[str, Any], study: Study) -> dict[str, Any] | None:
  """Where a claim's estimate, interval and margins are drawn; None if it was not judged.

  The record has the margins. What is allowed is known if the experiment still states the claim.
  """
  if claim["estimate"] is None:
    return None
  rules = [c for c in study.claims if c.statement == claim["statement"]]
  margins = claim["margin"] if isinstance(claim["margin"], list) else [claim["margin"]]
  known = [v for v in (claim["estimate"], *claim["interval"], *margins) if v is not None]
  span = (max(known) - min(known)) or abs(known[0]) or 1.0
  low, high = min(known) - 0.15 * span, max(known) + 0.15 * span

  def place(value: float) -> float:
    return round(GAUGE * (value - low) / (high - low), 1)

  def ends(pair: Sequence[float | None]) -> list[float]:
    return [place(e if v is None else v) for v, e in zip(pair, (low, high), strict=True)]

  return {
    "estimate": place(claim["estimate"]),
    "interval": ends(claim["interval"]),
    "margins": [(place(m), f"{m:g}") for m in margins],
    "allowed": ends((rules[0].at_least, rules[0].at_most)) if rules else None,
  }


def _study(run: Run, study: Study, anchor: str) -> dict[str, Any]:
  directory = run.directory(study)
  metrics = text.measured(text.arms_of(study, run.results))
  shown = text.drawn(study, metrics)
  curves = plots.names(plots.recorded(study, directory))
  (_, *arms), *by_metric = zip(*text.arm_rows(study, run.results, metrics), strict=True)

  def figures(shown: Sequence[str] | None = None) -> list[Markup]:
    rows = plots.panels(study, run.results, directory, shown)
    return [Markup(plots.svg(panel, anchor)) for row in rows for panel in row]

  return {
    "anchor": anchor,
    "name": study.name,
    "arms": text.arm_rows(study, run.results, shown, run.notes(study)),
    "metrics": [["metric", *arms], *by_metric[: len(metrics)]] if metrics != shown else [],
    "figures": figures(),
    "training": figures([m for m in curves if m.startswith("train/")]),
    "pictures": [
      (f"{arm}: {path.stem}", base64.b64encode(path.read_bytes()).decode())
      for arm in study.arms
      for path in sorted((directory / slug(arm)).glob("*.png"))
    ],
    "config": _config(run, study),
  }


def _config(run: Run, study: Study) -> dict[str, Any] | None:
  """What all arms' configurations share, and a row an arm of what they do not."""
  flat: dict[str, dict[str, str]] = {}
  for arm in study.arms:
    record = run.configs.get(f"{study.name}/{arm}")
    if record is not None:
      leaves = configs.flat(ml_collections.ConfigDict(record["config"]))
      flat[arm] = {k: v if isinstance(v, str) and v else json.dumps(v) for k, v in leaves.items()}
      flat[arm]["seeds"] = ", ".join(map(str, record["seeds"]))
  if not flat:
    return None
  keys = list(dict.fromkeys(key for leaves in flat.values() for key in leaves))
  differ = [k for k in keys if len({leaves.get(k) for leaves in flat.values()}) > 1]
  first = next(iter(flat.values()))
  return {
    "shared": {k: first[k] for k in keys if k not in differ},
    "arms": [["arm", *differ], *([a, *(v.get(k, "-") for k in differ)] for a, v in flat.items())],
  }
