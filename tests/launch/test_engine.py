import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from launch import (
  ConfigurationError,
  TrainingError,
  interruption,
  loop,
  metrics,
  run,
  runner,
  table,
)
from launch import mesh as meshes
from launch.checkpoints import Checkpoints
from launch.program import Program

TOY = pathlib.Path(__file__).parent / "toy.py"
ROOT = pathlib.Path(__file__).parents[2]
QUICK = {"steps": 20}


def final(directory: pathlib.Path):
  """The final state on disk, as numpy arrays."""
  checkpoints = Checkpoints(directory)
  step = checkpoints.latest()
  state = checkpoints.manager.restore(step)["state"]
  checkpoints.close()
  return step, jax.tree.map(np.asarray, state)


def command(*arguments: str) -> subprocess.Popen:
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    [sys.executable, str(TOY), *arguments],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.fixture(scope="module")
def finished(toy, one_device, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, run(toy, workdir=workdir, mesh=one_device)


def test_the_record_of_a_run(finished):
  workdir, results = finished
  on_disk = json.loads((workdir / "verdict.json").read_text())
  assert on_disk == results
  wanted = [
    "experiment",
    "scale",
    "commit",
    "versions",
    "wall_s",
    "device",
    "date",
    "command",
    "arms",
    "claims",
  ]
  assert set(wanted) == set(results)
  arm = results["arms"]["learning/adam"]
  assert arm["steps"] == 60
  assert len(arm["metrics"]["test/accuracy"]) == 3
  (claim,) = results["claims"]
  assert claim["verdict"] == "held"
  assert claim["interval"][0] < claim["estimate"] < claim["interval"][1]
  assert {"study", "name", "statement", "metric", "margin", "seeds"} <= set(claim)
  arm_directory = workdir / "learning" / "adam"
  assert json.loads((arm_directory / "config.json").read_text())["config"]["width"] == 16
  assert (workdir / "learning" / "plot.png").stat().st_size > 10_000
  assert list((arm_directory / "tensorboard").glob("train-seed2/events*"))
  records = metrics.read(arm_directory / "metrics.jsonl")
  assert {r["step"] for r in records if "test/accuracy" in r} == {20, 40, 60}
  assert [r for r in records if "train/loss" in r]
  (row,) = [r for r in table(results) if r["arm"] == "adam"]
  assert row["test/accuracy low"] < row["test/accuracy"] < row["test/accuracy high"]


def test_a_finished_run_is_read_back(finished, toy, one_device, monkeypatch):
  workdir, results = finished
  monkeypatch.setattr(Program, "update", None)
  assert run(toy, workdir=workdir, mesh=one_device)["arms"] == results["arms"]


def test_accuracy_is_the_exact_mean_over_the_test_set(finished, toy, one_device):
  """200 examples in batches of 16: the last batch is half full."""
  workdir, results = finished
  config = runner.compose(toy, "laptop", toy.STUDIES[0], "adam")
  program = Program(toy.stages(config)["train"], one_device, (0, 1, 2))
  checkpoints = Checkpoints(workdir / "learning/adam/checkpoints/train")
  state, _ = checkpoints.read(checkpoints.latest(), program.abstract_state)
  model, data = toy.Network(16, 1), toy.Clusters(1)
  for seed in range(3):
    variables = jax.tree.map(
      lambda x, seed=seed: x[seed], {"params": state.params, **state.variables}
    )
    hits = model.apply(variables, data.x, train=False).argmax(-1) == data.labels
    found = results["arms"]["learning/adam"]["metrics"]["test/accuracy"][seed]
    assert found == pytest.approx(float(hits.mean()), abs=1e-6)


def test_one_seed_alone_is_that_seed_of_the_comparison(finished, toy, one_device, tmp_path):
  workdir, _ = finished
  run(toy, arm="adam", seeds=[2], workdir=tmp_path, mesh=one_device)
  _, three = final(workdir / "learning/adam/checkpoints/train")
  _, one = final(tmp_path / "learning/adam/checkpoints/train")
  for a, b in zip(jax.tree.leaves(three["params"]), jax.tree.leaves(one["params"]), strict=True):
    np.testing.assert_allclose(a[2], b[0], rtol=1e-3, atol=1e-4)


def test_seeds_that_cannot_be_mapped_run_one_after_another(finished, toy, one_device, tmp_path):
  _, mapped = finished
  overrides = {"map_seeds": False}
  looped = run(toy, arm="adam", workdir=tmp_path, mesh=one_device, overrides=overrides)
  a, b = (r["arms"]["learning/adam"]["metrics"]["test/loss"] for r in (mapped, looped))
  np.testing.assert_allclose(a, b, rtol=1e-3)
  assert (tmp_path / "learning/adam/checkpoints/train-seed1/done.json").exists()


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "tensor": 4},
    {"sequence": 8},
    dict.fromkeys(("data", "fsdp", "sequence"), 2),
  ],
  ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_sharded_training_is_unsharded_training(finished, toy, tmp_path, sizes):
  workdir, _ = finished
  run(toy, arm="adam", workdir=tmp_path, mesh=meshes.make(sizes))
  _, whole = final(workdir / "learning/adam/checkpoints/train")
  _, parts = final(tmp_path / "learning/adam/checkpoints/train")
  for a, b in zip(jax.tree.leaves(whole["params"]), jax.tree.leaves(parts["params"]), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_parameters_and_their_moments_are_sharded(toy):
  config = runner.compose(toy, "laptop", toy.STUDIES[0], "adam")
  program = Program(toy.stages(config)["train"], meshes.make({"fsdp": 4, "tensor": 2}), (0, 1, 2))
  state = program.initial_state()
  kernel = state.params["Dense_1"]["kernel"]  # (seeds, embed 16, mlp 32)
  assert kernel.sharding.shard_shape(kernel.shape) == (3, 4, 16)
  moment = state.opt_state[0].mu["Dense_1"]["kernel"]
  assert moment.sharding == kernel.sharding
  compiled = program.compile_update(5)
  assert compiled.memory_analysis().alias_size_in_bytes > 0  # the state is donated


def test_a_run_goes_on_on_another_mesh(finished, toy, tmp_path, monkeypatch):
  """Half of the run on eight data shards, the rest on fsdp 4 x tensor 2."""
  workdir, _ = finished

  class HalfWay(interruption.Interruption):
    reads = 0

    @property
    def signal(self):
      HalfWay.reads += 1
      return signal.SIGTERM if HalfWay.reads > 6 else None

    @signal.setter
    def signal(self, value): ...

  with monkeypatch.context() as patch, pytest.raises(interruption.Stopped):
    patch.setattr(runner, "Interruption", HalfWay)
    run(toy, arm="adam", workdir=tmp_path, mesh="data=8")
  stopped, _ = final(tmp_path / "learning/adam/checkpoints/train")
  assert 0 < stopped < 60
  run(toy, arm="adam", workdir=tmp_path, mesh="fsdp=4,tensor=2")
  _, whole = final(workdir / "learning/adam/checkpoints/train")
  _, parts = final(tmp_path / "learning/adam/checkpoints/train")
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_killed_at_any_instant_the_end_is_the_same(tmp_path):
  """SIGKILL three times, at random moments of training; the final state is bit-identical."""
  arguments = ["--study=alone", "--config.pause=0.002"]
  undisturbed = command(*arguments, f"--workdir={tmp_path / 'a'}")
  kills = random.Random(0)
  checkpoints = tmp_path / "b" / "alone/adam/checkpoints/train"
  for _ in range(3):
    process = command(*arguments, f"--workdir={tmp_path / 'b'}")
    before = set(checkpoints.glob("*"))
    deadline = time.monotonic() + 60
    while set(checkpoints.glob("*")) <= before and time.monotonic() < deadline:
      time.sleep(0.005)
    time.sleep(kills.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  last = command(*arguments, f"--workdir={tmp_path / 'b'}")
  for process in (last, undisturbed):
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
  (step, a), (_, b) = (final(tmp_path / w / "alone/adam/checkpoints/train") for w in "ab")
  assert step == 60
  jax.tree.map(np.testing.assert_array_equal, a, b)
  first, second = (
    [r for r in metrics.read(tmp_path / w / "alone/adam/metrics.jsonl") if "test/loss" in r]
    for w in "ab"
  )
  assert first == second  # no evaluation is missing, repeated or different


def test_sigterm_saves_and_exits(tmp_path):
  process = command("--study=alone", "--config.pause=0.005", f"--workdir={tmp_path}")
  checkpoints = tmp_path / "alone/adam/checkpoints/train"
  deadline = time.monotonic() + 60
  while not (checkpoints / "10").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM, error
  assert "run the same command again to go on" in error
  step, _ = final(checkpoints)
  assert 10 <= step < 60
  assert not (checkpoints / "done.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(toy, one_device, tmp_path):
  message = (
    r"learning/adam train, 3 seeds: seed \d: loss is not finite at step \d+, .*"
    r"\((last good|no checkp)"
  )
  with pytest.raises(TrainingError, match=message):
    run(toy, arm="adam", workdir=tmp_path, mesh=one_device, overrides={"poison": 7})
  steps = [int(p.name) for p in (tmp_path / "learning/adam/checkpoints/train").glob("[0-9]*")]
  for step in steps:
    state = Checkpoints(tmp_path / "learning/adam/checkpoints/train").manager.restore(step)
    finite = [np.isfinite(x.reshape(3, -1)) for x in jax.tree.leaves(state["state"]["params"])]
    assert np.concatenate(finite, axis=1).all(axis=1).any()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"scale": "paper/larg"}, "unknown scale 'paper/larg'; did you mean 'paper/large'"),
    ({"study": "lerning"}, "unknown study 'lerning' at scale 'laptop'; did you mean 'learning'"),
    ({"arm": "adma"}, "unknown arm 'adma'; did you mean 'adam'"),
    (
      {"overrides": {"optimizer.rl": 1.0}},
      "unknown key config.optimizer.rl.*known there: lr, |name",
    ),
    ({"overrides": {"steps": 2.5}}, "config.steps = 2.5 is a float; a int such as 60 is accepted"),
    ({"overrides": {"map_seeds": 1}}, "config.map_seeds = 1 is a int; a bool such as True"),
    (
      {"mesh": "data=8", "overrides": {"batch_size": 12}},
      "batch_size = 12 .* data=8 .* multiple of 8",
    ),
    ({"mesh": "data=1,sequence=8", "overrides": {}}, None),
    ({"mesh": "data=3"}, "--mesh=data=3 takes 3 devices; 8 are there"),
    ({"mesh": "dta=8"}, "unknown axis 'dta'; did you mean 'data'"),
    ({"seeds": 0}, "seeds = 0; a number of at least 1"),
    ({"seeds": [1, 1]}, r"seeds = \[1, 1\]"),
  ],
)
def test_mistakes_are_one_line_before_compilation(toy, tmp_path, monkeypatch, arguments, message):
  def compile_nothing(*_):
    raise AssertionError("compiled")

  monkeypatch.setattr(Program, "initial_state", compile_nothing)
  if message is None:
    return
  with pytest.raises(ConfigurationError, match=message) as error:
    run(toy, workdir=tmp_path, **arguments)
  assert "\n" not in str(error.value)


