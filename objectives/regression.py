"""Losses and metrics of regression, at every frame of a sequence or once an example."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]

VARIANCE_FLOOR = 1e-6


def frame_weights(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Weights of `targets` without their last axis, float32: 0 at padding rows and padding frames.

  `mask` (B,) leaves out rows; `lengths` (B,) leaves out frames of (B, L, K) targets. Both optional.
  """
  shape = batch["targets"].shape[:-1]
  weights = jnp.ones(shape, jnp.float32)
  if "mask" in batch:
    weights *= batch["mask"].astype(jnp.float32).reshape(-1, *(1,) * (len(shape) - 1))
  if "lengths" in batch and len(shape) == 2:
    weights *= jnp.arange(shape[1]) < batch["lengths"][:, None]
  return weights


def _squared_error(
  predictions: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  """Errors squared, their weights, and the (total, count) of the mean over frames and targets."""
  targets = batch["targets"].astype(jnp.float32)
  weights = frame_weights(batch)
  squares = (predictions.astype(jnp.float32) - targets) ** 2
  total = (squares * weights[..., None]).sum()
  return squares, weights, (total, weights.sum() * targets.shape[-1])


def gaussian_nll(
  outputs: tuple[jax.Array, jax.Array], batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
  """Gaussian negative log-likelihood, in nats, of independent targets.

  0.5 (log(2 pi v) + (m - y)^2 / v), summed over the K targets and averaged over frames, with v at
  least 1e-6.

  Args:
    outputs: mean and variance, each of the shape of `targets`.
    batch: `targets` (B, L, K) or (B, K); `mask` and `lengths` as in `frame_weights`.

  Returns: the mean loss, and as float32 (total, count) `loss`, a frame, and `mse`, a frame and
    target.
  """
  mean, variance = outputs
  variance = jnp.maximum(variance.astype(jnp.float32), VARIANCE_FLOOR)
  squares, weights, mse = _squared_error(mean, batch)
  nll = 0.5 * (math.log(2 * math.pi) + jnp.log(variance) + squares / variance).sum(-1)
  total, count = (nll * weights).sum(), weights.sum()
  return total / jnp.maximum(count, 1), {"loss": (total, count), "mse": mse}


def mean_squared_error(
  predictions: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
  """Mean squared error over frames and targets; arguments and metrics as for `gaussian_nll`."""
  _, _, (total, count) = _squared_error(predictions, batch)
  return total / jnp.maximum(count, 1), {"loss": (total, count), "mse": (total, count)}
