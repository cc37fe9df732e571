"""Which manual a paragraph is from: packaged documentation as a task of classification.

    manuals.windows("train", 32)[0]                            # {"inputs"}, for pretraining
    manuals.paragraphs("test", 96, most=150)[0]                # {"inputs", "labels"}
    manuals.probe(encode, "test", 32, windows=3, train=150, test=150)    # accuracies, a seed each

Python's reference, the docstrings of its library, and those of six packages. Splits are those of
`text`: the docstrings of a file are in one of them. Paragraphs may name their package: what they
are labelled by is not hidden, as it is in `few_shot`.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.datasets import sources, text, tokenization

DOMAINS = ("reference", "docstrings", "science")
MANUALS = ("reference", "docstrings", "numpy", "scipy", "sklearn", "jax", "flax", "optax")
SHORTEST = 12  # words


def windows(split: str, length: int, most: int | None = None) -> sources.InMemory:
  """All manuals as bytes, in windows of `length` (`text.windows`); `most` from all over them."""
  parts = [text.windows(domain, split, length).fields["inputs"] for domain in DOMAINS]
  joined = np.concatenate(parts)
  if most is not None:
    joined = joined[np.linspace(0, len(joined) - 1, most).astype(int)]
  return sources.InMemory({"inputs": joined})


@functools.cache
def _paragraphs(split: str) -> dict[str, list[str]]:
  """The paragraphs of each manual, in the order of its documents, each once."""
  found: dict[str, dict[str, None]] = {manual: {} for manual in MANUALS}
  for domain in DOMAINS:
    source = sources.load(f"text/{domain}", split, in_memory=True)
    for i in range(len(source)):
      name, body = (source[i][key].decode() for key in ("name", "text"))
      manual = name.partition("/")[0] if domain == "science" else domain
      for paragraph in re.split(r"\n\s*\n", body):
        words = paragraph.split()
        if len(words) >= SHORTEST:
          found[manual][" ".join(words)] = None
  return {manual: list(paragraphs) for manual, paragraphs in found.items()}


@functools.lru_cache(maxsize=8)
def paragraphs(split: str, length: int, most: int) -> sources.InMemory:
  """Up to `most` paragraphs of each manual, from all over it, as bytes (`bytes_tokenizer`).

  Returns: examples {"inputs": (length,) int32, padded with 0 or cut, "labels": () int32, an index
    of MANUALS}.

  Raises: ValueError for a split that does not exist.
  """
  encode, inputs, labels = tokenization.bytes_tokenizer().encode, [], []
  for label, found in enumerate(_paragraphs(split).values()):
    for i in np.linspace(0, len(found) - 1, min(most, len(found))).astype(int):
      ids = encode(found[i])[:length]
      inputs.append(np.pad(ids, (0, length - len(ids))))
      labels.append(label)
  return sources.InMemory({"inputs": np.stack(inputs), "labels": np.array(labels, np.int32)})


def probe(
  encode: Callable[[np.ndarray, np.ndarray], Any],
  split: str,
  length: int,
  *,
  windows: int,
  train: int,
  test: int,
) -> list[float]:
  """Accuracy of a logistic regression on frozen features, standardised, for each seed.

  Args:
    encode: features (S, K, length, H) of S seeds, of tokens (K, length) int32 with true lengths
      (K,) int32, which may be 0. A paragraph's features are their mean over its tokens.
    split: what is measured; "train" is what the regression is fitted to.
    length, windows: a paragraph is read in so many windows of so many bytes.
    train, test: paragraphs of each manual, at most.
  """
  parts = [paragraphs(s, windows * length, m).fields for s, m in (("train", train), (split, test))]

  def features(tokens_NT: np.ndarray) -> np.ndarray:
    tokens_KL = tokens_NT.reshape(-1, length)
    there_KL = tokens_KL > 0
    encoded_SKLH = np.asarray(encode(tokens_KL, there_KL.sum(1, dtype=np.int32)))
    total_SKH = np.einsum("sklh,kl->skh", encoded_SKLH, there_KL)
    total_SNH = total_SKH.reshape(len(total_SKH), len(tokens_NT), windows, -1).sum(2)
    return total_SNH / (tokens_NT > 0).sum(1, keepdims=True)

  x_train, x_test = (features(part["inputs"]) for part in parts)
  classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
  return [
    float(classifier.fit(a, parts[0]["labels"]).score(b, parts[1]["labels"]))
    for a, b in zip(x_train, x_test, strict=True)
  ]
