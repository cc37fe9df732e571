"""What may go wrong, each made to happen: files damaged, disks full, data gone, seeds diverged."""

import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import (
  ConfigurationError,
  TrainingError,
  interruption,
  load,
  metrics,
  processes,
  run,
  runner,
)
from launch.checkpoints import Checkpoints, Damaged, digests
from launch.program import Program

HERE = pathlib.Path(__file__).parent
TRAIN = pathlib.Path("learning/adam/checkpoints/train")
QUICK = {"steps": 20}


def quick(toy, workdir, mesh, **arguments):
  """Twenty updates of the toy, with checkpoints at 10 and 20."""
  arguments = {"arm": "adam", "overrides": QUICK} | arguments
  return run(toy, workdir=workdir, mesh=mesh, **arguments)


def state(directory: pathlib.Path):
  checkpoints = Checkpoints(directory)
  return checkpoints.manager.restore(checkpoints.latest())["state"]


@pytest.fixture(scope="module")
def whole(toy, one_device, tmp_path_factory):
  """An undisturbed run of twenty updates."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, quick(toy, workdir, one_device)


@pytest.fixture(scope="module")
def program(toy, one_device):
  config = runner.compose(toy, "laptop", toy.STUDIES[0], "adam", QUICK)
  return Program(toy.stages(config)["train"], one_device, (0, 1, 2))


@pytest.fixture
def damaged(whole, tmp_path):
  """A copy of the finished run, as if killed after its last checkpoint, to do harm to."""
  shutil.copytree(whole[0], tmp_path / "run")
  for name in (TRAIN / "done.json", TRAIN.parent.parent / "result.json"):
    (tmp_path / "run" / name).unlink()
  return tmp_path / "run"


def spoil(path: pathlib.Path, how: str) -> None:
  content = bytearray(path.read_bytes())
  if how == "truncated":
    del content[len(content) // 2 :]
  else:
    for index in range(0, len(content), 101):
      content[index] ^= 4
  path.write_bytes(content)


def same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Checkpoints


def test_every_file_of_a_checkpoint_may_be_damaged(whole, program, tmp_path):
  """Either the damage is found, or nothing of what it held is read differently."""
  directory = tmp_path / "train"
  shutil.copytree(whole[0] / TRAIN, directory)
  with_record = Checkpoints(directory).read(20, program.abstract_state)
  found = 0
  for path in sorted((directory / "20").rglob("*")):
    if not path.is_file():
      continue
    content = path.read_bytes()
    for how in ("truncated", "flipped"):
      spoil(path, how)
      checkpoints = Checkpoints(directory)
      try:
        same(checkpoints.read(20, program.abstract_state), with_record)
      except Damaged:
        found += 1
      checkpoints.close()
      path.write_bytes(content)
  assert found > 8


def largest(directory: pathlib.Path) -> pathlib.Path:
  return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_the_checkpoint_before_a_damaged_one_is_used(
  how, whole, damaged, toy, one_device, tmp_path, capsys
):
  spoil(largest(damaged / TRAIN / "20/state"), how)
  quick(toy, damaged, one_device)
  assert f"{TRAIN}: the checkpoint at step 20 is damaged" in capsys.readouterr().out
  same(state(whole[0] / TRAIN), state(damaged / TRAIN))


def test_a_flipped_bit_of_the_record_is_found(damaged, program):
  path = damaged / TRAIN / "20/record/metadata"
  assert '"next_index": 20' in path.read_text()
  path.write_text(path.read_text().replace('"next_index": 20', '"next_index": 21'))
  with pytest.raises(Damaged, match="its record is not what was saved"):
    Checkpoints(damaged / TRAIN).read(20, program.abstract_state)


def test_when_no_checkpoint_can_be_read_it_says_so(damaged, toy, one_device):
  for step in ("10", "20"):
    spoil(largest(damaged / TRAIN / step / "state"), "flipped")
  message = r"train: no checkpoint can be read \(step 20: .*; step 10: .*\); remove the directory"
  with pytest.raises(TrainingError, match=message) as error:
    quick(toy, damaged, one_device)
  assert "\n" not in str(error.value)


def test_several_processes_go_on_from_it_at_the_next_start(damaged, program, monkeypatch):
  """One that cannot read its part ends all, as the others are waiting for it."""
  spoil(damaged / TRAIN / "20/state/manifest.ocdbt", "truncated")
  with monkeypatch.context() as patch:
    patch.setattr(processes, "count", lambda: 2)
    with pytest.raises(TrainingError, match=r"20 cannot be read \(.*goes on from the checkpoint b"):
      Checkpoints(damaged / TRAIN).restore(program.abstract_state, print)
  said: list[str] = []
  _, record = Checkpoints(damaged / TRAIN).restore(program.abstract_state, said.append)
  assert record["next_index"] == 10
  assert len(said) == 1
  assert "the checkpoint at step 20 is damaged" in said[0]
  assert not list((damaged / TRAIN).glob("*.damaged"))
  assert Checkpoints(damaged / TRAIN).latest() == 10


def test_a_finished_stage_that_is_damaged_is_trained_again(
  whole, toy, one_device, tmp_path, capsys
):
  workdir = tmp_path / "run"
  shutil.copytree(whole[0], workdir)
  (workdir / TRAIN.parent.parent / "result.json").unlink()
  for path in (workdir / TRAIN / "20/state").rglob("d/*"):
    spoil(path, "flipped")
  with pytest.raises(ConfigurationError, match="is damaged"):
    load(workdir, "learning/adam")
  again = quick(toy, workdir, one_device)
  assert "damaged" in capsys.readouterr().out
  assert again["arms"]["learning/adam"]["metrics"] == whole[1]["arms"]["learning/adam"]["metrics"]


DTYPES = ["bool", "int8", "uint32", "int32", "float16", "bfloat16", "float32", "complex64", "int4"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "int64", "float8_e4m3fn"])
def test_a_digest_sees_every_change_and_no_layout(dtype):
  random = np.random.RandomState(0)
  with jax.enable_x64(dtype in ("float64", "int64")):
    x = jnp.asarray(random.randn(8, 6) * 3)
    x = x > 0 if dtype == "bool" else x.astype(dtype)
    first = digests({"x": x})
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    for spec in [("data", "fsdp"), (("data", "fsdp"), None), (None, "fsdp")]:
      placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
      assert digests({"x": placed}) == first
    for index in np.ndindex(8, 6):
      other = x.at[index].set(~x[index] if dtype == "bool" else x[index] + 1)
      assert digests({"x": other}) != first
    assert digests({"x": x[::-1]}) != first
    assert digests({"x": x.reshape(6, 8).T}) != first


@pytest.mark.slow
def test_thirty_kills_and_the_end_is_the_same(tmp_path):
  """Fifteen while a checkpoint is being written."""
  environment = {**os.environ, "XLA_FLAGS": ""}
  for workdir, kills in (("a", 0), ("b", 30)):
    subprocess.run(
      [sys.executable, HERE / "soak.py", tmp_path / workdir, str(kills)],
      env=environment | {"PYTHONPATH": str(HERE.parent.parent)},
      check=True,
      timeout=900,
    )
  train = "alone/adam/checkpoints/train"
  same(state(tmp_path / "a" / train), state(tmp_path / "b" / train))
  first, second = (
    [r for r in metrics.read(tmp_path / w / "alone/adam/metrics.jsonl") if "test/loss" in r]
    for w in "ab"
  )
  assert first == second


def full_disk(workdir, seconds, patience):
  return subprocess.run(
    [sys.executable, HERE / "full_disk.py", workdir, str(seconds), str(patience)],
    env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent.parent)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_a_full_disk_is_waited_for(tmp_path, toy, one_device):
  done = full_disk(tmp_path / "a", 3, 120)
  assert done.returncode == 0, done.stderr
  assert "cannot be saved" in done.stdout
  assert "File too large; trying again in 0.3 s" in done.stdout
  run(toy, study="alone", workdir=tmp_path / "b", mesh=one_device, overrides={"pause": 0.001})
  train = "alone/adam/checkpoints/train"
  same(state(tmp_path / "a" / train), state(tmp_path / "b" / train))
  # what could not be written at once was written later
  a, b = (
    [r["step"] for r in metrics.read(tmp_path / w / "alone/adam/metrics.jsonl")] for w in "ab"
  )
  assert sorted(set(a)) == sorted(set(b))


def test_a_disk_that_stays_full_ends_the_run(tmp_path):
  done = full_disk(tmp_path, 1e4, 2)
  assert done.returncode == 1
  assert re.search(  # orbax's threads write there as well
    r"error: alone/adam train, seed 0: step \d+ cannot be saved in \S+: .+;"
    r" (the last checkpoint is of step \d+|none was saved)",
    done.stderr,
  ), done.stderr


def test_nothing_is_unpickled(damaged, toy, one_device, monkeypatch):
  def refuse(*_, **__):
    raise AssertionError("unpickled")

  shutil.rmtree(damaged / TRAIN / "20")
  for name in ("load", "loads", "Unpickler"):
    monkeypatch.setattr(pickle, name, refuse)
  results = quick(toy, damaged, one_device)
  assert results["arms"]["learning/adam"]["steps"] == 20
  load(damaged, "learning/adam")


# Data


def test_data_that_vanishes(whole, toy, one_device, tmp_path, monkeypatch):
  """The state is saved; when the data is back the run goes on as if nothing had been."""
  shard = tmp_path / "shard"
  shard.touch()
  reads = []

  class Sharded(toy.Source):
    def __getitem__(self, index):
      reads.append(index)
      if len(reads) == 400:
        shard.unlink()
      shard.stat()
      return super().__getitem__(index)

  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(toy, "Source", Sharded)
    message = r"train, 3 seeds: the data of step \d+ cannot be read \(FileNotFoundError: .*shard"
    with pytest.raises(TrainingError, match=message) as error:
      quick(toy, workdir, one_device)
  saved = int(str(error.value).partition("saved at step ")[2].partition(":")[0])
  assert Checkpoints(workdir / TRAIN).latest() == saved > 0
  quick(toy, workdir, one_device)
  same(state(whole[0] / TRAIN), state(workdir / TRAIN))


def test_evaluation_data_that_vanishes(whole, toy, one_device, tmp_path, monkeypatch):
  class Gone(toy.Clusters):
    reads = 0

    def __getitem__(self, index):
      Gone.reads += 1
      if Gone.reads > 300:
        raise RuntimeError("open() failed: No such file or directory; opening shard")
      return super().__getitem__(index)

  overrides = QUICK | {"steps": 40}
  healthy = quick(toy, tmp_path / "healthy", one_device, overrides=overrides)
  with monkeypatch.context() as patch:
    original = toy.Clusters
    patch.setattr(toy, "Clusters", lambda split: Gone(split) if split else original(split))
    message = r"test cannot be measured \(open\(\) failed.*goes on from step 30"
    with pytest.raises(TrainingError, match=message):
      quick(toy, tmp_path / "gone", one_device, overrides=overrides)
  again = quick(toy, tmp_path / "gone", one_device, overrides=overrides)
  assert again["arms"]["learning/adam"]["metrics"] == healthy["arms"]["learning/adam"]["metrics"]


def test_a_shard_that_is_missing_is_one_line(toy, one_device, tmp_path, monkeypatch):
  class Gone(toy.Source):
    def __getitem__(self, index):
      raise RuntimeError("open() failed: No such file or directory; opening shard")

  monkeypatch.setattr(toy, "Source", Gone)
  message = r"learning/adam train: the data cannot be read \(open\(\) failed"
  with pytest.raises(ConfigurationError, match=message):
    quick(toy, tmp_path, one_device)


# Seeds


def test_a_seed_that_diverges_is_reported_and_the_others_go_on(
  whole, toy, one_device, tmp_path, capsys
):
  steps, batch = 10, 16
  read = [set(program_order(toy, seed)[: steps * batch]) for seed in range(3)]
  poison = min(read[1] - read[0] - read[2])
  overrides = {"steps": steps, "poison": int(poison)}
  healthy = quick(toy, tmp_path / "a", one_device, overrides={"steps": steps})
  results = quick(toy, tmp_path / "b", one_device, overrides=overrides)
  output = capsys.readouterr().out
  assert "learning/adam train, 3 seeds: seed 1: loss is not finite at step" in output
  assert "failed  adam, seed 1: train: loss is not finite at step" in output
  arm, other = (r["arms"]["learning/adam"] for r in (results, healthy))
  for name, values in arm["metrics"].items():
    assert [values[0], values[2]] == [other["metrics"][name][0], other["metrics"][name][2]]
    assert values[1] is None
  assert list(arm["failed"]) == ["1"]
  assert [c["verdict"] for c in results["claims"]] == ["undecided"]
  sound, hurt = (state(tmp_path / w / TRAIN)["params"] for w in "ab")
  same(*(jax.tree.map(lambda x: x[::2], p) for p in (sound, hurt)))
  assert runner.run(toy, arm="adam", workdir=tmp_path / "b", mesh=one_device, overrides=overrides)
  json.loads((tmp_path / "b/verdict.json").read_text(), parse_constant=lambda c: 1 / 0)


def test_a_seed_that_diverged_stays_so_after_a_restart(toy, one_device, tmp_path, monkeypatch):
  read = [set(program_order(toy, seed)[:160]) for seed in range(3)]
  first = set(program_order(toy, 1)[:32])
  overrides = {"steps": 10, "poison": int(min(first - read[0] - read[2]))}

  class HalfWay(interruption.Interruption):
    signal = property(lambda self: signal.SIGTERM, lambda self, value: None)

  with monkeypatch.context() as patch, pytest.raises(interruption.Stopped):
    patch.setattr(runner, "Interruption", HalfWay)
    quick(toy, tmp_path, one_device, overrides=overrides)
  results = quick(toy, tmp_path, one_device, overrides=overrides)
  arm = results["arms"]["learning/adam"]
  assert list(arm["failed"]) == ["1"]
  assert all(values[1] is None and values[0] is not None for values in arm["metrics"].values())


def program_order(toy, seed: int) -> list[int]:
  """The order in which a seed reads the toy's examples."""
  from launch import inputs

  source = toy.Clusters(0)
  batches = inputs.Batches(source, {}, len(source), (seed,), range(len(source)), (1,))
  return batches.indices(0, 1)[0, 0].tolist()
