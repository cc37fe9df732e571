"""All tests see eight CPU devices; compiled programs are kept between runs."""

import gc
import os
import pathlib
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "roundup-test-xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module", autouse=True)
def _forgets():
  """Compiled programs are mapped memory, of which a process may have 65,530 pieces."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()
