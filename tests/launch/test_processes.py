"""Runs of several processes, started as a user would; and how they, or one alone, are stopped."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launch import ConfigurationError, inputs, load, local, metrics, processes

HERE = pathlib.Path(__file__).parent
TRACED = HERE / "traced.py"
TIMEOUT = 480  # of a whole run, on a busy machine
LOST_S = 60  # from the loss of a process to the end of the others: what is promised
REAL = pytest.mark.slow


class Run:
  """`launch.local` with the traced experiment; its pids, and what each process printed."""

  def __init__(self, workdir, count, devices, *flags, logs, **environment) -> None:
    self.logs = pathlib.Path(logs)
    own = [f"--processes={count}", f"--devices={devices}", f"--logs={logs}"]
    command = [sys.executable, "-m", "launch.local", *own, "--", str(TRACED)]
    self.output = (self.logs.parent / f"{self.logs.name}.txt").open("w+")
    self.process = subprocess.Popen(
      [*command, f"--workdir={workdir}", *flags],
      env=os.environ | {"PYTHONPATH": str(HERE.parents[1])} | environment,
      stdout=self.output,
      stderr=subprocess.STDOUT,
    )

  @property
  def text(self) -> str:
    """Of process 0 and the starter."""
    return pathlib.Path(self.output.name).read_text()

  def pid(self, index: int) -> int:
    wait_for(lambda: "; logs in" in self.text)
    return int(re.search(r"pid ([\d ]+);", self.text)[1].split()[index])

  def log(self, index: int) -> str:
    return (self.logs / f"process-{index}.log").read_text() if index else self.text

  def end(self, timeout: float = TIMEOUT) -> int:
    try:
      return self.process.wait(timeout)
    finally:
      if self.process.poll() is None:
        self.process.kill()
        for match in re.search(r"pid ([\d ]+);", self.text)[1].split():
          os.kill(int(match), signal.SIGKILL)


def wait_for(condition, timeout: float = TIMEOUT) -> None:
  deadline = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def checkpoints(workdir: pathlib.Path) -> set[str]:
  folder = workdir / "toy/linear/checkpoints/train"
  return {path.name for path in folder.glob("*") if path.name.isdigit()}


def losses(workdir: pathlib.Path) -> dict[tuple[int, str], list[float]]:
  return {
    (record["step"], name): record[name]
    for record in metrics.read(workdir / "toy/linear/metrics.jsonl")
    for name in ("train/loss", "test/loss")
    if name in record
  }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """One process of four devices."""
  folder = tmp_path_factory.mktemp("alone")
  run = Run(folder / "work", 1, 4, "--mesh=data=2,fsdp=2", logs=folder / "logs")
  assert run.end() == 0, run.text
  return folder / "work"


def same(workdir: pathlib.Path, reference: pathlib.Path) -> None:
  """The same examples in the same order, and the same losses and parameters."""
  ours, theirs = (load(w, "toy/linear").variables for w in (workdir, reference))
  np.testing.assert_array_equal(ours["trace"]["order"], theirs["trace"]["order"])
  np.testing.assert_allclose(ours["params"]["w"], theirs["params"]["w"], rtol=1e-5, atol=1e-6)
  a, b = losses(workdir), losses(reference)
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=str(key))


@REAL
def test_every_epoch_has_every_example_once(alone):
  for order in load(alone, "toy/linear").variables["trace"]["order"]:
    epochs = order.reshape(-1)[:200].reshape(4, 50)
    assert (np.sort(epochs) == np.arange(50)).all()


@REAL
@pytest.mark.parametrize(("count", "devices", "mesh"), [(2, 2, "data=4"), (4, 1, "data=2,fsdp=2")])
def test_any_number_of_processes_is_the_same_run(count, devices, mesh, alone, tmp_path):
  run = Run(tmp_path / "work", count, devices, f"--mesh={mesh}", logs=tmp_path / "logs")
  assert run.end() == 0, run.text
  same(tmp_path / "work", alone)


@REAL
def test_one_signal_stops_all_at_one_step_and_another_layout_goes_on(alone, tmp_path):
  """SIGTERM to one of four processes in the middle of an epoch; the rest of it on two processes."""
  work = tmp_path / "work"
  run = Run(work, 4, 1, "--mesh=data=2,fsdp=2", logs=tmp_path / "first", PAUSE="0.3")
  wait_for(lambda: checkpoints(work))
  os.kill(run.pid(3), signal.SIGTERM)
  assert run.end() == 128 + signal.SIGTERM, run.text
  stopped = int(re.search(r"stopped and saved at step (\d+)", run.text)[1])
  assert 10 <= stopped < 30 and str(stopped) in checkpoints(work)
  for index in (1, 2, 3):
    assert f"stopped and saved at step {stopped};" in run.log(index)
  run = Run(work, 2, 2, "--mesh=data=4", logs=tmp_path / "second")
  assert run.end() == 0, run.text
  same(work, alone)


@REAL
@pytest.mark.parametrize(("count", "victim"), [(4, 2), (2, 0)])
def test_a_lost_process_ends_the_others(count, victim, tmp_path):
  run = Run(tmp_path / "work", count, 1, logs=tmp_path / "logs", PAUSE="2")
  wait_for(lambda: "compiled in" in run.text)
  time.sleep(2)
  os.kill(run.pid(victim), signal.SIGKILL)
  assert run.end(LOST_S) == 128 + signal.SIGKILL, run.text
  assert f"process {victim} was ended by SIGKILL" in run.text
  assert "still there" not in run.text
  for index in set(range(count)) - {victim}:
    assert re.search(rf"process {index} (exited with [1-9]|was ended by SIGABRT)", run.text)
    # On a busy machine jax may abort a process that lost its coordinator before it can say so.
    jax_says = r"|Failed to send RPC to coordination service" if victim == 0 else ""
    assert re.search(rf"error: process {victim} \(.*was lost{jax_says}", run.log(index))


@REAL
def test_a_process_without_data_ends_all(tmp_path):
  run = Run(tmp_path / "work", 2, 1, logs=tmp_path / "logs", MISSING="1")
  assert run.end() == 2, run.text
  assert re.search(r"process 1 \(.*\) has left: error: numbers: not prepared", run.text)
  assert run.log(1).strip().endswith("error: numbers: not prepared")


@REAL
@pytest.mark.parametrize(
  ("stuck", "grace", "line"),
  [
    ("8", 3, "not saved 3 s after SIGTERM (last good checkpoint: step 10, in "),
    ("0", 60, "stopped, with nothing to save; run the same command again"),
    ("native", 60, "stopped, with nothing to save; run the same command again"),
  ],
)
def test_sigterm_has_a_deadline(stuck, grace, line, tmp_path):
  process = subprocess.Popen(
    [sys.executable, str(TRACED), f"--workdir={tmp_path}", f"--grace={grace}"],
    env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "XLA_FLAGS": "", "STUCK": stuck},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  lines = iter(process.stdout.readline, "")
  if stuck == "native":
    wait_for((tmp_path / "verdict.json").exists)
    time.sleep(1)
  elif stuck == "0":
    assert any("compiled in" in line for line in lines)
    time.sleep(1)
  else:
    wait_for(lambda: checkpoints(tmp_path))
    time.sleep(2)
  process.send_signal(signal.SIGTERM)
  try:
    _, error = process.communicate(timeout=45)
  finally:
    process.kill()
  assert process.returncode == 128 + signal.SIGTERM, error
  assert line in error
  assert "Traceback" not in error


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--processes=2", "no experiment; give one after --"),
    ("--processes=2 experiments.s5", "'experiments.s5': the experiment and its flags come after"),
    ("--processes=0 -- experiments.s5", "--processes=0; accepted: 1 or more"),
    ("--devices=x -- experiments.s5", "invalid int value: 'x'"),
    ("-- experiments.s55", "unknown experiment 's55'; did you mean 's5'"),
    ("-- nothing.py", "nothing.py: there is no such file"),
  ],
)
def test_what_cannot_be_started_is_refused(words, message, capsys):
  assert local.main(words.split()) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("host", 0, 2), "--coordinator=host; accepted: HOST:PORT"),
    (("host:1", 2, 2), "--process_id=2; accepted: 0 to 1"),
  ],
)
def test_a_wrong_place_is_refused(arguments, message):
  with pytest.raises(ConfigurationError, match=message):
    processes.join(*arguments)


def test_alone_a_process_agrees_with_itself():
  assert processes.count() == 1
  assert processes.first({"a": 1}) == {"a": 1}
  assert processes.poll(None) is None
  assert processes.poll(signal.SIGTERM) == signal.SIGTERM


def test_rows_that_are_not_neighbours():
  """A process may hold any rows of the batch, as a pod's mesh has it."""
  spec = {"index": np.empty((), np.int32)}
  source = type("Source", (), {"gather": lambda self, i: {"index": i}, "__len__": lambda self: 9})()
  whole, part = (
    inputs.Batches(source, spec, 8, (0, 1), rows, range(1, 9)) for rows in (range(8), (0, 1, 4, 5))
  )
  for call in range(8):
    np.testing.assert_array_equal(part[call]["index"], whole[call]["index"][..., [0, 1, 4, 5]])
