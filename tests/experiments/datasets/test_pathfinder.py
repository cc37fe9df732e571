"""Pathfinder: the drawings follow the rule, the labels too, and nothing else tells them apart."""

import dataclasses
import hashlib

import numpy as np
import pytest

from experiments.datasets import pathfinder, sources, stable

FEW = dict(train=300, validation=20, test=20)


def images(split="train", **parameters):
  config = pathfinder.config(**(FEW | parameters))
  pictures, labels = zip(*pathfinder.images(config, split), strict=True)
  return np.stack(pictures), np.array(labels)


@pytest.fixture(scope="module", params=sorted(pathfinder.GEOMETRIES))
def drawn(request):
  """Contours without distractors, and the pictures of them."""
  size, kept = request.param, []
  geometry = pathfinder.GEOMETRIES[size]
  drawing = pathfinder._Drawing(size, geometry.margins[0])
  contours = pathfinder._Drawing.contours

  def keeping(self, *arguments):
    *canvases, dashes = contours(self, *arguments)
    kept.append(dashes)
    return *canvases, dashes

  # Shorter contours: most of those of 14 dashes find no place, and it takes seconds.
  config = pathfinder.config(size=size, contour_length=8, distractors=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pathfinder._Drawing, "contours", keeping)
    pictures, labels = pathfinder._some(drawing, config, 40, stable.draws(1, 2))
  return drawing, geometry, np.concatenate(kept)[:40], pictures[..., 0], labels


def where(drawing, positions):
  """(..., 2) pixels y, x of positions in image 0, from -frame on."""
  return np.stack(np.divmod(positions, drawing.width), -1) - drawing.frame


def test_dashes_follow_one_another(drawn):
  drawing, geometry, dashes, *_ = drawn
  margin = geometry.margins[0]
  pivots, kinds = where(drawing, dashes[..., 0]), dashes[..., 1]
  steps = np.linalg.norm(np.diff(pivots, axis=2), axis=-1)
  assert np.abs(steps - (geometry.dash + 2 * margin)).max() < 0.75
  direction = where(drawing, drawing.tip[kinds] + drawing.position(0, 0))
  angle = np.arctan2(direction[..., 0], direction[..., 1])
  turn = np.abs((np.diff(angle, axis=2) + np.pi) % (2 * np.pi) - np.pi)
  assert turn.max() < np.pi / 2 / geometry.continuity
  # cos^2 is nearly even within a third of that, where nothing is in the way.
  assert 0.1 < turn.mean() * geometry.continuity < 0.8


def test_first_dashes_lie_at_the_centre(drawn):
  drawing, geometry, dashes, *_ = drawn
  first = dashes[:, :, 0]
  tails = where(drawing, first[..., 0] + drawing.tail[first[..., 1]])
  tips = where(drawing, first[..., 0] + drawing.tip[first[..., 1]])
  low, high = 2 * geometry.seed_distance, drawing.size - 2 * geometry.seed_distance
  for ends in (tails[:, 0], tips[:, 0]):
    assert (ends >= low).all() and (ends < high).all()
  apart = np.linalg.norm(tails[:, 0] - tails[:, 1], axis=1)
  assert np.abs(apart - geometry.seed_distance).max() <= 0.75


def test_dashes_keep_clear_of_all_but_their_neighbours(drawn):
  """By distance: a margin's space is around each, so axes are two margins apart, up to pixels."""
  drawing, geometry, dashes, *_ = drawn
  length, margin = geometry.dash, geometry.margins[0]
  direction = where(drawing, drawing.tip[dashes[..., 1]] + drawing.position(0, 0))
  direction = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
  along = margin + length * np.linspace(0, 1, 9)
  points = where(drawing, dashes[..., 0])[..., None, :] + along[:, None] * direction[..., None, :]
  assert points.min() > geometry.padding - 1
  assert points.max() < drawing.size - geometry.padding
  for image in points:
    for i, one in enumerate(image.reshape(-1, 9, 2)):
      for j, other in enumerate(image.reshape(-1, 9, 2)[:i]):
        same, latest = i // 8 == j // 8, {i % 8, j % 8}
        # Contours grow in turn: what is drawn last does not see the other's last.
        if (same and i - j == 1) or (not same and max(latest) - min(latest) <= 1):
          continue
        gap = np.linalg.norm(one[:, None] - other[None], axis=-1).min()
        assert gap > 2 * margin + geometry.thickness - 2


