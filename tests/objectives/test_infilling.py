"""Filling in the middle: every document by a plain arrangement, uniform cuts, characters."""

import collections
import functools

import jax
import numpy as np
import pytest

from experiments.datasets import tokenization
from objectives import infilling

END = 2
PRE, SUF, MID, EOT = MARKERS = range(10, 14)


def fim(tokens, draws, *, length, **fields):
  tokens = np.asarray(tokens, np.int32)
  one = functools.partial(
    infilling.fill_in_the_middle, tokens_T=tokens, length=length, markers=MARKERS
  )
  rows = jax.jit(jax.vmap(functools.partial(one, **fields)))(
    jax.random.split(jax.random.key(0), draws)
  )
  return jax.tree.map(np.asarray, rows)


def padded(tokens, length):
  return np.pad(np.array(tokens, np.int32)[:length], (0, max(length - len(tokens), 0)))


def arranged(document, piece, spm):
  """What a document becomes, from the pieces that its tokens are of."""
  prefix, middle, suffix = (
    [t for t, p in zip(document, piece, strict=True) if p == which]
    for which in (infilling.PREFIX, infilling.MIDDLE, infilling.SUFFIX)
  )
  if spm:
    return [PRE, SUF, *suffix, MID, *prefix, *middle, EOT]
  return [PRE, *prefix, SUF, *suffix, MID, *middle, EOT]


@pytest.mark.parametrize("spm", [0.0, 1.0])
@pytest.mark.parametrize(
  "tokens", [range(100, 140), [*range(100, 109), END, *range(200, 205), END, END, *range(300, 320)]]
)
def test_psm_and_spm_of_every_document(tokens, spm):
  """By a plain arrangement of each document; the cuts are those of rate 0 with the same key."""
  tokens, length = np.asarray(tokens, np.int32), len(tokens) + 12
  fields = {"length": length, "end": END, "spm_rate": spm}
  plain, pieces = fim(tokens, 60, rate=0.0, **fields)
  rows, moved_pieces = fim(tokens, 60, rate=1.0, **fields)
  np.testing.assert_array_equal(plain[:, : len(tokens)], np.tile(tokens, (60, 1)))
  for row, piece, moved_piece in zip(rows, pieces, moved_pieces, strict=True):
    expected, document, of = [], [], []
    for token, p in [*zip(tokens, piece[: len(tokens)], strict=True), (None, None)]:
      if token not in (END, None):
        document.append(token)
        of.append(p)
        continue
      expected += arranged(document, of, spm) if document else []
      expected += [] if token is None else [END]
      document, of = [], []
    np.testing.assert_array_equal(row, padded(expected, length))
    counted = np.bincount(moved_piece, minlength=6)
    np.testing.assert_array_equal(counted[2:], np.bincount(piece, minlength=6)[2:])
    assert counted[infilling.MARKER] == 4 * sum(t == EOT for t in expected)


def test_cuts_are_uniform_and_pieces_may_be_empty():
  _, pieces = fim(range(100, 106), 40_000, length=10, rate=0.0)
  sizes = np.stack([(pieces == p).sum(1) for p in (2, 3, 4)], axis=1)
  seen = collections.Counter(map(tuple, sizes.tolist()))
  assert len(seen) == 7 * 8 // 2
  # Two independent cuts of 0..6: equal ones once in 49, others twice.
  for (_, middle, _), n in seen.items():
    assert n / 40_000 == pytest.approx((1 if middle == 0 else 2) / 49, abs=0.005)


def test_rates_of_documents_and_forms():
  tokens = np.tile([*range(100, 105), END], 10)
  rows, _ = fim(tokens, 2_000, length=120, rate=0.9, spm_rate=0.3, end=END)
  assert (rows == PRE).sum() / 20_000 == pytest.approx(0.9, abs=0.01)
  spm = (rows[:, :-1] == PRE) & (rows[:, 1:] == SUF)
  # PSM with an empty prefix looks alike: a cut at 0 among 0..5, twice.
  alike = 1 - (5 / 6) ** 2
  assert spm.sum() / (rows == PRE).sum() == pytest.approx(0.3 + 0.7 * alike, abs=0.01)


