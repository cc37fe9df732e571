"""Random numbers and files that are the same on every platform and in every version.

NumPy guarantees the raw stream of a bit generator (NEP 19) but not what its distributions make of
it, so everything here is derived from `Philox.random_raw` alone.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np


def raw(seed: int, stream: int, size: int) -> np.ndarray:
  """`size` uint64 draws of the Philox-4x64 stream keyed by (seed, stream), both in [0, 2**64)."""
  return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(size)


def uniform(seed: int, stream: int, size: int) -> np.ndarray:
  """`size` float64 draws in [0, 1): the top 53 bits of each raw draw."""
  return (raw(seed, stream, size) >> np.uint64(11)) * 2.0**-53


def draws(seed: int, stream: int) -> Callable[[int], np.ndarray]:
  """A function of n that returns the next n of `uniform(seed, stream, ...)`."""
  generator = np.random.Philox(key=np.array([seed, stream], np.uint64))
  return lambda n: (generator.random_raw(n) >> np.uint64(11)) * 2.0**-53


def normal(uniform_N: np.ndarray) -> np.ndarray:
  """Standard normals from an even number of uniforms by Box and Muller, as many as went in."""
  u_M, v_M = np.split(np.asarray(uniform_N, np.float64), 2)
  radius_M = np.sqrt(-2.0 * np.log1p(-u_M))
  return np.concatenate([radius_M * np.cos(2 * np.pi * v_M), radius_M * np.sin(2 * np.pi * v_M)])


def packaged(distribution: str, suffix: str) -> Path:
  """Path of the file of an installed distribution that ends in `suffix`; imports nothing of it.

  Raises:
    FileNotFoundError: the distribution, or the file in it, is not installed.
  """
  try:
    files = importlib.metadata.files(distribution) or ()
  except importlib.metadata.PackageNotFoundError:
    files = ()
  for file in files:
    if str(file).endswith(suffix):
      return Path(str(file.locate()))
  raise FileNotFoundError(
    f"{suffix} of the package {distribution} is not installed; run: pip install {distribution}"
  )
