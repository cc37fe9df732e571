"""Metrics of generated text by contextual embeddings: BERTScore, MoverScore, BaryScore.

BERTScore: Zhang et al., arXiv:1904.09675. MoverScore: Zhao et al., arXiv:1909.02622. BaryScore:
Colombo et al., arXiv:2108.12463. Conventions are those of the released code as "Reproducibility
Issues for BERT-based Evaluation Metrics" (arXiv:2204.00004) found them.

A text is vectors and weights of its units (pieces or words, the special tokens included). What
becomes a unit and what it weighs is common to the three and decided before them: `Preprocessing`,
under which `corpus_scores` has all three of a corpus; `agreement` is theirs with people's scores.
Greedy matching is JAX and batched; optimal transport is exact, by POT's network simplex, a text at
a time on the host in float64: a rounded plan would be another metric.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ot

SUBWORDS = ("first", "all", "mean")
SPECIAL = ("[CLS]", "[SEP]")
AGGREGATIONS = ("greedy", "transport", "barycenter")  # BERTScore's, MoverScore's, BaryScore's


class Text(NamedTuple):
  """One text: ids (n,), pieces, and hidden states (layers + 1, n, H), the embeddings first."""

  ids: np.ndarray
  pieces: list[str]
  hidden: np.ndarray


class Preprocessing(NamedTuple):
  """What is done before an aggregation.

  Attributes:
    stopwords: words, in lower case, that are dropped.
    idf: units weigh their inverse document frequency, else alike.
    subword: one of SUBWORDS, what of a word is a unit.
    punctuation: is it kept?
  """

  stopwords: Collection[str] = ()
  idf: bool = False
  subword: str = "all"
  punctuation: bool = True


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
  special: Collection[str] = SPECIAL,
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


def agreement(
  statistic: str, score_N: np.ndarray, target_N: np.ndarray, source_N: np.ndarray
) -> float:
  """Of scores with people's judgements, higher the better in both.

  Args:
    statistic: "kendall", over the pairs of hypotheses of one reference that people rate apart
      (WMT18), or "pearson", over all hypotheses.
    score_N, target_N: the metric's and people's.
    source_N: which reference each hypothesis belongs to.
  """
  if statistic == "pearson":
    return float(np.corrcoef(score_N, target_N)[0, 1])
  pairs = (source_N[:, None] == source_N) & (target_N[:, None] > target_N)
  better, worse = np.nonzero(pairs)
  total, count = kendall(jnp.asarray(score_N[better]), jnp.asarray(score_N[worse]))
  return float(total / count)


def corpus_scores(
  references: Sequence[Text],
  hypotheses: Sequence[Text],
  source_N: Sequence[int] | np.ndarray,
  before: Preprocessing,
  *,
  layer: int,
  layers: int,
  vocab: int,
  length: int,
) -> dict[str, np.ndarray]:
  """{one of AGGREGATIONS: (N,) a score of each hypothesis, higher is better}.

  Conventions of the released code: BERTScore takes one layer, the references' IDF table on both
  sides, and special tokens without weight; the other two take several layers, a table of each
  side's own, and special tokens that weigh 1 without IDF. BaryScore's distance changes its sign.

  Args:
    references: M of them.
    hypotheses: N of them.
    source_N: (N,) the reference of each.
    before: the preprocessing, common to the three.
    layer: of greedy matching, counted from 1.
    layers: the last so many, of the other two.
    vocab: number of ids.
    length: the most units of a text.
  """
  tables = [
    inverse_document_frequency([t.ids for t in side], vocab) if before.idf else None
    for side in (references, hypotheses)
  ]
  r, h = (
    [_units(text, before, own, tables[0]) for text in side]
    for side, own in zip((references, hypotheses), tables, strict=True)
  )
  (r_NMD, r_weights_NM, r_mask_NM), (h_NLD, h_weights_NL, h_mask_NL) = (
    _padded([u.vectors[layer] for u in side], [u.greedy for u in side], length) for side in (r, h)
  )
  at = np.asarray(source_N)
  _, _, greedy = jax.jit(bert_score)(
    h_NLD, r_NMD[at], h_weights_NL, r_weights_NM[at], h_mask_NL, r_mask_NM[at]
  )
  last, pairs = slice(-layers, None), [(u, r[i]) for u, i in zip(h, at, strict=True)]
  mover = [mover_score(u.vectors[last], v.vectors[last], u.weights, v.weights) for u, v in pairs]
  centers = [[barycenter(unit(u.vectors[last]), u.weights) for u in side] for side in (r, h)]
  bary = [-bary_distance(c, centers[0][i]) for c, i in zip(centers[1], at, strict=True)]
  found = (np.asarray(greedy), np.array(mover), np.array(bary))
  return dict(zip(AGGREGATIONS, found, strict=True))


class _Units(NamedTuple):
  vectors: np.ndarray  # (layers + 1, n, H)
  weights: np.ndarray  # (n,) by the table of the text's own side
  greedy: np.ndarray  # (n,) by the references', special tokens 0


def _units(
  text: Text, before: Preprocessing, own: np.ndarray | None, references: np.ndarray | None
) -> _Units:
  """A unit's vectors are the mean of its pieces', its weight the mean of their IDFs, or 1."""
  stopwords, _, subword, punctuation = before
  groups = group_pieces(text.pieces, subword, stopwords, punctuation)

  def weigh(idf: np.ndarray | None) -> np.ndarray:
    each = np.ones(len(text.ids)) if idf is None else idf[text.ids]
    return np.array([each[group].mean() for group in groups])

  vectors = np.stack([text.hidden[:, group].mean(1) for group in groups], 1)
  special = [text.pieces[group[0]] in SPECIAL for group in groups]
  return _Units(vectors, weigh(own), np.where(special, 0, weigh(references)))


def _padded(
  vectors: Sequence[np.ndarray], weights: Sequence[np.ndarray], length: int
) -> tuple[np.ndarray, ...]:
  """Vectors (N, L, H), weights (N, L) and mask (N, L) of texts of different lengths."""
  vectors_NLH = np.zeros((len(vectors), length, vectors[0].shape[-1]), np.float32)
  weights_NL, mask_NL = np.zeros((2, len(vectors), length), np.float32)
  for i, (v, w) in enumerate(zip(vectors, weights, strict=True)):
    vectors_NLH[i, : len(v)], weights_NL[i, : len(v)], mask_NL[i, : len(v)] = v, w, 1
  return vectors_NLH, weights_NL, mask_NL


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
