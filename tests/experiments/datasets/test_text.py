"""Text domains: what is kept, where it goes, and windows over it."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from experiments.datasets import npm, prepare, sources, text, tokenization


@pytest.fixture(scope="module")
def reference(data_dir):
  return {s: sources.load("text/reference", s, data_dir=data_dir) for s in text.SPLITS}


def rows(source):
  return [(source[i]["name"].decode(), source[i]["text"].decode()) for i in range(len(source))]


def test_the_reference_is_pydoc_s(reference):
  from pydoc_data.topics import topics

  found = {name: content for source in reference.values() for name, content in rows(source)}
  assert found.items() <= topics.items()
  assert sum(map(len, found.values())) > 0.6 * sum(map(len, topics.values()))
  assert all(example["domain"] == 0 for example in (s[0] for s in reference.values()))


def runs(content, n=8):
  words = content.lower().split()
  return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_splits_share_no_text(reference):
  """Topics contain one another: by names alone, half of the test split would be known."""
  splits = {split: rows(source) for split, source in reference.items()}
  names = [name for split in splits.values() for name, _ in split]
  assert len(names) == len(set(names))
  known = set().union(*(runs(content) for _, content in splits["train"]))
  for split in ("validation", "test"):
    asked = set().union(*(runs(content) for _, content in splits[split]))
    assert len(asked & known) < 0.02 * len(asked)


def test_splits_have_their_shares(reference):
  sizes = {s: sum(len(content) for _, content in rows(source)) for s, source in reference.items()}
  whole = sum(sizes.values())
  for split in ("validation", "test"):
    assert 0.08 < sizes[split] / whole < 0.105


PROSE = [
  " ".join(np.random.default_rng(i).permutation([f"{i}word{j}" for j in range(40)]))
  for i in range(60)
]


def test_copies_are_left_out():
  a, b, c = PROSE[:3]
  documents = [
    ("part", a[:200]),
    ("a", a),
    ("again", "Copyright 1999 Somebody Else\n" + a.upper().replace(" ", ",\n") + "!"),
    ("short", "word"),
    ("b", b),
    ("both", b[:100] + c),
  ]
  assert [name for name, _ in text._distinct(documents)] == ["again", "b", "both"]
  assert [name for name, _ in text._distinct(documents[::-1])] == ["both", "b", "again"]


def test_a_file_is_not_divided():
  documents = [(f"file{i // 3}:{i}", content) for i, content in enumerate(PROSE)]
  splits = text._split(documents)
  assert sum(map(len, splits.values())) == 60
  where = {s: {name.split(":")[0] for name, _ in found} for s, found in splits.items()}
  assert sum(map(len, where.values())) == 20
  assert {s: len(found) for s, found in splits.items()} == {"train": 48, "validation": 6, "test": 6}
  shuffled = [documents[i] for i in np.random.default_rng(0).permutation(60)]
  again = text._split(shuffled)
  assert {s: Counter(found) for s, found in again.items()} == {
    s: Counter(found) for s, found in splits.items()
  }, "the order in which files are found does not matter"


def test_a_document_beyond_a_tenth_is_trained_on():
  splits = text._split([("long", "x" * 900), *((f"s{i}", "y" * 10) for i in range(10))])
  assert ("long", "x" * 900) in splits["train"]


def test_docstrings_without_importing():
  code = b'''"""Of the module."""
raise SystemExit("imported")
class A:
  """Of A."""
  if True:
    async def f(self):
      """
      Of f.
        Indented.
      """
      g = lambda: 1
  def none(self): return "not one"
try:
  pass
except OSError:
  def handler():
    "Of the handler."
'''
  assert list(text._docstrings("m.py", code)) == [
    ("m.py:", "Of the module."),
    ("m.py:.A", "Of A."),
    ("m.py:.A.f", "Of f.\n  Indented."),
    ("m.py:.handler", "Of the handler."),
  ]
  assert list(text._docstrings("m.py", b"print 'of another Python'")) == []


def test_mail_without_headers():
  message = b"""From a@b Thu Aug 22 12:36:23 2002
Subject: tells the label
Content-Type: multipart/mixed; boundary="cut"

preamble
--cut
Content-Type: text/plain; charset=us-ascii
Content-Transfer-Encoding: quoted-printable

one=20=3D two
--cut
Content-Type: image/png
Content-Transfer-Encoding: base64

AAAA
--cut
Content-Type: text/html

