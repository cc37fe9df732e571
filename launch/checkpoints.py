"""Checkpoints of one stage: asynchronous, atomic, restorable onto any mesh."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

from launch.task import State


class Checkpoints:
  """Orbax checkpoints under one directory, one sub-directory a step.

  A checkpoint holds the state and a JSON record (the input position, the evaluations so far, the
  time spent). A step's directory appears under its name only when it is whole.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
    self.directory = directory
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    self.manager = ocp.CheckpointManager(directory.absolute(), options=options)

  def latest(self) -> int | None:
    return self.manager.latest_step()

  def save(self, step: int, state: State, record: dict[str, Any]) -> None:
    if step in self.manager.all_steps():
      return
    self.manager.save(
      step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=_save_json(record))
    )

  def restore(self, abstract_state: State) -> tuple[State, dict[str, Any]]:
    """The newest checkpoint, laid out as `abstract_state` (shapes, dtypes, shardings) says."""
    restored = self.manager.restore(
      self.manager.latest_step(),
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore()
      ),
    )
    return restored["state"], restored["record"]

  def wait(self) -> None:
    self.manager.wait_until_finished()

  def close(self) -> None:
    self.manager.close()


def _save_json(record: dict[str, Any]) -> Any:
  return ocp.args.JsonSave(record)