def test_a_workdir_of_another_configuration_is_refused(finished, toy, one_device):
  workdir, _ = finished
  with pytest.raises(ConfigurationError, match=r"config.optimizer.lr: 0.01 there, 0.02 now"):
    run(toy, workdir=workdir, arm="adam", mesh=one_device, overrides={"optimizer.lr": 0.02})
  with pytest.raises(ConfigurationError, match=r"seeds: \[0, 1, 2\] there, \[0\] now"):
    run(toy, workdir=workdir, arm="adam", mesh=one_device, seeds=1)


def test_a_run_that_never_began_is_in_nobodys_way(toy, one_device, tmp_path, monkeypatch):
  def missing(*_):
    raise FileNotFoundError("no such data")

  with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
    patch.setattr(toy, "Source", missing)
    run(toy, arm="adam", workdir=tmp_path, mesh=one_device)
  overrides = {"width": 8, "steps": 5}
  results = run(toy, arm="adam", workdir=tmp_path, mesh=one_device, overrides=overrides)
  assert results["arms"]["learning/adam"]["steps"] == 5


def test_a_run_that_stops_leaves_what_is_known(toy, one_device, tmp_path, monkeypatch):
  """With the command that goes on, written from the arguments."""
  calls = iter([False, True])
  run_arm = runner._run_arm

  def stop_at_the_second(*arguments):
    if next(calls):
      raise KeyboardInterrupt
    run_arm(*arguments)

  monkeypatch.setattr(runner, "_run_arm", stop_at_the_second)
  overrides = {"steps": 5, "optimizer.lr": 0.5}
  with pytest.raises(KeyboardInterrupt):
    run(toy, study="learning", workdir=tmp_path, mesh=one_device, overrides=overrides, seeds=[1, 4])
  verdict = json.loads((tmp_path / "verdict.json").read_text())
  assert list(verdict["arms"]) == ["learning/adam"]
  assert [c["verdict"] for c in verdict["claims"]] == ["undecided"]
  assert verdict["command"] == (
    "python -m experiments.toy --study=learning --seeds=1,4 --config.steps=5"
    " --config.optimizer.lr=0.5"
  )


