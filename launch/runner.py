"""Runs an experiment: its studies, their arms, their claims; from a script or a notebook."""

import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import ml_collections
import rich.console
from jax.sharding import Mesh

from launch import config as configs
from launch import inputs, processes, report, storage
from launch import mesh as meshes
from launch.errors import ConfigurationError, nearest
from launch.interruption import GRACE_S, Interruption
from launch.lab import Lab, slug
from launch.metrics import write_json
from launch.program import Program
from launch.progress import Progress
from launch.study import ArmMetrics, Study, judge

PACKAGE = "experiments"


def names() -> list[str]:
  """The experiments there are."""
  package = importlib.import_module(PACKAGE)
  found = pkgutil.iter_modules(package.__path__)
  return sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


def find(name: str) -> ModuleType:
  if name not in names():
    raise ConfigurationError(f"unknown experiment {name!r}{nearest(name, names())}")
  return importlib.import_module(f"{PACKAGE}.{name}")


def slug_of(module: ModuleType) -> str:
  spec = getattr(module, "__spec__", None)
  if module.__name__ == "__main__" and spec is None:
    return pathlib.Path(module.__file__ or "experiment").stem
  return (spec.name if spec else module.__name__).rpartition(".")[2]


def run(
  experiment: str | ModuleType,
  *,
  scale: str = "laptop",
  study: str | Sequence[str] | None = None,
  arm: str | Sequence[str] | None = None,
  seeds: int | Sequence[int] | None = None,
  overrides: Mapping[str, Any] | None = None,
  workdir: str | os.PathLike[str] | None = None,
  mesh: str | Mesh | None = None,
  console: rich.console.Console | None = None,
  command: str | None = None,
  profile: tuple[int, int] | None = None,
  grace_s: float = GRACE_S,
) -> dict[str, Any]:
  """Trains and judges an experiment's studies; finished arms of the same workdir are not repeated.

  Args:
    experiment: its name, such as `"s5"`, or the module.
    scale: one of the module's `SCALES`.
    study: which studies; default: all of the scale that are not optional.
    arm: which arms; default: all. Claims about arms that were not run stay unjudged.
    seeds: how many seeds, or which ones; default: the study's.
    overrides: `{"optimizer.lr": 1e-3}`, beneath the arms' own overrides.
    workdir: where everything goes, a path or gs:// or s3://; default `runs/EXPERIMENT/SCALE`.
    mesh: `"data=4,fsdp=2"` or a mesh with the axes of `launch.mesh.AXES`.
    console: where to print; default: standard output.
    command: what repeats this run, for the record; default: one with the same arguments.
    profile: trace so many updates of every stage from this one on, `(step, count)`.
    grace_s: seconds after SIGTERM at which the process leaves, even if it could not save.

  Returns: what `verdict.json` holds: arms with their metrics, claims with their verdicts.

  Raises:
    ConfigurationError: something asked for does not exist or does not fit, before compilation.
    TrainingError: a loss or parameter is no longer finite.
  """
  if jax.process_count() != processes.count():
    raise ConfigurationError(
      f"{jax.process_count()} processes: let launch.processes.join join them; it watches them too"
    )
  module = find(experiment) if isinstance(experiment, str) else experiment
  name = slug_of(module)
  console = console or rich.console.Console()
  if scale not in module.SCALES:
    raise ConfigurationError(f"unknown scale {scale!r}{nearest(scale, module.SCALES)}")
  studies = _chosen(module, scale, study)
  arms = _arms(studies, arm)
  asked = mesh if isinstance(mesh, str) else None
  if not isinstance(mesh, Mesh):
    mesh = meshes.make(meshes.parse(mesh or ""))
  root = storage.path(workdir or pathlib.Path("runs", name, scale))
  plan = []
  for s in studies:
    for a in arms[s.name]:
      config = compose(module, scale, s, a, overrides)
      chosen = seed_list(s.seeds if seeds is None else seeds)
      record: dict[str, Any] = {"experiment": name, "scale": scale, "study": s.name, "arm": a}
      record |= {"seeds": list(chosen), "config": configs.plain(config)}
      directory = root / slug(s.name) / slug(a)
      _check_workdir(directory, record)
      if s.run is None and not (directory / "result.json").exists():
        _check_stages(module, config, mesh, f"{s.name}/{a}")
      plan.append((s, config, directory, record))
  if command is None:
    chosen_by = {"scale": scale if scale != "laptop" else None, "study": study, "arm": arm}
    command = _command(name, chosen_by | {"seeds": seeds, "mesh": asked}, overrides or {})
  progress, interruption = Progress(console), Interruption(grace_s)

  def judged() -> dict[str, Any]:
    """Everything known so far, in `verdict.json` too: an unfinished run can be reported on."""
    if jax.process_index() > 0:
      return processes.first(None)
    verdict = assemble(module, scale, root) | {"command": command}
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "verdict.json", verdict)
    return processes.first(verdict)

  verdict = judged()
  with interruption.listen():
    for s, config, directory, record in plan:
      label, chosen = f"{s.name}/{record['arm']}", tuple(record["seeds"])
      lab = Lab(mesh, directory, chosen, label, progress, interruption, profile)
      _run_arm(module, s, config, record, lab)
      verdict = judged()
  if jax.process_index() == 0:
    for s in studies:
      report.plot_study(s, verdict, root / slug(s.name))
    report.show(console, studies, verdict, root)
  return verdict


