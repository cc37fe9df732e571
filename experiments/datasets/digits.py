"""The handwritten digits that scikit-learn carries: 1,797 images of 8x8, 10 classes.

Example: {"image": (8, 8, 1) uint8 in 0..16, "label": int in 0..9}.

Splits, fixed: the k-th image of each class (k from 0, in the file's order) goes to train for
k mod 5 in {0, 1, 2}, to validation for 3, to test for 4: 1,085 / 357 / 355, balanced to one image
a class. As in every random split of this set, one writer's digits occur in all three.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.stable import packaged

SPLIT_OF = ("train", "train", "train", "validation", "test")


class Digits(tfds.core.GeneratorBasedBuilder):
  """scikit-learn digits (UCI Optical Recognition of Handwritten Digits, test part), CC BY 4.0."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,  # the order is this file's, not that of a hash in tfds
      supervised_keys=("image", "label"),
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in dict.fromkeys(SPLIT_OF)}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    rows = np.loadtxt(packaged("scikit-learn", "data/digits.csv.gz"), delimiter=",", dtype=np.uint8)
    seen = [0] * 10
    for i, row in enumerate(rows):
      label = int(row[64])
      if SPLIT_OF[seen[label] % 5] == split:
        yield i, {"image": row[:64].reshape(8, 8, 1), "label": label}
      seen[label] += 1


def builder(data_dir: str) -> tfds.core.DatasetBuilder:
  """The builder, to be prepared as array_record under `data_dir`."""
  return Digits(data_dir=data_dir, file_format="array_record")
