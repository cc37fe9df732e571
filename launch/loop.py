"""The train loop of one stage: read, update, measure, save; resume where it stopped."""

import bisect
import collections
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import inputs, metrics
from launch.checkpoints import Checkpoints
from launch.errors import TrainingError
from launch.interruption import Interruption, Stopped
from launch.program import Program
from launch.progress import Progress
from launch.task import Evaluation, Source, Task

RECORDS = 100  # training metrics are written about this often in a stage
READ_S = 0.3  # and brought to the host about this often, in seconds


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A finished stage: what it learnt and how well it does.

  `params` and `variables` have a leading seed axis; `metrics` is `{name: [a value a seed]}`.
  """

  params: Any
  variables: Any
  metrics: dict[str, list[float]]
  parameters: int  # trained parameters of one seed
  steps: int
  wall_s: float


def stops(task: Task) -> Iterator[int]:
  """The steps at which a compiled call ends: a function of the task alone, so that a resumed run
  makes the same calls as an undisturbed one (and gets the same bits)."""
  step = 0
  while step < task.steps:
    nexts = [(step // every + 1) * every for every in _rhythm(task)]
    step = min(*nexts, task.steps)
    yield step


def _rhythm(task: Task) -> tuple[int, int, int]:
  return (
    max(task.steps_per_dispatch, 1),
    task.evaluate_every or task.steps,
    task.checkpoint_every or task.steps,
  )


def fit(
  program: Program,
  directory: pathlib.Path,
  stage: str,
  label: str,
  writer: metrics.Writer,
  progress: Progress,
  interruption: Interruption,
  variables: Any = None,
) -> Fitted:
  """Trains `program.task` to its last step, from the newest checkpoint if there is one.

  Args:
    program: the task on its mesh.
    directory: the stage's own; holds the checkpoints and, at the end, `done.json`.
    stage: its name in the metrics.
    label: how messages and the display name it.
    writer: where metrics go.
    progress: where the display goes.
    interruption: read between updates; when set, the state is saved and `Stopped` is raised.
    variables: start from these instead of `task.init` (leading seed axis), ignored on resuming.

  Raises:
    TrainingError: the loss or a parameter is no longer finite.
    Stopped: after a signal.
  """
  task = program.task
  done = directory / "done.json"
  if done.exists():
    return _finished(program, directory)
  source, sources = inputs.load(task, label)
  measured = [Measurement(program, name, task.evaluate[name], s) for name, s in sources.items()]
  run = _Run(program, directory, label, writer, source, measured)
  run.begin(variables)
  writer.begin(stage, run.step)
  progress.start(label, run.step, task.steps)
  try:
    with program.context(), interruption.listen():
      run.train(progress, interruption)
  finally:
    progress.finish()
    run.close()
  result: dict[str, Any] = {
    "metrics": selected(run.history, task.select),
    "parameters": program.parameters,
    "steps": task.steps,
    "wall_s": round(run.wall_s, 3),
  }
  if jax.process_index() == 0:
    metrics.write_json(done, result)
  return Fitted(params=run.state.params, variables=run.state.variables, **result)


def _finished(program: Program, directory: pathlib.Path) -> Fitted:
  result = json.loads((directory / "done.json").read_text())
  checkpoints = Checkpoints(directory)
  state, _ = checkpoints.restore(program.abstract_state)
  checkpoints.close()
  return Fitted(params=state.params, variables=state.variables, **result)


class _Run:
  """The state of a stage's run; one use."""

  def __init__(self, program, directory, label, writer, source, measured) -> None:
    self.program: Program = program
    self.task: Task = program.task
    self.label, self.writer, self.measured = label, writer, measured
    self.checkpoints = Checkpoints(directory)
    rows, seeds = program.rows, program.seeds
    self.batches = inputs.Batches(
      source, self.task.example, self.task.batch_size, seeds, rows, tuple(stops(self.task))
    )
    self.history: list[dict[str, Any]] = []  # evaluations so far
    self.window: dict[str, list[Any]] = {}  # training metrics since the last record
    self.all_finite = jax.jit(_all_finite)

  def begin(self, variables: Any) -> None:
    record: dict[str, Any] = {"next_index": 0, "history": [], "wall_s": 0.0}
    if self.checkpoints.latest() is None:
      self.state = self.program.initial_state(variables)
    else:
      self.state, record = self.checkpoints.restore(self.program.abstract_state)
    self.step: int = record["next_index"]
    self.history = record["history"]
    self.wall_s: float = record["wall_s"]
    self.began = time.monotonic() - self.wall_s

  def train(self, progress: Progress, interruption: Interruption) -> None:
    task = self.task
    shardings = self.program.batch_shardings
    batches = inputs.iterate(self.batches, self.step)
    pending: collections.deque[tuple[int, Any]] = collections.deque()
    _, evaluate_every, checkpoint_every = _rhythm(task)
    read_at = None
    if not task.steps and not self.history:
      self.evaluate()
      self.save()
    for stop in self.batches.stops[bisect.bisect_right(self.batches.stops, self.step) :]:
      placed = inputs.to_devices(next(batches), shardings, 2, task.batch_size)
      self.state, measured = self.program.update(self.state, placed)
      pending.append((self.step, measured))
      self.step = stop
      if read_at is None:  # the first call has compiled
        jax.block_until_ready(measured)
        progress.restart_clock(stop)
        read_at = time.monotonic()
      signalled = interruption.signal
      evaluates = stop % evaluate_every == 0 or stop == task.steps
      saves = stop % checkpoint_every == 0 or stop == task.steps or signalled
      if len(pending) > 1:  # one call stays in flight: the device never waits for Python
        jax.block_until_ready(pending[-2][1])
      if evaluates or saves or time.monotonic() - read_at > READ_S:
        self.read(pending, progress, leave=0 if evaluates or saves else 1)
        read_at = time.monotonic()
      if evaluates:
        self.evaluate()
      if saves:
        self.save()
      if signalled:
        self.checkpoints.wait()
        raise Stopped(self.label, self.step, signalled)
    self.checkpoints.wait()
    self.wall_s = time.monotonic() - self.began

  def read(self, pending: collections.deque, progress: Progress, leave: int) -> None:
    """Brings metrics to the host, all but the newest `leave` calls', checks and writes them."""
    every = max(self.task.steps // RECORDS, 1)
    loss = math.nan
    while len(pending) > leave:
      first, measured = pending.popleft()
      host = jax.device_get(measured)
      total, count = host["loss"]
      if not np.isfinite(total).all():
        self.fail(first + int(np.argmax(~np.isfinite(total).all(axis=1))) + 1, "loss")
      loss = float((total[-1] / count[-1]).mean())
      for name, pair in host.items():
        sums = self.window.setdefault(name, [0.0, 0.0])
        for which in range(2):
          sums[which] = sums[which] + pair[which].sum(axis=0)
      last = first + len(total)
      if last // every > first // every or last == self.task.steps:
        means = {f"train/{k}": t / np.maximum(n, 1e-30) for k, (t, n) in self.window.items()}
        self.writer.write(last, means)
        self.window = {}
    if not math.isnan(loss):
      progress.update(last, loss)

  def evaluate(self) -> None:
    values: dict[str, list[float]] = {}
    for measurement in self.measured:
      values |= measurement(self.state.params, self.state.variables)
    if values:
      self.history.append({"step": self.step, "values": values})
      self.writer.write(self.step, values)

  def save(self) -> None:
    if not bool(self.all_finite(self.state.params)):
      self.fail(self.step, "a parameter")
    self.wall_s = time.monotonic() - self.began
    record = {"next_index": self.step, "history": self.history, "wall_s": self.wall_s}
    self.checkpoints.save(self.step, self.state, record)

  def fail(self, step: int, what: str) -> None:
    self.checkpoints.wait()
    good = self.checkpoints.latest()
    kept = f"last good checkpoint: step {good}" if good is not None else "no checkpoint yet"
    raise TrainingError(
      f"{self.label}: {what} is not finite at step {step} ({kept}, in {self.checkpoints.directory})"
    )

  def close(self) -> None:
    self.writer.close()
    self.checkpoints.close()


def _all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class Measurement:
  """An evaluation with its data at hand: exact means over the whole source."""

  def __init__(self, program: Program, name: str, evaluation: Evaluation, source: Source) -> None:
    self.program, self.name, self.source = program, name, source
    self.example = evaluation.example or program.task.example
    self.compiled = program.evaluation(evaluation.loss or program.task.loss)

  def __call__(self, params: Any, variables: Any) -> dict[str, list[float]]:
    """Totals over counts, `{name/metric: [a value a seed]}`."""
    size, shardings = self.program.task.batch_size, self.program.evaluation_shardings
    rows = inputs.local_rows(shardings["mask"], size, 0)
    sums: dict[str, Any] = {}
    with self.program.context():
      batches = inputs.evaluation_batches(self.source, self.example, size, rows)
      for index, batch in enumerate(batches):
        placed = inputs.to_devices(batch, shardings, 0, size)
        values = dict(self.compiled(params, variables, placed, np.int32(index)))
        sums = jax.tree.map(jnp.add, sums, values) if sums else values
    means = {k: np.asarray(t) / np.maximum(np.asarray(n), 1e-30) for k, (t, n) in sums.items()}
    return {f"{self.name}/{k}": v.tolist() for k, v in means.items()}


def selected(history: list[dict[str, Any]], select: str | None) -> dict[str, list[float]]:
  """The results of a stage: its last evaluation, or for each seed the one where `select` peaked."""
  if not history:
    return {}
  if select is None:
    return history[-1]["values"]
  if select not in history[-1]["values"]:
    raise TrainingError(f"select = {select!r} is not measured; {sorted(history[-1]['values'])} are")
  scores = np.array([entry["values"][select] for entry in history])  # (evaluations, S)
  best = np.where(np.isnan(scores), -math.inf, scores).argmax(axis=0)
  return {
    name: [history[i]["values"][name][seed] for seed, i in enumerate(best)]
    for name in history[-1]["values"]
  }
