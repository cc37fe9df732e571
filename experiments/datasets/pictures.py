"""Square images as generative models take them: float32 (size, size, channels) in [-1, 1].

pictures.load("mnist_5k", "train", 8, texture=0.1)[0]["inputs"]       # (8, 8, 1)
pictures.load("oxford_flowers102", "train+test", 256)[0]["inputs"]    # (256, 256, 3)
"""

import functools
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from experiments.datasets import sources, stable

SPLITS = ("train", "validation", "test")


@functools.lru_cache(maxsize=8)
def load(name: str, split: str, size: int, texture: float = 0.0) -> sources.Source:
  """`inputs`, and `labels` () int of digits.

  Args:
    name: "mnist_5k", whose digits are averaged to `size`; or any set of photographs, as in
      `sources.load`, of which the middle is resized.
    split: as in `sources.load`.
    size: height and width; of digits a divisor of 24.
    texture: deviation of noise on digits, always the same for a digit, which are scaled to leave
      room for two deviations; in [0, 0.5). Without any, nothing in them is imperceptible.

  Raises: ValueError for a size that digits cannot be averaged to, or a texture out of range.
  """
  if name != "mnist_5k":
    photographs = sources.load(name, split, in_memory=False)
    return photographs.map(functools.partial(_middle, size=size))
  if 24 % size:
    raise ValueError(f"size={size}; accepted: divisors of 24")
  if not 0 <= texture < 0.5:
    raise ValueError(f"texture={texture}; accepted: at least 0, below 0.5")
  digits = sources.load(name, split, in_memory=True)
  fields = digits.gather(range(len(digits)))
  ink = fields["image"][:, 2:26, 2:26] / 255
  ink = ink.reshape(-1, size, 24 // size, size, 24 // size, 1).mean(axis=(2, 4))
  stream = SPLITS.index(split) if texture else 0
  grain = stable.normal(stable.uniform(0, stream, ink.size)).reshape(ink.shape)
  textured = np.clip((1 - 2 * texture) * (2 * ink - 1) + texture * grain, -1, 1)
  return sources.InMemory({"inputs": textured.astype(np.float32), "labels": fields["label"]})


def _middle(example: sources.Example, size: int) -> sources.Example:
  image = Image.fromarray(np.asarray(example["image"]))
  fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
  return {"inputs": np.asarray(fitted, np.float32) / 127.5 - 1}


def noise(count: int, shape: tuple[int, ...], seed: int = 1) -> sources.Source:
  """`count` standard normal `inputs` of a shape: what sampling starts from, the same everywhere."""

  def draw(index: Any) -> sources.Example:
    uniform = stable.uniform(seed, index, int(np.prod(shape)))
    return {"inputs": stable.normal(uniform).reshape(shape).astype(np.float32)}

  return sources.Lazy(range(count), (draw,))
