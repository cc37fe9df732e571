"""Pathfinder by the generating rule of the Long Range Arena: are two dots on one dashed contour?

Two contours of `contour_length` dashes start `seed_distance` apart and grow in turn, one dash at a
time, without touching anything drawn before; shorter contours of a third of that length are put in
between. A dot marks the start of one contour; another marks the end of the same one (label 1) or of
the other one (label 0), each with probability 1/2.

The next dash of a contour leaves a point `margin` beyond the last one, in a direction drawn with
weight cos^2(min(continuity * turn, pi / 2)) among those whose tip is clear of the space around all
other dashes. If the dash touches such a space it is drawn anew, three times; a pair of contours in
which a dash finds no place is thrown away.

Verified against the published generator of Linsley et al. (arXiv:1805.08315): the growth rule with
its weights, spaces and numbers of attempts, the places of the first dashes, the dots. Verified
against the Arena's published builder (arXiv:2011.04006): `GEOMETRIES`; 14 dashes are its hard set,
the one in use. Different here: a first dash takes one of the directions of the growth rule, not any
whole degree; pictures are thinned by area, not by Lanczos resampling, and the space around a dash
is kept as one bit a pixel, from 0.9 of its area; the last dashes of both contours are kept clear
of, not of one; all dashes of an image have one contrast (that generator's distractors of size 32
are brighter than its contours); a distractor starts at the first of 32 random places that is free,
and margins are taken in turn. The Arena's own images of size 128 may hold twice the distractors
(said elsewhere, not checked).

Example: {"image": (size, size, 1) uint8, "label": 1 if connected, else 0}.

The generator is a function of the parameters alone, in integer arithmetic from the raw Philox
stream (`stable`) once the tables are made. Splits have streams of their own, and a larger one
extends a smaller one. Each set of parameters is a configuration of its own on disk. One core makes
about 2,400 images a second of size 32 and 350 of size 128, where few pairs of contours find room.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from scipy import ndimage

from experiments.datasets import stable

Draw = Callable[[int], np.ndarray]  # the next n uniforms of a stream

SPLITS = ("train", "validation", "test")
ROUND = 256  # images made together; which image is which depends on it
CANDIDATES = 2048  # pairs of contours begun together, likewise
PLACES = 32  # tried for the first dash of a distractor
DRAWS = 3  # of a direction, for a dash that hits something
ATTEMPTS = 5  # at a distractor, before there is one fewer
SOLID = 230  # of 255: the share from which a pixel is part of the space around a dash
OVERSAMPLING = 8
PATIENCE = 100  # times CANDIDATES, in a row, before giving up
PROGRESS = 20_000  # images between two notes


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Lengths in pixels.

  Attributes:
    dash: length of a dash.
    thickness: its thickness.
    margins: clear space around a dash, one of them an image.
    continuity: larger is straighter.
    contrast: brightness of a dash that covers its pixels, before clipping at 1.
    radius: of the dots.
    seed_distance: between the starts of the two contours.
    padding: width of the frame that stays empty.
    distractor_dashes: in all of an image's distractors.
  """

  dash: int
  thickness: float
  margins: tuple[int, ...]
  continuity: float
  contrast: float
  radius: float
  seed_distance: int
  padding: int
  distractor_dashes: int


GEOMETRIES = {  # by size of the image
  32: Geometry(2, 0.5, (1,), 1.0, 1.5, 1.5, 7, 1, 20),
  64: Geometry(5, 1.0, (1,), 1.8, 0.8, 2.5, 12, 1, 22),
  128: Geometry(5, 1.5, (2, 3), 1.8, 0.9, 3.0, 20, 1, 35),  # Path-X
  256: Geometry(5, 2.0, (3,), 1.8, 1.0, 5.0, 27, 22, 30),
}


@dataclasses.dataclass
class PathfinderConfig(tfds.core.BuilderConfig):
  """Parameters of one generated set.

  `size` is one of GEOMETRIES, `contour_length` the number of dashes of the two contours;
  `distractors` is the number of contours of `contour_length // 3` dashes, -1: the Arena's.
  """

  size: int = 32
  contour_length: int = 14
  distractors: int = -1
  train: int = 160_000
  validation: int = 20_000
  test: int = 20_000
  seed: int = 0


