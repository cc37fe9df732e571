"""Contrastive losses of embeddings: cosine similarity of pairs, and InfoNCE.

Batches are written as if they were whole: under `jit` with the batch sharded over devices, the
compiler gathers what a matrix of similarities needs, so that every other example of the global
batch is a negative and the gradient flows back to the device that holds it.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def normalise(x: jax.Array) -> jax.Array:
  """Unit vectors along the last axis, float32; 0 stays 0, with gradient 0."""
  x = x.astype(jnp.float32)
  square = (x**2).sum(-1, keepdims=True)
  return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def cosine_pairs(
  embeddings_B2D: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
  """Mean of (cos(u, v) - target)^2 over pairs (SetFit, arXiv:2209.11055, section 3).

  Args:
    embeddings_B2D: the two sides of each pair; normalised here, in float32.
    batch: `targets` (B,) float, 1 for a pair of one class and 0 for a pair of two; `mask` (B,)
      float32, optional: 0 leaves a row out.

  Returns: the mean loss, and `{"loss", "accuracy"}` as float32 (total, count); a pair is accurate
    where the cosine is on its target's side of 1/2.
  """
  targets_B = batch["targets"].astype(jnp.float32)
  mask_B = batch.get("mask", jnp.ones(targets_B.shape)).astype(jnp.float32)
  cosine_B = normalise(embeddings_B2D).prod(1).sum(-1)
  total, count = ((cosine_B - targets_B) ** 2 * mask_B).sum(), mask_B.sum()
  right_B = ((cosine_B > 0.5) == (targets_B > 0.5)).astype(jnp.float32)
  metrics = {"loss": (total, count), "accuracy": ((right_B * mask_B).sum(), count)}
  return total / jnp.maximum(count, 1), metrics


def similarities(
  u_BD: jax.Array, v_BD: jax.Array, mask_B: jax.Array | None, temperature: float | jax.Array
) -> jax.Array:
  """Cosines over the temperature of every u (rows) with every v (columns), (B, B) float32.

  A column with mask 0 is no negative: its logit is the least that float32 has.
  """
  logits_BB = jnp.matmul(normalise(u_BD), normalise(v_BD).T, preferred_element_type=jnp.float32)
  logits_BB = logits_BB / temperature
  if mask_B is None:
    return logits_BB
  return jnp.where(mask_B[None, :] > 0, logits_BB, jnp.finfo(jnp.float32).min)


def info_nce(
  embeddings: tuple[jax.Array, jax.Array],
  batch: Mapping[str, jax.Array],
  temperature: float | jax.Array = 1.0,
) -> tuple[jax.Array, Metrics]:
  """Symmetric InfoNCE: each u against all v of the global batch and the reverse, halved.

  van den Oord et al., arXiv:1807.03748, eq. 4; symmetric as in CLIP (arXiv:2103.00020, fig. 3).

  Args:
    embeddings: u and v, (B, D) each; row i of one belongs to row i of the other.
    batch: `mask` (B,) float32, optional: 0 makes a row neither example nor negative.
    temperature: divides the cosines; CLIP's exp(-s), where s is learnt.

  Returns: the mean loss, in nats, and as float32 (total, count) `loss`, `accuracy` (of u finding
    its v) and `accuracy_back`.
  """
  u_BD, v_BD = embeddings
  given = batch.get("mask")
  mask_B = jnp.ones(u_BD.shape[0]) if given is None else given.astype(jnp.float32)
  labels_B, count = jnp.arange(u_BD.shape[0]), mask_B.sum()
  total, metrics = jnp.zeros(()), {}
  for name, sides in (("accuracy", (u_BD, v_BD)), ("accuracy_back", (v_BD, u_BD))):
    logits_BB = similarities(*sides, given, temperature)
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BB, labels_B)
    total += (jnp.where(mask_B > 0, loss_B, 0) * mask_B).sum() / 2
    right_B = (logits_BB.argmax(-1) == labels_B).astype(jnp.float32)
    metrics[name] = ((right_B * mask_B).sum(), count)
  return total / jnp.maximum(count, 1), {"loss": (total, count)} | metrics
