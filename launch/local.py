"""Several processes on this machine, as on a pod: `python -m launch.local --processes=4 -- ...`

    python -m launch.local --processes=4 --devices=2 -- experiments.s5 --study=accuracy

Starts the experiment in so many processes of so many CPU devices each, which join by
`jax.distributed` and exchange gradients by gloo. The terminal shows process 0; what the others
print goes to a file each. SIGTERM and Ctrl-C are passed on to all. When a process fails, the others
leave by themselves; those that have not done so after a while are killed. The exit code is that of
the first that failed.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from launch.errors import ConfigurationError, nearest
from launch.main import COMMAND, VARIABLES
from launch.runner import PACKAGE, names

PATIENCE_S = 60.0  # between the first failure and the killing of those that are left


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """The flags before `--`, and the experiment with its own flags.

  Raises:
    ConfigurationError: no experiment, an unknown one, or a number that is not positive.
  """
  ours, separator, experiment = _split(list(argv))
  parser = argparse.ArgumentParser(
    prog="python -m launch.local",
    description="\n".join((__doc__ or "").splitlines()[1:]),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="%(prog)s [--processes=N] [--devices=N] [--logs=DIR] -- experiments.NAME [flags]",
    exit_on_error=False,
  )
  parser.add_argument("--processes", type=int, default=2, help="default: 2")
  parser.add_argument("--devices", type=int, default=1, help="of each process; default: 1")
  parser.add_argument("--logs", type=pathlib.Path, help="folder for what processes 1, 2, ... print")
  try:
    flags, unknown = parser.parse_known_args(ours)
  except argparse.ArgumentError as error:
    raise ConfigurationError(str(error)) from error
  if unknown:
    raise ConfigurationError(f"{unknown[0]!r}: the experiment and its flags come after --")
  for name in ("processes", "devices"):
    if getattr(flags, name) < 1:
      raise ConfigurationError(f"--{name}={getattr(flags, name)}; accepted: 1 or more")
  if not separator or not experiment:
    raise ConfigurationError("no experiment; give one after --, such as -- experiments.s5")
  return flags, experiment


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
  at = argv.index("--") if "--" in argv else len(argv)
  return argv[:at], at < len(argv), argv[at + 1 :]


def program(experiment: str) -> list[str]:
  """How Python runs it: a module, `experiments.s5` or `s5`, or a file."""
  if experiment.endswith(".py"):
    if not pathlib.Path(experiment).exists():
      raise ConfigurationError(f"{experiment}: there is no such file")
    return [experiment]
  name = experiment.removeprefix(f"{PACKAGE}.")
  if name not in names():
    raise ConfigurationError(f"unknown experiment {name!r}{nearest(name, names())}")
  return ["-m", f"{PACKAGE}.{name}"]


def environment(port: int, index: int, count: int, devices: int, command: str) -> dict[str, str]:
  """What tells a process its place. The command line is the same for all, as on a pod."""
  flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
  place = {"coordinator": f"localhost:{port}", "process_id": index, "process_count": count}
  # A thread of XLA's pool that waits in gloo does nothing else: with as many devices as cores, none
  # would be left for the work that is waited for.
  threads = 2 * devices + (os.cpu_count() or 1)
  return (
    dict(os.environ)
    | {VARIABLES[flag]: str(value) for flag, value in place.items()}
    | {
      "JAX_PLATFORMS": "cpu",
      "NPROC": str(threads),
      "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
      COMMAND: command,
    }
  )


def run(flags: argparse.Namespace, experiment: Sequence[str]) -> int:
  """Starts the processes and waits for them; returns the exit code."""
  start = [sys.executable, *program(experiment[0]), "--distributed", *experiment[1:]]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  logs = flags.logs or pathlib.Path(tempfile.mkdtemp(prefix="launch-local-"))
  logs.mkdir(parents=True, exist_ok=True)
  command = f"python -m launch.local {shlex.join(sys.argv[1:])}"
  children: list[subprocess.Popen] = []
  passed = (signal.SIGTERM, signal.SIGINT)
  before = {s: signal.signal(s, lambda number, _: _send(children, number)) for s in passed}
  for index in range(flags.processes):
    with contextlib.ExitStack() as files:
      output = files.enter_context((logs / f"process-{index}.log").open("w")) if index else None
      children.append(
        subprocess.Popen(
          start,
          env=environment(port, index, flags.processes, flags.devices, command),
          stdin=subprocess.DEVNULL,
          stdout=output,
          stderr=output,
          process_group=0,  # Ctrl-C reaches them through us, once
        )
      )
  pids = " ".join(str(child.pid) for child in children)
  say(f"{flags.processes} processes of {flags.devices} devices: pid {pids}; logs in {logs}")
  try:
    status = wait(children, logs)
  finally:
    _send(children, signal.SIGKILL)
    for number, handler in before.items():
      signal.signal(number, handler)
  if status == 0 and flags.logs is None:
    shutil.rmtree(logs)
  return status


def wait(children: Sequence[subprocess.Popen], logs: pathlib.Path) -> int:
  """Until all have ended; says which failed, and kills those that do not follow the first."""
  status, until = 0, float("inf")
  left = dict(enumerate(children))
  while left:
    for index, child in list(left.items()):
      if child.poll() is None:
        continue
      del left[index]
      if child.returncode:
        say(f"process {index} {_ending(child.returncode)}{'' if status else _last(index, logs)}")
      if child.returncode and not status:
        status, until = _status(child.returncode), time.monotonic() + PATIENCE_S
    if time.monotonic() > until:
      late = ", ".join(map(str, left))
      say(f"still there {PATIENCE_S:.0f} s after the first: process {late}; killed")
      _send(list(left.values()), signal.SIGKILL)
      until = float("inf")
    time.sleep(0.05)
  return status


def _send(children: Sequence[subprocess.Popen], number: int) -> None:
  for child in children:
    if child.poll() is None:
      child.send_signal(number)


def _status(code: int) -> int:
  return code if code >= 0 else 128 - code


def _ending(code: int) -> str:
  return f"exited with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"


def _last(index: int, logs: pathlib.Path) -> str:
  """The last line that a process printed; process 0 has printed it here."""
  lines = (logs / f"process-{index}.log").read_text().split("\n") if index else []
  lines = [line for line in lines if line.strip()]
  return f": {lines[-1]}" if lines else ""


def say(text: str) -> None:
  print(f"launch.local: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
  try:
    flags, experiment = parse(argv)
    return run(flags, experiment)
  except ConfigurationError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
