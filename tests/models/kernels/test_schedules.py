"""The kernels compile for every TPU in use, and to programs no longer than they were."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.plan import libtpu

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("schedules", HERE / "schedules.py")
schedules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schedules)

pytestmark = pytest.mark.skipif(not libtpu.installed(), reason="needs libtpu")


def measured(*flags):
  """In a process of its own, which tells libtpu where to write before it is loaded."""
  path = pathlib.Path(schedules.__file__)
  environment = {**os.environ, "PYTHONPATH": str(path.parents[3]), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, path, *flags],
    env=environment,
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


def test_bundles_and_copies():
  golden = json.loads(schedules.GOLDEN.read_text())
  if golden.pop("libtpu") != libtpu.version():
    pytest.skip(f"recorded with another libtpu; {schedules.__doc__.splitlines()[3].strip()}")
  found = measured("--chip=v5e")
  found.pop("libtpu")
  assert found.keys() == golden.keys()
  longer = {
    name: (have, golden[name])
    for name, have in found.items()
    if len(have["loops"]) != len(golden[name]["loops"])
    or any(x > 1.1 * y for x, y in zip(have["loops"], golden[name]["loops"], strict=True))
    or have["all"] > 1.1 * golden[name]["all"]
    or have["copies"] > golden[name]["copies"]
  }
  assert not longer


def test_whole_layers():
  """S5's kernels take everything as it lies; the convolution's take u and dy, and give y and du,
  with features in front of time. SGConv's taps are made once, from zeros, and copied into the
  kernel's layout; their gradient is copied and reshaped out of it."""
  assert measured("--layers") == {"s5": 0, "sgconv": 4, "sgconv's taps": 4}


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_other_chips(chip):
  found = measured(f"--chip={chip}")
  found.pop("libtpu")
  assert found.keys() == schedules.cases().keys()
  golden = json.loads(schedules.GOLDEN.read_text())
  assert not {name for name, case in found.items() if case["copies"] and not golden[name]["copies"]}
