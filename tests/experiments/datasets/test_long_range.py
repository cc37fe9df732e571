"""What is described is what is loaded."""

import jax
import numpy as np
import pytest

from experiments.datasets import long_range, sources


@pytest.fixture(autouse=True)
def folder(data_dir, monkeypatch):
  monkeypatch.setenv("ROUNDUP_DATA", str(data_dir))
  long_range.load.cache_clear()
  yield
  long_range.load.cache_clear()


@pytest.mark.parametrize(
  "data",
  [
    {"name": "digits"},
    {"name": "digits", "repeat": 4},
    {"name": "digits", "size": 32, "take": 300},
    {"name": "mnist_5k", "size": 32, "take": 10},
    {"name": "pathfinder32", "take": 40},
    {"name": "pathfinder128"},
  ],
)
def test_examples_are_as_described(data, monkeypatch):
  for size in (32, 128):
    few = {"size": size, "train": 50, "validation": 7, "test": 9}
    monkeypatch.setitem(sources.LOCAL, f"pathfinder{size}", ("pathfinder", few, ""))
  described = long_range.describe(**data)
  train = long_range.load(split="train", **data)
  if not (data["name"].startswith("pathfinder") and "take" not in data):  # few were made above
    assert len(train) == described.train
  example = train[0]
  assert example.keys() == described.example.keys()
  for key, wanted in described.example.items():
    found = np.asarray(example[key])
    assert jax.ShapeDtypeStruct(found.shape, found.dtype) == wanted
  assert len(long_range.load(split="test", **data)) == len(
    long_range.load(split="test", name=data["name"])
  ), "`take` must leave the other splits alone"


def test_pathfinder_is_centred(monkeypatch):
  few = {"size": 32, "train": 50, "validation": 7, "test": 9}
  monkeypatch.setitem(sources.LOCAL, "pathfinder32", ("pathfinder", few, ""))
  batch = long_range.load("pathfinder32", "train").gather(range(50))
  assert batch["inputs"].min() == -1 and batch["inputs"].max() == 1


def test_take_takes_the_first():
  some, whole = (long_range.load("digits", "train", size=16, take=n) for n in (20, None))
  np.testing.assert_array_equal(some.fields["inputs"], whole.fields["inputs"][:20])


@pytest.mark.parametrize(
  ("data", "match"),
  [
    ({"name": "digit"}, "data.name='digit'; accepted: digits, "),
    ({"name": "listops", "size": 32}, "data.size=32 of listops; accepted: at least 1, of digits"),
    ({"name": "digits", "size": 0}, "data.size=0 of digits"),
    ({"name": "digits", "take": 1086}, r"data.take=1086 of digits; accepted: 1\.\.1085"),
    ({"name": "digits", "take": 0}, "data.take=0 of digits"),
  ],
)
def test_mistakes(data, match):
  with pytest.raises(ValueError, match=match):
    long_range.describe(**data)
