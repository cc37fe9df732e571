"""Images as classifiers want them, and whole sets as one example."""

import numpy as np
import pytest

from experiments.datasets import labelled, sources


def test_digits_are_from_black_to_white():
  data, raw = labelled.load("digits", "train[:20]"), sources.load("digits", "train[:20]")
  first = data[0]
  assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
    k: (v.shape, v.dtype) for k, v in labelled.describe("digits").example.items()
  }
  np.testing.assert_array_equal(first["inputs"], raw[0]["image"] / np.float32(8) - 1)
  assert labelled.load("digits", "train[:20]") is data
  assert len(labelled.load("digits", "train")) == labelled.describe("digits").train


def test_the_middle_of_a_photograph():
  image = np.zeros((80, 160, 3), np.uint8)
  image[:, 40:120] = 200  # wider than the square, 70 pixels from row 5 and column 45
  image[:5] = image[75:] = 7
  found = labelled.middle(image, 35)
  assert found.shape == (35, 35, 3)
  assert (found == 200).all()


def test_a_whole_set_is_one_example():
  whole = labelled.Whole("digits", "test", 50, "float64")
  source = whole()
  assert len(source) == 1
  for name, spec in whole.example.items():
    assert (source[0][name].shape, source[0][name].dtype) == (spec.shape, spec.dtype)
  pixels = source.gather(np.array([0, 0]))["inputs"]
  assert pixels.shape == (2, 50, 8, 8, 1)
  np.testing.assert_allclose([pixels[0].mean(), pixels[0].var()], [0, 1], atol=1e-12)
  raw = sources.load("digits", "test[:50]").gather(range(50))
  np.testing.assert_allclose(np.corrcoef(pixels[0].ravel(), raw["image"].ravel()), 1, rtol=1e-9)
  np.testing.assert_array_equal(source[0]["labels"], raw["label"])
  assert labelled.Whole("digits", "test", 50)()[0]["inputs"].dtype == np.float32


def test_mistakes():
  with pytest.raises(ValueError, match="data='x'; accepted: digits, mnist, cifar10"):
    labelled.load("x", "train")