def test_overrides_lie_between_study_and_arm(toy):
  study = toy.STUDIES[0]
  config = runner.compose(toy, "laptop", study, "slow", {"optimizer.lr": 0.5, "width": 8})
  assert (config.optimizer.lr, config.width) == (1e-5, 8)


def test_a_cut_off_line_of_metrics_is_dropped(tmp_path):
  writer = metrics.Writer(tmp_path, (0,))
  writer.begin("train", 0)
  writer.write(1, {"loss": [1.0]})
  writer.write(2, {"loss": [2.0]})
  with writer.path.open("a") as file:
    file.write('{"stage": "train", "step": 3, "lo')
  assert [r["step"] for r in metrics.read(writer.path)] == [1, 2]
  writer.begin("train", 1)
  writer.write(2, {"loss": [3.0]})
  writer.close()
  assert [r["loss"] for r in metrics.read(writer.path)] == [[1.0], [3.0]]


def test_selection_reads_each_seed_at_its_best_evaluation():
  history = [
    {"values": {"validation/accuracy": [0.5, 0.9], "test/accuracy": [1.0, 2.0]}},
    {"values": {"validation/accuracy": [0.8, 0.7], "test/accuracy": [3.0, 4.0]}},
    {"values": {"validation/accuracy": [0.6, float("nan")], "test/accuracy": [5.0, 6.0]}},
  ]
  assert loop.selected(history, "validation/accuracy")["test/accuracy"] == [3.0, 2.0]
  assert loop.selected(history, None)["test/accuracy"] == [5.0, 6.0]


