"""Few labelled sentences a class, drawn from pools; each draw leaves the rest to be tested on.

    pool = few_shot.pool("science")                # sentences of docstrings, labelled by subject
    drawn = few_shot.draw(pool, per_class=8, held_out=50, seed=0)

A pool that is made from docstrings tells nothing by its names: what a sentence documents, words of
code and the names of the classes are masked. Sentences nearly alike (three quarters of their words
in common) are there once, so that none of them is both trained and tested on.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

from experiments.datasets import sentences, sources, stable

MASK = "something"
# Domain of `text`, and for each class beginnings of its files' names.
DOCSTRINGS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
  "science": (
    "science",
    {
      "linear algebra": ("scipy/linalg", "numpy/linalg", "scipy/sparse/linalg"),
      "statistics": ("scipy/stats", "numpy/random"),
      "optimisation": ("scipy/optimize",),
      "signals": ("scipy/signal", "scipy/fft", "numpy/fft"),
      "special functions": ("scipy/special", "numpy/polynomial"),
      "neural networks": ("flax",),
    },
  ),
  "tuning": (  # nothing of the pool before
    "science",
    {
      "interpolation": ("scipy/interpolate",),
      "estimators": ("sklearn/linear_model", "sklearn/ensemble"),
      "arrays": ("numpy/lib", "numpy/ma"),
      "sparse arrays": ("scipy/sparse/_", "scipy/sparse/csgraph"),
      "preprocessing": ("sklearn/preprocessing", "sklearn/feature", "sklearn/impute"),
      "gradients": ("optax",),
    },
  ),
  "library": (
    "docstrings",
    {
      "tkinter": ("tkinter", "turtle"),
      "idle": ("idlelib",),
      "asyncio": ("asyncio",),
      "email": ("email", "mailbox", "smtplib", "imaplib"),
      "web": ("http", "urllib", "wsgiref", "xmlrpc"),
      "numbers": ("_pydecimal", "fractions", "statistics", "numbers"),
    },
  ),
}
HUB = ("sst5", "amazon_counterfactual", "cr", "emotion", "enron_spam")
WORDS = (4, 12)  # the least and the most of a sentence


class Pool(NamedTuple):
  """Sentences and classes, numbered from 0; from `tested` on they are a test set of their own."""

  texts: tuple[str, ...]
  labels: np.ndarray
  classes: tuple[str, ...]
  tested: int | None = None


class Draw(NamedTuple):
  """Indices of a pool: `train` has `per_class` of each class; `held_out` others of each."""

  train: np.ndarray
  held_out: np.ndarray


def masked(sentence: str, name: str, keywords: tuple[str, ...] = ()) -> str:
  """Without code and without words of `name` or that begin as one of `keywords`."""
  parts = {part for part in re.split(r"[^a-z]+", name.lower()) if len(part) > 2}

  def tells(word: str) -> bool:
    bare = re.sub(r"\W+$|^\W+", "", word)
    code = re.search(r"[_`=<>\[\]{}\d]|\w[.(]\w|[a-z][A-Z]", bare)
    own = set(re.split(r"[^a-z]+", bare.lower())) & parts
    return bool(code or own or bare.lower().startswith(keywords))

  return " ".join(MASK if tells(word) else word for word in sentence.split())


@functools.cache
def pool(name: str) -> Pool:
  """A pool by name: of DOCSTRINGS, or a set of tensorflow-datasets with texts and labels.

  Raises:
    DatasetNotFound: the set has to be prepared first; the line says how.
    ValueError: a set that only a hub has.
  """
  if name in HUB:
    raise ValueError(
      f"name={name!r}; accepted: {', '.join(DOCSTRINGS)} or a set of TFDS, not a hub's"
    )
  if name not in DOCSTRINGS:
    return _tfds([sources.load(name, split, in_memory=True) for split in ("train", "test")])
  domain, classes = DOCSTRINGS[name]
  stems = {re.split(r"\W", path)[-1] for paths in classes.values() for path in paths}
  keywords = tuple(sorted(stems | set(re.split(r"\W", " ".join(classes)))))
  texts: list[str] = []
  labels: list[int] = []
  seen: list[set[str]] = []
  for file, entries in sentences.summaries(domain).items():
    label = next((i for i, paths in enumerate(classes.values()) if file.startswith(paths)), None)
    if label is None:
      continue
    for documented, sentence in entries:
      plain = masked(sentence, documented, keywords)
      words = {word for word in re.findall(r"[a-z]+", plain.lower()) if word != MASK}
      alike = any(4 * len(words & other) >= 3 * max(len(words), len(other)) for other in seen)
      if WORDS[0] <= len(words) and len(plain.split()) <= WORDS[1] and not alike:
        texts.append(plain)
        labels.append(label)
        seen.append(words)
  return Pool(tuple(texts), np.array(labels), tuple(classes))


def _tfds(parts: list[sources.Source]) -> Pool:
  rows = [part[i] for part in parts for i in range(len(part))]
  text = "description" if "description" in rows[0] else "text"
  labels = np.array([int(row["label"]) for row in rows])
  texts = tuple(row[text].decode() for row in rows)
  classes = tuple(str(i) for i in range(int(labels.max()) + 1))
  return Pool(texts, labels, classes, len(parts[0]))


def draw(pool: Pool, per_class: int, held_out: int, seed: int) -> Draw:
  """`per_class` of each class to train on and `held_out` others of each, at random.

  Raises: ValueError where a class has too few.
  """

  def shuffled(members: np.ndarray, label: int) -> np.ndarray:
    return members[np.argsort(stable.uniform(seed, label, len(members)), kind="stable")]

  parts: list[tuple[np.ndarray, np.ndarray]] = []
  for label, name in enumerate(pool.classes):
    members = np.flatnonzero(pool.labels == label)
    if pool.tested is None:
      order = shuffled(members, label)
      chosen = order[:per_class], order[per_class:][:held_out]
    else:
      sides = members[members < pool.tested], members[members >= pool.tested]
      chosen = shuffled(sides[0], label)[:per_class], shuffled(sides[1], label)[:held_out]
    if (len(chosen[0]), len(chosen[1])) != (per_class, held_out):
      raise ValueError(
        f"per_class={per_class} and held_out={held_out}; {name!r} has {len(members)}"
      )
    parts.append(chosen)
  return Draw(*(np.concatenate(side) for side in zip(*parts, strict=True)))


def pairs(labels_M: np.ndarray, repeats: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """SetFit's pairs: indices (2 R M, 2) and targets (2 R M,) (arXiv:2209.11055, section 3).

  R = `repeats` times, each example is paired with one of its class, maybe itself (target 1), and
  with one of another class (target 0), each uniformly drawn.
  """
  count = len(labels_M)
  uniform = stable.uniform(seed, 1_000, 2 * repeats * count).reshape(repeats, count, 2)
  same = [np.flatnonzero(labels_M == label) for label in labels_M]
  other = [np.flatnonzero(labels_M != label) for label in labels_M]
  found, targets = [], []
  for r in range(repeats):
    for i in range(count):
      for target, partners in ((1, same[i]), (0, other[i])):
        found.append((i, partners[int(uniform[r, i, target] * len(partners))]))
        targets.append(target)
  return np.array(found), np.array(targets, np.float32)
