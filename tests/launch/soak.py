"""Kills one run of the toy experiment many times: `python soak.py WORKDIR KILLS ARGUMENTS...`

Every life is a fork of this process, which has imported everything and started nothing, so that a
start costs little. Half of the kills come as soon as a checkpoint is being written, half at random.
"""

import os
import pathlib
import random
import signal
import sys
import time

import toy

from launch import runner


def live(workdir: pathlib.Path) -> int:
  """Starts the run; returns its process."""
  pid = os.fork()
  if pid == 0:
    try:
      overrides = {"steps": 500, "pause": 0.0005}
      runner.run(toy, study="alone", workdir=workdir, overrides=overrides)
      os._exit(0)
    except BaseException as error:
      print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
      os._exit(1)
  return pid


def main() -> None:
  workdir, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  chance = random.Random(0)
  checkpoints = workdir / "alone/adam/checkpoints/train"
  for kill in range(kills):
    pid = live(workdir)
    there = set(checkpoints.glob("*"))
    deadline = time.monotonic() + 120
    while not any("tmp" in path.name for path in set(checkpoints.glob("*")) - there):
      assert time.monotonic() < deadline, "no checkpoint is being written"
      assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"the run ended after {kill} kills"
      time.sleep(0.0005)
    if kill % 2:
      time.sleep(chance.uniform(0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  _, status = os.waitpid(live(workdir), 0)
  sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
  main()
