"""`python -m launch.bench`: what the engine costs on top of the compiled step.

Three tables, each measured side by side in this run: the train loop's time a step against the bare
compiled step on a batch that is already on the device; examples a second that the input delivers
against what the step takes; and S5's layer against the authors' formulation by length.
"""

import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from absl import app, flags, logging

from launch import inputs, interruption, loop, metrics, supervised
from launch import mesh as meshes
from launch.program import Program
from launch.progress import Progress
from launch.task import Task
from models.kernels import bench as kernels

ROUNDS = flags.DEFINE_integer(
  "rounds", 7, "Timed rounds of each contestant, in turn.", lower_bound=1
)
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
BATCH, FEATURES = 32, 64
STEPS = (  # name, width and repeats of the work, steps of a run, steps a dispatch
  ("10 ms, 1 a dispatch", 128, 760, 400, 1),
  ("0.5 ms, 50 a dispatch", 128, 36, 4000, 50),
)


class Random:
  """1,024 examples of normal noise in memory."""

  def __init__(self) -> None:
    random = np.random.RandomState(0)
    self.fields = {
      "inputs": random.randn(1024, FEATURES).astype(np.float32),
      "labels": random.randint(0, 10, 1024).astype(np.int32),
    }

  def __len__(self) -> int:
    return 1024

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {k: v[index] for k, v in self.fields.items()}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v[indices] for k, v in self.fields.items()}


class Work(nn.Module):
  """A small network with a dial for how long a step takes: `repeats` products of width `width`."""

  width: int
  repeats: int

  @nn.compact
  def __call__(self, x_BD, *, train):
    x_BH = nn.Dense(self.width)(x_BD)
    w_HH = self.param("w", nn.initializers.orthogonal(), (self.width, self.width))
    x_BH = jax.lax.fori_loop(0, self.repeats, lambda _, x: jnp.tanh(x @ w_HH), x_BH)
    return nn.Dense(10)(jax.lax.stop_gradient(x_BH))


def objective(logits_BC, batch):
  losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch["labels"])
  return losses_B.mean(), {"loss": (losses_B.sum(), batch["mask"].sum())}


def work(width: int, repeats: int, steps: int, per_dispatch: int) -> Task:
  example = {
    "inputs": jax.ShapeDtypeStruct((FEATURES,), np.float32),
    "labels": jax.ShapeDtypeStruct((), np.int32),
  }
  init, loss = supervised(Work(width, repeats), objective, example)
  return Task(
    init=init,
    loss=loss,
    optimizer=optax.adam(1e-3),
    example=example,
    data=Random,
    batch_size=BATCH,
    steps=steps,
    steps_per_dispatch=per_dispatch,
  )


class Clock(Progress):
  """A display that shows nothing and keeps the times between compilation and the last update."""

  def restart_clock(self, step: int) -> None:
    super().restart_clock(step)
    self.started = time.perf_counter()

  def update(self, step: int, loss: float) -> None:
    super().update(step, loss)
    self.ended = time.perf_counter()

  def per_step(self) -> float:
    return (self.ended - self.started) / (self.steps - self.first)


def loop_seconds(program: Program) -> float:
  """Seconds a step in the real loop: input, transfer, metrics, display; compilation left out."""
  clock = Clock(rich.console.Console(quiet=True))
  with tempfile.TemporaryDirectory() as folder:
    directory = pathlib.Path(folder)
    writer = metrics.Writer(directory, program.seeds)
    loop.fit(
      program, directory / "stage", "stage", "bench", writer, clock, interruption.Interruption()
    )
  return clock.per_step()


def bare_seconds(program: Program, updates: int, calls: int) -> float:
  """Seconds a step of the compiled program alone, on one batch that is on the device."""
  task, rows = program.task, range(BATCH)
  batches = inputs.Batches(
    inputs.load(task, "bench")[0], task.example, BATCH, program.seeds, rows, (updates,)
  )
  with program.context():
    placed = jax.device_put(batches[0], program.batch_shardings)  # once: only the step is timed
    state, _ = program.update(program.initial_state(), placed)
    jax.block_until_ready(state)
    began = time.perf_counter()
    for _ in range(calls):
      state, _ = program.update(state, placed)
    jax.block_until_ready(state)
  return (time.perf_counter() - began) / (calls * updates)


def in_turn(*contestants: Callable[[], float]) -> list[list[float]]:
  """Every contestant once a round."""
  rounds = [[contestant() for contestant in contestants] for _ in range(ROUNDS.value)]
  return [list(times) for times in zip(*rounds, strict=True)]


def overhead() -> list[dict[str, Any]]:
  """The loop against the bare step, for a step of about 10 ms and one of about 0.5 ms."""
  rows = []
  mesh = meshes.make({}, jax.devices()[:1])
  for name, width, repeats, steps, updates in STEPS:
    program = Program(work(width, repeats, steps, updates), mesh, (0,))
    bare = functools.partial(bare_seconds, program, updates, steps // updates)
    one_by_one = functools.partial(bare_seconds, program, 1, min(steps, 1000))
    ours, theirs, single = in_turn(functools.partial(loop_seconds, program), bare, one_by_one)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    rows.append(
      {
        "step": name,
        "loop ms": 1e3 * statistics.median(ours),
        "bare ms": 1e3 * statistics.median(theirs),
        "bare ms, 1 a dispatch": 1e3 * statistics.median(single),
        "loop / bare, median": statistics.median(ratios),
        "loop / bare, best": min(ours) / min(theirs),
      }
    )
  return rows


def reading() -> list[dict[str, Any]]:
  """Examples a second from the input pipeline, and what a training step of the same task takes."""
  rows = []
  mesh = meshes.make({}, jax.devices()[:1])
  for name, width, repeats, steps, updates in STEPS:
    task = work(width, repeats, steps, updates)
    program = Program(task, mesh, (0,))
    calls = tuple(loop.stops(task))
    source, _ = inputs.load(task, name)
    batches = inputs.Batches(source, task.example, BATCH, (0,), range(BATCH), calls)

    def read(batches=batches) -> float:
      iterator = inputs.iterate(batches, 0)
      next(iterator)
      began = time.perf_counter()
      for _ in iterator:
        pass
      last, first = batches.stops[-1], batches.stops[0]
      return (time.perf_counter() - began) / (last - first)

    delivered, needed = in_turn(
      read, functools.partial(bare_seconds, program, updates, steps // updates)
    )
    ratios = [b / a for a, b in zip(delivered, needed, strict=True)]
    rows.append(
      {
        "step": name,
        "delivered examples/s": BATCH / statistics.median(delivered),
        "needed examples/s": BATCH / statistics.median(needed),
        "delivered / needed": statistics.median(ratios),
      }
    )
  return rows


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
  grid = rich.table.Table(*rows[0])
  for row in rows:
    grid.add_row(*(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
  return grid


def layer() -> list[dict[str, Any]]:
  """S5's layer against the authors' formulation, forward and with gradients, by length."""
  return list(kernels.rows(repeats=ROUNDS.value))


def main(argv) -> None:
  del argv
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  console = rich.console.Console()
  tables = {
    "train loop against the bare step": overhead,
    "input against the step's need": reading,
    "S5 layer against the authors' formulation": layer,
  }
  figures = {}
  for title, measure in tables.items():
    figures[title] = measure()
    console.print(f"[bold]{title}[/]")
    console.print((kernels.table if measure is layer else table)(figures[title]))
  if JSON.value is not None:
    metrics.write_json(pathlib.Path(JSON.value), figures)


if __name__ == "__main__":
  app.run(main)
