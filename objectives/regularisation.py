"""Classification under the usual regularisers: label smoothing, mixup, cutout and others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from objectives import augmentation, classification

REGULARISERS = ("none", "smoothing", "confidence", "jacobian", "cutout", "mixup")


def mean_entropy(logits_BC: jax.Array) -> jax.Array:
  """Mean entropy of the predictions, in nats."""
  return (jax.nn.softmax(logits_BC) * -jax.nn.log_softmax(logits_BC)).sum(-1).mean()


def jacobian_square_norm(
  key: jax.Array, apply: Callable[[jax.Array], jax.Array], x_B: jax.Array
) -> jax.Array:
  """Sum over examples of |d logits / d x|^2 (Frobenius), estimated by one normal direction each.

  Unbiased: E |J' v|^2 = |J|^2 for v of unit covariance (arXiv:1908.02729, section 2.3).

  Args:
    key: a PRNG key.
    apply: inputs -> logits (B, C).
    x_B: inputs, leading axis B.
  """
  logits_BC, pull = jax.vjp(apply, x_B)
  (slope_B,) = pull(jax.random.normal(key, logits_BC.shape))
  return (slope_B**2).sum()


def cross_entropy(
  key: jax.Array,
  apply: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
  batch: Mapping[str, jax.Array],
  classes: int,
  kind: str = "none",
  strength: float = 0.0,
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, tuple[classification.Metrics, Any]]:
  """Mean cross-entropy of a batch without padding, in nats, under one regulariser.

  | kind       | what it does                                                | source           |
  | ---------- | ----------------------------------------------------------- | ---------------- |
  | smoothing  | a share `strength` of each target goes to all classes alike | arXiv:1512.00567 |
  | confidence | loss - strength * entropy of the predictions                | arXiv:1701.06548 |
  | jacobian   | loss + strength / 2 * `jacobian_square_norm` / B            | arXiv:1908.02729 |
  | cutout     | `augmentation.cutout` of `strength` pixels                  | arXiv:1708.04552 |
  | mixup      | `augmentation.mixup` with alpha = `strength`                | arXiv:1710.09412 |

  Args:
    key: a PRNG key.
    apply: (key, inputs) -> logits (B, C) and anything else, such as updated statistics.
    batch: `inputs` (B, height, width, channels) from -1 to 1, `labels` (B,) int.
    classes: C.
    kind: one of REGULARISERS.
    strength: of it.
    augment: (key, image) -> image, of every image before anything else.

  Returns: the loss; and the metrics of `classification.cross_entropy` on the labels as they were,
  with whatever `apply` gave.

  Raises: ValueError for another `kind`.
  """
  if kind not in REGULARISERS:
    raise ValueError(f"regulariser={kind!r}; accepted: {', '.join(REGULARISERS)}")
  image_key, mix_key, cut_key, key = jax.random.split(key, 4)
  x_B = batch["inputs"]
  targets_BC = jax.nn.one_hot(batch["labels"], classes)
  if augment is not None:
    x_B = augmentation.each(augment, image_key, x_B)
  if kind == "cutout":
    cut = functools.partial(augmentation.cutout, width=strength)
    x_B = augmentation.each(cut, cut_key, x_B)
  if kind == "mixup":
    x_B, targets_BC = augmentation.mixup(mix_key, strength, x_B, targets_BC)
  if kind == "smoothing":
    targets_BC = optax.smooth_labels(targets_BC, strength)
  logits_BC, extra = apply(key, x_B)
  _, metrics = classification.cross_entropy(logits_BC, batch)
  value = optax.softmax_cross_entropy(logits_BC, targets_BC).mean()
  if kind == "confidence":
    value -= strength * mean_entropy(logits_BC)
  if kind == "jacobian":
    value += strength / 2 * jacobian_square_norm(key, lambda x: apply(key, x)[0], x_B) / len(x_B)
  return value, (metrics, extra)
