"""Rated segments of a metrics task (WMT): tables of references, hypotheses and human scores.

No package carries WMT's human scores. A table is tab-separated with a header; the columns
`reference` and `hypothesis` are text, others are numbers, and the one to correlate with is named.
"""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Rated(NamedTuple):
  """Hypotheses (N), the score of each, and which of the distinct references it belongs to.

  `others` is the correlation of the target with every other numeric column, to be looked at: a
  published metric was once correlated with the wrong column.
  """

  references: list[str]
  hypotheses: list[str]
  target: np.ndarray
  source: np.ndarray
  others: dict[str, float]


def segments(
  path: str | os.PathLike, target: str, low: float = -np.inf, high: float = np.inf
) -> Rated:
  """Reads a table.

  Args:
    path: the file.
    target: name of the column of human scores, higher for the better hypothesis.
    low, high: the least and the most that a score may be.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a column is missing or has no numbers, or a score is out of range.
  """
  if not Path(path).exists():
    raise FileNotFoundError(
      f"{path}: no such table of rated segments; WMT's human scores are in no package, give the"
      " file by --config.data.table and its column by --config.data.target"
    )
  with Path(path).open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  columns = list(rows[0]) if rows else []
  for name in ("reference", "hypothesis", target):
    if name not in columns:
      raise ValueError(f"{path}: column {name!r} is missing; accepted: {', '.join(columns)}")

  def numbers(name: str) -> np.ndarray | None:
    try:
      return np.array([float(row[name]) for row in rows])
    except ValueError:
      return None

  scores = numbers(target)
  if scores is None or not ((low <= scores) & (scores <= high)).all():
    raise ValueError(f"{path}: target={target!r} has other values; accepted: {low:g} to {high:g}")
  references = list(dict.fromkeys(row["reference"] for row in rows))
  number = {reference: i for i, reference in enumerate(references)}
  others = {
    name: float(np.corrcoef(scores, values)[0, 1])
    for name in columns
    if name != target and (values := numbers(name)) is not None
  }
  source = np.array([number[row["reference"]] for row in rows])
  return Rated(references, [row["hypothesis"] for row in rows], scores, source, others)
