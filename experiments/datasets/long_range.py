"""Long sequences to classify or regress: any of the data sets, as one network reads them.

The settings are those of the Long Range Arena as S5 uses it (arXiv:2208.04933, released code):
ListOps tokens; IMDB reviews as characters that occur at least 15 times; CIFAR-10 in grey,
normalised and in raster order, a tenth of its training set for validation; Pathfinder with values
from -1 to 1. Other image sets are read in raster order with values from 0 to 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from experiments.datasets import sources, views


@dataclasses.dataclass(frozen=True)
class Sequences:
  """What a network must know of a data set.

  Attributes:
    kind: "classify" one sequence, "match" two documents, or "regress" at every frame.
    length: positions.
    outputs: classes, or targets a frame.
    vocab: number of tokens; None for real values.
    train: training examples.
    splits: what can be measured.
  """

  kind: str
  length: int
  outputs: int
  vocab: int | None
  train: int
  splits: tuple[str, ...] = ("validation", "test")

  @property
  def example(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example."""
    n, label = self.length, {"labels": jax.ShapeDtypeStruct((), np.int32)}
    if self.kind == "match":
      return _spec(np.int32, inputs=(2, n), lengths=(2,)) | label
    if self.kind == "regress":
      return _spec(np.float32, inputs=(n, 24, 24, 1), dt=(n,), targets=(n, self.outputs))
    if self.vocab:
      return _spec(np.int32, inputs=(n,), lengths=()) | label
    return _spec(np.float32, inputs=(n, 1)) | label

  @property
  def inputs(self) -> list[str]:
    """The fields that the network reads."""
    return [name for name in self.example if name not in ("labels", "targets")]

  @property
  def axes(self) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of the fields that have a length."""
    if self.kind == "match":
      return {"inputs": (None, "length")}
    return {name: ("length",) for name, s in self.example.items() if self.length in s.shape}

  def at_half_rate(self) -> "Sequences":
    return dataclasses.replace(self, length=(self.length + 1) // 2)


def _spec(dtype: Any, **shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


# Training sizes of Speech Commands and the pendulum are recalled. The data of Speech Commands and
# AAN are not among `sources`: their networks can be built and compiled, and loading says what is
# missing.
SETS = {
  "digits": Sequences("classify", 64, 10, None, 1_085),
  "mnist_5k": Sequences("classify", 784, 10, None, 3_500),
  "mnist_10k": Sequences("classify", 784, 10, None, 7_008),
  "listops": Sequences("classify", 2048, 10, 20, 96_000),
  "imdb_reviews": Sequences("classify", 4096, 2, 135, 25_000, ("test",)),
  "cifar10": Sequences("classify", 1024, 10, None, 45_000),
  "pendulum": Sequences("regress", 50, 2, None, 2_000),
  "speech_commands_35": Sequences("classify", 16_000, 35, None, 84_843),
  "aan": Sequences("match", 4000, 2, 98, 147_086),
  "pathfinder32": Sequences("classify", 1024, 2, None, 160_000),
  "pathfinder128": Sequences("classify", 16_384, 2, None, 160_000),
}
IMAGES = ("digits", "mnist_5k", "mnist_10k", "cifar10", "pathfinder32", "pathfinder128")


def describe(
  name: str, repeat: int = 1, size: int | None = None, take: int | None = None
) -> Sequences:
  """The description of a set; `repeat`, `size` and `take` as for `load`.

  Raises:
    ValueError: for a name that is not in SETS, a `size` of what is no image, or a `take` of more
      than there is.
  """
  if name not in SETS:
    raise ValueError(f"data.name={name!r}; accepted: {', '.join(SETS)}")
  data = SETS[name]
  if size is not None and (name not in IMAGES or size < 1):
    raise ValueError(f"data.size={size} of {name}; accepted: at least 1, of {', '.join(IMAGES)}")
  if take is not None and not 1 <= take <= data.train:
    raise ValueError(f"data.take={take} of {name}; accepted: 1..{data.train}")
  length = (data.length if size is None else size * size) * repeat
  return dataclasses.replace(data, length=length, train=take or data.train)


@functools.lru_cache(maxsize=16)
def load(
  name: str, split: str, repeat: int = 1, size: int | None = None, take: int | None = None
) -> sources.Source:
  """A split as sequences: a source whose examples have the shapes of `describe(...).example`.

  The arms of a comparison share what it returns.

  Args:
    name: one of SETS.
    split: "train", "validation" or "test".
    repeat: how many times each pixel of an image is repeated.
    size: enlarge an image to size x size, bilinearly.
    take: train on the first so many examples only; the other splits stay as they are.

  Raises:
    ValueError: as `describe`.
  """
  length = describe(name, repeat, size, take).length
  part = f"train[:{take}]" if take and split == "train" else split
  match name:
    case "listops":
      return sources.load(name, part, in_memory=False).map(views.pad(length))
    case "imdb_reviews":
      vocabulary = views.character_vocabulary(sources.load(name, "train"))
      characters = views.characters(vocabulary, length=length)
      return sources.load(name, part, in_memory=False).map(characters).map(views.pad(length))
    case "pendulum":
      return sources.load(name, part).map(views.pendulum())
    case "cifar10":
      part = {"train": "train[:90%]", "validation": "train[90%:]"}.get(part, part)
      grey = views.raster(repeat=repeat, size=size, grey=True, mean=122.6 / 255, std=61 / 255)
      return sources.load(name, part).map(grey)
    case "pathfinder32" | "pathfinder128":
      centred = views.raster(repeat=repeat, size=size, mean=0.5, std=0.5)
      return sources.load(name, part, in_memory=False).map(centred)
    case _:
      scale = 16.0 if name == "digits" else 255.0
      return sources.load(name, part).map(views.raster(repeat=repeat, size=size, scale=scale))