def test_the_command_line(tmp_path):
  process = command("--config.optimiser.lr=1", f"--workdir={tmp_path}")
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2
  assert error.strip() == (
    "error: flag: unknown key config.optimiser.lr; did you mean 'optimizer.lr'?"
  )
  output, _ = command("--help").communicate(timeout=60)
  for flag in ("--config", "--scale", "--study", "--arm", "--seeds", "--workdir", "--mesh"):
    assert f"{flag}:" in output


def test_the_recorded_command_is_not_where_it_wrote(monkeypatch):
  given = ["s5", "--workdir", "a b", "--seeds=1,2", "--workdir=c", "--config.name=a b"]
  monkeypatch.setattr(sys, "argv", given)
  assert runner.command_line("s5") == "python -m experiments.s5 --seeds=1,2 '--config.name=a b'"


def test_the_list_of_experiments(monkeypatch, capsys, tmp_path):
  from launch import list as listing

  monkeypatch.chdir(tmp_path)  # no runs here: the committed verdicts are shown
  monkeypatch.setattr(sys, "argv", ["launch.list"])
  listing.main()
  output = capsys.readouterr().out
  for name in runner.names():
    assert name in output
    for study in runner.find(name).STUDIES:
      assert study.name in output
  assert "not run" in output  # paper scales
  assert "estimate" in output


@pytest.fixture
def lab(one_device, tmp_path):
  import rich.console

  progress = runner.Progress(rich.console.Console(quiet=True))
  return runner.Lab(one_device, tmp_path, (0, 1), "arm", progress, interruption.Interruption())


def test_a_second_stage_starts_from_transformed_parameters(toy, lab):
  config = runner.compose(toy, "laptop", toy.STUDIES[0], "adam", QUICK)
  task = toy.stages(config)["train"]
  first = lab.fit("first", task)
  halved = {"params": jax.tree.map(lambda x: x / 2, first.params), **first.variables}
  frozen = dataclasses.replace(task, optimizer=optax.sgd(0.0))
  second = lab.fit("second", frozen, halved)
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
    np.testing.assert_array_equal(a / 2, b)
  assert lab.steps == 40
  before = lab.evaluate(task, "test", task.evaluate["test"], halved)
  after = lab.evaluate(
    task, "test", task.evaluate["test"], {"params": second.params} | first.variables
  )
  assert before == after


def test_an_update_of_ones_own(toy, lab):
  """Two half steps along the same gradient are the whole step of plain gradient descent."""
  overrides = {**QUICK, "optimizer.name": "sgd"}
  config = runner.compose(toy, "laptop", toy.STUDIES[1], "adam", overrides)
  task = toy.stages(config)["train"]

  def update(state, batch, key):
    def loss(params):
      return task.loss(params, state.variables, batch, key, train=True)

    (value, (metrics, variables)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    params = state.params
    for _ in range(2):
      params = jax.tree.map(lambda p, g: p - 0.5 * config.optimizer.lr * g, params, grads)
    return state.replace(params=params, variables=variables), {"loss": (value, 1.0)} | metrics

  plain = lab.fit("plain", task)
  own = lab.fit("own", dataclasses.replace(task, update=update))
  for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(own.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_plot_of_ones_own(lab):
  lab.plot("line", lambda figure: figure.subplots().plot([0, 1]))
  assert (lab.directory / "line.png").stat().st_size > 1000
