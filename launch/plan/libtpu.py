"""libtpu on a machine without a TPU: for plans, and out of the way of everything else."""

import contextlib
import glob
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.extend.backend
from jax.experimental import topologies

from launch.errors import ConfigurationError

# What libtpu would look for on a TPU machine (any valid values do), no log files, no lock against
# other processes, and its warnings, for `heard`.
ENVIRONMENT = {
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
  "TPU_STDERR_LOG_LEVEL": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def installed() -> bool:
  return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def version() -> str:
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return os.environ.get("TPU_LIBRARY_PATH", "")


def devices(name: str, **options) -> list[jax.Device]:
  """The devices of a TPU topology such as `v5e:4x4`, to compile for.

  Raises:
    ConfigurationError: libtpu is not installed, or knows no such topology.
  """
  if not installed():
    raise ConfigurationError("TPUs are planned by libtpu: pip install 'roundup[plan]'")
  for key, value in ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  try:
    with heard():
      return topologies.get_topology_desc(name, "tpu", **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ConfigurationError(f"libtpu {version()} on {name}: {error}") from error


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
  """Lines that compilers log to stderr meanwhile, kept off it; complete at the end.

  With TPU_STDERR_LOG_LEVEL=0 they are shown and not kept, to see why one crashes.
  """
  lines: list[str] = []
  if os.environ.get("TPU_STDERR_LOG_LEVEL") == "0":
    yield lines
    return
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield lines
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
      file.seek(0)
      lines += file.read().decode(errors="replace").splitlines()


def leave_alone() -> None:
  """Keeps jax from starting a TPU that is not there, where libtpu is installed for plans.

  Before it falls back to the CPU it would try, with a page of complaints and a log file. A platform
  that is asked for by name, and an attached TPU, are left as they are.
  """
  asked = jax.config.jax_platforms or "JAX_FORCE_TPU_INIT" in os.environ  # type: ignore[attr-defined]
  if asked or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
    return

  def absent():
    raise RuntimeError("no TPU is attached")

  jax.extend.backend.register_backend_factory("tpu", absent)
