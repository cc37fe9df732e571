"""Runs the toy experiment on a disk that is full for a while: WORKDIR SECONDS PATIENCE.

The limit on the size of a file stands in for the full disk: it fails the same writes, underneath
every library. It is in force from the first checkpoint on.
"""

import pathlib
import resource
import signal
import sys
import threading
import time

import toy

from launch import TrainingError, loop, runner


def full(workdir: pathlib.Path, seconds: float) -> None:
  first = workdir / "alone/adam/checkpoints/train/10"
  while not first.exists():
    time.sleep(0.001)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
  time.sleep(seconds)
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
  workdir, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
  loop.RETRY_S, loop.PATIENCE_S = 0.3, float(sys.argv[3])
  threading.Thread(target=full, args=(workdir, seconds), daemon=True).start()
  try:
    runner.run(toy, study="alone", workdir=workdir, overrides={"pause": 0.001})
  except TrainingError as error:
    sys.exit(f"error: {error}")
