"""The train loop of one stage: read, update, measure, save; resume where it stopped."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import inputs, metrics, processes
from launch.checkpoints import Checkpoints, Damaged, SaveError
from launch.errors import TrainingError
from launch.interruption import Interruption, Stopped
from launch.profiling import Clock, Compiler, Trace
from launch.program import Program
from launch.progress import Progress
from launch.task import Evaluation, Source, State, Task

RECORDS = 100  # training metrics are written about this often in a stage
READ_S = 0.3  # and brought to the host about this often, in seconds
RETRY_S = 30.0  # a checkpoint that could not be written is tried again this often
PATIENCE_S = 600.0  # and at the end of a stage for this long
STOPPING_S = 10.0  # or, told to stop, four times in this; what preempts gives 30 seconds or so


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A finished stage: what it learnt and how well it does.

  `params`, `variables` and `opt_state` have a leading seed axis; `metrics` is `{name: [a value a
  seed]}`.
  """

  params: Any
  variables: Any
  opt_state: Any
  metrics: dict[str, list[float]]
  parameters: int  # trained parameters of one seed
  steps: int
  wall_s: float
  failed: dict[int, str] = dataclasses.field(default_factory=dict)  # seed -> what went wrong


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
  start: tuple[Any, Any] = (None, None),
  trace: Trace | None = None,
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
    start: variables and optimizer state in place of fresh ones, ignored on resuming; see `Lab.fit`.
    trace: which updates to profile.

  A seed whose loss or parameters are no longer finite is reported, its metrics are NaN from then
  on, and the others go on.

  Raises:
    TrainingError: no seed is finite any more; the data cannot be read; the last state cannot be
      saved.
    Stopped: after a signal.
  """
  task = program.task
  done = directory / "done.json"
  say = functools.partial(progress.console.print, highlight=False, markup=False, soft_wrap=True)
  result = processes.first(json.loads(done.read_text()) if done.exists() else None)
  if result is not None:
    finished = _finished(program, directory, result)
    if finished is not None:
      return finished
    say(f"{label}: what it learnt is damaged; on from an earlier checkpoint")
    done.unlink(missing_ok=True)
  source, sources = inputs.load(task, label)
  measured = [Measurement(program, name, task.evaluate[name], s) for name, s in sources.items()]
  run = _Run(program, directory, label, writer, source, measured, say)
  run.begin(*start)
  writer.begin(stage, run.step)
  progress.start(label, run.step, task.steps)
  try:
    with program.context(), interruption.training(label, run.kept):
      run.train(progress, interruption, trace)
  finally:
    progress.finish()
    # To close is to wait for all processes; one that fails alone must tell them instead.
    error = sys.exception()
    together = error is None or (isinstance(error, Stopped) and error.step is not None)
    if together or processes.count() == 1:
      run.close()
  result = {
    "metrics": selected(run.history, task.select),
    "parameters": program.parameters,
    "steps": task.steps,
    "wall_s": round(run.wall_s, 3),
    "failed": run.failed,
  }
  if jax.process_index() == 0:
    metrics.write_json(done, result)
  return _fitted(run.state, result)


def _finished(program: Program, directory: pathlib.Path, result: dict[str, Any]) -> Fitted | None:
  """A finished stage read back; None when its last checkpoint is damaged."""
  result["failed"] = {int(seed): why for seed, why in result["failed"].items()}
  result["metrics"] = {k: np.asarray(v, float).tolist() for k, v in result["metrics"].items()}
  with contextlib.closing(Checkpoints(directory)) as checkpoints:
    try:
      state, _ = checkpoints.read(result["steps"], program.abstract_state)
    except Damaged:
      return None
  return _fitted(state, result)


def _fitted(state: State, result: dict[str, Any]) -> Fitted:
  kept = {"params": state.params, "variables": state.variables, "opt_state": state.opt_state}
  return Fitted(**kept, **result)


class _Run:
  """The state of a stage's run; one use."""

  def __init__(self, program, directory, label, writer, source, measured, say) -> None:
    self.program: Program = program
    self.task: Task = program.task
    self.label, self.writer, self.measured, self.say = label, writer, measured, say
    self.checkpoints = Checkpoints(directory)
    rows, seeds = program.rows, program.seeds
    self.batches = inputs.Batches(
      source, self.task.example, self.task.batch_size, seeds, rows, tuple(stops(self.task))
    )
    self.compiler = Compiler(program, label, say)
    self.clock = Clock(label, say)
    self.history: list[dict[str, Any]] = []  # evaluations so far
    self.window: dict[str, list[Any]] = {}  # training metrics since the last record
    self.failed: dict[int, str] = {}  # seed -> what is not finite, and since when
    self.retry_at: float | None = None  # when a checkpoint that failed is tried again
    self.finite = jax.jit(_finite)

  def begin(self, variables: Any, opt_state: Any) -> None:
    found = self.checkpoints.restore(self.program.abstract_state, self.say)
    if found is None:
      record: dict[str, Any] = {"next_index": 0, "history": [], "wall_s": 0.0, "failed": {}}
      self.state = self.program.initial_state(variables, opt_state)
    else:
      self.state, record = found
    self.step: int = record["next_index"]
    self.history = record["history"]
    self.failed = {int(seed): why for seed, why in record["failed"].items()}
    self.wall_s: float = record["wall_s"]
    self.began = time.monotonic() - self.wall_s

  def train(self, progress: Progress, interruption: Interruption, trace: Trace | None) -> None:
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
      update = self.compiler(stop - self.step)
      if trace is not None:
        trace.begin(self.step)
      self.clock.start()
      batch = self.next_batch(batches)
      self.clock.waited(pending[-1][1] if pending else None)
      placed = inputs.to_devices(batch, shardings, 2, task.batch_size)
      with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
        self.state, measured = update(self.state, placed)
      pending.append((self.step, measured))
      updates, self.step = stop - self.step, stop
      if read_at is None:  # the first call warms up
        jax.block_until_ready(measured)
        progress.restart_clock(stop)
        read_at = time.monotonic()
      signalled = interruption.poll()
      retries = self.retry_at is not None and time.monotonic() > self.retry_at
      evaluates = stop % evaluate_every == 0 or stop == task.steps
      saves = stop % checkpoint_every == 0 or stop == task.steps or signalled or retries
      if len(pending) > 1:  # one call stays in flight: the device never waits for Python
        jax.block_until_ready(pending[-2][1])
      if evaluates or saves or time.monotonic() - read_at > READ_S:
        self.read(pending, progress, leave=0 if evaluates or saves else 1)
        read_at = time.monotonic()
        with self.not_fatal():
          self.checkpoints.check()
      self.clock.stop(updates)
      if trace is not None and (traced := trace.end(stop, measured)):
        self.say(f"{self.label}: {traced}")
      if evaluates:
        self.evaluate()
      if saves:
        self.save()
      if signalled:
        self.settle(STOPPING_S)
        raise Stopped(self.label, self.step, signalled)
    self.settle(PATIENCE_S)
    self.wall_s = time.monotonic() - self.began

  def next_batch(self, batches: Iterator[inputs.Arrays]) -> inputs.Arrays:
    try:
      return next(batches)
    except Exception as error:  # a shard that vanished, a disk gone, a bug of the source
      what = (
        f"{self.label}: the data of step {self.step + 1} cannot be read"
        f" ({type(error).__name__}: {error})"
      )
      if processes.count() > 1:  # the others are not here to save with
        raise TrainingError(f"{what}; {self.kept()}") from error
      self.save()
      self.settle(STOPPING_S)
      raise TrainingError(
        f"{what}; saved at step {self.step}: when the data is back, the same command goes on"
        " from there"
      ) from error

  def read(self, pending: collections.deque, progress: Progress, leave: int) -> None:
    """Brings metrics to the host, all but the newest `leave` calls', checks and writes them."""
    every = max(self.task.steps // RECORDS, 1)
    loss = math.nan
    while len(pending) > leave:
      first, measured = pending.popleft()
      host = jax.device_get(measured)
      total, count = host["loss"]
      finite = np.isfinite(total)  # (updates, S)
      self.fail("loss", ~finite.all(axis=0), first + 1 + (~finite).argmax(axis=0))
      alive = self.alive
      loss = float((total[-1, alive] / count[-1, alive]).mean())
      for name, pair in host.items():
        sums = self.window.setdefault(name, [0.0, 0.0])
        for which in range(2):
          sums[which] = sums[which] + pair[which].sum(axis=0)
      last = first + len(total)
      if last // every > first // every or last == self.task.steps:
        means = {f"train/{k}": t / np.maximum(n, 1e-30) for k, (t, n) in self.window.items()}
        self.writer.write(last, means | self.clock.metrics(self.compiler, last))
        self.window = {}
    if not math.isnan(loss):
      progress.update(last, loss)

  def evaluate(self) -> None:
    values: dict[str, list[float]] = {}
    for measurement in self.measured:
      try:
        values |= measurement(self.state.params, self.state.variables)
      except (OSError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError | TrainingError):
          raise
        raise TrainingError(
          f"{self.label}: {measurement.name} cannot be measured ({error}); the same command goes on"
          f" from step {self.checkpoints.latest() or 0}"
        ) from error
    if values:
      masked = {k: np.where(self.alive, v, math.nan).tolist() for k, v in values.items()}
      self.history.append({"step": self.step, "values": masked})
      self.writer.write(self.step, masked)

  @property
  def alive(self) -> np.ndarray:
    """Which seeds are finite, (S,) bool."""
    return np.array([seed not in self.failed for seed in self.program.seeds])

  def fail(self, what: str, failed: np.ndarray, step: np.ndarray) -> None:
    """Notes the seeds that are `failed` (S,) since `step` (S,); stops when none is left."""
    for index in np.flatnonzero(failed & self.alive):
      seed, since = self.program.seeds[index], int(step[index])
      self.failed[seed] = f"{what} is not finite at step {since}"
      if self.alive.any():
        self.say(f"{self.label}: seed {seed}: {self.failed[seed]}; the other seeds go on")
    if self.alive.any():
      return
    if processes.count() == 1:
      with self.not_fatal():
        self.checkpoints.wait()
    many = len(self.failed) > 1
    why = ", ".join(f"seed {s}: {why}" if many else why for s, why in self.failed.items())
    raise TrainingError(f"{self.label}: {why} ({self.kept()})")

  def kept(self) -> str:
    """The newest checkpoint that is whole on disk, in words; from any thread."""
    step, where = self.checkpoints.on_disk(), self.checkpoints.directory
    good = "no checkpoint yet" if step is None else f"last good checkpoint: step {step}"
    return f"{good}, in {where}"

  def save(self) -> None:
    """Begins a checkpoint; one that cannot be written is tried again later."""
    finite = np.asarray(self.finite(self.state.params))
    self.fail("a parameter", ~finite, np.full(len(finite), self.step))
    self.wall_s = time.monotonic() - self.began
    record = {"next_index": self.step, "history": self.history, "wall_s": self.wall_s}
    record["failed"] = {str(seed): why for seed, why in self.failed.items()}
    self.retry_at = None
    self.writer.sync()
    with self.not_fatal():
      self.checkpoints.save(self.step, self.state, record)

  @contextlib.contextmanager
  def not_fatal(self, pause: float | None = None) -> Iterator[None]:
    """A checkpoint that cannot be written is no reason to stop: the state is in memory.

    It is tried again in `pause` seconds, by default RETRY_S.
    """
    pause = RETRY_S if pause is None else pause
    try:
      yield
    except SaveError as error:
      self.retry_at = time.monotonic() + pause
      self.unsaved = f"cannot be saved in {self.checkpoints.directory}: {error}"
      if processes.count() > 1:  # a second attempt would need all of them to know
        raise TrainingError(
          f"{self.label}: step {self.step} {self.unsaved}; {self.kept()}"
        ) from error
      self.say(f"{self.label}: step {self.step} {self.unsaved}; trying again in {pause:g} s")

  def settle(self, patience: float) -> None:
    """Returns when the newest state is whole on disk; tries again for `patience` seconds."""
    until, pause = time.monotonic() + patience, min(RETRY_S, patience / 4)
    while True:
      with self.not_fatal(pause):
        self.checkpoints.wait()
      if self.retry_at is None:
        return
      if time.monotonic() > until:
        good = self.checkpoints.latest()
        kept = f"the last checkpoint is of step {good}" if good is not None else "none was saved"
        raise TrainingError(f"{self.label}: step {self.step} {self.unsaved}; {kept}")
      time.sleep(max(min(pause, until - time.monotonic()), 0.0))
      self.save()

  def close(self) -> None:
    self.writer.close()
    with contextlib.suppress(SaveError):  # said already, where it matters
      self.checkpoints.close()


def _finite(params: Any) -> jax.Array:
  """Which seeds' parameters are all finite, (S,) bool."""
  leaves = [jnp.isfinite(x).reshape(len(x), -1).all(axis=1) for x in jax.tree.leaves(params)]
  return jnp.stack(leaves).all(axis=0)


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
