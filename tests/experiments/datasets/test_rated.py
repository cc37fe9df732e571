"""Rated segments: a table's column by its name, nothing taken on trust; edits of known severity."""

import numpy as np
import pytest

from experiments.datasets import rated, stable

STOPWORDS = frozenset({"the", "a", "of", "is", "and"})
TEXT = "The value of a mapping is deleted, and every key disappears quietly forever."
POOL = [f"{TEXT[:-1]} number {word}." for word in ("one", "two", "three", "four")] + ["Too short."]

TABLE = "hypothesis\treference\tsystem\tz\traw\n" + "\n".join(
  f"h{i}\tr{i // 2}\tA\t{i / 10}\t{100 - i}" for i in range(6)
)


@pytest.fixture
def path(tmp_path):
  file = tmp_path / "wmt.tsv"
  file.write_text(TABLE)
  return file


def test_a_column_by_name(path):
  read = rated.segments(path, "z", -1, 1)
  assert read.references == ["r0", "r1", "r2"]
  assert read.hypotheses[3] == "h3"
  assert read.source.tolist() == [0, 0, 1, 1, 2, 2]
  assert read.target.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
  assert read.others == {"raw": pytest.approx(-1)}


@pytest.mark.parametrize(
  ("target", "high", "words"),
  [
    ("score", 1, "column 'score' is missing; accepted: hypothesis, reference, system, z, raw"),
    ("raw", 1, "target='raw' has other values; accepted: -1 to 1"),
    ("system", 1, "target='system' has other values"),
  ],
)
def test_the_wrong_column_is_refused(path, target, high, words):
  with pytest.raises(ValueError, match=words):
    rated.segments(path, target, -1, high)


def test_what_is_missing_is_said(tmp_path):
  with pytest.raises(FileNotFoundError, match="WMT's human scores are in no package"):
    rated.segments(tmp_path / "wmt17.tsv", "z")


@pytest.mark.parametrize("severity", range(6))
def test_severity_is_the_number_of_content_words_that_change(severity):
  original = {"value", "mapping", "deleted", "every", "key", "disappears", "quietly", "forever"}
  for seed in range(20):
    draw = stable.draws(seed, 0)
    text = rated.edited(TEXT, severity, draw, STOPWORDS, ["zebra"])
    words = [word.strip(",.").lower() for word in text.split()]
    assert len(original - set(words)) == severity
    assert words.count("zebra") <= severity
    for word in ("of", "is", "and"):  # articles may go, other function words stay
      assert word in words


def test_noise_changes_no_content():
  found = {rated.edited(TEXT, 0, stable.draws(seed, 0), STOPWORDS, []) for seed in range(40)}
  assert len(found) > 10
  assert any(t.isupper() for t in found) and any(not t.endswith(".") for t in found)
  articles = {t.lower().split().count("the") + t.lower().split().count("a") for t in found}
  assert articles == {1, 2}


def test_graded_hypotheses_know_their_reference_and_severity():
  draw = {"stopwords": STOPWORDS, "severities": 4}
  one, again, other = (rated.graded(POOL, 3, seed, **draw) for seed in (0, 0, 1))
  assert one.hypotheses == again.hypotheses != other.hypotheses
  assert len(set(one.references)) == 3 and POOL[-1] not in one.references
  assert one.source.tolist() == np.repeat([0, 1, 2], 4).tolist()
  assert one.target.tolist() == [0, -1, -2, -3] * 3
  for i, hypothesis in enumerate(one.hypotheses):
    words = [
      {w.strip(",.").lower() for w in t.split() if rated.is_content(w, STOPWORDS)}
      for t in (one.references[one.source[i]], hypothesis)
    ]
    assert len(words[0] - words[1]) <= -one.target[i]
  with pytest.raises(ValueError, match="references=5; accepted: up to 4"):
    rated.graded(POOL, 5, 0, **draw)