<p>three</p>
--cut--
"""
  ((name, content),) = text._mail("data/spam-1/0001.txt", message)
  assert name == "spam-1/0001.txt"
  assert content.split() == ["one", "=", "two", "<p>three</p>"]
  assert list(text._mail("data/spam-1/0001.json", b"{}")) == []


def pack(package, data_dir, files):
  """An archive like that of an npm package."""
  path = package.archive(data_dir)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w:gz") as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))


def test_domains_of_npm_packages(tmp_path):
  """From archives as the packages have them, through the command, without unpacking."""
  contents = {
    "novel": {f"data/chapter_{i}.txt": c.encode() for i, c in enumerate(PROSE[:40])}
    | {"data/data.txt": " ".join(PROSE[:40]).encode(), "data/contents.txt": b"chapter " * 20},
    "mail": {
      f"data/{('easy-ham-1', 'spam-2')[i % 2]}/{i}.txt": b"Subject: s\n\n" + c.encode()
      for i, c in enumerate(PROSE[:40])
    },
    "spdx": {
      f"licenses/L-{i}.json": json.dumps({"licenseText": c}).encode() for i, c in enumerate(PROSE)
    }
    | {"package.json": b"{}"},
  }
  for domain, files in contents.items():
    pack(text.DOMAINS[domain].files, tmp_path, files)
    prepare.prepare(f"text/{domain}", str(tmp_path))
    splits = [sources.load(f"text/{domain}", s, data_dir=tmp_path) for s in text.SPLITS]
    found = [row for source in splits for row in rows(source)]
    assert sorted(content for _, content in found) == sorted(PROSE[: len(found)])
    assert len(found) == (60 if domain == "spdx" else 40)
    assert {s[0]["domain"] for s in splits} == {list(text.DOMAINS).index(domain)}
    text.DOMAINS[domain].files.archive(tmp_path).unlink()  # no longer needed
    assert len(sources.load(f"text/{domain}", "test", data_dir=tmp_path)) == len(splits[2])
    if domain == "mail":
      for name, label, group in zip(
        *(splits[0].fields[key] for key in ("name", "label", "group")), strict=True
      ):
        assert label == int(name.split(b".")[0].split(b"/")[1]) % 2 == group.startswith(b"spam")


def test_another_content_is_another_folder(tmp_path, monkeypatch):
  """Files by name and content decide, wherever they lie."""

  def folder(place, **files):
    for name, content in files.items():
      (tmp_path / place).mkdir(exist_ok=True)
      (tmp_path / place / name).write_text(content)
    paths = {name: tmp_path / place / name for name in files}
    domain = text.Domain(lambda: paths, text._whole, lambda: ("numpy",))
    monkeypatch.setitem(text.DOMAINS, "reference", domain)
    text._fingerprint.cache_clear()
    return text.config("reference")

  one, same, content, name = (
    folder(*arguments[:1], **arguments[1])
    for arguments in (
      ("a", {"x": "1", "y": "2"}),
      ("b", {"y": "2", "x": "1"}),
      ("c", {"x": "12", "y": ""}),
      ("d", {"x": "1", "z": "2"}),
    )
  )
  assert one.name == same.name and len({one.name, content.name, name.name}) == 3
  assert f"numpy {np.__version__}" in one.description and "Python 3." in one.description
  monkeypatch.undo()
  text._fingerprint.cache_clear()


def test_a_gloss_follows_its_words():
  dictionary = (
    "  1 This software and database is being provided\n"
    "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  \n"
    "00002684 03 n 02 object 0 physical_object 0 039 @ 00001930 n 0000 | a tangible entity\n"
    "00015388 05 n 01 animal 0 001 @ 00004475 n 0000 | a living organism\n"
  )
  assert list(text._glosses("dict/data.noun", dictionary.encode())) == [
    (
      "noun-03",
      "entity: that which is perceived\nobject, physical object: a tangible entity",
    ),
    ("noun-05", "animal: a living organism"),
  ]
  assert not list(text._glosses("dict/index.noun", dictionary.encode()))


def test_exchanges_of_a_topic_are_one_document():
  topic = b"categories:\n- food\nconversations:\n- - Do you eat?\n  - I do not.\n- - Why?\n  - 42\n"
  assert list(text._dialogue("data/english/food.yml", topic)) == [
    ("food", "Do you eat?\nI do not.\n\nWhy?\n42")
  ]


def test_chapters_begin_with_verse_one():
  module = (
    b"from x import y\nbible = Bible(V.K, '\\n1. In the. 2. And.\\n1. Thus 11. Of.', {1: (2, 3)})\n"
  )
  documents = [text for _, text in text._bible("plain_text_bible.py", module)]
  assert documents == ["1. In the. 2. And.", "1. Thus 11. Of."]


@pytest.mark.parametrize(
  "domain", [d for d in text.DOMAINS if not isinstance(text.DOMAINS[d].files, npm.Package)]
)
def test_local_domains_have_files(domain):
  made = text.DOMAINS[domain]
  try:
    files = made.files()
  except FileNotFoundError as error:
    assert domain in ("dialogue", "bible")  # all others come with the installation
    pytest.skip(str(error))
  assert files and all(path.is_file() for path in files.values())
  assert not [name for name in files if "/tests/" in name or "site-packages" in name]
  name = next(
    name for name in sorted(files) if list(made.documents(name, files[name].read_bytes()))
  )
  assert all(found for _, found in made.documents(name, files[name].read_bytes()))


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
  for files, match in (
    (
      lambda: text._installed(["not-there"], ""),
      "text/c: not installed; run: pip install --no-deps not-there",
    ),
    (dict, "text/c: this installation has none of its files"),
  ):
    monkeypatch.setitem(text.DOMAINS, "c", text.Domain(files, text._whole))
    text._fingerprint.cache_clear()
    with pytest.raises(sources.DatasetNotFound, match=match):
      sources.load("text/c", "train", data_dir=tmp_path)


def test_windows_are_the_documents_end_to_end(data_dir, reference):
  windows = text.windows("reference", "test", 100, data_dir=data_dir)
  byte = tokenization.bytes_tokenizer()
  whole = [i for _, c in rows(reference["test"]) for i in (*byte.encode(c), 2)]
  stream = windows.fields["inputs"].ravel().tolist()
  assert stream == whole[: len(stream)] and len(whole) - len(stream) <= 100
  np.testing.assert_array_equal(windows.fields["targets"].ravel(), whole[1 : len(stream) + 1])
  example = windows[3]
  assert {k: (x.shape, x.dtype) for k, x in example.items()} == dict.fromkeys(
    ("inputs", "targets"), ((100,), np.int32)
  )
  assert text.windows("reference", "test", 100, data_dir=data_dir) is windows, "arms share it"


def test_windows_of_another_tokenizer(data_dir, reference):
  bpe = tokenization.train_bpe(reference["train"].fields["text"], 400, data_dir=data_dir)
  windows = text.windows("reference", "test", 64, bpe, data_dir=data_dir)
  plain = text.windows("reference", "test", 64, data_dir=data_dir)
  assert len(windows) < 0.8 * len(plain)
  assert windows.fields["inputs"].max() < bpe.vocab_size
  assert bpe.decode(windows[0]["inputs"]) in rows(reference["test"])[0][1]


def test_passages_differ_from_seed_to_seed(data_dir, reference):
  drawn = text.passages("reference", "train", 64, 2, (0, 1, 5), data_dir=data_dir)
  assert drawn.shape == (3, 2, 65)
  assert len({row.tobytes() for row in drawn.reshape(6, 65)}) == 6
  byte = tokenization.bytes_tokenizer()
  whole = b"".join(byte.encode(c).tobytes() + b"\2\0\0\0" for _, c in rows(reference["train"]))
  assert all(row.tobytes() in whole for row in drawn.reshape(6, 65))
  alone = text.passages("reference", "train", 64, 2, (5,), data_dir=data_dir)
  np.testing.assert_array_equal(alone[0], drawn[2])
  with pytest.raises(ValueError, match=r"seeds=\[0, 100000\]; accepted: below \d+, of 2 rows each"):
    text.passages("reference", "train", 64, 2, (0, 100_000), data_dir=data_dir)


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    (("references", "test", 9), "domain='references'; accepted: reference, library"),
    (("reference", "test", 10**8), r"length=100000000; accepted: below \d+, the tokens of test"),
    (("reference", "dev", 9), "text/reference has no split 'dev'"),
    (("reference", "test", 9, None, "<end>"), "end='<end>'; accepted: <pad>, <bos>"),
  ],
)
def test_mistakes(data_dir, arguments, match):
  with pytest.raises(ValueError, match=match):
    text.windows(*arguments, data_dir=data_dir)
