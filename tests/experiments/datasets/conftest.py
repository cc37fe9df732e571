"""A data folder for the whole run: the small sets are prepared once."""

import hashlib

import numpy as np
import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def digest():
  """sha256 of integer fields of all examples, in order, as little-endian int32."""

  def of(source, *fields):
    sha = hashlib.sha256()
    for i in range(len(source)):
      example = source[i]
      for field in fields:
        sha.update(np.asarray(example[field]).astype("<i4").tobytes())
    return sha.hexdigest()[:16]

  return of
