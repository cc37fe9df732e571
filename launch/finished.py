"""A finished arm read back: its configuration and what it learnt, without its experiment."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from launch import storage
from launch.checkpoints import Checkpoints, digests
from launch.errors import ConfigurationError, nearest
from launch.lab import slug


@dataclasses.dataclass(frozen=True)
class Finished:
  """What `load` returns.

  Attributes:
    config: the arm's, resolved.
    seeds: in the order of the arrays' leading axis.
    variables: the flax variable dict, numpy arrays (S, ...).
  """

  config: ml_collections.ConfigDict
  seeds: tuple[int, ...]
  variables: dict[str, Any]

  def seed(self, seed: int) -> dict[str, Any]:
    """The variables of one seed, as `model.apply` takes them."""
    if seed not in self.seeds:
      raise ConfigurationError(f"seed={seed}; accepted: {', '.join(map(str, self.seeds))}")
    index = self.seeds.index(seed)
    return jax.tree.map(lambda x: x[index], self.variables)


def load(workdir: str | os.PathLike[str], arm: str, stage: str | None = None) -> Finished:
  """Reads what a finished stage learnt, on any machine, whatever mesh it was trained on.

  Args:
    workdir: what a run wrote, such as `runs/s5/laptop` or `gs://BUCKET/runs/s5/laptop`.
    arm: with its study, as in the results: `"accuracy/s5"`.
    stage: may be left out where the arm has one.

  Raises:
    ConfigurationError: there is no such arm or stage, or it is not finished.
  """
  root = storage.path(workdir)
  records = [json.loads(path.read_text()) for path in sorted(root.glob("*/*/config.json"))]
  arms = {f"{r['study']}/{r['arm']}": r for r in records}
  if arm not in arms:
    raise ConfigurationError(f"{root} has no arm {arm!r}{nearest(arm, arms)}")
  record = arms[arm]
  directory = root / slug(record["study"]) / slug(record["arm"]) / "checkpoints"
  # Seeds that ran one after another have a directory each.
  names = sorted({re.sub(r"-seed\d+$", "", path.name) for path in directory.glob("*")})
  if stage is None and len(names) == 1:
    stage = names[0]
  if stage not in names:
    raise ConfigurationError(f"{arm}: stage={stage!r}; accepted: {', '.join(names) or 'none'}")
  whole = directory / str(stage)
  parts = [whole] if whole.exists() else [directory / f"{stage}-seed{s}" for s in record["seeds"]]
  for part in parts:
    if not (part / "done.json").exists():
      raise ConfigurationError(f"{part} is not finished; run the same command again to go on")
  trees = [_restore(part) for part in parts]
  return Finished(
    config=ml_collections.ConfigDict(record["config"]).lock(),
    seeds=tuple(record["seeds"]),
    variables=jax.tree.map(lambda *x: np.concatenate(x), *trees),
  )


def _restore(directory: pathlib.Path) -> dict[str, Any]:
  """Parameters and the other collections of the newest checkpoint, as numpy arrays."""
  with contextlib.closing(Checkpoints(directory)) as checkpoints:
    path = storage.absolute(directory) / str(checkpoints.latest())
  handler = ocp.PyTreeCheckpointHandler()
  try:
    saved = handler.metadata(path / "state")
    wanted = {name: saved[name] for name in ("params", "variables")}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    asked = ocp.args.PyTreeRestore(item=wanted, restore_args=on_host, partial_restore=True)
    state = handler.restore(path / "state", args=asked)
    record = json.loads((path / "record" / "metadata").read_text())["record"]
  except Exception as error:  # whatever a parser met in a damaged file
    raise ConfigurationError(f"{path} is damaged: {str(error).partition(chr(10))[0]}") from error
  for name, digest in digests({field: state[field] for field in wanted}).items():
    if digest != record["digests"][name]:
      raise ConfigurationError(f"{path} is damaged: {name} is not what was saved")
  return {"params": state["params"], **state["variables"]}
