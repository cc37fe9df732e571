"""Rated segments of a metrics task: references, hypotheses and how good each hypothesis is.

    rated.segments("wmt17.tsv", target="score")              # human scores, of a table
    rated.graded(sentences.catalogue("fi"), 24, seed=0, stopwords=stopwords)

No package carries WMT's human scores. A table is tab-separated with a header; the columns
`reference` and `hypothesis` are text, others are numbers, and the one to correlate with is named.
Where there are no people, a sentence is edited, and the number of words that changed is the score.
"""

import csv
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.datasets import stable

STREAM = 2204


class Rated(NamedTuple):
  """Hypotheses (N), the score of each, and which of the distinct references it belongs to.

  `target` is higher for the better hypothesis. `others` is its correlation with every other numeric
  column, to be looked at: a published metric was once correlated with the wrong column.
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


def graded(
  pool: Sequence[str],
  count: int,
  seed: int,
  *,
  stopwords: frozenset[str],
  severities: int = 6,
  content_words: int = 6,
  words: int = 16,
) -> Rated:
  """`count` sentences of a pool by lot, each with a hypothesis of every severity 0, 1, ... .

  The target is minus the severity, that many content words dropped or exchanged; see `edited`.

  Args:
    pool: sentences.
    count: how many references.
    seed: of the choice and the edits.
    stopwords: words, in lower case, that are no content.
    severities: hypotheses of a reference.
    content_words: the least that a reference has.
    words: the most that it has, of any kind.

  Raises: ValueError where too few sentences have these lengths.
  """
  content = {text: [w for w in text.split() if is_content(w, stopwords)] for text in pool}
  fitting = [t for t in pool if len(content[t]) >= content_words and len(t.split()) <= words]
  if len(fitting) < count:
    raise ValueError(f"references={count}; accepted: up to {len(fitting)}")
  draw = stable.draws(seed, STREAM)
  chosen = [fitting[i] for i in np.argsort(draw(len(fitting)))[:count]]
  vocabulary = sorted({re.sub(r"\W", "", w).lower() for ws in content.values() for w in ws})
  hypotheses = [
    edited(text, severity, draw, stopwords, vocabulary)
    for text in chosen
    for severity in range(severities)
  ]
  target = -np.tile(np.arange(severities), count)
  return Rated(chosen, hypotheses, target, np.repeat(np.arange(count), severities), {})


def edited(
  text: str,
  severity: int,
  draw: Callable[[int], np.ndarray],
  stopwords: frozenset[str],
  vocabulary: Sequence[str],
) -> str:
  """`text` with `severity` content words dropped or exchanged, and noise that changes no meaning.

  The noise: an article dropped, a comma added, the full stop dropped, all in capitals, each or not.

  Args:
    text: a sentence.
    severity: how many of its content words change.
    draw: `stable.draws(...)`.
    stopwords: words, in lower case, that are no content.
    vocabulary: where the words come from that take others' places.
  """
  words = text.split()
  places = [i for i, word in enumerate(words) if is_content(word, stopwords)]
  for i in sorted(np.array(places)[np.argsort(draw(len(places)))[:severity]], reverse=True):
    drops, which = draw(2)
    words[i : i + 1] = [] if drops < 0.5 else [vocabulary[int(which * len(vocabulary))]]
  article, comma, case, stop = draw(4) < 0.5
  articles = [i for i, word in enumerate(words) if word.lower() in ("a", "an", "the")]
  if article and articles:
    del words[articles[int(draw(1)[0] * len(articles))]]
  if comma:
    words[int(draw(1)[0] * (len(words) - 1))] += ","
  text = " ".join(words)
  text = text.rstrip(".") if stop else text
  return text.upper() if case else text


def is_content(word: str, stopwords: frozenset[str]) -> bool:
  """Is it letters, more than one, and no stopword?"""
  bare = word.strip(".,;:!?()\"'«»“”")
  return bare.isalpha() and len(bare) > 1 and bare.lower() not in stopwords
