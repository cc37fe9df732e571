"""Lab: what a running arm is given by the engine."""

import io
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from launch import loop, metrics
from launch.interruption import Interruption
from launch.profiling import Trace
from launch.program import Program
from launch.progress import Progress
from launch.task import Evaluation, Task


class Lab:
  """Mesh, seeds, work directory, metric writer and display of one arm of a study.

  Attributes:
    mesh: the devices.
    seeds: one replicate each; every metric is a list in this order.
    directory: the arm's own work directory.
    parameters: trained parameters of one seed, of the newest stage.
    steps: updates of all stages so far.
    failed: seed -> stage and what was not finite there.
  """

  def __init__(
    self,
    mesh: Mesh,
    directory: pathlib.Path,
    seeds: tuple[int, ...],
    label: str,
    progress: Progress,
    interruption: Interruption,
    profile: tuple[int, int] | None = None,
  ) -> None:
    self.mesh, self.directory, self.seeds = mesh, directory, seeds
    self.label, self.progress, self.interruption = label, progress, interruption
    self.profile = profile
    self.writer = metrics.Writer(directory, seeds)
    self.parameters = 0
    self.steps = 0
    self.wall_s = 0.0
    self.failed: dict[int, str] = {}

  def fit(
    self, stage: str, task: Task, variables: Any = None, opt_state: Any = None
  ) -> loop.Fitted:
    """Trains a stage, or resumes it, or reads it back when it is finished.

    Args:
      stage: its name; checkpoints are kept under it.
      task: what to train.
      variables: a flax variable dict with a leading seed axis to start from, in place of
        `task.init` (say the transformed parameters of an earlier stage).
      opt_state: that of an earlier stage to go on with, its schedule included; a fresh one without.
    """
    start = (variables, opt_state)
    if task.map_seeds:
      fitted = self._fit(stage, task, self.seeds, start)
    else:
      self.progress.console.print(f"{self.label} {stage}: seeds one after another")
      parts = []
      for index, seed in enumerate(self.seeds):
        own = jax.tree.map(lambda x, i=index: x[i : i + 1], start)
        parts.append(self._fit(f"{stage}-seed{seed}", task, (seed,), own))
      fitted = _together(parts)
    self.parameters = fitted.parameters
    self.steps += fitted.steps
    self.wall_s += fitted.wall_s
    for seed, why in fitted.failed.items():
      self.failed.setdefault(seed, f"{stage}: {why}")
    return fitted

  def _fit(self, stage: str, task: Task, seeds: tuple[int, ...], start: Any) -> loop.Fitted:
    many = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    label = f"{self.label} {stage}, {many}"
    program = Program(task, self.mesh, seeds)
    directory = self.directory / "checkpoints" / stage
    writer = self.writer if seeds == self.seeds else metrics.Writer(self.directory, seeds)
    trace = Trace(self.profile, self.directory / "profile" / stage)
    return loop.fit(
      program, directory, stage, label, writer, self.progress, self.interruption, start, trace
    )

  def evaluate(
    self, task: Task, name: str, evaluation: Evaluation, variables: Any
  ) -> dict[str, list[float]]:
    """Measures `variables` (leading seed axis) without training: `{name/metric: [a value a seed]}`.

    `task` says how they are laid out and how a batch looks.
    """
    program = Program(task, self.mesh, self.seeds)
    rest = {k: v for k, v in variables.items() if k != "params"}
    measurement = loop.Measurement(program, name, evaluation, evaluation.data())
    measured = measurement(variables["params"], rest)
    alive = [seed not in self.failed for seed in self.seeds]
    return {k: np.where(alive, v, np.nan).tolist() for k, v in measured.items()}

  def plot(self, name: str, draw: Callable[[Any], None], width: float = 6, height: float = 4):
    """Saves `NAME.png` in the arm's directory; `draw(figure)` fills a matplotlib figure."""
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)  # on every process, as it may compute
    if jax.process_index() == 0:
      buffer = io.BytesIO()
      figure.savefig(buffer, dpi=150)
      (self.directory / f"{name}.png").write_bytes(buffer.getvalue())


def _together(parts: list[loop.Fitted]) -> loop.Fitted:
  params, variables, opt_state = (
    jax.tree.map(lambda *x: jnp.concatenate(x), *[getattr(p, field) for p in parts])
    for field in ("params", "variables", "opt_state")
  )
  first = parts[0]
  return loop.Fitted(
    params=params,
    variables=variables,
    opt_state=opt_state,
    metrics={k: [v for p in parts for v in p.metrics[k]] for k in first.metrics},
    parameters=first.parameters,
    steps=first.steps,
    wall_s=sum(p.wall_s for p in parts),
  )  # `failed` is empty: a run of one seed that fails stops


def slug(name: str) -> str:
  """A name as a directory: `random spectrum` -> `random-spectrum`."""
  return re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-")
