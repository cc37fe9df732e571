"""Every crop, square and mixture that can be drawn, and none other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from objectives import augmentation

KEY = jax.random.key(0)


def image(seed=0):
  return jnp.asarray(np.random.RandomState(seed).rand(8, 8, 1), jnp.float32)


def test_crops_are_those_of_the_framed_image():
  x = image()
  crop = functools.partial(augmentation.crop_and_flip, pad=1)
  views = np.asarray(augmentation.each(crop, KEY, jnp.stack([x] * 300)))
  wanted = np.pad(np.asarray(x), ((1, 1), (1, 1), (0, 0)), constant_values=-1)
  crops = {wanted[i : i + 8, j : j + 8][:, ::s].tobytes() for i in range(3) for j in range(3)
           for s in (1, -1)}  # fmt: skip
  assert {v.tobytes() for v in views} == crops


def test_cutout_is_a_square_that_the_edge_may_cut():
  cut = functools.partial(augmentation.cutout, width=2.0)
  views = np.asarray(augmentation.each(cut, KEY, jnp.stack([image()] * 50)))
  assert set((views == -1).sum((1, 2, 3)).tolist()) <= {1, 2, 4}


def test_mixup_mixes_images_and_targets_alike():
  x_B, targets_BC = jnp.stack([image(s) for s in range(5)]), jnp.eye(5)
  mixed_B, mixed_BC = jax.jit(augmentation.mixup)(KEY, 1.0, x_B, targets_BC)
  np.testing.assert_allclose(mixed_BC.sum(-1), 1, rtol=1e-6)
  np.testing.assert_allclose(mixed_B, jnp.tensordot(mixed_BC, x_B, 1), rtol=1e-5)
  shares = np.sort(np.asarray(mixed_BC), -1)[:, -2:].sum(-1)  # two images at most
  np.testing.assert_allclose(shares, 1, rtol=1e-6)
  assert len({tuple(np.unique(row[row > 0]).round(5)) for row in np.asarray(mixed_BC)}) <= 2


def test_mixup_has_the_shares_of_beta():
  draw = jax.vmap(lambda k: augmentation.mixup(k, 0.3, jnp.eye(2), jnp.eye(2))[1][0, 0])
  shares = np.asarray(jax.jit(draw)(jax.random.split(KEY, 20_000)))
  # Half of the time the other is oneself: E[share] = (1 + 1/2) / 2; or Beta(0.3, 0.3)'s.
  np.testing.assert_allclose(shares.mean(), 0.75, atol=0.01)
  mixed = shares[shares < 1]
  np.testing.assert_allclose(mixed.var(), 0.25 / 1.6, rtol=0.05)
