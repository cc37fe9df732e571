"""Views: order, scale, lengths, gaps and vocabularies."""

import numpy as np
import pytest
from PIL import Image

from experiments.datasets import sources, views


def image(height=2, width=3, channels=1):
  return np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)


def test_raster_runs_row_by_row_and_repeats():
  out = views.raster(repeat=2, scale=1.0)({"image": image(), "label": 3})
  assert out["inputs"].dtype == np.float32 and out["inputs"].shape == (12, 1)
  assert out["inputs"][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
  assert out["labels"] == 3 and out["labels"].dtype == np.int32


def test_raster_scales_then_normalises():
  out = views.raster(mean=122.6 / 255, std=61 / 255)({"image": np.full((1, 2), 200), "label": 0})
  np.testing.assert_allclose(out["inputs"], (200 - 122.6) / 61, rtol=1e-5)
  colour = views.raster(scale=1, mean=[0, 1, 2], std=[1, 1, 2])
  out = colour({"image": image(1, 2, 3), "label": 0})
  np.testing.assert_allclose(out["inputs"], [[0, 0, 0], [3, 3, 1.5]])


def test_raster_grey():
  pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
  out = views.raster(grey=True)({"image": pixels, "label": 0})
  np.testing.assert_allclose(out["inputs"][:, 0], [0.299, 0.587, 0.114, 1.0], rtol=1e-6)
  with pytest.raises(ValueError, match="needs 3 channels, the image has 1"):
    views.raster(grey=True)({"image": image(), "label": 0})


def test_raster_permutes_pixels_before_repeating():
  order = np.array([5, 0, 1, 2, 3, 4])
  out = views.raster(permutation=order, repeat=2, scale=1)({"image": image(), "label": 0})
  assert out["inputs"][::2, 0].tolist() == order.tolist()
  with pytest.raises(ValueError, match="a permutation of 4 for an image of 6 pixels"):
    views.raster(permutation=np.arange(4))({"image": image(), "label": 0})


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_resized(method):
  """As Pillow does it, for a picture of several channels and sides."""
  x_HWC = np.random.default_rng(0).integers(0, 256, (3, 4, 2), np.uint8)
  out = views.raster(size=9, method=method, scale=1)({"image": x_HWC, "label": 0})["inputs"]
  how = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}[method]
  for c in range(2):
    wanted = np.asarray(Image.fromarray(x_HWC[..., c].astype(np.float32)).resize((9, 9), how))
    np.testing.assert_allclose(out[:, c].reshape(9, 9), wanted, atol=1e-3)


def test_resizing_keeps_a_constant_and_knows_its_methods():
  out = views.raster(size=32, scale=16)({"image": np.full((8, 8, 1), 16, np.uint8), "label": 3})
  np.testing.assert_allclose(out["inputs"], np.ones((1024, 1)), rtol=1e-6)
  assert out["inputs"].dtype == np.float32
  with pytest.raises(ValueError, match="method='cubic'; accepted: bilinear, nearest"):
    views.raster(size=4, method="cubic")


@pytest.mark.parametrize("length", [1, 2, 8, 256, 1024])
def test_bit_reversal_is_an_involution(length):
  order = views.bit_reversal(length)
  assert sorted(order) == list(range(length))
  assert (order[order] == np.arange(length)).all()


def test_bit_reversal_values():
  assert views.bit_reversal(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
  assert views.bit_reversal(6).tolist() == [0, 4, 2, 1, 5, 3]
  assert sorted(views.bit_reversal(784)) == list(range(784))


def test_random_permutation_is_fixed():
  assert views.random_permutation(8, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
  assert views.random_permutation(8, 1).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
  assert sorted(views.random_permutation(784, 5)) == list(range(784))
  assert (views.random_permutation(784, 5) != np.arange(784)).mean() > 0.98


def test_subsample():
  example = {
    "inputs": np.arange(7)[:, None],
    "targets": np.arange(7),
    "dt": np.array([1, 2, 1, 3, 1, 1, 4], np.float32),
    "lengths": np.int32(5),
    "labels": np.int32(1),
  }
  out = views.subsample(3)(example)
  assert out["inputs"][:, 0].tolist() == out["targets"].tolist() == [0, 3, 6]
  assert out["dt"].tolist() == [1, 6, 6] and out["dt"].dtype == np.float32
  assert out["lengths"] == 2 and out["labels"] == 1
  assert example["inputs"].shape == (7, 1), "the example itself must not change"
  with pytest.raises(ValueError, match="k must be at least 1"):
    views.subsample(0)


def test_pad():
  out = views.pad(5)({"tokens": np.array([7, 8, 2], np.uint8), "label": 4})
  assert out["inputs"].tolist() == [7, 8, 2, 0, 0] and out["inputs"].dtype == np.int32
  assert out["lengths"] == 3 and out["labels"] == 4
  with pytest.raises(ValueError, match="3 tokens do not fit length=2"):
    views.pad(2)({"tokens": np.arange(3), "label": 0})
  out = views.pad(2, truncate=True)({"tokens": np.arange(3), "label": 0})
  assert out["inputs"].tolist() == [0, 1] and out["lengths"] == 2


def test_characters():
  texts = [b"aab", "aé".encode() * 2, b"abcz" + b"q" * 50]
  source = sources.InMemory.from_examples({"text": t, "label": i} for i, t in enumerate(texts))
  vocabulary = views.character_vocabulary(source, min_frequency=2, length=5)
  assert vocabulary == ("<pad>", "<unk>", "<eos>", "a", "b", "é")
  out = source.map(views.characters(vocabulary, length=5)).map(views.pad(5))
  assert out.fields["inputs"].tolist() == [[3, 3, 4, 2, 0], [3, 5, 3, 5, 2], [3, 4, 1, 1, 2]]
  assert out.fields["lengths"].tolist() == [4, 5, 5]
  assert out.fields["labels"].tolist() == [0, 1, 2]
