"""Metrics: one writer to JSON lines and TensorBoard event files."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from launch import storage

Values = Mapping[str, Sequence[float]]  # metric -> one value a seed


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file whole or not at all. A number that is not finite becomes null."""
  storage.write_text(path, json.dumps(_plain(value), indent=1) + "\n")


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


class Writer:
  """Appends the metrics of one arm: `metrics.jsonl`, and event files with one run a seed; only in
  the first of several processes.

  A record is `{"stage", "step", metric: [a value a seed], ...}`. What a full disk does not take is
  kept and written with the next record.
  """

  def __init__(self, directory: pathlib.Path, seeds: Sequence[int]) -> None:
    self.mirror = storage.Mirror(directory)
    self.path = self.mirror.local / "metrics.jsonl"
    self.directory = self.mirror.local / "tensorboard"
    self.seeds = tuple(seeds)
    self.boards: list[EventsWriter] = []
    self.stage = ""
    self.unwritten = ""

  def begin(self, stage: str, step: int) -> None:
    """Drops what an interrupted run wrote of `stage` after `step`."""
    if jax.process_index() > 0:
      return
    self.close()
    self.stage = stage
    self.mirror.fetch(self.path.name)
    if self.path.exists():
      records = [line for line in self.path.read_text().splitlines() if _kept(line, stage, step)]
      storage.write_text(self.path, "".join(line + "\n" for line in records))
    for seed in self.seeds:
      directory = self.directory / f"{stage}-seed{seed}"
      directory.mkdir(parents=True, exist_ok=True)
      self.boards.append(EventsWriter(str(directory / "events")))
      start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
      self.boards[-1].write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

  def write(self, step: int, values: Values) -> None:
    if jax.process_index() > 0:
      return
    values = {k: np.asarray(v, np.float64).tolist() for k, v in values.items()}
    self.unwritten += json.dumps(_plain({"stage": self.stage, "step": step} | values)) + "\n"
    with contextlib.suppress(OSError):
      _append(self.path, self.unwritten)
      self.unwritten = ""
    with contextlib.suppress(OSError):
      for index, board in enumerate(self.boards):
        scalars = [
          Summary.Value(tag=name, simple_value=value[index % len(value)])
          for name, value in values.items()
          if len(value) in (1, len(self.boards))
        ]
        board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        board.flush()

  def sync(self) -> None:
    """Before a checkpoint: a run that resumes from it must find what was written until then."""
    with contextlib.suppress(OSError):  # tried again with the next one
      self.mirror.upload()

  def close(self) -> None:
    """Raises `OSError` when an object store does not take what was written."""
    with contextlib.suppress(OSError):
      if self.unwritten:
        _append(self.path, self.unwritten)
        self.unwritten = ""
      for board in self.boards:
        board.close()
    self.boards = []
    self.mirror.upload()


def _append(path: pathlib.Path, text: str) -> None:
  """Adds the text whole or not at all."""
  with path.open("ab", buffering=0) as file:
    size = file.tell()
    try:
      written = file.write(text.encode())
      if written < len(text.encode()):
        raise OSError("the disk is full")
    except OSError:
      file.truncate(size)
      raise


def _kept(line: str, stage: str, step: int) -> bool:
  try:
    record = json.loads(line)
  except ValueError:  # the line that was being written when the run was killed
    return False
  return record["stage"] != stage or record["step"] <= step


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a `metrics.jsonl`, null as NaN; a last line cut short is left out."""
  records = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:
      break
    records.append(
      {k: np.array(v, float).tolist() if isinstance(v, list) else v for k, v in record.items()}
    )
  return records