def _chosen(module: ModuleType, scale: str, study: str | Sequence[str] | None) -> list[Study]:
  here = {s.name: s for s in module.STUDIES if s.at(scale)}
  if study is None:
    chosen = [s for s in here.values() if not s.optional]
    if not chosen:
      raise ConfigurationError(f"no study runs at scale {scale!r}; name one with --study")
    return chosen
  wanted = [study] if isinstance(study, str) else list(study)
  for name in wanted:
    if name not in here:
      raise ConfigurationError(f"unknown study {name!r} at scale {scale!r}{nearest(name, here)}")
  return [here[name] for name in wanted]


def _arms(studies: Sequence[Study], arm: str | Sequence[str] | None) -> dict[str, list[str]]:
  if arm is None:
    return {s.name: list(s.arms) for s in studies}
  wanted = [arm] if isinstance(arm, str) else list(arm)
  known = [a for s in studies for a in s.arms]
  for name in wanted:
    if name not in known:
      raise ConfigurationError(f"unknown arm {name!r}{nearest(name, known)}")
  return {s.name: [a for a in s.arms if a in wanted] for s in studies}


def seed_list(seeds: int | Sequence[int]) -> tuple[int, ...]:
  chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
  if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
    raise ConfigurationError(
      f"seeds = {seeds!r}; a number of at least 1 or distinct numbers from 0 are accepted"
    )
  return chosen


def compose(
  module: ModuleType,
  scale: str,
  study: Study,
  arm: str,
  overrides: Mapping[str, Any] | None = None,
) -> ml_collections.ConfigDict:
  """The configuration of one arm: the scale's, then the study's, the caller's, the arm's."""
  config = module.get_config(scale)
  configs.override(config, study.config, f"study {study.name}")
  configs.override(config, overrides or {}, "override")
  configs.override(config, study.arms[arm], f"arm {arm}")
  return config.lock()


def run_stages(module: ModuleType, config: ml_collections.ConfigDict, lab: Lab) -> ArmMetrics:
  """The program of an arm with nothing special: every stage in turn; the last one's metrics."""
  metrics: ArmMetrics = {}
  for name, task in module.stages(config).items():
    metrics = lab.fit(name, task).metrics
  return metrics


def _check_stages(module: ModuleType, config: Any, mesh: Mesh, label: str) -> None:
  """Builds every stage, its shapes and its data: what cannot work is refused before compiling."""
  try:
    for stage, task in module.stages(config).items():
      _ = Program(task, mesh, (0,)).abstract_state
      inputs.load(task, f"{label} {stage}")
  except ConfigurationError:
    raise
  except ValueError as error:
    raise ConfigurationError(f"{label}: {error}") from error


