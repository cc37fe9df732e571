"""Irregularly sampled images of a swinging pendulum, by simulation.

The regression task of continuous recurrent units (CRU, arXiv:2111.11344; images after recurrent
Kalman networks, arXiv:1905.07357), which S5 takes over: from an irregular half of the
frames of an episode, tell the sine and cosine of the angle at each of them.

Example, with L = round(keep * steps) kept frames:
  frames: (L, size, size) uint8, a bright rod on black, pivot in the centre, y downwards.
  times: (L,) int32, sorted distinct step numbers in [0, steps), drawn uniformly.
  targets: (L, 2) float32, sine and cosine of the true angle.
  angle: (L,) float32, radians from hanging straight down, not wrapped.

The angle obeys a'' = -stiffness * sin(a) - friction * a', with a(0) uniform and a'(0) = 0, plus a
normal kick of standard deviation `transition_noise` on a' after each step of `step` seconds. The
defaults are those of the CRU's own generator (stiffness 3 g / l = 29.43 1/s^2, 0.01 s, friction
0.1, kicks 0.1, 2,000 training episodes, noise in the images; numbers checked against it, code
written anew). The 1,000 validation and 1,000 test episodes are as recalled from the paper; that
generator makes one held-out set of 1,000. Two further differences: the original integrates with
Euler steps of 0.1 ms, here Runge and Kutta's fourth order runs in steps of at most 2.5 ms; the
original draws on a canvas of 128 pixels and shrinks it, here coverage is computed at each pixel of
the same geometry.

Image noise (`image_noise`): a frame becomes f * frame + (1 - f) * noise, noise uniform at every
pixel, with a factor f that is correlated in time: a walk in [0, 1] that starts uniformly, moves by
a uniform step within +-0.2 and is clipped, then stretched so that its values below t1 ~ U(0, 1/4)
give 0 and those above t2 ~ U(3/4, 1) give 1. The first `clean` steps of an episode have f = 1.

Everything about an episode depends on (seed, split, number of the episode) and the parameters only;
`times` are bit-identical everywhere, the rest up to the platform's sine.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import stable

SPLITS = ("train", "validation", "test")
STIFFNESS = 3 * 9.81  # g m l / I with the inertia m l^2 / 3 of a rod, l = 1 m
ROD = (55 / 64, 4 / 64)  # length and half width, in half image widths
WALK = 0.2
LOWER, UPPER = (0.0, 0.25), (0.75, 1.0)
LONGEST_STEP = 2.5e-3


@dataclasses.dataclass
class PendulumConfig(tfds.core.BuilderConfig):
  """Parameters of one generated set: episodes a split, `step` in seconds, `friction` in 1/s."""

  train: int = 2_000
  validation: int = 1_000
  test: int = 1_000
  steps: int = 100
  keep: float = 0.5
  size: int = 24
  step: float = 0.01
  friction: float = 0.1
  transition_noise: float = 0.1
  image_noise: bool = True
  clean: int = 5
  seed: int = 0


def simulate(
  angle: float, kicks_T: np.ndarray, *, step: float, friction: float, velocity: float = 0.0
) -> np.ndarray:
  """Integrates the pendulum from (angle, velocity).

  Args:
    angle: radians from hanging down.
    kicks_T: added to the velocity after each step, radians a second; one fewer than states.
    step: seconds between states.
    friction: 1/s.
    velocity: radians a second.

  Returns:
    float64 (T + 1, 2): angle (not wrapped) and velocity at times 0, step, 2 * step, ...
  """

  def slope(a, v):
    return v, -STIFFNESS * math.sin(a) - friction * v

  substeps = math.ceil(step / LONGEST_STEP - 1e-9)
  h = step / substeps
  states = [(angle, velocity)]
  for kick in kicks_T.tolist():
    a, v = states[-1]
    for _ in range(substeps):
      a1, v1 = slope(a, v)
      a2, v2 = slope(a + h / 2 * a1, v + h / 2 * v1)
      a3, v3 = slope(a + h / 2 * a2, v + h / 2 * v2)
      a4, v4 = slope(a + h * a3, v + h * v3)
      a, v = a + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4), v + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
    states.append((a, v + kick))
  return np.array(states)


def render(angle_L: np.ndarray, size: int) -> np.ndarray:
  """Anti-aliased frames (L, size, size) float64 in [0, 1] of a rod hanging at these angles."""
  length, half_width = ROD
  grid = (np.arange(size) + 0.5) * (2 / size) - 1
  x_WW, y_WW = np.meshgrid(grid, grid)  # y grows downwards, like the rows of an image
  sin_L, cos_L = np.sin(angle_L)[:, None, None], np.cos(angle_L)[:, None, None]
  along = x_WW * sin_L + y_WW * cos_L
  across = x_WW * cos_L - y_WW * sin_L
  pixel = 2 / size  # a pixel's coverage by a straight edge is linear over about its width
  inside = np.minimum(half_width - np.abs(across), np.minimum(along, length - along))
  return np.clip(inside / pixel + 0.5, 0.0, 1.0)


def noise_factors(uniform_T: np.ndarray, t1: float, t2: float, clean: int) -> np.ndarray:
  """Weights (T,) of the true frame in each noisy one, from T uniforms; see the module."""
  factor, factors = float(uniform_T[0]), []
  for u in uniform_T[1:].tolist():
    factors.append(factor)
    factor = min(max(factor + WALK * (2 * u - 1), 0.0), 1.0)
  factors_T = np.clip((np.array([*factors, factor]) - t1) / (t2 - t1), 0.0, 1.0)
  factors_T[:clean] = 1.0
  return factors_T


def episode(config: PendulumConfig, split: str, index: int) -> dict[str, np.ndarray]:
  """One example; see the module."""
  steps, size = config.steps, config.size
  kept = _kept(config)
  even = steps + steps % 2
  sizes = (steps, 1, even, 2, steps, kept * size * size)
  draws = stable.uniform(config.seed, SPLITS.index(split) << 32 | index, sum(sizes))
  keep_T, start, kick_T, t, walk_T, pixel = np.split(draws, np.cumsum(sizes)[:-1])

  times_L = np.sort(np.argsort(keep_T, kind="stable")[:kept]).astype(np.int32)
  kicks_T = config.transition_noise * stable.normal(kick_T)[: steps - 1]
  angle = math.pi * (2 * float(start[0]) - 1)
  angle_T = simulate(angle, kicks_T, step=config.step, friction=config.friction)[:, 0]
  angle_L = angle_T[times_L]
  frames_LWW = 255 * render(angle_L, size)
  if config.image_noise:
    t1 = LOWER[0] + (LOWER[1] - LOWER[0]) * t[0]
    t2 = UPPER[0] + (UPPER[1] - UPPER[0]) * t[1]
    factor_L11 = noise_factors(walk_T, t1, t2, config.clean)[times_L, None, None]
    frames_LWW = factor_L11 * frames_LWW + (1 - factor_L11) * 255 * pixel.reshape(frames_LWW.shape)
  return {
    "frames": np.rint(frames_LWW).astype(np.uint8),
    "times": times_L,
    "targets": np.stack([np.sin(angle_L), np.cos(angle_L)], -1).astype(np.float32),
    "angle": angle_L.astype(np.float32),
  }


def _kept(config: PendulumConfig) -> int:
  return round(config.keep * config.steps)


class Pendulum(tfds.core.GeneratorBasedBuilder):
  """Simulated pendulum; see the module."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    kept, size = _kept(self.builder_config), self.builder_config.size
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,  # episodes are independent
      supervised_keys=("frames", "targets"),
      features=tfds.features.FeaturesDict(
        {
          "frames": tfds.features.Tensor(
            shape=(kept, size, size), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
          ),
          "times": tfds.features.Tensor(shape=(kept,), dtype=np.int32),
          "targets": tfds.features.Tensor(shape=(kept, 2), dtype=np.float32),
          "angle": tfds.features.Tensor(shape=(kept,), dtype=np.float32),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    for i in range(getattr(self.builder_config, split)):
      yield i, episode(self.builder_config, split, i)


def config(**parameters: float) -> PendulumConfig:
  """The configuration of these parameters, checked and named after them.

  Raises:
    TypeError: an unknown parameter, or one of the wrong type.
    ValueError: a parameter out of its range.
  """
  floats = ("keep", "step", "friction", "transition_noise")
  counts = ("train", "validation", "test", "steps", "size", "clean", "seed")
  names = (*counts, *floats, "image_noise")
  for key in parameters:
    if key not in names:
      raise TypeError(f"pendulum has no parameter {key!r}; it takes {', '.join(names)}")
  made = PendulumConfig(name="", **parameters)  # type: ignore[arg-type]
  for key in floats:
    if isinstance(getattr(made, key), bool) or not isinstance(getattr(made, key), int | float):
      raise TypeError(f"pendulum: {key} must be a number, got {getattr(made, key)!r}")
    setattr(made, key, float(getattr(made, key)))
  for key in counts:
    if type(getattr(made, key)) is not int:
      raise TypeError(f"pendulum: {key} must be an int, got {getattr(made, key)!r}")
    least = 0 if key in ("clean", "seed") else 1
    if getattr(made, key) < least:
      raise ValueError(f"pendulum: {key} must be at least {least}, got {getattr(made, key)}")
  if type(made.image_noise) is not bool:
    raise TypeError(f"pendulum: image_noise must be a bool, got {made.image_noise!r}")
  if not 0 < made.keep <= 1 or _kept(made) < 1:
    raise ValueError(f"pendulum: keep must be in (0, 1] and keep a frame, got {made.keep}")
  if made.step <= 0 or not math.isfinite(made.step):
    raise ValueError(f"pendulum: step must be above 0 s, got {made.step}")
  for key in ("friction", "transition_noise"):
    if not 0 <= getattr(made, key) < math.inf:
      raise ValueError(f"pendulum: {key} must not be negative, got {getattr(made, key)}")
  noise = f"on{made.clean}" if made.image_noise else "off"
  made.name = (
    f"size{made.train}-{made.validation}-{made.test}_steps{made.steps}_keep{made.keep}"
    f"_pixels{made.size}_step{made.step}_friction{made.friction}"
    f"_kicks{made.transition_noise}_noise{noise}_seed{made.seed}"
  )
  return made


def builder(data_dir: str, **parameters: float) -> tfds.core.DatasetBuilder:
  """The builder for these parameters (`PendulumConfig`), array_record under `data_dir`."""
  return Pendulum(config=config(**parameters), data_dir=data_dir, file_format="array_record")
