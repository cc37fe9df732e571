"""Images to classify: what a network must know of a set, and its pixels.

    data = labelled.describe("cifar10")
    data.example                                    # {"inputs": (32, 32, 3) float32, "labels"}
    labelled.load("cifar10", "train")[0]["inputs"]  # from -1 to 1

CIFAR and ImageNet are read as tensorflow-datasets prepares them; TinyImageNet has no builder there.
"""

import dataclasses
import functools

import jax
import numpy as np
from PIL import Image

from experiments.datasets import sources


@dataclasses.dataclass(frozen=True)
class Images:
  """A set of images.

  Attributes:
    shape: height, width, channels.
    classes: number of classes.
    train: training examples.
    splits: what is measured, and the split's name.
    white: the value of a white pixel.
  """

  shape: tuple[int, int, int]
  classes: int
  train: int
  splits: tuple[tuple[str, str], ...] = (("test", "test"),)
  white: int = 255

  @property
  def example(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example."""
    inputs = jax.ShapeDtypeStruct(self.shape, np.float32)
    return {"inputs": inputs, "labels": jax.ShapeDtypeStruct((), np.int32)}


HELD_OUT = (("test", "validation"),)  # the labels of the test set are not public
SETS = {
  "digits": Images((8, 8, 1), 10, 1_085, (("validation", "validation"), ("test", "test")), 16),
  "mnist": Images((28, 28, 1), 10, 60_000),
  "cifar10": Images((32, 32, 3), 10, 50_000),
  "cifar100": Images((32, 32, 3), 100, 50_000),
  "tiny_imagenet": Images((64, 64, 3), 200, 100_000, HELD_OUT),
  "imagenet2012": Images((224, 224, 3), 1000, 1_281_167, HELD_OUT),
}


def describe(name: str) -> Images:
  """Raises: ValueError for a name that is not in SETS."""
  if name not in SETS:
    raise ValueError(f"data={name!r}; accepted: {', '.join(SETS)}")
  return SETS[name]


@functools.lru_cache
def load(name: str, split: str) -> sources.InMemory | sources.Lazy:
  """A split with `inputs` from -1 to 1 and `labels`, shapes as `describe(name).example`.

  ImageNet's are the `middle` of each image. The arms of a comparison share what it returns.

  Raises: as `describe` and `sources.load`.
  """
  data = describe(name)
  half = np.float32(data.white / 2)

  def view(example: sources.Example) -> sources.Example:
    pixels = example["image"]
    if name == "imagenet2012":
      pixels = middle(pixels, data.shape[0])
    inputs = np.asarray(pixels, np.float32) / half - 1
    return {"inputs": inputs, "labels": np.int32(example["label"])}

  return sources.load(name, split).map(view)


def middle(image: np.ndarray, size: int) -> np.ndarray:
  """The central square, seven eighths of the shorter side wide, as (size, size, 3) uint8."""
  height, width = image.shape[:2]
  side = min(height, width) * 7 // 8
  top, left = (height - side) // 2, (width - side) // 2
  square = Image.fromarray(image[top : top + side, left : left + side])
  return np.asarray(square.resize((size, size)))


@dataclasses.dataclass(frozen=True)
class Whole:
  """The first images of a split as one example, for full batches.

  `inputs` (size, height, width, channels), of mean 0 and variance 1 over all pixels, and `labels`
  (size,) int32. Calling it loads a source of length 1.

  Attributes:
    name: one of SETS.
    split: of it.
    size: how many images.
    dtype: of the inputs.
  """

  name: str
  split: str
  size: int
  dtype: str = "float32"

  @property
  def example(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the example."""
    shape = (self.size, *describe(self.name).shape)
    inputs = jax.ShapeDtypeStruct(shape, np.dtype(self.dtype))
    return {"inputs": inputs, "labels": jax.ShapeDtypeStruct((self.size,), np.int32)}

  def __call__(self) -> sources.InMemory:
    found = sources.load(self.name, f"{self.split}[:{self.size}]").gather(range(self.size))
    pixels = found["image"].astype(np.float64)
    inputs = ((pixels - pixels.mean()) / pixels.std()).astype(self.dtype)
    labels = found["label"].astype(np.int32)
    return sources.InMemory({"inputs": inputs[None], "labels": labels[None]})
