"""The pendulum: physics, gaps, images, noise, and which episode is where."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments.datasets import pendulum, sources, views

SPLITS = ("train", "validation", "test")
SMALL = dict(train=6, validation=3, test=3, seed=1)


@pytest.fixture(scope="module")
def small(data_dir):
  return {s: sources.load("pendulum", s, data_dir=data_dir, **SMALL) for s in SPLITS}


@pytest.mark.parametrize("angle", [0.3, 2.0, 3.1])
def test_energy_is_conserved_without_friction(angle):
  states = pendulum.simulate(angle, np.zeros(2_000), step=0.01, friction=0.0)
  energy = states[:, 1] ** 2 / 2 - pendulum.STIFFNESS * np.cos(states[:, 0])
  assert np.abs(energy - energy[0]).max() < 1e-6 * pendulum.STIFFNESS


def test_friction_takes_energy_away():
  states = pendulum.simulate(2.0, np.zeros(300), step=0.01, friction=0.5)
  energy = states[:, 1] ** 2 / 2 - pendulum.STIFFNESS * np.cos(states[:, 0])
  assert (np.diff(energy) <= 1e-9).all()
  assert energy[-1] < energy[0] - 5


def test_agrees_with_another_integrator():
  states = pendulum.simulate(2.5, np.zeros(100), step=0.05, friction=0.1, velocity=-1.0)
  other = solve_ivp(
    lambda _, s: (s[1], -pendulum.STIFFNESS * math.sin(s[0]) - 0.1 * s[1]),
    (0, 5),
    (2.5, -1.0),
    t_eval=np.arange(101) * 0.05,
    rtol=1e-11,
    atol=1e-12,
  )
  np.testing.assert_allclose(states, other.y.T, atol=2e-5)


def test_small_swings_have_the_known_period():
  period = 2 * math.pi / math.sqrt(pendulum.STIFFNESS)
  states = pendulum.simulate(1e-3, np.zeros(100), step=period / 100, friction=0.0)
  np.testing.assert_allclose(states[-1], [1e-3, 0.0], atol=1e-8)
  np.testing.assert_allclose(states[50], [-1e-3, 0.0], atol=1e-8)


def test_kicks_change_the_velocity_after_each_step():
  states = pendulum.simulate(0.0, np.array([0.5, 0.0]), step=0.01, friction=0.0)
  assert states[0, 1] == 0 and states[1, 1] == 0.5
  assert states[1, 0] == 0 and states[2, 0] > 0


def test_rod_points_where_the_angle_says():
  angles = np.array([0.0, math.pi / 2, math.pi, -math.pi / 2, 0.7])
  frames = pendulum.render(angles, 24)
  grid = (np.arange(24) + 0.5) / 12 - 1
  for angle, frame in zip(angles, frames, strict=True):
    x, y = (frame.sum(0) * grid).sum(), (frame.sum(1) * grid).sum()
    np.testing.assert_allclose(
      math.atan2(x, y), angle % (2 * math.pi) - (angle < 0) * 2 * math.pi, atol=0.02
    )
    # Area of the rod in pixels: its length by its width, 144 pixels to the unit square.
    np.testing.assert_allclose(frame.sum(), 2 * pendulum.ROD[0] * pendulum.ROD[1] * 144, rtol=0.05)
  moved = pendulum.render(np.array([0.0, 0.05, 0.5]), 24)
  assert 0 < np.abs(moved[1] - moved[0]).sum() < np.abs(moved[2] - moved[0]).sum()


def test_examples(small):
  config = pendulum.config(**SMALL)
  for split in SPLITS:
    assert len(small[split]) == SMALL[split]
    for i in range(len(small[split])):
      example = small[split][i]
      times = example["times"]
      assert example["frames"].shape == (50, 24, 24) and example["frames"].dtype == np.uint8
      assert len(times) == 50 and (np.diff(times) > 0).all()
      assert times.min() >= 0 and times.max() < 100
      assert len(set(np.diff(times))) > 1, "the gaps should be irregular"
      np.testing.assert_allclose((example["targets"] ** 2).sum(-1), 1, atol=1e-6)
      np.testing.assert_allclose(example["targets"][:, 0], np.sin(example["angle"]), atol=1e-6)
      np.testing.assert_allclose(example["targets"][:, 1], np.cos(example["angle"]), atol=1e-6)
      again = pendulum.episode(config, split, i)
      assert all((again[key] == example[key]).all() for key in example)


def test_kept_steps_are_uniform():
  config = pendulum.config(size=1, image_noise=False)
  counts = np.zeros(100)
  for i in range(200):
    counts[pendulum.episode(config, "train", i)["times"]] += 1
  assert counts.sum() == 200 * 50
  assert np.abs(counts - 100).max() < 5 * math.sqrt(200 * 0.25)


def test_episodes_differ_between_splits_and_seeds():
  config = pendulum.config(**SMALL)
  starts = {pendulum.episode(config, s, i)["angle"][0] for s in SPLITS for i in range(3)}
  assert len(starts) == 9
  other = pendulum.config(**{**SMALL, "seed": 2})
  assert pendulum.episode(other, "train", 0)["angle"][0] not in starts


def test_image_noise_is_correlated_and_spares_the_first_steps():
  noisy = pendulum.config(keep=1.0, transition_noise=0.0)
  clear = pendulum.config(keep=1.0, transition_noise=0.0, image_noise=False)
  difference = []
  for i in range(10):
    a, b = (pendulum.episode(c, "train", i) for c in (noisy, clear))
    assert (a["angle"] == b["angle"]).all()
    difference.append(np.abs(a["frames"].astype(int) - b["frames"]).mean((1, 2)))
  difference = np.array(difference)
  assert (difference[:, :5] == 0).all()
  assert difference[:, 5:].max() > 80, "some frames should be lost altogether"
  assert (difference[:, 5:] < 1).mean() > 0.1, "some frames should be clear"
  later = difference[:, 5:]
  assert np.abs(np.diff(later, axis=1)).mean() < 0.5 * np.abs(later - later[:, ::-1]).mean()


def test_noise_factors_are_a_stretched_clipped_walk():
  uniform = np.array([0.5, 1.0, 1.0, 1.0, 0.0, 0.5])
  walk = np.array([0.5, 0.7, 0.9, 1.0, 0.8, 0.8])
  np.testing.assert_allclose(
    pendulum.noise_factors(uniform, 0.2, 0.8, 0), np.clip((walk - 0.2) / 0.6, 0, 1)
  )
  assert (pendulum.noise_factors(uniform, 0.2, 0.8, 2)[:2] == 1).all()


def test_view(small):
  example = small["train"][0]
  view = views.pendulum()(example)
  assert view["inputs"].shape == (50, 24, 24, 1) and view["inputs"].dtype == np.float32
  assert view["inputs"].min() >= 0 and view["inputs"].max() <= 1
  assert view["dt"].dtype == np.float32 and view["dt"][0] == 1
  np.testing.assert_array_equal(np.cumsum(view["dt"]) - 1 + example["times"][0], example["times"])
  batch = small["train"].map(views.pendulum()).gather([1, 2])
  assert {k: v.shape for k, v in batch.items()} == {
    "inputs": (2, 50, 24, 24, 1),
    "targets": (2, 50, 2),
    "dt": (2, 50),
  }


def test_golden(small, digest):
  # Only `times` are the same to the bit on every platform; the rest passes through sin and cos.
  assert {s: digest(source, "times") for s, source in small.items()} == {
    "train": "d398459155af4c0d",
    "validation": "bef7f42bd5acca1a",
    "test": "1276a6cb77da9898",
  }
  np.testing.assert_allclose(
    small["train"][0]["angle"][[0, 25, 49]], [1.66192055, -1.16342807, -1.34100616], atol=1e-5
  )
  np.testing.assert_allclose(small["test"][2]["frames"].mean(), 65.30382, atol=0.01)


@pytest.mark.parametrize(
  ("parameters", "error", "match"),
  [
    (dict(length=3), TypeError, "no parameter 'length'; it takes train"),
    (dict(steps=1.5), TypeError, "steps must be an int"),
    (dict(keep=1.5), ValueError, r"keep must be in \(0, 1\]"),
    (dict(step=0.0), ValueError, "step must be above 0 s"),
    (dict(friction=-1), ValueError, "friction must not be negative"),
  ],
)
def test_wrong_parameters(tmp_path, parameters, error, match):
  with pytest.raises(error, match=match):
    sources.load("pendulum", "train", data_dir=tmp_path, **parameters)


def test_parameters_make_different_names():
  changed = dict(
    train=1, validation=1, test=1, steps=7, keep=0.25, size=7, step=0.0123456789, friction=0.2
  )
  changed |= dict(transition_noise=0.0, image_noise=False, clean=1, seed=9)
  names = {pendulum.config(**{k: v}).name for k, v in changed.items()}
  assert len(names | {pendulum.config().name, pendulum.config(step=0.0123456788).name}) == 14
