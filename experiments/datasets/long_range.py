"""Long sequences to classify or regress: any of the data sets, as one network reads them.

The settings are those of the Long Range Arena as S5 uses it (arXiv:2208.04933, released code):
ListOps tokens; IMDB reviews as characters that occur at least 15 times; CIFAR-10 in grey,
normalised and in raster order, a tenth of its training set for validation. Other image sets are
read in raster order with values from 0 to 1.
"""

from experiments.datasets import sources, views


def load(name: str, split: str, length: int, *, repeat: int = 1):
  """A split as sequences: a source of `inputs`, `labels` or `targets`, and `lengths` or `dt`.

  Args:
    name: "listops", "imdb_reviews", "pendulum", or an image set such as "digits" or "cifar10".
    split: "train", "validation" or "test".
    length: what token sequences are padded or cut to; images and frames have their own.
    repeat: how many times each pixel is repeated.
  """
  match name:
    case "listops":
      return sources.load(name, split).map(views.pad(length))
    case "imdb_reviews":
      vocabulary = views.character_vocabulary(sources.load(name, "train"))
      characters = views.characters(vocabulary, length=length)
      return sources.load(name, split).map(characters).map(views.pad(length))
    case "pendulum":
      return sources.load(name, split).map(views.pendulum())
    case "cifar10":
      part = {"train": "train[:90%]", "validation": "train[90%:]"}.get(split, split)
      grey = views.raster(repeat=repeat, grey=True, mean=122.6 / 255, std=61 / 255)
      return sources.load(name, part).map(grey)
    case _:
      scale = 16.0 if name == "digits" else 255.0
      return sources.load(name, split).map(views.raster(repeat=repeat, scale=scale))
