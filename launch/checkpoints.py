"""Checkpoints of one stage: asynchronous, atomic, checked, restorable onto any mesh."""

import contextlib
import json
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from launch import processes, storage
from launch.errors import TrainingError
from launch.task import State


class SaveError(Exception):
  """A checkpoint could not be written; the reason in a few words."""


class Damaged(Exception):
  """A checkpoint does not hold what was saved."""


class Checkpoints:
  """Orbax checkpoints under one directory, one sub-directory a step.

  A checkpoint holds the state and a JSON record (the input position, the evaluations so far, the
  time spent). A step's directory appears under its name only when it is whole. The record carries
  a digest of every array and one of itself, so that damage is found on reading.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
    self.directory = directory
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
      **storage.checkpoint_options(directory),
    )
    self.manager = ocp.CheckpointManager(storage.absolute(directory), options=options)

  def latest(self) -> int | None:
    return self.manager.latest_step()

  def on_disk(self) -> int | None:
    """The newest step that is whole, by its directory alone."""
    if storage.remote(self.directory):
      marks = self.directory.glob("*/commit_success.txt")
      return max((int(mark.parent.name) for mark in marks), default=None)
    return max(ocp.utils.checkpoint_steps(self.directory), default=None)

  def save(self, step: int, state: State, record: dict[str, Any]) -> None:
    """Begins to write; `check` and `wait` tell whether it can be done.

    Raises:
      SaveError: it cannot, or the one before could not.
    """
    if step in self.manager.all_steps():
      return
    record = record | {"digests": digests(state)}
    sealed = {"record": record, "seal": _seal(record)}
    arguments = ocp.args.Composite(
      state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(sealed)
    )
    self._attempt(lambda: self.manager.save(step, args=arguments))

  def check(self) -> None:
    """Raises `SaveError` when the write in the background has failed; does not wait for it."""
    self._attempt(self.manager.check_for_errors)

  def wait(self) -> None:
    """Returns when the newest checkpoint is whole on disk, or raises `SaveError`."""
    self._attempt(self.manager.wait_until_finished)

  def _attempt(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:  # orbax and tensorstore raise whatever they met
      with contextlib.suppress(Exception):  # clears what is left of the failed write
        self.manager.wait_until_finished()
      raise SaveError(_reason(error)) from error

  def restore(self, abstract_state: State, say: Callable[[str], None]) -> tuple[State, dict] | None:
    """The newest undamaged checkpoint, laid out as `abstract_state` (shapes, dtypes, shardings).

    Damaged ones are removed once an older one has been read, and `say` tells. None when there is
    no checkpoint.

    Raises:
      TrainingError: there are checkpoints and none can be read.
    """
    marked = {path.stem: path.read_text() for path in self.directory.glob("*.damaged")}
    steps = self.manager.all_steps()
    reasons = {int(s): why for s, why in processes.first(marked).items() if int(s) in steps}
    for step in sorted({*steps} - {*reasons}, reverse=True):
      try:
        found = self.read(step, abstract_state)
      except Damaged as error:
        reasons[step] = str(error)
        continue
      for bad, reason in reasons.items():
        say(f"{self.directory}: the checkpoint at step {bad} is damaged ({reason}); on from {step}")
        self.manager.delete(bad)
        if jax.process_index() == 0:
          (self.directory / f"{bad}.damaged").unlink(missing_ok=True)
      return found
    if reasons:
      whole = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
      raise TrainingError(
        f"{self.directory}: no checkpoint can be read ({whole}); remove the directory to begin anew"
      )
    return None

  def read(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
    """The state and the record saved at `step`.

    Raises:
      Damaged: files are missing or unreadable, or an array is not what was saved.
    """
    arguments = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore()
    )
    try:
      restored = self.manager.restore(step, args=arguments)
      state, sealed = restored["state"], restored["record"]
      record, seal = sealed["record"], sealed["seal"]
    except Exception as error:  # whatever a parser met in a damaged file
      if processes.count() > 1:  # what one cannot read the others may have read, and wait for it
        (self.directory / f"{step}.damaged").write_text(_reason(error))
        raise TrainingError(
          f"{self.directory / str(step)} cannot be read ({_reason(error)});"
          " the same command goes on from the checkpoint before"
        ) from error
      raise Damaged(_reason(error)) from error
    if seal != _seal(record):
      raise Damaged("its record is not what was saved")
    saved, found = record.pop("digests"), digests(state)
    for name in saved:
      if saved[name] != found.get(name):
        raise Damaged(f"{name} is not what was saved")
    return state, record

  def close(self) -> None:
    try:
      self.manager.close()
    except Exception as error:
      raise SaveError(_reason(error)) from error


def _reason(error: BaseException) -> str:
  """The operating system's word for it where there is one, else the first line."""
  text = str(error) or type(error).__name__
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, OSError) and cause.strerror:
      return cause.strerror
    if named := re.search(r"OS error \d+: (?:E[A-Z]+ )?([^\]]+)\]", str(cause)):
      return named[1]
    cause = cause.__cause__ or cause.__context__
  return text.splitlines()[0][:160]


def _seal(record: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def digests(state: Any) -> dict[str, int]:
  """One number for each array of a tree, the same however the array is sharded.

  A sum, modulo 2^32, of hashed words: integers add up to the same in any order. No flipped bit goes
  unseen, since the hash of a word at its place is one to one.
  """
  flat = jax.tree_util.tree_leaves_with_path(state)
  values = jax.device_get([_digest(leaf) for _, leaf in flat])
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  return {name: int(value) for name, value in zip(names, values, strict=True)}


@jax.jit  # of each array, since many have the same shape: one program of all takes long to compile
def _digest(x: jax.Array) -> jax.Array:
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else None
  bits = bits or jnp.iinfo(x.dtype).bits
  if bits < 8:
    words = [x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)]
    words = [jax.lax.bitcast_convert_type(words[0], jnp.uint32)]
  elif bits == 64:
    halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
    words = [halves[..., 0], halves[..., 1]]
  else:
    words = [jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)]
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  total = jnp.uint32(0)
  for index, word in enumerate(words):
    total += _mixed(word ^ _mixed(place * jnp.uint32(2) + jnp.uint32(index))).sum(dtype=jnp.uint32)
  return total


def _mixed(x: jax.Array) -> jax.Array:
  """A one-to-one scrambling of 32-bit words (the finaliser of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
