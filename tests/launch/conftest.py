import importlib.util
import pathlib

import jax
import pytest

from launch import mesh as meshes


@pytest.fixture(scope="session")
def toy():
  """The toy experiment as a module."""
  spec = importlib.util.spec_from_file_location("toy", pathlib.Path(__file__).parent / "toy.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def one_device():
  return meshes.make({}, jax.devices()[:1])
