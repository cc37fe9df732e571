"""Metrics: one writer to JSON lines and TensorBoard event files."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

Values = Mapping[str, Sequence[float]]  # metric -> one value a seed


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(value, indent=1) + "\n")
  partial.replace(path)


class Writer:
  """Appends the metrics of one arm: `metrics.jsonl`, and event files with one run a seed.

  A record is `{"stage", "step", metric: [a value a seed], ...}`.
  """

  def __init__(self, directory: pathlib.Path, seeds: Sequence[int]) -> None:
    self.path = directory / "metrics.jsonl"
    self.directory = directory / "tensorboard"
    self.seeds = tuple(seeds)
    self.boards: list[SummaryWriter] = []
    self.stage = ""

  def begin(self, stage: str, step: int) -> None:
    """Drops what an interrupted run wrote of `stage` after `step`."""
    self.close()
    self.stage = stage
    if self.path.exists():
      records = [line for line in self.path.read_text().splitlines() if _kept(line, stage, step)]
      partial = self.path.with_name(self.path.name + ".partial")
      partial.write_text("".join(line + "\n" for line in records))
      partial.replace(self.path)
    self.boards = [
      SummaryWriter(str(self.directory / f"{stage}-seed{seed}"), purge_step=step + 1)
      for seed in self.seeds
    ]

  def write(self, step: int, values: Values) -> None:
    values = {k: np.asarray(v, np.float64).tolist() for k, v in values.items()}
    with self.path.open("a") as file:
      file.write(json.dumps({"stage": self.stage, "step": step} | values) + "\n")
    for index, board in enumerate(self.boards):
      for name, value in values.items():
        if len(value) == len(self.boards):
          board.add_scalar(name, value[index], step)

  def close(self) -> None:
    for board in self.boards:
      board.close()
    self.boards = []


def _kept(line: str, stage: str, step: int) -> bool:
  try:
    record = json.loads(line)
  except ValueError:  # the line that was being written when the run was killed
    return False
  return record["stage"] != stage or record["step"] <= step


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a `metrics.jsonl`; a last line cut short is left out."""
  records = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      break
  return records
