"""Packing: nothing is lost, nothing is mixed up, and rows are nearly full."""

import itertools
from collections import Counter

import numpy as np
import pytest

from experiments.datasets import packing


def made(seed, count, longest):
  """Documents of 0..longest tokens; token values tell the document and the place in it."""
  lengths = np.random.default_rng(seed).integers(0, longest + 1, count)
  return [1000 * (d + 1) + np.arange(n) for d, n in enumerate(lengths)]


@pytest.mark.parametrize(
  ("longest", "length", "window"), [(40, 16, 8), (10, 16, 1), (100, 7, 3), (12, 64, 256), (5, 1, 1)]
)
def test_every_pair_of_neighbours_is_asked_for_once(longest, length, window):
  documents = made(longest, 200, longest)
  rows = packing.pack(documents, length, window=window).fields
  assert all(x.shape == (len(rows["inputs"]), length) for x in rows.values())
  assert {k: x.dtype.name for k, x in rows.items()} == dict.fromkeys(
    ("inputs", "targets", "segments", "positions"), "int32"
  ) | {"weights": "float32"}
  used = rows["segments"] > 0
  np.testing.assert_array_equal(rows["weights"], used)
  assert all(not rows[key][~used].any() for key in ("inputs", "targets", "positions"))
  asked = Counter(zip(rows["inputs"][used], rows["targets"][used], strict=True))
  assert asked == Counter(pair for d in documents for pair in itertools.pairwise(d))


def test_segments_are_pieces_in_order():
  rows = packing.pack(made(0, 300, 50), 32).fields
  for inputs, segments, positions in zip(
    rows["inputs"], rows["segments"], rows["positions"], strict=True
  ):
    used = segments.max(initial=0)
    assert used and (np.diff(segments[segments > 0]) >= 0).all()
    assert segments[: (segments > 0).sum()].all(), "padding is at the end"
    for segment in range(1, used + 1):
      piece = inputs[segments == segment]
      assert (np.diff(piece) == 1).all(), "one document, its tokens in order"
      np.testing.assert_array_equal(positions[segments == segment], np.arange(len(piece)))


def test_long_documents_are_cut_at_the_length():
  rows = packing.pack([np.arange(100, 121)], 8).fields
  assert rows["inputs"].tolist() == [
    list(range(100, 108)),
    list(range(108, 116)),
    [*range(116, 120), 0, 0, 0, 0],
  ]
  assert rows["targets"][:2].tolist() == (rows["inputs"][:2] + 1).tolist()


def test_the_best_fit_is_taken():
  a, b, c, d = (np.arange(n + 1) + 100 * n for n in (5, 3, 4, 2))
  rows = packing.pack([a, b, c, d], 8).fields["segments"]
  assert rows.tolist() == [[1] * 5 + [2] * 3, [1] * 4 + [2] * 2 + [0, 0]]
  # Of two open rows, b goes where it leaves less.
  a, b, c = (np.arange(n + 1) for n in (4, 6, 2))
  assert packing.pack([a, b, c], 8).fields["segments"].max(axis=1).tolist() == [1, 2]


def test_rows_are_nearly_full():
  documents = made(1, 2_000, 200)
  shares = [packing.pack(documents, 256, window=w).fields["weights"].mean() for w in (1, 8, 256)]
  assert shares == sorted(shares) and shares[-1] > 0.98


def test_deterministic_and_random_access():
  one, other = (packing.pack(made(2, 100, 30), 16) for _ in range(2))
  for key, value in one.fields.items():
    np.testing.assert_array_equal(value, other.fields[key])
  np.testing.assert_array_equal(one[3]["inputs"], one.gather([3])["inputs"][0])


def test_mistakes():
  with pytest.raises(ValueError, match="length=0, window=256; accepted: at least 1"):
    packing.pack([np.arange(3)], 0)
  with pytest.raises(ValueError, match="no document has two tokens"):
    packing.pack([np.arange(1), np.arange(0)], 8)