def _check_workdir(directory: pathlib.Path, record: dict[str, Any]) -> None:
  path = directory / "config.json"
  begun = any((directory / name).exists() for name in ("checkpoints", "result.json"))
  if not path.exists() or not begun:
    return  # nothing that another run could spoil
  found = configs.differences(record, json.loads(path.read_text()))
  if found:
    raise ConfigurationError(
      f"{directory} holds another run ({'; '.join(found)}); remove it or name another --workdir"
    )


def _run_arm(module: ModuleType, study: Study, config: Any, record: Any, lab: Lab) -> None:
  result, console = lab.directory / "result.json", lab.progress.console
  commit = processes.first(json.loads(result.read_text())["commit"] if result.exists() else None)
  if commit is not None:
    note = "" if commit == _commit() else f", by commit {commit}"
    console.print(f"{lab.label}  finished earlier{note}", highlight=False)
    return
  lab.directory.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    write_json(lab.directory / "config.json", record)
  began = time.monotonic()
  if study.run is not None:
    metrics = study.run(config, lab)
  elif hasattr(module, "run"):
    metrics = module.run(config, lab)
  else:
    metrics = run_stages(module, config, lab)
  wall_s = max(time.monotonic() - began, lab.wall_s)
  if jax.process_index() == 0:
    write_json(
      result,
      {
        "params": lab.parameters,
        "steps": lab.steps,
        "metrics": {k: [float(x) for x in v] for k, v in metrics.items()},
        "wall_s": round(wall_s, 2),
        "commit": _commit(),
        "failed": lab.failed,
      },
    )
  console.print(f"{lab.label}  done in {wall_s:.0f} s", highlight=False)


def assemble(module: ModuleType, scale: str, root: pathlib.Path) -> dict[str, Any]:
  """The verdict on everything that a workdir holds results for."""
  arms: dict[str, Any] = {}
  claims: list[dict[str, Any]] = []
  commits: set[str] = set()
  for study in module.STUDIES:
    there = {}
    for arm in study.arms:
      path = root / slug(study.name) / slug(arm) / "result.json"
      if study.at(scale) and path.exists():
        result = json.loads(path.read_text())
        commits.add(result.pop("commit"))
        arms[f"{study.name}/{arm}"] = result
        there[arm] = result["metrics"]
    for claim in study.claims if there else ():
      claims.append(
        {"study": study.name, "name": claim.name, "statement": claim.statement}
        | {"metric": claim.metric, "margin": claim.margin}
        | judge(claim, there)
      )
  return {
    "experiment": slug_of(module),
    "scale": scale,
    "commit": ", ".join(sorted(commits)),
    "versions": {"python": platform.python_version()}
    | {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "numpy")},
    "wall_s": round(sum(a["wall_s"] for a in arms.values()), 1),
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "date": datetime.date.today().isoformat(),
    "command": "",
    "arms": arms,
    "claims": claims,
  }


@functools.cache
def _commit() -> str:
  """The commit that ran, `+` when the tree had changes; `unknown` outside a repository."""
  here = pathlib.Path(__file__).parent

  def git(*arguments: str) -> str:
    done = subprocess.run(
      ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  try:
    changes = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changes else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _command(name: str, arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
  """The command line of a call of `run`."""
  words = [f"python -m {PACKAGE}.{name}"]
  for flag, value in [*arguments.items(), *((f"config.{k}", v) for k, v in overrides.items())]:
    if value is not None:
      listed = isinstance(value, Sequence) and not isinstance(value, str)
      text = ",".join(map(str, value)) if listed else str(value)
      words.append(shlex.quote(f"--{flag}={text}"))
  return " ".join(words)


def command_line(name: str) -> str:
  """What repeats the run: not where it wrote."""
  words, kept = iter(sys.argv[1:]), []
  for word in words:
    if word == "--workdir":
      next(words, None)
    elif not word.startswith("--workdir="):
      kept.append(word)
  return shlex.join(["python", "-m", f"{PACKAGE}.{name}", *kept])
