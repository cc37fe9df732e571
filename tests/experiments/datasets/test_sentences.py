"""Sentences: what is read, what is left out, and WordPiece rows."""

import re

import numpy as np
import pytest

from experiments.datasets import sentences, tokenization


def test_sentences_of_the_reference():
  found = sentences.reference()
  assert len(found) > 300 and len(set(found)) == len(found)
  assert all(8 <= len(s.split()) <= 20 and s.endswith(".") for s in found)
  assert not any(re.search(r'[`_"<>=]', s) for s in found)


@pytest.fixture
def django(tmp_path, monkeypatch):
  """A distribution with one catalogue."""
  folder = tmp_path / "django" / "conf" / "locale" / "fi" / "LC_MESSAGES"
  folder.mkdir(parents=True)
  (folder / "django.po").write_text(
    'msgid ""\nmsgstr ""\n"Language: fi\\n"\n\n'
    '#, python-format\nmsgid "Enter %(max)d\\n<b>values</b>."\nmsgstr "Anna %(max)d arvoa."\n\n'
    'msgid ""\n"One long "\n"line."\nmsgstr ""\n"Yksi pitkä "\n"rivi."\n\n'
    'msgid "one %s"\nmsgid_plural "many %s"\nmsgstr[0] "yksi"\nmsgstr[1] "monta"\n\n'
    '#~ msgid "old"\n#~ msgstr "vanha"\n'
  )
  paths = [p for p in tmp_path.rglob("*.po")]

  class File(str):
    def locate(self):
      return paths[0]

  files = [File(p.relative_to(tmp_path).as_posix()) for p in paths]
  monkeypatch.setattr(sentences.importlib.metadata, "files", lambda name: files)
  sentences.catalogue.cache_clear()
  yield
  sentences.catalogue.cache_clear()


def test_messages_of_a_catalogue(django):
  assert sentences.catalogue("fi") == ("Anna 3 arvoa.", "Yksi pitkä rivi.", "yksi")
  assert sentences.catalogue("en") == ("Enter 3 values.", "One long line.")
  with pytest.raises(FileNotFoundError, match="django"):
    sentences.catalogue("xx")


def test_summaries_are_first_sentences_each_once():
  found = sentences.summaries("docstrings")
  flat = [sentence for file in found.values() for _, sentence in file]
  assert len(flat) > 2000
  assert len({s.lower() for s in flat}) == len(flat)
  assert list(found) == sorted(found)


def test_frequent_words():
  assert sentences.frequent(["The cat, the dog.", "a dog 3 3 3"], 2) == {"the", "dog"}
  assert sentences.frequent(["b a"], 1) == {"a"}


def test_rows_keep_the_end():
  tokenizer = tokenization.Tokenizer(
    9, {"[CLS]": 7, "[SEP]": 8}, lambda t: np.arange(1, len(t) + 1, dtype=np.int32), str
  )
  tokens, lengths = sentences.rows(tokenizer, ["ab", "abcdef", ""], 5)
  np.testing.assert_array_equal(tokens, [[7, 1, 2, 8, 0], [7, 1, 2, 3, 8], [7, 8, 0, 0, 0]])
  assert lengths.tolist() == [4, 5, 2] and tokens.dtype == lengths.dtype == np.int32
