"""Tokenizers: round trips, special tokens, and that training depends on the texts alone."""

import json
import pickle

import numpy as np
import pytest
import tokenizers

from experiments.datasets import tokenization

TEXTS = [
  "the cat sat on the mat, the cat ran",
  "naïve café: 中文 🙂\n\tend",
  "the rain in Spain " * 20,
]
AWKWARD = [*TEXTS, "", " ", "\0", "a <eos> b<extra_0>", "\r\n  x", "e\u0301"]


def bpe(folder, **kwargs):
  return tokenization.train_bpe(TEXTS, kwargs.pop("vocab_size", 300), data_dir=folder, **kwargs)


@pytest.fixture(scope="module", params=["bytes", "bpe", "file"])
def tokenizer(request, tmp_path_factory):
  if request.param == "bytes":
    return tokenization.bytes_tokenizer(sentinels=10)
  folder = tmp_path_factory.mktemp("tokenizers")
  made = bpe(folder, sentinels=10, vocab_size=320)
  if request.param == "file":
    (path,) = (folder / "tokenizers").iterdir()
    return tokenization.from_file(path)
  return made


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text
  np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
  assert not set(ids.tolist()) & set(tokenizer.specials.values()), "texts hold no special token"
  assert ids.max(initial=0) < tokenizer.vocab_size


def test_special_tokens_are_not_decoded(tokenizer):
  ids = tokenizer.encode("ab")
  eos = tokenizer.specials["<eos>"]
  assert tokenizer.decode([eos, *ids, eos, 0]) == "ab"


def test_it_can_be_sent_to_a_worker(tokenizer):
  other = pickle.loads(pickle.dumps(tokenizer))
  np.testing.assert_array_equal(other.encode(AWKWARD[6]), tokenizer.encode(AWKWARD[6]))


def test_bytes():
  tokenizer = tokenization.bytes_tokenizer()
  assert tokenizer.vocab_size == 261
  assert list(tokenizer.specials.items()) == [
    *(("<pad>", 0), ("<bos>", 1), ("<eos>", 2), ("<mask>", 3), ("<sep>", 4))
  ]
  assert tokenizer.encode("aé").tolist() == [5 + 97, 5 + 0xC3, 5 + 0xA9]
  assert tokenizer.encode(bytes(range(256))).tolist() == list(range(5, 261))
  assert tokenizer.decode([5 + 0xC3]) == "\ufffd"


@pytest.mark.parametrize("make", [tokenization.bytes_tokenizer, None])
def test_sentinels_come_last_and_change_nothing_else(make, tmp_path):
  plain, more = (
    make(sentinels=n) if make else bpe(tmp_path, vocab_size=300 + n, sentinels=n) for n in (0, 7)
  )
  assert more.vocab_size == plain.vocab_size + 7
  assert more.specials == plain.specials | {f"<extra_{i}>": plain.vocab_size + i for i in range(7)}
  for text in AWKWARD:
    np.testing.assert_array_equal(plain.encode(text), more.encode(text))


def test_bpe_is_trained_once_and_always_the_same(tmp_path, monkeypatch):
  one, two = (bpe(tmp_path / folder) for folder in "ab")
  files = [list((tmp_path / folder / "tokenizers").iterdir()) for folder in "ab"]
  assert [len(f) for f in files] == [1, 1] and files[0][0].name == files[1][0].name
  assert files[0][0].read_text() == files[1][0].read_text()
  monkeypatch.setattr(tokenizers.Tokenizer, "train_from_iterator", None)  # from the file now
  again = bpe(tmp_path / "a")
  for text in AWKWARD:
    assert one.encode(text).tolist() == two.encode(text).tolist() == again.encode(text).tolist()


def test_bpe_merges_what_is_frequent(tmp_path):
  tokenizer = bpe(tmp_path)
  assert 261 < tokenizer.vocab_size <= 300
  assert len(tokenizer.encode("the rain in Spain ")) < 8
  with pytest.raises(ValueError, match="vocab_size=264; accepted: at least 265, 4 sentinels"):
    bpe(tmp_path, vocab_size=264, sentinels=4)


def test_another_text_is_another_file(tmp_path):
  tokenization.train_bpe(["ab", "c"], 262, data_dir=tmp_path)
  tokenization.train_bpe(["a", "bc"], 262, data_dir=tmp_path)
  tokenization.train_bpe(["a", "bc"], 263, data_dir=tmp_path)
  assert len(list((tmp_path / "tokenizers").iterdir())) == 3


def test_a_pretrained_file_keeps_its_names_and_loses_its_truncation(tmp_path):
  words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5}
  model = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
  model.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
  model.enable_truncation(3)
  model.enable_padding(length=8)
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = tokenization.from_file(tmp_path / "tokenizer.json")
  assert tokenizer.specials == {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
  assert tokenizer.encode("a b a b b").tolist() == [4, 5, 4, 5, 5]
  assert tokenizer.vocab_size == 6


def test_not_a_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError):
    tokenization.from_file(tmp_path / "none.json")
  (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
  with pytest.raises(ValueError, match=r"other.json is no tokenizer\.json"):
    tokenization.from_file(tmp_path / "other.json")
