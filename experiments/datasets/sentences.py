"""Sentences of packaged text: of Python's reference, of Django's catalogues, of docstrings.

    sentences.reference()                      # English prose about a programming language
    sentences.catalogue("fi")                  # Django's messages in Finnish; "en": the originals
    sentences.summaries("science")             # {file: first sentences of its docstrings}

and what WordPiece models need of them: `rows`.
"""

import functools
import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.datasets import sources, stable, text, tokenization

PLAIN = re.compile(r"[A-Z][a-zA-Z ,;'()-]+\.")  # prose without code or markup
FIELD = re.compile(r'(msgid|msgstr)(?:\[0\])? "(.*)"')


@functools.cache
def reference() -> tuple[str, ...]:
  """Plain sentences of `pydoc_data.topics`, 8 to 20 words, each once."""
  found = []
  for split in text.SPLITS:
    documents = sources.load("text/reference", split, in_memory=True)
    for i in range(len(documents)):
      for paragraph in re.split(r"\n\s*\n", documents[i]["text"].decode()):
        found += re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
  return tuple(dict.fromkeys(s for s in found if PLAIN.fullmatch(s) and 8 <= len(s.split()) <= 20))


@functools.cache
def catalogue(language: str) -> tuple[str, ...]:
  """Messages of Django in a language ("fi", "cs", ...), or the English originals ("en"), each once.

  Markup is removed; a placeholder such as %(limit)s becomes the number 3.

  Raises: FileNotFoundError where Django, or the language in it, is not installed.
  """
  folder = "fi" if language == "en" else language  # all have the same originals
  stable.packaged("django", f"/locale/{folder}/LC_MESSAGES/django.po")
  paths = sorted(
    Path(str(f.locate()))
    for f in importlib.metadata.files("django") or ()
    if str(f).endswith("/django.po") and f"/locale/{folder}/" in str(f)
  )
  wanted = "msgid" if language == "en" else "msgstr"
  messages = []
  for path in paths:
    for entry in re.split(r"\n\s*\n", path.read_text("utf-8")):
      joined = re.sub(r'"\s*\n"', "", re.sub(r"(?m)^#.*\n", "", entry))
      if 'msgid ""\n' in joined:
        continue  # the header
      for kind, message in FIELD.findall(joined):
        plain = re.sub(r"<[^>]*>|&\w+;", "", message.replace("\\n", " ").replace('\\"', '"'))
        plain = " ".join(re.sub(r"%\(\w+\)[sd]", "3", plain).split())
        if kind == wanted and plain and not re.search(r"[%{}]", plain):
          messages.append(plain)
  return tuple(dict.fromkeys(messages))


@functools.cache
def summaries(domain: str) -> dict[str, tuple[tuple[str, str], ...]]:
  """First sentences of the docstrings of a domain of `text`, each once in all.

  Returns: by file, pairs of what is documented (such as ".Model.fit") and the sentence.
  """
  found: dict[str, dict[str, str]] = {}
  seen: set[str] = set()
  for split in text.SPLITS:
    documents = sources.load(f"text/{domain}", split, in_memory=True)
    for i in range(len(documents)):
      name, body = (documents[i][key].decode() for key in ("name", "text"))
      paragraph = " ".join(body.split("\n\n")[0].split())
      sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
      if sentence.lower() not in seen:
        seen.add(sentence.lower())
        file, _, path = name.partition(":")
        found.setdefault(file, {})[path] = sentence
  return {file: tuple(found[file].items()) for file in sorted(found)}


def frequent(texts: Sequence[str], count: int) -> frozenset[str]:
  """The most frequent words, in lower case; of equals, those first in the alphabet."""
  words = Counter(word for t in texts for word in re.findall(r"[^\W\d_]+", t.lower()))
  return frozenset(sorted(words, key=lambda word: (-words[word], word))[:count])


def rows(
  tokenizer: tokenization.Tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """[CLS], the pieces, [SEP] of each text: (N, L) int32, filled up with 0, and lengths (N,) int32.

  What is longer than `length` loses its last pieces, never [SEP].
  """
  start, end = (tokenizer.specials[name] for name in ("[CLS]", "[SEP]"))
  tokens = [[start, *tokenizer.encode(t)[: length - 2], end] for t in texts]
  lengths = np.array([len(t) for t in tokens], np.int32)
  padded = [t + [0] * (length - len(t)) for t in tokens]
  return np.array(padded, np.int32).reshape(-1, length), lengths
