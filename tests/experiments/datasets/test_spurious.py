"""Digits on checkers: groups in the shares asked for, no digit in two splits, parts that add up."""

import numpy as np
import pytest

from experiments.datasets import spurious


@pytest.mark.parametrize("correlation", [0.5, 0.95, 1.0])
def test_the_background_tells_the_label_as_often_as_asked(correlation):
  data = spurious.digits("train", correlation=correlation, size=1000, seed=3)
  labels, backgrounds = data["groups"] // 2, data["groups"] % 2
  np.testing.assert_array_equal(labels, data["labels"])
  assert (labels == backgrounds).mean() == pytest.approx(correlation)
  assert data["inputs"].shape == (1000, 12, 12, 1) and data["inputs"].dtype == np.float32
  again = spurious.digits("train", correlation=correlation, size=1000, seed=3)
  np.testing.assert_array_equal(data["inputs"], again["inputs"])
  other = spurious.digits("train", correlation=correlation, size=1000, seed=4)
  assert not np.array_equal(data["inputs"], other["inputs"])


def test_groups_of_one_size_show_no_digit_twice():
  shown = {"per_group": 32, "seed": 1}
  data = spurious.digits("validation", **shown, part="foreground")
  assert np.bincount(data["groups"]).tolist() == [32] * 4
  assert len(np.unique(data["inputs"].reshape(128, -1), axis=0)) == 128


def test_the_test_set_has_every_digit_on_both_checkers():
  full, ink = (spurious.digits("test", part=part)["inputs"] for part in ("full", "foreground"))
  assert len(full) == 2 * 355
  np.testing.assert_array_equal(ink[:355], ink[355:])
  data = spurious.digits("test")
  np.testing.assert_array_equal(data["groups"][:355] + 1, data["groups"][355:])
  train = spurious.digits("train", size=1000, part="foreground")["inputs"]
  seen = {row.tobytes() for row in train}
  assert not any(row.tobytes() in seen for row in ink)


def test_a_canvas():
  ink = np.zeros((2, 8, 8))
  ink[:, 3, 4] = [1.0, 0.5]
  full, front, back = (spurious.canvas(ink, np.array([0, 1]), part) for part in spurious.PARTS)
  assert set(np.unique(back)) == {0.0, 0.5}
  np.testing.assert_array_equal(back[0] + back[1], np.full((12, 12, 1), 0.5))
  assert full[0, 5, 6] == 1 and front[1, 5, 6] == 0.5
  np.testing.assert_allclose(full, front + (1 - front) * back)
  with pytest.raises(ValueError, match="part='both'; accepted: full, foreground, background"):
    spurious.canvas(ink, np.array([0, 1]), "both")


def test_too_many():
  with pytest.raises(ValueError, match="accepted: 357 in all"):
    spurious.digits("validation", per_group=100)


def test_a_portrait():
  example = {
    "image": np.full((218, 178, 3), 255, np.uint8),
    "attributes": {"Blond_Hair": True, "Male": False},
  }
  seen = spurious._portrait(example)
  assert seen["inputs"].shape == (224, 224, 3) and seen["inputs"].dtype == np.float32
  assert (seen["labels"], seen["groups"]) == (1, 2)
  np.testing.assert_allclose(seen["inputs"][0, 0, 0], (1 - 0.485) / 0.229, rtol=1e-5)
