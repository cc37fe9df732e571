"""Losses and metrics of language models."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def next_token(logits_BLV: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Metrics]:
  """Mean cross-entropy, in nats, of the tokens that count.

  Args:
    logits_BLV: unnormalised log-probabilities of the next token; computed in float32.
    batch: `targets` (B, L) int; `weights` (B, L) float32, optional: what a target counts; `mask`
      (B,) float32, optional: 0 leaves a row out.

  Returns: the mean loss, and as float32 (total, count) "loss" in nats, "bits" (both a token) and
  "accuracy". The perplexity is 2 ** bits.
  """
  targets_BL = batch["targets"]
  weights_BL = batch.get("weights", jnp.ones(targets_BL.shape)).astype(jnp.float32)
  if "mask" in batch:
    weights_BL = weights_BL * batch["mask"].astype(jnp.float32)[:, None]
  logits_BLV = logits_BLV.astype(jnp.float32)
  loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
  correct_BL = (logits_BLV.argmax(-1) == targets_BL).astype(jnp.float32)
  count = weights_BL.sum()
  total = (loss_BL * weights_BL).sum()
  metrics = {
    "loss": (total, count),
    "bits": (total / jnp.log(2.0), count),
    "accuracy": ((correct_BL * weights_BL).sum(), count),
  }
  return total / jnp.maximum(count, 1), metrics


def shifted(tokens_BT: jax.Array, padding: int = 0) -> dict[str, jax.Array]:
  """Rows of L + 1 tokens as examples of `next_token`: "inputs", "targets", "weights", (B, L) each.

  Every target counts, 1.0, but for `padding`, 0.0.
  """
  asked_BL = tokens_BT[:, 1:]
  return {"inputs": tokens_BT[:, :-1], "targets": asked_BL, "weights": 1.0 * (asked_BL != padding)}
