"""Corpora: rows of several domains, evenly chosen ones of what is held out, tokenizers by name."""

import numpy as np
import pytest

from experiments.datasets import corpora, sources, text


def test_rows_are_the_windows_of_each_domain_in_turn():
  domains = ("reference", "docstrings")
  found = corpora.rows(domains, "test", 64).fields["inputs"]
  parts = [text.windows(domain, "test", 64).fields["inputs"] for domain in domains]
  np.testing.assert_array_equal(found, np.concatenate(parts))
  some = corpora.rows(domains, "test", 64, count=5).fields["inputs"]
  places = np.linspace(0, len(found) - 1, 5).astype(int)
  np.testing.assert_array_equal(some, found[places])
  assert len(corpora.rows(("reference",), "test", 64, count=10**9)) == len(parts[0])


def test_tokenizers_by_name():
  marked = corpora.tokenizer(markers=("<pre>",), sentinels=2)
  assert marked is corpora.tokenizer(markers=("<pre>",), sentinels=2)
  assert marked.vocab_size == 264 and marked.specials["<pre>"] == 261
  bpe = corpora.tokenizer("bpe", "reference", 300, markers=("<pre>",))
  assert bpe.vocab_size == 300 and bpe.specials["<pre>"] == 299
  rows = corpora.rows(("reference",), "test", 32, bpe).fields["inputs"]
  assert rows.max() < 300 and len(rows) < len(corpora.rows(("reference",), "test", 32))


def test_mistakes():
  with pytest.raises(ValueError, match="tokenizer='words'; accepted: bytes, bpe"):
    corpora.tokenizer("words")
  for call in (
    lambda: corpora.tokenizer("bpe", "c4", 300),
    lambda: corpora.rows(("reference", "c4"), "test", 32),
  ):
    with pytest.raises(sources.DatasetNotFound, match="data='c4': in no package; accepted: ref"):
      call()
