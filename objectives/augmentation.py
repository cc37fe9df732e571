"""Random changes of images that keep their labels, as functions of a key; mixup changes both.

An image is (height, width, channels) float with values from -1, black, to 1. For a batch,

    images = each(crop_and_flip, key, images)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def each(
  change: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, x_B: jax.Array
) -> jax.Array:
  """`change(key, x)` of every x of a batch, with a key of its own."""
  return jax.vmap(change)(jax.random.split(key, len(x_B)), x_B)


def crop_and_flip(key: jax.Array, x_HWC: jax.Array, pad: int = 4) -> jax.Array:
  """A random crop of the image with a black frame of `pad` pixels, mirrored half of the time."""
  crop_key, flip_key = jax.random.split(key)
  framed = jnp.pad(x_HWC, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1)
  corner = (*jax.random.randint(crop_key, (2,), 0, 2 * pad + 1), 0)
  cropped = jax.lax.dynamic_slice(framed, corner, x_HWC.shape)
  return jnp.where(jax.random.bernoulli(flip_key), cropped[:, ::-1], cropped)


def cutout(key: jax.Array, x_HWC: jax.Array, width: float) -> jax.Array:
  """The image with a black square, `width` pixels wide, about a random pixel (arXiv:1708.04552)."""
  rows, columns = (jnp.arange(n) for n in x_HWC.shape[:2])
  i, j = jax.random.uniform(key, (2, 1)) * jnp.array(x_HWC.shape[:2])[:, None] - 0.5
  inside = (abs(rows - i) < width / 2)[:, None] & (abs(columns - j) < width / 2)
  return jnp.where(inside[..., None], -1, x_HWC)


def mixup(
  key: jax.Array, alpha: float, x_B: jax.Array, targets_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Images and targets mixed with those of other examples (arXiv:1710.09412).

  One share, from Beta(alpha, alpha), for the whole batch: share x_b + (1 - share) x_pi(b).

  Args:
    key: a PRNG key.
    alpha: above 0.
    x_B: images, leading axis B.
    targets_BC: probabilities of the classes.
  """
  share_key, order_key = jax.random.split(key)
  share = jax.random.beta(share_key, alpha, alpha)
  order = jax.random.permutation(order_key, len(x_B))
  mixed_B, mixed_BC = (share * x + (1 - share) * x[order] for x in (x_B, targets_BC))
  return mixed_B, mixed_BC