def test_what_does_not_fit_is_dropped_and_padding_stays_padding():
  whole, pieces = fim(range(100, 120), 50, length=24, rate=1.0)
  short, short_pieces = fim(range(100, 120), 50, length=20, rate=1.0)
  np.testing.assert_array_equal(short, whole[:, :20])
  np.testing.assert_array_equal(short_pieces, pieces[:, :20])
  padded_tokens = [*range(100, 120), *[7] * 12]
  some, some_pieces = fim(padded_tokens, 50, length=40, rate=1.0, count=20)
  assert ((some_pieces > 0).sum(1) == 24).all() and not some[:, 24:].any()
  assert (np.sort(some[:, :24]) == np.sort([*MARKERS, *range(100, 120)])).all()


def test_the_document_level_moves_before_rows_are_cut():
  documents = [np.append(np.arange(100, 100 + n), END) for n in (30, 80, 1, 0)]
  stream = infilling.stream(documents, markers=MARKERS, end=END, rate=1.0, spm_rate=1.0).tolist()
  ends = [t for t in stream if t in (PRE, EOT, END)]
  assert ends == [PRE, EOT, END] * 3 + [END]
  for document in documents:
    at = stream.index(END)
    own, stream = stream[:at], stream[at + 1 :]
    assert sorted(own) == sorted([*(MARKERS if len(document) > 1 else ()), *document[:-1]])
    if len(document) > 1:
      assert own[:2] == [PRE, SUF] and own[-1] == EOT
  plain = infilling.stream(documents, markers=MARKERS, end=END, rate=0.0)
  np.testing.assert_array_equal(plain, np.concatenate(documents))


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_cuts_of_characters_encode_the_pieces_by_themselves(spm_rate, tmp_path):
  made = tokenization.train_bpe(
    ["the cat sat on the mat naïve café " * 20], 300, markers=infilling.MARKERS, data_dir=tmp_path
  )
  ids = infilling.ids(made.specials)
  (pre, suf, mid, eot), end = ids.values()
  documents = ["the cat sat on the mat", "naïve café the cat"]
  tokens = np.concatenate([np.append(made.encode(d), end) for d in documents])
  straddled = 0
  for extra in range(20):  # another context, other draws
    longer = np.append(tokens, made.encode("the" * extra))
    row = infilling.by_characters(
      longer, made.encode, made.decode, length=200, rate=1.0, spm_rate=spm_rate, **ids
    )
    first = row[: row.tolist().index(end)].tolist()
    assert first[0] == pre and first[-1] == eot
    if spm_rate:
      suffix, rest = first[2 : first.index(mid)], first[first.index(mid) + 1 : -1]
      # Prefix and middle run on, each encoded by itself.
      assert first[1] == suf and made.decode(rest) + made.decode(suffix) == documents[0]
      straddled += rest != made.encode(made.decode(rest)).tolist()
    else:
      a, b = first.index(suf), first.index(mid)
      prefix, suffix, middle = first[1:a], first[a + 1 : b], first[b + 1 : -1]
      assert made.decode(prefix) + made.decode(middle) + made.decode(suffix) == documents[0]
      for piece in (prefix, suffix, middle):
        np.testing.assert_array_equal(made.encode(made.decode(piece)), piece)
      joined = prefix + middle + suffix
      straddled += joined != made.encode(documents[0]).tolist()
    assert row.tolist().count(end) == 2 and not row[np.flatnonzero(row)[-1] + 1 :].any()
  assert straddled > 0, "cuts fall inside what would be one token"


def test_fragments_of_characters_at_the_edges_are_left_out():
  made = tokenization.bytes_tokenizer(markers=infilling.MARKERS)
  fields = infilling.ids(made.specials) | {"length": 20, "rate": 0.0}
  row = infilling.by_characters(made.encode("é = 1")[1:], made.encode, made.decode, **fields)
  assert made.decode(row) == " = 1"
