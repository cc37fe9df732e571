"""Documents of any length packed into rows of one length, for language modelling.

    rows = packing.pack(text.tokens("docstrings", "train"), 512)
    rows.fields["weights"].mean()             # the share of positions in use

Grain's packing transforms are iterators: which documents share a row depends on what came before,
so a row has no index and a position in the data no meaning for another number of processes. Here
rows are made at once and then read like any other source.
"""

import bisect
from collections.abc import Iterable

import numpy as np

from experiments.datasets import sources


def pack(documents: Iterable[np.ndarray], length: int, *, window: int = 256) -> sources.InMemory:
  """Best-fit packing of token sequences, in their order, into rows of `length` positions.

  A document of n tokens has n - 1 positions, each showing a token and asking for the next; those of
  long documents are cut into pieces of `length` and a rest. So every pair of neighbours is
  asked for exactly once, and no document for another's first token; documents of fewer than two
  tokens have nothing to ask for. A piece goes to the open row that it fills best, or opens one;
  of more than `window` open rows the fullest is closed.

  Args:
    documents: (n,) ints each, end tokens included if they are wanted.
    length: positions of a row.
    window: rows open at a time; more pack tighter and mix documents from farther apart.

  Returns:
    Examples of (length,) fields, zero where nothing is: "inputs" and "targets" int32, "segments"
    int32 (1, 2, .. for the pieces of the row from left to right), "positions" int32 (from 0 in each
    piece) and "weights" float32 (1 where a target counts).

  Raises:
    ValueError: `length` or `window` is below 1, or there is nothing to pack.
  """
  if min(length, window) < 1:
    raise ValueError(f"length={length}, window={window}; accepted: at least 1")
  rows: list[list[np.ndarray]] = []  # of each row, its pieces with the token that follows each
  open_rows: list[tuple[int, int]] = []  # room and index, the fullest first
  for document in documents:
    for start in range(0, len(document) - 1, length):
      piece = np.asarray(document[start : start + length + 1], np.int32)
      at = bisect.bisect_left(open_rows, (len(piece) - 1, 0))
      if at < len(open_rows):
        room, row = open_rows.pop(at)
      else:
        room, row = length, len(rows)
        rows.append([])
      rows[row].append(piece)
      if room := room - len(piece) + 1:
        bisect.insort(open_rows, (room, row))
      del open_rows[: len(open_rows) - window]
  if not rows:
    raise ValueError("packing: no document has two tokens")
  names = ("inputs", "targets", "segments", "positions")
  fields = {name: np.zeros((len(rows), length), np.int32) for name in names}
  for r, pieces in enumerate(rows):
    begin = 0
    for segment, piece in enumerate(pieces, 1):
      end = begin + len(piece) - 1
      span = (r, slice(begin, end))
      fields["inputs"][span], fields["targets"][span] = piece[:-1], piece[1:]
      fields["segments"][span], fields["positions"][span] = segment, np.arange(end - begin)
      begin = end
  return sources.InMemory(fields | {"weights": (fields["segments"] > 0).astype(np.float32)})
