"""Losses and metrics of classification."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def cross_entropy(
  logits_BC: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
  """Mean cross-entropy, in nats, and accuracy of integer labels.

  Args:
    logits_BC: unnormalised log-probabilities; computed in float32.
    batch: `labels` (B,) int; `mask` (B,) float32, optional: 0 leaves a row out.

  Returns: the mean loss, and `{"loss", "accuracy"}` as float32 (total, count).
  """
  labels_B = batch["labels"]
  mask_B = batch.get("mask", jnp.ones(labels_B.shape)).astype(jnp.float32)
  logits_BC = logits_BC.astype(jnp.float32)
  loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
  correct_B = (logits_BC.argmax(-1) == labels_B).astype(jnp.float32)
  count = mask_B.sum()
  total = (loss_B * mask_B).sum()
  metrics = {"loss": (total, count), "accuracy": ((correct_B * mask_B).sum(), count)}
  return total / jnp.maximum(count, 1), metrics
