"""Tables of rated segments: the column by its name, and nothing taken on trust."""

import pytest

from experiments.datasets import rated

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
