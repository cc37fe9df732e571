"""Images whose background tells the label, most of the time: groups of (label, background).

    train = spurious.digits("train", correlation=0.95, size=1000, seed=0)

An example is {"inputs", "labels", "groups"} with group 2 y + s of label y and background s. In the
digits' set the label is whether the digit is 5 or more, and the background one of two checkers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.datasets import sources, stable

SIDE, CELL, CONTRAST = 12, 2, 0.5
GROUPS = 4
PARTS = ("full", "foreground", "background")


def canvas(digits_N88: np.ndarray, backgrounds_N: np.ndarray, part: str = "full") -> np.ndarray:
  """Digits, in [0, 1], in the middle of checkers: (N, 12, 12, 1) float32.

  Args:
    digits_N88: 1 is ink, 0 lets the background through.
    backgrounds_N: 0 or 1, which of the checkers: squares of 2 pixels, 0 and 0.5, exchanged.
    part: "full", or the "foreground" on black, or the "background" without a digit.

  Raises: ValueError for another part.
  """
  if part not in PARTS:
    raise ValueError(f"part={part!r}; accepted: {', '.join(PARTS)}")
  cells, edge = np.arange(SIDE) // CELL, (SIDE - 8) // 2
  light = (cells[:, None] + cells + backgrounds_N[:, None, None]) % 2 == 0
  drawn = np.where(light, CONTRAST, 0.0) if part != "foreground" else np.zeros(light.shape)
  if part != "background":
    window = drawn[:, edge:-edge, edge:-edge]
    window[...] = digits_N88 + (1 - digits_N88) * window
  return drawn[..., None].astype(np.float32)


def digits(
  split: str,
  *,
  correlation: float = 0.5,
  size: int | None = None,
  per_group: int | None = None,
  seed: int = 0,
  part: str = "full",
) -> dict[str, np.ndarray]:
  """Digits on checkers, drawn by the seed, as arrays with a leading axis N.

  Args:
    split: of the digits, which are not shared between splits.
    correlation: share of examples whose background is their label.
    size: how many; None: every digit on both backgrounds, whatever the correlation.
    per_group: so many of each group instead, no digit twice.
    seed: of the choice and of the backgrounds.
    part: as of `canvas`.

  Raises: ValueError where the split has too few digits.
  """
  source = sources.load("digits", split, in_memory=True)
  examples = [source[i] for i in range(len(source))]
  images = np.stack([e["image"][..., 0] for e in examples]) / 16
  labels = np.array([int(e["label"]) >= 5 for e in examples], np.int32)
  draw = stable.draws(seed, {"train": 0, "validation": 1, "test": 2}[split])
  order = np.argsort(draw(len(labels)), kind="stable")
  if per_group is not None:
    members = [order[labels[order] == y][: 2 * per_group] for y in (0, 1)]
    chosen = np.concatenate(members)
    backgrounds = np.tile(np.repeat([0, 1], per_group), 2)[: len(chosen)]
    wanted = GROUPS * per_group
  elif size is not None:
    chosen, wanted = order[:size], size
    agrees = np.argsort(draw(len(chosen)), kind="stable") < round(correlation * size)
    backgrounds = np.where(agrees, labels[chosen], 1 - labels[chosen])
  else:
    chosen, backgrounds = np.tile(order, 2), np.repeat([0, 1], len(order))
    wanted = len(chosen)
  if len(chosen) < wanted:
    raise ValueError(f"size={size}, per_group={per_group}; accepted: {len(labels)} in all")
  return {
    "inputs": canvas(images[chosen], backgrounds, part),
    "labels": labels[chosen],
    "groups": (2 * labels[chosen] + backgrounds).astype(np.int32),
  }


def celeba(split: str) -> Any:
  """CelebA of tensorflow-datasets: is the hair blond, and is it a man's; 224x224, ImageNet's scale.

  Raises: DatasetNotFound where the set is not prepared; the line says how.
  """
  return sources.load("celeb_a", split).map(_portrait)


def _portrait(example: Mapping[str, Any]) -> dict[str, np.ndarray]:
  label, man = (int(example["attributes"][name]) for name in ("Blond_Hair", "Male"))
  whole = np.asarray(example["image"], np.float32)[20:198] / 255  # 178 x 178
  image = np.asarray(jax.image.resize(whole, (224, 224, 3), "linear"))
  scaled = (image - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
  return {
    "inputs": scaled.astype(np.float32),
    "labels": np.int32(label),
    "groups": np.int32(2 * label + man),
  }