def test_pictures_hold_the_dashes_and_two_dots(drawn):
  """Drawn again dash by dash from the templates, and dots from their distance."""
  drawing, geometry, dashes, pictures, labels = drawn
  half = int(np.sqrt(len(drawing.ink.places))) // 2
  y, x = np.mgrid[: drawing.size, : drawing.size]
  agreed = 0
  for one, picture, label in zip(dashes, pictures, labels, strict=True):
    wanted = np.zeros((drawing.size + 80, drawing.size + 80), np.uint8)
    for pivot, kind in one.reshape(-1, 2):
      cy, cx = where(drawing, pivot + drawing.middle[kind]) + 40
      window = wanted[cy - half : cy + half + 1, cx - half : cx + half + 1]
      np.maximum(window, drawing.ink.values[kind].reshape(window.shape), out=window)
    wanted = wanted[40:-40, 40:-40]
    starts = [where(drawing, p + drawing.tail[k]) for p, k in one[:, 0]]
    ends = [where(drawing, p + drawing.tip[k]) for p, k in one[:, -1]]
    for contour in range(2):
      away = np.min(
        [np.hypot(y - cy, x - cx) for cy, cx in (starts[contour], ends[contour ^ 1 ^ label])], 0
      )
      inside, outside = away < geometry.radius - 0.75, away > geometry.radius + 0.75
      if (picture[inside] == 255).all():
        np.testing.assert_array_equal(picture[outside], wanted[outside])
        agreed += 1
        break
  assert agreed == len(pictures), "the dots are not where the label says"


def test_distractors_add_dashes_clear_of_the_contours():
  """Six distractors of 4 dashes beside 28 dashes: nearly 24 / 28 more ink, none of it shared."""
  ink = [images(size=128, distractors=n, train=128)[0].sum() for n in (0, 6)]
  assert 1.4 < ink[1] / ink[0] < 1 + 24 / 28


def test_nothing_simple_tells_the_label():
  """Ink and lit pixels have one distribution; the dots' distance differs by what the rule says."""
  pictures, labels = images(size=32, train=4_000)
  assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(4_000)
  x = pictures[..., 0]
  for statistic in (x.mean((1, 2)), (x > 0).mean((1, 2)), (x > 128).mean((1, 2)), x.max((1, 2))):
    one, other = statistic[labels == 0], statistic[labels == 1]
    error = np.sqrt(one.var() / len(one) + other.var() / len(other))
    assert abs(one.mean() - other.mean()) <= 4 * error
  means = np.stack([x[labels == c].mean(0) for c in (0, 1)])
  errors = x.std(0) * np.sqrt(2 / 2_000)
  off = np.abs(means[0] - means[1]) / np.maximum(errors, 1e-9)
  assert off.max() < 5 and (off > 3).mean() < 0.01, "no pixel tells it either"


@pytest.mark.parametrize(
  ("size", "golden"),
  [(32, "8000210283970d3c"), (128, "a5f78eeef4c3a667")],
)
def test_golden_digests(size, golden):
  pictures, labels = images(size=size, train=32, seed=5)
  assert pictures.shape == (32, size, size, 1) and pictures.dtype == np.uint8
  assert hashlib.sha256(pictures.tobytes() + bytes(labels.tolist())).hexdigest()[:16] == golden


def test_a_larger_set_extends_a_smaller_one_and_splits_differ():
  small, large, test = images(train=20), images(train=300), images("test")
  for few, many in zip(small, large, strict=True):
    np.testing.assert_array_equal(few, many[:20])
  assert not (test[0] == large[0][:20]).all((1, 2, 3)).any()
  assert len({picture.tobytes() for picture in large[0]}) == 300
  assert (images(train=20, seed=1)[0] != small[0]).any()


def test_draws_are_those_of_the_stream():
  draw = stable.draws(3, 4)
  np.testing.assert_array_equal(np.concatenate([draw(2), draw(5)]), stable.uniform(3, 4, 7))


def test_loads(data_dir):
  splits = {
    s: sources.load("pathfinder32", s, data_dir=data_dir, contour_length=6, **FEW) for s in FEW
  }
  assert {s: len(source) for s, source in splits.items()} == FEW
  pictures, labels = images("validation", size=32, contour_length=6)
  np.testing.assert_array_equal(splits["validation"].fields["image"], pictures)
  np.testing.assert_array_equal(splits["validation"].fields["label"], labels)


def test_progress_is_told(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(pathfinder, "PROGRESS", 100)
  sources.load("pathfinder32", "test", data_dir=tmp_path, **FEW)
  assert "pathfinder: train 200 of 300, " in capsys.readouterr().err


def test_the_arena_s_sizes():
  config = pathfinder.config(size=128)
  assert (config.train, config.validation, config.test) == (160_000, 20_000, 20_000)
  assert config.contour_length == 14
  geometry = dataclasses.astuple(pathfinder.GEOMETRIES[128])
  assert geometry == (5, 1.5, (2, 3), 1.8, 0.9, 3.0, 20, 1, 35)


def test_contours_that_cannot_fit_are_refused(monkeypatch):
  monkeypatch.setattr(pathfinder, "PATIENCE", 2)
  with pytest.raises(ValueError, match="contour_length=90 is too long for size=32"):
    images(size=32, contour_length=90)


@pytest.mark.parametrize(
  ("parameters", "error", "match"),
  [
    ({"size": 48}, ValueError, "size=48; accepted: 32, 64, 128, 256"),
    ({"train": 0}, ValueError, "train must be at least 1, got 0"),
    ({"contour_length": 2}, ValueError, "contour_length must be at least 3"),
    ({"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
    ({"sizes": 32}, TypeError, "pathfinder has no parameter 'sizes'; it takes size, contour"),
  ],
)
def test_mistakes(parameters, error, match):
  with pytest.raises(error, match=match):
    pathfinder.config(**parameters)
