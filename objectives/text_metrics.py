"""Metrics of generated text by contextual embeddings: BERTScore, MoverScore, BaryScore.

BERTScore: Zhang et al., arXiv:1904.09675. MoverScore: Zhao et al., arXiv:1909.02622. BaryScore:
Colombo et al., arXiv:2108.12463. Conventions are those of the released code as "Reproducibility
Issues for BERT-based Evaluation Metrics" (arXiv:2204.00004) found them.

A text is vectors and weights of its units (pieces or words, the special tokens included). What
becomes a unit and what it weighs is common to the three and decided before them: `group_pieces`,
`inverse_document_frequency`. Greedy matching is JAX and batched; optimal transport is exact, by
POT's network simplex, a text at a time on the host in float64: a rounded plan would be another
metric.
"""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import ot

SUBWORDS = ("first", "all", "mean")


def inverse_document_frequency(
  documents: Sequence[Sequence[int] | np.ndarray], vocab: int
) -> np.ndarray:
  """log((N + 1) / (df + 1)) of each token of N documents, (vocab,) float64; log(N + 1) if unseen.

  A document counts once a token. A token of every document, such as [CLS], weighs 0.
  """
  seen = [np.unique(np.asarray(document)) for document in documents]
  frequency = np.bincount(np.concatenate(seen), minlength=vocab) if seen else np.zeros(vocab)
  return np.log((len(documents) + 1) / (frequency + 1))


def group_pieces(
  pieces: Sequence[str],
  subword: str = "all",
  stopwords: Collection[str] = (),
  punctuation: bool = True,
  special: Collection[str] = ("[CLS]", "[SEP]"),
) -> list[list[int]]:
  """Positions of the pieces that make each unit of a text, in order.

  Args:
    pieces: WordPieces; "##ing" goes on the word before it.
    subword: what of a word is kept: its "first" piece, "all" pieces, each a unit, or their "mean".
    stopwords: words, in lower case, that are dropped.
    punctuation: False drops words without a letter or digit.
    special: pieces that are kept whatever else is dropped.

  Raises: ValueError for an unknown `subword`.
  """
  if subword not in SUBWORDS:
    raise ValueError(f"subword={subword!r}; accepted: {', '.join(SUBWORDS)}")
  words: list[list[int]] = []
  for i, piece in enumerate(pieces):
    if piece.startswith("##") and words:
      words[-1].append(i)
    else:
      words.append([i])

  def kept(word: list[int]) -> bool:
    text = "".join(pieces[i].removeprefix("##") for i in word).lower()
    plain = text not in stopwords and (punctuation or any(c.isalnum() for c in text))
    return pieces[word[0]] in special or plain

  chosen = [word for word in words if kept(word)]
  match subword:
    case "first":
      return [word[:1] for word in chosen]
    case "all":
      return [[i] for word in chosen for i in word]
  return chosen


