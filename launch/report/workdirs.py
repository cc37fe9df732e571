"""What a run wrote, read back: a finished workdir, an unfinished one, or a file of results."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from launch import metrics, runner, storage
from launch.errors import ConfigurationError
from launch.lab import slug
from launch.study import Study

EXPECTED = "what a run wrote, such as runs/s5/laptop, or a file of results, such as verdict.json"


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir or file of results.

  Attributes:
    path: as it was named.
    results: what `verdict.json` holds, and arms that finished after it was written.
    studies: those of which something is there; of an experiment that is not installed here, made
      from the records.
    configs: `study/arm` -> `config.json` of every arm that was begun.
    title: of the paper, where the experiment is installed here.
  """

  path: pathlib.Path
  results: Mapping[str, Any]
  studies: list[Study]
  configs: Mapping[str, Mapping[str, Any]]
  title: str

  def directory(self, study: Study) -> pathlib.Path:
    return self.path / slug(study.name)

  def notes(self, study: Study) -> dict[str, str]:
    """Arm -> why it has no result, for arms without one."""
    notes = {}
    for arm in study.arms:
      label = f"{study.name}/{arm}"
      if label not in self.results["arms"]:
        records = metrics.read(self.directory(study) / slug(arm) / "metrics.jsonl")
        at = f" at update {records[-1]['step']:,}" if records else ""
        notes[arm] = f"unfinished{at}" if label in self.configs else "not run"
    return notes

  @property
  def unfinished(self) -> int:
    """Arms that were begun and have no result."""
    return len({*self.configs} - {*self.results["arms"]})


def read(path: pathlib.Path) -> Run:
  """Reads a workdir or a file of results.

  Raises:
    ConfigurationError: it is neither.
  """
  configs: dict[str, Any] = {}
  if path.is_dir():
    verdict = path / "verdict.json"
    results = _json(verdict) if verdict.exists() else None
    for file in sorted(path.glob("*/*/config.json"), key=storage.modified):
      record = _json(file)
      if {"experiment", "scale", "study", "arm", "config"} <= set(record):
        label = f"{record['study']}/{record['arm']}"
        configs[label] = record
        results = results or {"experiment": record["experiment"], "scale": record["scale"]}
        result = file.with_name("result.json")
        if result.exists():
          results.setdefault("arms", {}).setdefault(label, _json(result))
    if results is None:
      below = sorted([*path.glob("*/verdict.json"), *path.glob("*/*/verdict.json")])
      hint = f"; did you mean {below[0].parent}?" if below else ""
      raise ConfigurationError(f"{path} is no workdir: expected {EXPECTED}{hint}")
  elif path.exists():
    results = _json(path)
  else:
    raise ConfigurationError(f"{path} does not exist: expected {EXPECTED}")
  missing = {"experiment", "scale"} - set(results)
  if missing:
    raise ConfigurationError(f"{path} is no file of results: expected {EXPECTED}")
  results = {"arms": {}, "claims": [], "versions": {}, "command": ""} | results
  module = _installed(results["experiment"])
  return Run(
    path=path,
    results=results,
    studies=_studies(results, configs, module),
    configs=configs,
    title=((module.__doc__ or "") if module else "").partition("\n")[0].rstrip("."),
  )


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except ValueError as error:  # not JSON, or not even text
    raise ConfigurationError(f"{path} is not JSON: expected {EXPECTED}") from error
  return value if isinstance(value, dict) else {}


def _installed(experiment: str) -> ModuleType | None:
  try:
    return runner.find(experiment)
  except ConfigurationError:
    return None


def _studies(
  results: Mapping[str, Any], configs: Mapping[str, Any], module: ModuleType | None
) -> list[Study]:
  there: dict[str, dict[str, Any]] = {}
  for label in [*results["arms"], *configs]:
    study, _, arm = label.partition("/")
    there.setdefault(study, {})[arm] = {}
  for claim in results["claims"]:
    there.setdefault(claim["study"], {})
  known = [s for s in module.STUDIES if s.at(results["scale"])] if module else []
  studies = []
  for study in known:
    arms = there.pop(study.name, None)
    if arms is not None:
      others = [a for a in arms if a not in study.arms]
      studies.append(dataclasses.replace(study, arms={**study.arms, **{a: {} for a in others}}))
  for name, arms in there.items():
    claims = [c for c in results["claims"] if c["study"] == name]
    studies.append(Study(name, arms, plot=list(dict.fromkeys(c["metric"] for c in claims))))
  return studies