def _coverage(half: int, inside: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
  """uint8 share of each pixel around the origin, -half..half, in a set of points (y, x)."""
  n = 2 * half + 1
  at = (np.arange(n * OVERSAMPLING) + 0.5) / OVERSAMPLING - half - 0.5
  blocks = inside(at[:, None], at[None]).reshape(n, OVERSAMPLING, n, OVERSAMPLING)
  return np.rint(blocks.mean((1, 3)) * 255).astype(np.uint8)


def _nearest(x: np.ndarray) -> np.ndarray:
  """Nearest integers; halves go up, however a platform rounds its sines."""
  return np.floor(x + 0.5 + 1e-9).astype(np.int64)


def _below(n: int, uniforms: np.ndarray) -> np.ndarray:
  """Integers in [0, n) from uniforms in [0, 1)."""
  return np.floor(n * uniforms).astype(np.int64)


class _Ink:
  """Pictures (kinds, P, P) uint8 drawn on canvases of uint8, `width` a row."""

  def __init__(self, pictures: np.ndarray, width: int):
    reach = np.arange(pictures.shape[1]) - pictures.shape[1] // 2
    self.places = (reach[:, None] * width + reach).ravel()
    self.values = pictures.reshape(len(pictures), -1)

  def press(self, canvas: np.ndarray, centres: np.ndarray, kinds: np.ndarray | int) -> None:
    where = centres[:, None] + self.places
    canvas[where] = np.maximum(canvas[where], self.values[kinds])


class _Bits:
  """Shapes (kinds, P, P) bool, P up to 33, on canvases of one bit a pixel in uint32 words."""

  def __init__(self, shapes: np.ndarray, width: int):
    side = shapes.shape[1]
    self.corner = side // 2 * (width + 1)
    self.words = np.arange(side)[:, None] * (width // 32) + np.arange(2)
    rows = (shapes * (np.uint64(1) << np.arange(side, dtype=np.uint64))).sum(2)
    shifted = rows[:, None] << np.arange(32, dtype=np.uint64)[:, None]  # (kinds, 32, P)
    self.table = np.stack([shifted & np.uint64(2**32 - 1), shifted >> np.uint64(32)], 3)
    self.table = self.table.astype(np.uint32)

  def press(self, canvas: np.ndarray, centres: np.ndarray, kinds: np.ndarray) -> None:
    at = centres - self.corner
    canvas[(at >> 5)[:, None, None] + self.words] |= self.table[kinds, at & 31]

  def hits(self, canvas: np.ndarray, centres: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    at = centres - self.corner
    under = canvas[(at >> 5)[:, None, None] + self.words] & self.table[kinds, at & 31]
    return under.any((1, 2))


class _Drawing:
  """What can be drawn at one size and margin.

  Canvases are flat: square images, each in a frame, one after the other. A position is the index of
  a pixel among all of them, a displacement a number to add. A dash is (pivot, kind): the position
  that it leaves, `margin` before its tail, and the number of its direction.
  """

  def __init__(self, size: int, margin: int):
    geometry = GEOMETRIES[size]
    length, thickness, step = geometry.dash, geometry.thickness, geometry.dash + margin
    circle = np.linspace(0, 2 * np.pi, 64 * step, endpoint=False)
    tips = np.unique(_nearest(step * np.stack([np.sin(circle), np.cos(circle)], 1)), axis=0)
    angles = np.arctan2(tips[:, 0], tips[:, 1])
    ahead = np.stack([np.sin(angles), np.cos(angles)], 1)
    half = int(np.ceil(length / 2 + thickness / 2 + margin)) + 1
    self.size, self.frame = size, 2 * (step + margin) + half
    self.width = -(-(size + 2 * self.frame) // 32) * 32
    self.image = self.width * (size + 2 * self.frame)
    self.tip, self.tail = self._flat(tips), self._flat(margin * ahead)
    self.onward = self._flat((length + 2 * margin) * ahead)
    turns = np.abs(angles[:, None] - angles)
    turns = geometry.continuity * np.minimum(turns, 2 * np.pi - turns)
    self.turns = np.rint(2**16 * np.cos(np.minimum(turns, np.pi / 2)) ** 2).astype(np.int64)
    middles = (margin + length / 2) * ahead
    self.middle = self._flat(middles)

    def dash(kind: int, grown: float) -> np.ndarray:
      (to_y, to_x), (at_y, at_x) = ahead[kind], middles[kind] - _nearest(middles[kind])

      def inside(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        along = np.abs((y - at_y) * to_y + (x - at_x) * to_x) - length / 2
        across = np.abs((y - at_y) * to_x - (x - at_x) * to_y) - thickness / 2
        return np.hypot(np.maximum(along, 0), np.maximum(across, 0)) <= grown + 1e-6

      return _coverage(half + margin, inside)

    kinds, trim = range(len(tips)), slice(margin, -margin)
    masks, ink = (np.stack([dash(kind, grown) for kind in kinds]) for grown in (margin, 0))
    ink = np.rint(np.minimum(geometry.contrast * ink, 255)).astype(np.uint8)
    reach = np.arange(-margin, margin + 1)
    disc = reach[:, None] ** 2 + reach**2 <= margin**2
    near = np.stack([ndimage.binary_dilation(mask >= 128, disc) for mask in masks])
    dot = _coverage(int(geometry.radius) + 1, lambda y, x: np.hypot(y, x) <= geometry.radius + 1e-6)
    self.ink, self.dot = _Ink(ink[:, trim, trim], self.width), _Ink(dot[None], self.width)
    self.clear = [_Bits(masks[:, trim, trim] >= SOLID, self.width), _Bits(near, self.width)]
    self.empty = []
    for padding in (geometry.padding, geometry.padding + margin):
      canvas = np.ones((size + 2 * self.frame, self.width), bool)
      inner = slice(self.frame + padding, self.frame + size - padding)
      canvas[inner, inner] = False
      self.empty.append(np.packbits(canvas, bitorder="little").view("<u4"))

  def _flat(self, displacements: np.ndarray) -> np.ndarray:
    y, x = _nearest(displacements).T
    return y * self.width + x

  def position(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Positions of the pixels (y, x) of image 0."""
    return (y + self.frame) * self.width + x + self.frame

  def extend(self, canvases: list[np.ndarray], dash: np.ndarray, draw: Draw):
    """The dash (2, n) that follows each of `dash` (2, n), and whether it found a place.

    The space around `dash` is closed where one did: it was open for the follower alone.
    """
    pivots, kinds = dash[0] + self.onward[dash[1]], dash[1].copy()
    tips = pivots[:, None] + self.tip
    closed = canvases[1][tips >> 5] >> (tips & 31).astype(np.uint32) & np.uint32(1)
    weights = np.cumsum(self.turns[kinds] * (closed == 0), axis=1)
    left = np.flatnonzero(weights[:, -1])
    found = np.zeros(len(pivots), bool)
    for _ in range(DRAWS):
      thresholds = np.floor(draw(len(left)) * weights[left, -1])
      kinds[left] = (weights[left] <= thresholds[:, None]).sum(1)
      hit = self.clear[0].hits(canvases[0], pivots[left] + self.middle[kinds[left]], kinds[left])
      found[left] = ~hit
      left = left[hit]
    self.close(canvases, dash[:, found])
    return np.stack([pivots, kinds]), found

  def close(self, canvases: list[np.ndarray], dash: np.ndarray) -> None:
    """Closes the space around dashes (2, n)."""
    for canvas, shape in zip(canvases, self.clear, strict=True):
      shape.press(canvas, dash[0] + self.middle[dash[1]], dash[1])

  def contours(self, length: int, distance: int, draw: Draw):
    """Pairs of contours: two canvases, (n, words), and dashes (n, 2 contours, length, 2)."""
    n = CANDIDATES
    y, x = (2 * distance + _below(self.size - 4 * distance, draw(n)) for _ in range(2))
    angle = _below(360, draw(n)) * np.pi / 180
    to_y, to_x = (_nearest(distance * f(angle)) for f in (np.sin, np.cos))
    tails = np.stack([self.position(y, x), self.position(y + to_y, x + to_x)])
    kinds = _below(len(self.tip), draw(2 * n)).reshape(2, n)
    pivots = tails - self.tail[kinds]
    centre = np.zeros((self.image // self.width, self.width), bool)
    inner = slice(self.frame + 2 * distance, self.frame + self.size - 2 * distance)
    centre[inner, inner] = True  # where the first dash has to lie
    alive = np.flatnonzero(centre.ravel()[pivots[0] + self.tip[kinds[0]]])
    dashes = np.zeros((n, 2, length, 2), np.int64)
    dashes[:, :, 0] = np.stack([pivots + np.arange(n) * self.image, kinds], 2).swapaxes(0, 1)
    canvases = [np.tile(canvas, n) for canvas in self.empty]
    for i in range(1, length):
      for contour in range(2):
        following, found = self.extend(canvases, dashes[alive, contour, i - 1].T, draw)
        alive = alive[found]
        dashes[alive, contour, i] = following[:, found].T
    for contour in range(2):
      self.close(canvases, dashes[alive, contour, -1].T)
    dashes[..., 0] -= np.arange(n)[:, None, None] * self.image
    return *(canvas.reshape(n, -1)[alive] for canvas in canvases), dashes[alive]

  def distractors(self, canvases: list[np.ndarray], length: int, draw: Draw):
    """One more contour an image: the images that have it, and its dashes (length, 2, n)."""
    n = len(canvases[0])
    flat = [canvas.ravel() for canvas in canvases]
    dashes, left = np.zeros((length, 2, n), np.int64), np.arange(n)
    for _ in range(PLACES):
      y, x = (_below(self.size, draw(len(left))) for _ in range(2))
      kinds = _below(len(self.tip), draw(len(left)))
      pivots = self.position(y, x) + left * self.image - self.tail[kinds]
      dashes[0][:, left] = pivots, kinds
      left = left[self.clear[0].hits(flat[0], pivots + self.middle[kinds], kinds)]
    alive = np.delete(np.arange(n), left)
    for i in range(1, length):
      following, found = self.extend(flat, dashes[i - 1][:, alive], draw)
      alive = alive[found]
      dashes[i][:, alive] = following[:, found]
    self.close(flat, dashes[-1][:, alive])
    return alive, dashes[:, :, alive]


def _some(drawing: _Drawing, config: PathfinderConfig, count: int, draw: Draw):
  """`count` images (count, size, size, 1) uint8 and their labels (count,)."""
  geometry, length = GEOMETRIES[config.size], config.contour_length // 3
  parts, have, failures = [], 0, 0
  while have < count:
    parts.append(drawing.contours(config.contour_length, geometry.seed_distance, draw))
    found = len(parts[-1][-1])
    have, failures = have + found, 0 if found else failures + 1
    if failures == PATIENCE:
      raise ValueError(
        f"pathfinder: {PATIENCE * CANDIDATES:,} pairs in a row found no place;"
        f" contour_length={config.contour_length} is too long for size={config.size}"
      )
  *canvases, dashes = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
  dashes[..., 0] += np.arange(count)[:, None, None] * drawing.image
  drawn = list(dashes.transpose(1, 2, 3, 0).reshape(-1, 2, count))  # one dash an image each
  wanted = config.distractors
  for _ in range(geometry.distractor_dashes // length if wanted < 0 else wanted):
    left = np.arange(count)
    for _ in range(ATTEMPTS):
      trial = [canvas[left] for canvas in canvases]
      alive, added = drawing.distractors(trial, length, draw)
      for canvas, tried in zip(canvases, trial, strict=True):
        canvas[left[alive]] = tried[alive]
      added[:, 0] += (left[alive] - alive) * drawing.image
      drawn += list(added)
      left = np.delete(left, alive)
  ink = np.zeros(count * drawing.image, np.uint8)
  for pivots, kinds in drawn:
    drawing.ink.press(ink, pivots + drawing.middle[kinds], kinds)
  contour, label = _below(2, draw(count)), _below(2, draw(count))
  start = dashes[np.arange(count), contour, 0]
  end = dashes[np.arange(count), contour ^ label ^ 1, -1]
  drawing.dot.press(ink, start[:, 0] + drawing.tail[start[:, 1]], 0)
  drawing.dot.press(ink, end[:, 0] + drawing.tip[end[:, 1]], 0)
  inner = slice(drawing.frame, drawing.frame + config.size)
  return ink.reshape(count, -1, drawing.width, 1)[:, inner, inner], label


def images(config: PathfinderConfig, split: str) -> Iterator[tuple[np.ndarray, int]]:
  """The images (size, size, 1) uint8 of a split in order, each with its label.

  Raises:
    ValueError: the contours are too long for the image.
  """
  drawings = [_Drawing(config.size, margin) for margin in GEOMETRIES[config.size].margins]
  left = getattr(config, split)
  for number in range(-(-left // ROUND)):
    draw = stable.draws(config.seed, SPLITS.index(split) << 32 | number)
    share = ROUND // len(drawings)
    made = [_some(drawing, config, share, draw) for drawing in drawings]
    for i in range(min(left, ROUND)):
      pictures, labels = made[i % len(made)]
      yield pictures[i // len(made)], int(labels[i // len(made)])
    left -= ROUND


class Pathfinder(tfds.core.GeneratorBasedBuilder):
  """Generated Pathfinder; see the module."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.size
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,  # generated in random order already
      supervised_keys=("image", "label"),
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(
            shape=(size, size, 1), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
          ),
          "label": tfds.features.ClassLabel(num_classes=2),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    count, begin = getattr(self.builder_config, split), time.monotonic()
    for i, (image, label) in enumerate(images(self.builder_config, split)):
      if i and i % PROGRESS == 0:
        rate = i / (time.monotonic() - begin)
        print(f"pathfinder: {split} {i:,} of {count:,}, {rate:,.0f} a second", file=sys.stderr)
      yield i, {"image": image, "label": label}


def config(**parameters: int) -> PathfinderConfig:
  """The configuration of these parameters, checked and named after them.

  Raises:
    TypeError: an unknown parameter, or one that is not an integer.
    ValueError: a parameter out of its range.
  """
  inherited = {f.name for f in dataclasses.fields(tfds.core.BuilderConfig)}
  names = [f.name for f in dataclasses.fields(PathfinderConfig) if f.name not in inherited]
  for key in parameters:
    if key not in names:
      raise TypeError(f"pathfinder has no parameter {key!r}; it takes {', '.join(names)}")
  made = PathfinderConfig(name="", **parameters)
  for key in names:
    if type(getattr(made, key)) is not int:
      raise TypeError(f"pathfinder: {key} must be an int, got {getattr(made, key)!r}")
  if made.size not in GEOMETRIES:
    raise ValueError(f"size={made.size}; accepted: {', '.join(map(str, GEOMETRIES))}")
  for key, least in (
    *(("train", 1), ("validation", 1), ("test", 1), ("contour_length", 3)),
    *(("distractors", -1), ("seed", 0)),
  ):
    if getattr(made, key) < least:
      raise ValueError(f"pathfinder: {key} must be at least {least}, got {getattr(made, key)}")
  made.name = (
    f"size{made.size}_length{made.contour_length}_distractors{made.distractors}"
    f"_count{made.train}-{made.validation}-{made.test}_seed{made.seed}"
  )
  return made


def builder(data_dir: str, **parameters: int) -> tfds.core.DatasetBuilder:
  """The builder for these parameters (`PathfinderConfig`), array_record under `data_dir`."""
  return Pathfinder(config=config(**parameters), data_dir=data_dir, file_format="array_record")
