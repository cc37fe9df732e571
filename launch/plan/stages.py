"""Plans of an experiment's stages, on the topology that its file names for the scale."""

import fnmatch
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from launch import mesh as meshes
from launch import runner
from launch.errors import ConfigurationError, nearest
from launch.plan import Plan, plan
from launch.study import Study


def named(module: ModuleType, scale: str) -> tuple[str, str] | None:
  """Topology and mesh of a scale: the first pattern of the module's `TOPOLOGIES` that fits it."""
  patterns: Mapping[str, tuple[str, str]] = getattr(module, "TOPOLOGIES", {})
  return next((t for p, t in patterns.items() if fnmatch.fnmatchcase(scale, p)), None)


def plans(
  name: str,
  scale: str,
  *,
  topology: str | None = None,
  mesh: str | None = None,
  study: str | None = None,
  arm: str | None = None,
  seeds: int | None = None,
  overrides: Mapping[str, Any] | None = None,
  cache: pathlib.Path | None = None,
  cached_only: bool = False,
) -> dict[str, Plan]:
  """A plan for every stage of one arm that has updates.

  Args:
    name: the experiment.
    scale: one of its scales.
    topology: such as `v5e-16`; default: the one named for the scale.
    mesh: such as `data=8,tensor=2`; default: the one named with the topology, else all on data.
    study: default: the first of the scale that trains stages; without one, the scale as it is.
    arm: default: the study's first.
    seeds: how many, side by side; default: the study's.
    overrides: dotted keys of the configuration.
    cache: as for `plan`.
    cached_only: as for `plan`.

  Raises:
    ConfigurationError: something asked for does not exist or does not fit together.
    LookupError: as for `plan`.
  """
  module = runner.find(name)
  if scale not in module.SCALES:
    raise ConfigurationError(f"unknown scale {scale!r}{nearest(scale, module.SCALES)}")
  where = named(module, scale)
  if topology is None and where is None:
    raise ConfigurationError(f"{name} names no topology for scale {scale!r}; give --topology")
  if where is not None and topology in (None, where[0]):
    topology, mesh = where[0], where[1] if mesh is None else mesh
  assert topology is not None
  chosen = _study(module, scale, study, arm)
  first = next(iter(chosen.arms)) if arm is None else arm
  config = runner.compose(module, scale, chosen, first, overrides)
  numbers = runner.seed_list(chosen.seeds if seeds is None else seeds)
  try:
    tasks = {stage: task for stage, task in module.stages(config).items() if task.steps}
    return {
      stage: plan(task, topology, meshes.parse(mesh or ""), numbers, cache, cached_only)
      for stage, task in tasks.items()
    }
  except ConfigurationError:
    raise
  except ValueError as error:
    raise ConfigurationError(f"{chosen.name}/{first}: {error}") from error


def _study(module: ModuleType, scale: str, name: str | None, arm: str | None) -> Study:
  """The study asked for; else the first that trains stages, any other, or none in particular."""
  here = {s.name: s for s in module.STUDIES if s.at(scale)}
  if name is not None and name not in here:
    raise ConfigurationError(f"unknown study {name!r} at scale {scale!r}{nearest(name, here)}")
  chosen = [here[name]] if name else sorted(here.values(), key=lambda s: s.run is not None)
  chosen = chosen or [Study("any", arms={"any": {}}, seeds=1)]
  fitting = [s for s in chosen if arm is None or arm in s.arms]
  if not fitting:
    arms = [a for s in chosen for a in s.arms]
    raise ConfigurationError(f"unknown arm {arm!r}{nearest(arm or '', arms)}")
  return fitting[0]
