"""Filling in the middle (FIM): a document's middle moved to its end, by tokens or by characters.

Bavarian et al., arXiv:2207.14255, section 3. A document is cut at two places and becomes

    PSM  <pre> prefix <suf> suffix <mid> middle <eot>
    SPM  <pre> <suf> suffix <mid> prefix middle <eot>     with probability `spm_rate` of these

`fill_in_the_middle` does so to one row of tokens on the device, with fresh draws at every step:

    fim = functools.partial(fill_in_the_middle, length=256, **ids(tokenizer.specials))
    rows_BL, pieces_BL = jax.vmap(fim)(jax.random.split(key, B), tokens_BT)

`stream` does it to whole documents before they are packed (the document level), and `by_characters`
on the host where tokens have several characters. Padding is 0.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PADDING, MARKER, PREFIX, MIDDLE, SUFFIX, END = range(6)  # pieces of a row
MARKERS = ("<pre>", "<suf>", "<mid>", "<eot>")


def ids(specials: Mapping[str, int], end: str = "<eos>") -> dict[str, Any]:
  """`markers` and `end` of the functions here, from a tokenizer's special tokens by name."""
  return {"markers": [specials[name] for name in MARKERS], "end": specials[end]}


def fill_in_the_middle(
  key: jax.Array,
  tokens_T: jax.Array,
  *,
  length: int,
  markers: Sequence[int],
  rate: float | jax.Array = 0.5,
  spm_rate: float | jax.Array = 0.5,
  end: int | None = None,
  count: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Moves the middle of each document, with probability `rate`, behind its prefix and suffix.

  It is cut at two places, each of 0..n alike.

  Args:
    key: draws the documents, their forms and cuts: the cuts are the same at every rate.
    tokens_T: (T,) int. At the context level a packed row, documents in it cut at `end`; at the
      document level a whole document, to be packed afterwards.
    length: of the results; T + 4 holds one document with its markers. What is beyond is dropped.
    markers: ids of MARKERS.
    rate, spm_rate: probabilities, which may be traced.
    end: id that ends a document in the row, and stays behind it; None for one document.
    count: true number of tokens; T by default.

  Returns: the row (length,) int32 and the piece (length,) int32 that each of its tokens is of, also
    of documents left in order: PADDING, MARKER, PREFIX, MIDDLE, SUFFIX or END.
  """
  size = tokens_T.shape[0]
  index = jnp.arange(size)
  valid_T = index < (size if count is None else count)
  end_T = valid_T & (tokens_T == end) if end is not None else jnp.zeros(size, bool)
  document_T = jnp.cumsum(end_T) - end_T  # an end belongs to what it ends
  zeros_D = jnp.zeros(size, jnp.int32)
  whole_D = zeros_D.at[document_T].add(valid_T)
  n_D = zeros_D.at[document_T].add(valid_T & ~end_T)

  move_key, form_key, cut_key = jax.random.split(key, 3)
  moved_D = (jax.random.uniform(move_key, (size,)) < rate) & (n_D > 0)
  spm_D = jax.random.uniform(form_key, (size,)) < spm_rate
  cuts = jnp.floor(jax.random.uniform(cut_key, (2, size)) * (n_D + 1)).astype(jnp.int32)
  a_D, b_D = jnp.sort(jnp.minimum(cuts, n_D), axis=0)
  first_D = jnp.cumsum(whole_D) - whole_D  # of the document in `tokens_T`, and in the result:
  begin_D = first_D + 4 * (jnp.cumsum(moved_D) - moved_D)

  i_T, a_T, b_T, n_T, spm_T = (
    x[document_T] if x is not None else index - first_D[document_T]
    for x in (None, a_D, b_D, n_D, spm_D)
  )
  piece_T = jnp.where(i_T < a_T, PREFIX, jnp.where(i_T < b_T, MIDDLE, SUFFIX))
  piece_T = jnp.where(end_T, END, piece_T)
  behind_T = jnp.where(spm_T, 3 + n_T - b_T + i_T, 1 + i_T)  # prefix
  behind_T = jnp.where(piece_T == MIDDLE, 3 + n_T - b_T + i_T, behind_T)
  behind_T = jnp.where(piece_T == SUFFIX, jnp.where(spm_T, 2, 2 + a_T) + i_T - b_T, behind_T)
  behind_T = jnp.where(piece_T == END, 4 + n_T, behind_T)
  at_T = begin_D[document_T] + jnp.where(moved_D[document_T], behind_T, i_T)

  suffix_D = jnp.where(spm_D, 1, 1 + a_D)
  middle_D = jnp.where(spm_D, 2, 2 + a_D) + n_D - b_D
  markers_at = begin_D + jnp.stack([zeros_D, suffix_D, middle_D, 3 + n_D])
  at = jnp.concatenate([
    jnp.where(valid_T, at_T, length), jnp.where(moved_D, markers_at, length).reshape(-1)
  ])  # fmt: skip
  values = jnp.concatenate([tokens_T, jnp.repeat(jnp.asarray(markers, tokens_T.dtype), size)])
  pieces = jnp.concatenate([piece_T, jnp.full(4 * size, MARKER)])
  row, piece = (
    jnp.zeros(length, jnp.int32).at[at].set(x.astype(jnp.int32), mode="drop")
    for x in (values, pieces)
  )
  return row, piece


def stream(
  documents: Iterable[np.ndarray],
  *,
  markers: Sequence[int],
  end: int,
  rate: float = 0.5,
  spm_rate: float = 0.5,
  seed: int = 0,
) -> np.ndarray:
  """Documents with their middles moved, one after the other: (N,) int32, to be cut into rows.

  The document level of the paper: a document's pieces may come to lie in different rows.

  Args:
    documents: (n,) int each, the last token of each `end`, which stays behind it.
    markers, end, rate, spm_rate: as of `fill_in_the_middle`.
    seed: of the draws; a document's are its own, by its place.
  """

  @functools.partial(jax.jit, static_argnames="size")
  def move(key: jax.Array, tokens_T: jax.Array, count: int, size: int) -> jax.Array:
    fields: dict[str, Any] = {"length": size + 4, "rate": rate, "spm_rate": spm_rate}
    return fill_in_the_middle(key, tokens_T, count=count, markers=markers, **fields)[0]

  parts: list[Any] = []
  for index, document in enumerate(documents):
    count = len(document) - 1
    size = 1 << count.bit_length()  # a dozen shapes to compile
    key = jax.random.fold_in(jax.random.key(seed), index)
    row = move(key, np.pad(document[:-1], (0, size - count)), count, size)
    parts += [np.trim_zeros(np.asarray(row), "b"), [end]]
  return np.concatenate(parts).astype(np.int32)


def by_characters(
  tokens_T: np.ndarray,
  encode: Callable[[str], np.ndarray],
  decode: Callable[[np.ndarray], str],
  *,
  length: int,
  markers: Sequence[int],
  end: int,
  rate: float = 0.5,
  spm_rate: float = 0.5,
) -> np.ndarray:
  """`fill_in_the_middle` of a packed row, on the host, cut between characters: (length,) int32.

  Each document is decoded, and its pieces are encoded one by one: no token straddles a cut, and
  none tells where one was. Fragments of characters at the ends of the row are left out. A row's
  draws are its own, the same whenever it is read.

  Args:
    tokens_T: (T,) int, documents cut at `end`.
    encode, decode: a tokenizer's, without special tokens; malformed characters become U+FFFD.
    length, markers, end, rate, spm_rate: as of `fill_in_the_middle`.
  """
  pre, suf, mid, eot = markers
  random = np.random.default_rng(np.asarray(tokens_T, np.uint32))
  row: list[int] = []
  for document in np.split(tokens_T, np.flatnonzero(tokens_T == end) + 1):
    string = decode(document).strip("\ufffd")
    (move, form), cuts = random.random(2), np.sort(random.integers(0, len(string) + 1, 2))
    pieces = (string[i:j] for i, j in itertools.pairwise([0, *cuts, len(string)]))
    if string and move < rate:
      prefix, middle, suffix = map(encode, pieces)
      if form < spm_rate:
        row += [pre, suf, *suffix, mid, *prefix, *middle, eot]
      else:
        row += [pre, *prefix, suf, *suffix, mid, *middle, eot]
    else:
      row += encode(string).tolist()
    row += [end] * int(end in document)
  return np.pad(np.array(row[:length], np.int32), (0, max(length - len(row), 0)))
