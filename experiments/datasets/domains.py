"""Several domains of text side by side: an example is a window of each.

    train = domains.side_by_side(("reference", "c"), "train", 128)      # fields (N, 2, 128)
    first, second = domains.parts(train, (0.5, 0.5))
    mixed = domains.random_split(second)                    # as many windows, of no domain

A model of each domain reads its column, a model of all domains reads the rows: both see the same
text in the same order, and every domain counts alike.
"""

from collections.abc import Sequence

import numpy as np

from experiments.datasets import sources, text


def side_by_side(
  domains: Sequence[str], split: str, length: int, count: int | None = None
) -> sources.InMemory:
  """Windows of `text.windows`, as many of each domain, taken evenly from all over it.

  Args:
    domains: of text.DOMAINS.
    split: "train", "validation" or "test".
    length: L, tokens of a window.
    count: windows of a domain; fewer, and by default, as many as the smallest has.

  Returns: examples {"inputs": (domains, L) int32, "targets": (domains, L) int32}.

  Raises:
    DatasetNotFound: a domain is in no package, or has to be fetched first.
  """
  if missing := [d for d in domains if d not in text.DOMAINS]:
    raise sources.DatasetNotFound(f"domains={', '.join(missing)}: in no package that is read here")
  found = [text.windows(domain, split, length).fields for domain in domains]
  size = min(len(fields["inputs"]) for fields in found)
  size = size if count is None else min(size, count)

  def spread(rows: np.ndarray) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, size).astype(int)]

  return sources.InMemory({k: np.stack([spread(f[k]) for f in found], 1) for k in found[0]})


def parts(source: sources.InMemory, shares: Sequence[float]) -> list[sources.InMemory]:
  """Cuts examples, in a random order that is always the same, into parts of these shares."""
  order = np.random.RandomState(0).permutation(len(source))
  cuts = np.round(np.cumsum(shares)[:-1] * len(source)).astype(int)
  return [sources.InMemory(source.gather(chosen)) for chosen in np.split(order, cuts)]


def random_split(source: sources.InMemory) -> sources.InMemory:
  """The same windows in columns at random: every column is a sample of all domains."""
  size, columns = source.fields["inputs"].shape[:2]
  order = np.random.RandomState(1).permutation(size * columns)
  return sources.InMemory(
    {k: v.reshape(-1, *v.shape[2:])[order].reshape(v.shape) for k, v in source.fields.items()}
  )
