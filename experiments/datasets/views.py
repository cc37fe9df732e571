"""Examples as batches want them: functions of one example, to be given to a source's `map`.

    sources.load("mnist_5k", "train").map(views.raster(permutation=views.bit_reversal(784)))
    sources.load("listops", "train", max_length=500, ...).map(views.pad(512))

Field names are those of the batch: `inputs`, `labels`, `lengths`, `dt`, `targets`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.datasets import stable
from experiments.datasets.sources import Example, Source

View = Callable[[Example], Example]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow's "L"
SPECIAL = ("<pad>", "<unk>", "<eos>")
PAD, UNK, EOS = range(3)


def bit_reversal(length: int) -> np.ndarray:
  """Indices 0..length-1 ordered by their reversed binary digits, (length,) int64.

  For a power of two this is an involution. Otherwise it is the order for the next power of two with
  the indices beyond `length` left out. This is the permutation of psMNIST in S4's and S5's code.
  """
  bits = max(length - 1, 0).bit_length()
  reversed_N = np.zeros(1 << bits, np.int64)
  for b in range(bits):
    reversed_N |= (np.arange(1 << bits) >> b & 1) << (bits - 1 - b)
  return reversed_N[reversed_N < length]


def random_permutation(length: int, seed: int) -> np.ndarray:
  """A permutation of 0..length-1, (length,) int64, the same for a seed everywhere and for ever.

  The order of `length` raw Philox draws keyed by the seed (`stable.raw`).
  """
  return np.argsort(stable.raw(seed, 0, length), kind="stable")


def _resampling(size: int, length: int, method: str) -> np.ndarray:
  """(size, length) weights of `length` pixels in each of `size` that cover the same extent."""
  at = (np.arange(size) + 0.5) * length / size - 0.5  # centres, in units of the old pixels
  if method == "nearest":
    at = np.floor(at + 0.5)
  old = np.arange(length)
  return np.stack([np.interp(at, old, e) for e in np.eye(length)], axis=1).astype(np.float32)


def raster(
  *,
  repeat: int = 1,
  size: int | None = None,
  method: str = "bilinear",
  permutation: np.ndarray | None = None,
  grey: bool = False,
  mean: float | Sequence[float] = 0.0,
  std: float | Sequence[float] = 1.0,
  scale: float = 255.0,
) -> View:
  """An image as a sequence of its pixels, row by row.

  From `image` (H, W, C) or (H, W) and `label` to `inputs` (L, C) float32 with
  L = H * W * repeat, and `labels` () int32. Pixel values are divided by `scale` (16 for `digits`),
  turned to grey, resized, normalised as (x - mean) / std, permuted, and repeated.

  Args:
    repeat: how many steps each pixel takes.
    size: make the image H = W = size first; meant for enlarging, as it does not smooth.
    method: of resizing, "bilinear" (edges extended) or "nearest".
    permutation: (H * W,) ints; step j shows pixel permutation[j]. None: raster order.
    grey: turn three channels into one by ITU-R BT.601 luma.
    mean: in units of the scaled pixel, one number or one a channel.
    std: likewise.
    scale: the pixel value that becomes 1.

  Raises:
    ValueError: an unknown method; when applied: the permutation does not fit the image, or `grey`
      meets other than 3 channels.
  """
  if method not in ("bilinear", "nearest"):
    raise ValueError(f"raster: method={method!r}; accepted: bilinear, nearest")
  mean_C, std_C = np.asarray(mean, np.float32), np.asarray(std, np.float32)

  def view(example: Example) -> Example:
    x_HWC = np.asarray(example["image"], np.float32) / np.float32(scale)
    if x_HWC.ndim == 2:
      x_HWC = x_HWC[..., None]
    if grey:
      if x_HWC.shape[-1] != 3:
        raise ValueError(f"raster: grey=True needs 3 channels, the image has {x_HWC.shape[-1]}")
      x_HWC = (x_HWC @ LUMA)[..., None]
    if size is not None:
      rows, columns = (_resampling(size, n, method) for n in x_HWC.shape[:2])
      x_HWC = np.einsum("ih,hwc,jw->ijc", rows, x_HWC, columns, optimize=True)
    x_LC = (x_HWC.reshape(-1, x_HWC.shape[-1]) - mean_C) / std_C
    if permutation is not None:
      if len(permutation) != len(x_LC):
        raise ValueError(
          f"raster: a permutation of {len(permutation)} for an image of {len(x_LC)} pixels"
        )
      x_LC = x_LC[permutation]
    return {"inputs": np.repeat(x_LC, repeat, axis=0), "labels": np.int32(example["label"])}

  return view


def subsample(k: int) -> View:
  """Every k-th step of a sequence, beginning with the first.

  `inputs` and `targets` are sliced, `lengths` become ceil(lengths / k), `dt` becomes the time since
  the last step kept (the first stays as it is); other fields stay.
  """
  if k < 1:
    raise ValueError(f"subsample: k must be at least 1, got {k}")

  def view(example: Example) -> Example:
    example = dict(example)
    for key in ("inputs", "targets"):
      if key in example:
        example[key] = example[key][::k]
    if "lengths" in example:
      example["lengths"] = np.int32(-(-int(example["lengths"]) // k))
    if "dt" in example:
      times_L = np.cumsum(example["dt"], dtype=np.float64)[::k]
      example["dt"] = np.diff(times_L, prepend=0.0).astype(np.float32)
    return example

  return view


def pad(length: int, *, value: int = PAD, truncate: bool = False) -> View:
  """Token sequences of one length.

  From `tokens` (n,) ints and `label` to `inputs` (length,) int32 filled up with `value` at the end,
  `labels` () int32 and `lengths` () int32, the number of true tokens.

  Raises (when applied):
    ValueError: n > length and `truncate` is off (it keeps the first `length` tokens).
  """

  def view(example: Example) -> Example:
    tokens = np.asarray(example["tokens"])
    if len(tokens) > length and not truncate:
      raise ValueError(f"pad: {len(tokens)} tokens do not fit length={length}")
    tokens = tokens[:length]
    inputs = np.full(length, value, np.int32)
    inputs[: len(tokens)] = tokens
    return {
      "inputs": inputs,
      "labels": np.int32(example["label"]),
      "lengths": np.int32(len(tokens)),
    }

  return view


def pendulum() -> View:
  """The pendulum's frames with the gaps between them.

  From `frames`, `times`, `targets` to `inputs` (L, size, size, 1) float32 in [0, 1], `targets`
  (L, 2) float32 and `dt` (L,) float32 in units of the simulation's step: dt[0] = 1 and
  dt[k] = times[k] - times[k - 1] (arXiv:2208.04933, irregular sampling).
  """

  def view(example: Example) -> Example:
    times_L = np.asarray(example["times"])
    return {
      "inputs": np.asarray(example["frames"], np.float32)[..., None] / np.float32(255),
      "targets": np.asarray(example["targets"], np.float32),
      "dt": np.diff(times_L, prepend=times_L[0] - 1).astype(np.float32),
    }

  return view


def _text(value: Any) -> str:
  return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def character_vocabulary(
  source: Source, *, min_frequency: int = 15, length: int = 4_096
) -> tuple[str, ...]:
  """The vocabulary of a source's `text`: (<pad>, <unk>, <eos>, characters...).

  Characters (Unicode code points) that occur at least `min_frequency` times in the first
  `length` - 1 of each text, the most frequent first, ties by code point. Use the training split;
  on IMDB this is the vocabulary of S4's and S5's Text task, up to the order of ties.
  """
  count: Counter[str] = Counter()
  for i in range(len(source)):
    count.update(_text(source[i]["text"])[: length - 1])
  frequent = [c for c, n in count.items() if n >= min_frequency]
  return (*SPECIAL, *sorted(frequent, key=lambda c: (-count[c], c)))


def characters(vocabulary: Sequence[str], *, length: int = 4_096) -> View:
  """Text as character ids, for `pad(length)` to follow.

  From `text` (bytes or str) and `label` to `tokens` (n,) int32 ids into `vocabulary`, n <= length:
  the first `length` - 1 characters and the end token; and `label`.
  """
  ids = {c: i for i, c in enumerate(vocabulary)}

  def view(example: Example) -> Example:
    text = _text(example["text"])[: length - 1]
    tokens = np.fromiter((*(ids.get(c, UNK) for c in text), EOS), np.int32)
    return {"tokens": tokens, "label": example["label"]}

  return view
