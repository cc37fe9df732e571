"""Text for language models: one tokenizer and one way to rows, over any domains of `text`.

tokenizer = corpora.tokenizer("bpe", "library", 1024, markers=("<pre>", "<eot>"))
train = corpora.rows(("reference", "library"), "train", 256, tokenizer)
held_out = corpora.rows(("reference", "library"), "test", 256, tokenizer, count=128)
"""

import functools
from collections.abc import Sequence

import numpy as np

from experiments.datasets import sources, text, tokenization


@functools.cache
def tokenizer(
  kind: str = "bytes",
  domain: str = "",
  vocab: int = 0,
  *,
  sentinels: int = 0,
  markers: tuple[str, ...] = (),
) -> tokenization.Tokenizer:
  """Bytes, or byte-level BPE of `vocab` ids trained on the training documents of a domain.

  Args:
    kind: "bytes", for which `domain` and `vocab` are not looked at, or "bpe".
    domain: of `text`.
    vocab: ids in all, markers and sentinels among them.
    sentinels, markers: special tokens, see `tokenization`.

  Raises:
    DatasetNotFound: no package has the domain.
    ValueError: another kind, or too small a vocabulary.
  """
  if kind == "bytes":
    return tokenization.bytes_tokenizer(sentinels, markers)
  if kind != "bpe":
    raise ValueError(f"tokenizer={kind!r}; accepted: bytes, bpe")
  _check(domain)
  source = sources.load(f"text/{domain}", "train", in_memory=True)
  texts = (source[i]["text"] for i in range(len(source)))
  return tokenization.train_bpe(texts, vocab, sentinels=sentinels, markers=markers)


def rows(
  domains: Sequence[str],
  split: str,
  length: int,
  tokenizer: tokenization.Tokenizer | None = None,
  count: int | None = None,
) -> sources.InMemory:
  """The windows of several domains, one domain after the other, `{"inputs": (length,) int32}`.

  Args:
    domains: of `text`.
    split: as in `sources.load`.
    length: tokens of a row; rows do not overlap.
    tokenizer: bytes by default.
    count: so many rows from all over in place of all of them: the first, the last and what is
      evenly between. There are fewer where the split has fewer.

  Raises:
    DatasetNotFound: no package has a domain.
    ValueError: as `text.windows`.
  """
  for domain in domains:
    _check(domain)
  parts = [text.windows(domain, split, length, tokenizer).fields["inputs"] for domain in domains]
  found = np.concatenate(parts) if len(parts) > 1 else parts[0]
  if count is not None:
    found = found[np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]
  return sources.InMemory({"inputs": found})


def _check(domain: str) -> None:
  if domain not in text.DOMAINS:
    accepted = ", ".join(text.DOMAINS)
    raise sources.DatasetNotFound(f"data={domain!r}: in no package; accepted: {accepted}")