def bert_score(
  hypothesis_BND: jax.Array,
  reference_BMD: jax.Array,
  hypothesis_weights_BN: jax.Array,
  reference_weights_BM: jax.Array,
  hypothesis_mask_BN: jax.Array,
  reference_mask_BM: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Precision, recall and F of greedy matching, (B,) float32 each (arXiv:1904.09675, section 3).

  P = sum_j w_j max_i <h_j, r_i> with unit vectors and weights of sum 1, R the same from the
  reference's side, F = 2PR / (P + R). At padding (mask 0) the similarity is 0 before the max and
  the weight is 0. Special tokens weigh 0 in the released code, but others may match them. A side
  whose weights are all 0 scores 0.
  """

  def to_unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  def average(best: jax.Array, weights: jax.Array, mask: jax.Array) -> jax.Array:
    weights = weights.astype(jnp.float32) * mask
    return (best * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1e-12)

  pairs_BNM = hypothesis_mask_BN[:, :, None] * reference_mask_BM[:, None, :]
  similarity_BNM = (
    jnp.einsum("bnd,bmd->bnm", to_unit(hypothesis_BND), to_unit(reference_BMD)) * pairs_BNM
  )
  precision_B = average(similarity_BNM.max(2), hypothesis_weights_BN, hypothesis_mask_BN)
  recall_B = average(similarity_BNM.max(1), reference_weights_BM, reference_mask_BM)
  total_B = precision_B + recall_B
  f_B = 2 * precision_B * recall_B / jnp.where(total_B == 0, 1, total_B)
  return precision_B, recall_B, f_B


def rescale(score: jax.Array, baseline: float | jax.Array) -> jax.Array:
  """(score - b) / (1 - b): b, the score of unrelated sentences, becomes 0, and 1 stays 1."""
  return (score - baseline) / (1 - baseline)


def power_means(layers_KND: np.ndarray) -> np.ndarray:
  """MoverScore's (N, 3 D) vectors: minimum, mean and maximum over K layers, each a unit vector."""
  x = unit(layers_KND)
  return np.concatenate([x.min(0), x.mean(0), x.max(0)], -1)


def ngrams(vectors_ND: np.ndarray, weights_N: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Weighted means of each n units in a row, and their summed weights; one of all if there are few.

  Where the weights of a window are all 0, its units count alike.
  """
  n = min(n, len(vectors_ND))
  windows = np.arange(len(vectors_ND) - n + 1)[:, None] + np.arange(n)
  shares = _normalised(weights_N[windows])
  return np.einsum("gn,gnd->gd", shares, vectors_ND[windows]), weights_N[windows].sum(1)


def transport_distance(
  x_ND: np.ndarray, y_MD: np.ndarray, x_weights_N: np.ndarray, y_weights_M: np.ndarray
) -> float:
  """The least cost of moving x's mass onto y's under squared Euclidean distance.

  Weights are normalised to sum 1 (the released MoverScore divides by the sum + 1e-5, which leaves
  the two sides unequal by as much); where they are all 0 every unit weighs alike.
  """
  a, b = _normalised(x_weights_N), _normalised(y_weights_M)
  return float(ot.emd2(a, b, _squared_distances(x_ND, y_MD), check_marginals=False))


def mover_score(
  hypothesis_KND: np.ndarray,
  reference_KMD: np.ndarray,
  hypothesis_weights_N: np.ndarray,
  reference_weights_M: np.ndarray,
  n: int = 1,
) -> float:
  """1 - EMD between n-grams of power means over K layers, renormalised (arXiv:1909.02622)."""
  h, h_weights = ngrams(power_means(hypothesis_KND), hypothesis_weights_N, n)
  r, r_weights = ngrams(power_means(reference_KMD), reference_weights_M, n)
  return 1 - transport_distance(unit(h), unit(r), h_weights, r_weights)


def barycenter(
  clouds_KND: np.ndarray, weights_N: np.ndarray, steps: int = 1000, tolerance: float = 1e-7
) -> np.ndarray:
  """Free-support Wasserstein barycenter of K clouds, N points of mass 1/N each, (N, D) float64.

  Cuturi and Doucet, arXiv:1310.4375, algorithm 2: transport the support to each cloud, move every
  point to the mean over clouds of what it is matched with. All clouds have the same `weights_N`.
  The support starts at the last cloud; from zeros, as in the released BaryScore, every first plan
  costs the same and the result is the solver's choice.
  """
  clouds_KND = np.asarray(clouds_KND, np.float64)
  layers, count, width = clouds_KND.shape
  weights_N, mass_N = _normalised(weights_N), np.full(count, 1 / count)
  flat_MD, alike = clouds_KND.reshape(-1, width), np.ptp(weights_N) == 0
  support_ND = clouds_KND[-1]
  for _ in range(steps):
    moved_ND = np.zeros_like(support_ND)
    costs_NKN = _squared_distances(support_ND, flat_MD).reshape(count, layers, count)
    for cloud_ND, cost_NN in zip(clouds_KND, costs_NKN.swapaxes(0, 1), strict=True):
      if alike and (cost_NN.argmin(1) == np.arange(count)).all():
        moved_ND += cloud_ND  # each point's nearest is its own: no plan is cheaper
      else:
        plan_NN = ot.emd(mass_N, weights_N, cost_NN, check_marginals=False, center_dual=False)
        moved_ND += count * plan_NN @ cloud_ND
    moved_ND /= layers
    change, support_ND = ((moved_ND - support_ND) ** 2).sum(), moved_ND
    if change < tolerance:
      break
  return support_ND


def bary_distance(hypothesis_ND: np.ndarray, reference_MD: np.ndarray) -> float:
  """BaryScore of two barycenters: a distance, lower is better (arXiv:2108.12463)."""
  return transport_distance(
    hypothesis_ND, reference_MD, np.ones(len(hypothesis_ND)), np.ones(len(reference_MD))
  )


def kendall(better_P: jax.Array, worse_P: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(concordant - discordant, pairs) of WMT18's Kendall-like score; a tie is discordant.

  Args:
    better_P: scores of the hypotheses that people preferred; higher is better.
    worse_P: scores of the other of each pair.
  """
  concordant = jnp.where(better_P > worse_P, 1.0, -1.0)
  return concordant.sum(), jnp.float32(concordant.size)


def unit(x: np.ndarray) -> np.ndarray:
  """Vectors of length 1 along the last axis, float64; 0 stays 0."""
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _normalised(weights: np.ndarray) -> np.ndarray:
  weights = np.asarray(weights, np.float64)
  total = weights.sum(-1, keepdims=True)
  return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / weights.shape[-1])


def _squared_distances(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
  x_ND, y_MD = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
  squares = (x_ND**2).sum(1)[:, None] + (y_MD**2).sum(1) - 2 * x_ND @ y_MD.T
  return np.maximum(squares, 0)
