"""Replaced token detection: what a generator and a discriminator are trained on together.

ELECTRA: Clark et al., arXiv:2003.10555. AMOS, where a mixture of generators plays against the
discriminator: Meng et al., arXiv:2204.03243, section 3. With `apply` of a `models.electra.Electra`,

    made = corrupt(apply, batch, key, depths=(4, 6, 8), mask=103, first=999)
    logits_BL = apply(made.embedded_BLH, method="discriminate")
    detected, metrics = detection(logits_BL, made.original_BL, made.asked)
    loss = made.loss + 50 * detected

is the whole of a step; ELECTRA's has one depth. The rest are the pieces, usable alone.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from objectives import language

Metrics = dict[str, tuple[jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
  """`x`, whose gradient is multiplied by `scale`; -1 reverses it (arXiv:1409.7495)."""
  del scale
  return x


scale_gradient.defvjp(lambda x, scale: (x, None), lambda scale, _, gradient: (scale * gradient,))


def masked_positions(
  key: jax.Array, candidates_BL: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
  """A fixed number of positions of each row, drawn among its candidates without replacement.

  Args:
    key: draws them.
    candidates_BL: bool, where a token may be masked.
    rate: share of a row's candidates to be masked, rounded, at least one where there is one.

  Returns: positions (B, M) int32, all different in a row, M = round(rate L) or 1, and weights
    (B, M) float32, 0 at those that a row with fewer candidates is not to use.

  Raises: ValueError for a rate that is not above 0, up to 1.
  """
  if not 0 < rate <= 1:
    raise ValueError(f"rate={rate}; accepted: above 0, up to 1")
  count = max(round(rate * candidates_BL.shape[1]), 1)
  draws_BL = jax.random.uniform(key, candidates_BL.shape) - ~candidates_BL
  _, positions_BM = jax.lax.top_k(draws_BL, count)
  there_B1 = candidates_BL.sum(axis=1, keepdims=True)
  used_B1 = jnp.minimum(jnp.maximum(jnp.round(rate * there_B1), 1), there_B1)
  return positions_BM, (jnp.arange(count) < used_B1).astype(jnp.float32)


def put(
  row_BL: jax.Array, positions_BM: jax.Array, values: jax.Array | int, weights_BM: jax.Array
) -> jax.Array:
  """(B, L, ...): rows with `values` (B, M, ...), or one for all, where weights are not 0."""

  def one(row: jax.Array, positions_M: jax.Array, values: jax.Array, weights_M: jax.Array):
    return row.at[jnp.where(weights_M > 0, positions_M, len(row))].set(values, mode="drop")

  shape = (*positions_BM.shape, *row_BL.shape[2:])
  values = jnp.broadcast_to(jnp.asarray(values, row_BL.dtype), shape)
  return jax.vmap(one)(row_BL, positions_BM, values, weights_BM)


def mixture(scores_PBM: jax.Array, logits_PBMV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mixture of the probes' logits (B, M, V), and its weights (P, B, M), float32.

  alpha = softmax over probes of the scores; z = sum_l alpha_l sg(z_l) (AMOS, section 3.2): logits
  are mixed, not probabilities, and what is done with the mixture trains its weights alone.
  """
  alpha_PBM = jax.nn.softmax(scores_PBM.astype(jnp.float32), axis=0)
  fixed_PBMV = jax.lax.stop_gradient(logits_PBMV.astype(jnp.float32))
  return jnp.einsum("pbm,pbmv->bmv", alpha_PBM, fixed_PBMV), alpha_PBM


