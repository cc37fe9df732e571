"""Images in [-1, 1]: digits with texture, photographs cut to a square, the noise to start from."""

import numpy as np
import pytest

from experiments.datasets import pictures, sources


def test_digits_have_texture_and_the_splits_share_no_noise():
  grain = {}
  for split in pictures.SPLITS:
    textured, plain = (
      pictures.load("mnist_5k", split, 8, texture=t).gather(range(100))["inputs"] for t in (0.1, 0)
    )
    dark = plain == -1  # of -0.8 + 0.1 * noise, never clipped but beyond two deviations
    assert textured.shape == (100, 8, 8, 1) and np.abs(textured).max() <= 1
    assert textured[dark].mean() == pytest.approx(-0.8, abs=0.01)
    assert textured[dark].std() == pytest.approx(0.1, rel=0.1)
    grain[split] = textured[0] - 0.8 * plain[0]
  assert not np.allclose(grain["train"], grain["test"], atol=0.05)


def test_digits_are_means_of_squares():
  raw = sources.load("mnist_5k", "test")[3]
  wanted = raw["image"][2:26, 2:26].astype(np.float64).reshape(12, 2, 12, 2).mean(axis=(1, 3))
  example = pictures.load("mnist_5k", "test", 12)[3]
  np.testing.assert_allclose(example["inputs"][..., 0], wanted / 127.5 - 1, atol=1e-6)
  assert example["labels"] == raw["label"]


def test_photographs_are_cut_to_a_square():
  image = np.zeros((60, 100, 3), np.uint8)
  image[:, 20:80] = 255
  cut = pictures._middle({"image": image}, 32)["inputs"]
  assert cut.shape == (32, 32, 3)
  np.testing.assert_allclose(cut, 1, atol=0.15)  # the edges see a little beyond


def test_noise_is_standard_and_the_same_for_ever():
  drawn = pictures.noise(2000, (8, 8, 1)).gather(range(2000))["inputs"]
  assert drawn.shape == (2000, 8, 8, 1) and drawn.dtype == np.float32
  assert abs(drawn.mean()) < 0.01
  assert drawn.std() == pytest.approx(1, abs=0.01)
  np.testing.assert_array_equal(pictures.noise(9, (8, 8, 1))[7]["inputs"], drawn[7])


def test_mistakes():
  with pytest.raises(ValueError, match="size=7; accepted: divisors of 24"):
    pictures.load("mnist_5k", "test", 7)
  with pytest.raises(ValueError, match=r"texture=0\.5; accepted: at least 0, below 0.5"):
    pictures.load("mnist_5k", "test", 8, texture=0.5)