def straight_through(key: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
  """A one-hot sample (..., V), float32, of the softmax of logits (..., V).

  onehot(argmax(z + g)) with Gumbel noise g; its gradient is that of softmax((z + g) / temperature)
  (arXiv:1611.01144), which the temperature scales, but not the sample.
  """
  noisy = logits.astype(jnp.float32) + jax.random.gumbel(key, logits.shape)
  soft = jax.nn.softmax(noisy / temperature)
  hard = jax.nn.one_hot(noisy.argmax(-1), logits.shape[-1])
  return hard + (soft - jax.lax.stop_gradient(soft))


def detection(
  logits_BL: jax.Array, original_BL: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
  """Mean binary cross-entropy, in nats, of telling original tokens from replaced ones.

  Args:
    logits_BL: of a token being the original; computed in float32.
    original_BL: bool, whether it is: a sampled token that happens to be the original is one.
    batch: `weights` (B, L) float32, optional: 1 where a token counts, 0 at padding; `mask` (B,)
      float32, optional: 0 leaves a row out.

  Returns: the mean over all tokens that count, masked or not, and as float32 (total, count) "loss",
  "accuracy", "replaced" (the share of tokens that are), and "missed" (the share of these that are
  taken for originals).
  """
  weights_BL = batch.get("weights", jnp.ones(logits_BL.shape)).astype(jnp.float32)
  if "mask" in batch:
    weights_BL = weights_BL * batch["mask"].astype(jnp.float32)[:, None]
  logits_BL, target_BL = logits_BL.astype(jnp.float32), original_BL.astype(jnp.float32)
  loss_BL = optax.sigmoid_binary_cross_entropy(logits_BL, target_BL)
  said_BL, replaced_BL = logits_BL > 0, weights_BL * (1 - target_BL)
  count = weights_BL.sum()
  total = (loss_BL * weights_BL).sum()
  return total / jnp.maximum(count, 1), {
    "loss": (total, count),
    "accuracy": ((weights_BL * (said_BL == original_BL)).sum(), count),
    "replaced": (replaced_BL.sum(), count),
    "missed": ((replaced_BL * said_BL).sum(), replaced_BL.sum()),
  }


class Corrupted(NamedTuple):
  """What a generator made of a batch.

  Attributes:
    loss: of the masked language models, summed over probes.
    tokens_BL: int, the rows with sampled tokens at the masked positions.
    original_BL: bool, where they are as they were.
    embedded_BLH: their embeddings, which lead back to the mixing weights.
    asked: `weights` and `mask` for `detection`: every token but padding (0).
    metrics: of each depth D, "masked D", its loss, and "alpha D", its mean mixing weight;
      "entropy", the mixing weights' mean entropy, 1 where all are alike. float32 (total, count).
  """

  loss: jax.Array
  tokens_BL: jax.Array
  original_BL: jax.Array
  embedded_BLH: jax.Array
  asked: dict[str, jax.Array]
  metrics: Metrics


def corrupt(
  apply: Callable[..., Any],
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  *,
  depths: tuple[int, ...],
  mask: int,
  first: int,
  rate: float = 0.15,
  temperature: float = 0.3,
  reversal: float = -1.0,
  uniform: bool = False,
  stop_hidden: bool = False,
) -> Corrupted:
  """Masks, asks every probe, mixes, samples (AMOS, sections 3.1 and 3.2).

  Args:
    apply: `apply` of a `models.electra.Electra`, with its variables.
    batch: `inputs` (B, L) int, 0 at padding; `mask` (B,) float32, 0 leaves a row out.
    key: draws masks and samples.
    depths: of the probes, for the names of the metrics.
    mask, first: id of the mask token, and the first id that may be masked.
    rate: share of the tokens that is masked.
    temperature: of the samples' gradient.
    reversal: multiplies the discriminator's gradient where it leaves for the mixing weights. The
      embeddings have it as it is.
    uniform: mixing weights that are all alike, in place of learned ones.
    stop_hidden: the mixing weights do not train the states that they are computed from, so that the
      mixing vector alone is adversarial; the released code has them train those.
  """
  mask_key, sample_key = jax.random.split(key)
  tokens_BL = batch["inputs"]
  positions_BM, weights_BM = masked_positions(mask_key, tokens_BL >= first, rate)
  masked_BL = put(tokens_BL, positions_BM, mask, weights_BM)
  hidden_PBMH = apply(masked_BL, positions_BM, method="generate")
  logits_PBMV = apply(hidden_PBMH, method="unembed")

  targets_BM = jnp.take_along_axis(tokens_BL, positions_BM, axis=1)
  asked = {"targets": targets_BM, "weights": weights_BM, "mask": batch["mask"]}
  losses_P, found = jax.vmap(lambda logits: language.next_token(logits, asked))(logits_PBMV)

  scored_PBMH = jax.lax.stop_gradient(hidden_PBMH) if stop_hidden else hidden_PBMH
  scores_PBM = apply(scored_PBMH, method="score") * (0.0 if uniform else 1.0)
  mixed_BMV, alpha_PBM = mixture(scores_PBM, logits_PBMV)
  code_BMV = straight_through(sample_key, mixed_BMV, temperature)
  embedded_BMH = apply(scale_gradient(code_BMV, reversal), method="embed")
  sampled_BL = put(tokens_BL, positions_BM, code_BMV.argmax(-1), weights_BM)

  counted_BM = weights_BM * batch["mask"][:, None]
  entropy_BM = jax.scipy.special.entr(alpha_PBM).sum(0) / np.log(max(len(depths), 2))
  metrics = {"entropy": ((entropy_BM * counted_BM).sum(), counted_BM.sum())}
  for i, depth in enumerate(depths):
    metrics[f"masked {depth}"] = found["loss"][0][i], found["loss"][1][i]
    metrics[f"alpha {depth}"] = (alpha_PBM[i] * counted_BM).sum(), counted_BM.sum()
  return Corrupted(
    loss=losses_P.sum(),
    tokens_BL=sampled_BL,
    original_BL=sampled_BL == tokens_BL,
    embedded_BLH=put(apply(tokens_BL, method="embed"), positions_BM, embedded_BMH, weights_BM),
    asked={"weights": (tokens_BL > 0).astype(jnp.float32), "mask": batch["mask"]},
    metrics=metrics,
  )
