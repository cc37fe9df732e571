"""Metrics of generated text: loops in float64, the linear programme, and published conventions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from objectives import text_metrics


def linear_programme(a, b, cost):
  """The transport problem by HiGHS."""
  n, m = cost.shape
  rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
  equal, sums = np.vstack([rows, columns]), np.concatenate([a, b])
  return optimize.linprog(cost.ravel(), A_eq=equal, b_eq=sums, method="highs").fun


def squared(x, y):
  return ((x[:, None] - y[None]) ** 2).sum(-1)


def greedy(h, r, w_h, w_r):
  """BERTScore in float64, a loop a token."""
  h, r = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, r))
  p = sum(w * max(a @ b for b in r) for a, w in zip(h, w_h, strict=True)) / w_h.sum()
  q = sum(w * max(a @ b for b in h) for a, w in zip(r, w_r, strict=True)) / w_r.sum()
  return p, q, 2 * p * q / (p + q)


def padded(x, length, value):
  return np.concatenate([x, np.full((length - len(x), *x.shape[1:]), value, x.dtype)])


def test_idf_counts_a_document_once_a_token():
  idf = text_metrics.inverse_document_frequency([[0, 1, 1, 2], [0, 2], [0, 3]], 6)
  np.testing.assert_allclose(idf, np.log(4 / (np.array([3, 1, 2, 1, 0, 0]) + 1)))
  assert idf[0] == 0 and idf[5] == np.log(4)


PIECES = ["[CLS]", "The", "play", "##ing", "field", ",", "s", "##d", ".", "[SEP]"]


@pytest.mark.parametrize(
  ("options", "groups"),
  [
    ({}, [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9]]),
    ({"subword": "first"}, [[0], [1], [2], [4], [5], [6], [8], [9]]),
    ({"subword": "mean"}, [[0], [1], [2, 3], [4], [5], [6, 7], [8], [9]]),
    ({"subword": "mean", "punctuation": False}, [[0], [1], [2, 3], [4], [6, 7], [9]]),
    ({"stopwords": {"the", "playing"}}, [[0], [4], [5], [6], [7], [8], [9]]),
    (
      {"stopwords": {"play", "[cls]"}, "subword": "first"},
      [[0], [1], [2], [4], [5], [6], [8], [9]],
    ),
  ],
)
def test_units(options, groups):
  assert text_metrics.group_pieces(PIECES, **options) == groups


def test_an_unknown_treatment_of_subwords():
  with pytest.raises(ValueError, match="subword='last'; accepted: first, all, mean"):
    text_metrics.group_pieces(PIECES, "last")


def test_bert_score_is_greedy_matching_whatever_the_padding():
  random = np.random.RandomState(0)
  sizes, length, width = [(4, 6), (7, 3), (1, 1)], 9, 5
  texts = [(random.rand(n, width), random.rand(m, width)) for n, m in sizes]
  weights = [(random.rand(n), random.rand(m)) for n, m in sizes]
  expected = [greedy(h, r, *w) for (h, r), w in zip(texts, weights, strict=True)]
  arrays = [np.stack([padded(t[side], length, 1e3) for t in texts]) for side in (0, 1)]
  arrays += [np.stack([padded(w[side], length, 7.0) for w in weights]) for side in (0, 1)]
  arrays += [np.stack([np.arange(length) < s[side] for s in sizes]) * 1.0 for side in (0, 1)]
  measured = jax.jit(text_metrics.bert_score)(*map(jnp.float32, arrays))
  np.testing.assert_allclose(np.stack(measured, 1), expected, rtol=1e-5)


def test_padding_is_similarity_0_before_the_max():
  """As released: a token that is unlike every other (-1 here) scores 0 once there is padding."""
  h, r, one = np.ones((1, 1, 2)), -np.ones((1, 2, 2)), np.ones((1, 1))
  for mask, wanted in (([[1, 1]], -1.0), ([[1, 0]], 0.0)):
    precision, _, _ = text_metrics.bert_score(h, r, one, np.ones((1, 2)), one, np.array(mask))
    assert float(precision[0]) == pytest.approx(wanted)


def test_bert_score_of_itself_is_one_and_special_tokens_may_be_matched():
  x = np.random.RandomState(1).randn(1, 5, 8)
  ones = np.ones((1, 5))
  assert text_metrics.bert_score(x, x, ones, ones, ones, ones)[2] == pytest.approx(1.0)
  weights = ones.copy()
  weights[0, [0, -1]] = 0  # special tokens
  reference = np.random.RandomState(2).randn(1, 5, 8)
  reference[0, 0] = x[0, 2]  # the reference's [CLS] is what the hypothesis says
  precision, recall, _ = text_metrics.bert_score(x, reference, weights, weights, ones, ones)
  wanted = greedy(x[0], reference[0], weights[0], weights[0])
  np.testing.assert_allclose([precision[0], recall[0]], wanted[:2], rtol=1e-5)
  nothing = text_metrics.bert_score(x, x, 0 * ones, ones, ones, ones)
  assert float(nothing[0][0]) == 0 and float(nothing[2][0]) == 0


def test_baseline_rescaling():
  np.testing.assert_allclose(text_metrics.rescale(np.array([0.3, 1.0, 0.65]), 0.3), [0, 1, 0.5])


@pytest.mark.parametrize("seed", range(4))
def test_transport_is_the_linear_programme(seed):
  random = np.random.RandomState(seed)
  x, y = random.randn(6 + seed, 3), random.randn(4, 3)
  a, b = random.rand(6 + seed), random.rand(4)
  a[0] = 0  # a special token under IDF
  wanted = linear_programme(a / a.sum(), b / b.sum(), squared(x, y))
  assert text_metrics.transport_distance(x, y, a, b) == pytest.approx(wanted, abs=1e-7)
  assert text_metrics.transport_distance(x, x, a, a) == pytest.approx(0, abs=1e-9)
  even = text_metrics.transport_distance(x, y, 0 * a, b)
  assert even == pytest.approx(text_metrics.transport_distance(x, y, np.ones_like(a), b))


def test_mover_score_in_plain_numpy():
  random = np.random.RandomState(3)
  h, r, w_h, w_r = random.randn(5, 4, 6), random.randn(5, 3, 6), random.rand(4), random.rand(3)

  def features(layers):
    layers = layers / np.linalg.norm(layers, axis=-1, keepdims=True)
    x = np.concatenate([layers.min(0), layers.mean(0), layers.max(0)], -1)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  cost = squared(features(h), features(r))
  wanted = 1 - linear_programme(w_h / w_h.sum(), w_r / w_r.sum(), cost)
  assert text_metrics.mover_score(h, r, w_h, w_r) == pytest.approx(wanted, abs=1e-7)
  # the sides are not alike: exchanging their weights is another metric
  exchanged = text_metrics.mover_score(h, r[:, [0, 1, 2, 2]], w_r[[0, 1, 2, 2]], w_h)
  assert exchanged != pytest.approx(wanted, abs=1e-4)


def test_ngrams():
  vectors, weights = np.arange(8.0).reshape(4, 2), np.array([1.0, 3.0, 0.0, 0.0])
  means, sums = text_metrics.ngrams(vectors, weights, 2)
  np.testing.assert_allclose(means, [[1.5, 2.5], [2, 3], [5, 6]])
  np.testing.assert_allclose(sums, [4, 3, 0])
  np.testing.assert_allclose(text_metrics.ngrams(vectors, weights, 9)[1], [4])
  np.testing.assert_array_equal(text_metrics.ngrams(vectors, weights, 1)[0], vectors)


@pytest.mark.parametrize("even", [True, False])
def test_a_barycenter_is_a_fixed_point_that_lowers_the_objective(even):
  random = np.random.RandomState(4)
  clouds = random.randn(3, 5, 2) + 2 * random.randn(1, 5, 2)
  weights = np.ones(5) if even else random.rand(5)
  center = text_metrics.barycenter(clouds, weights)
  mass, w = np.ones(5) / 5, weights / weights.sum()

  def objective(support):
    return sum(linear_programme(mass, w, squared(support, cloud)) for cloud in clouds)

  assert objective(center) <= min(objective(cloud) for cloud in clouds) + 1e-9
  for step in 1e-3 * random.randn(5, 5, 2):
    assert objective(center) <= objective(center + step) + 1e-9


def test_a_barycenter_of_one_cloud_and_of_translates():
  cloud = np.random.RandomState(5).randn(6, 3)
  np.testing.assert_allclose(text_metrics.barycenter(cloud[None], np.ones(6)), cloud)
  clouds = np.stack([cloud - 0.1, cloud + 0.3])
  np.testing.assert_allclose(text_metrics.barycenter(clouds, np.ones(6)), cloud + 0.1)


def test_bary_distance_is_a_distance():
  cloud = np.random.RandomState(6).randn(6, 3)
  assert text_metrics.bary_distance(cloud, cloud[::-1]) == pytest.approx(0, abs=1e-9)
  assert text_metrics.bary_distance(cloud, cloud + 1) == pytest.approx(3)


def test_kendall_counts_a_tie_as_discordant():
  total, count = text_metrics.kendall(
    jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0.0, 2.0, 4.0, 1.0])
  )
  assert (float(total), float(count)) == (0.0, 4.0)


# A corpus under one preprocessing


def texts(random, count, length=9):
  """Encoded texts of words, a comma and continuations, with random hidden states."""
  pieces = ["[CLS]", "the", "word", "##s", "go", ",", "far", "##ther", "[SEP]"][:length]
  return [
    text_metrics.Text(
      np.array([1, *random.randint(3, 30, length - 2), 2]), pieces, random.randn(7, length, 8)
    )
    for _ in range(count)
  ]


CELLS = list(itertools.product((False, True), (False, True), text_metrics.SUBWORDS, (False, True)))


def score(references, hypotheses, cell, source):
  drops, *choices = cell
  before = text_metrics.Preprocessing({"the"} if drops else (), *choices)
  sizes = {"layer": 5, "layers": 5, "vocab": 30, "length": 16}
  return text_metrics.corpus_scores(references, hypotheses, source, before, **sizes)


@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_itself_scores_best(cell):
  random = np.random.RandomState(0)
  references = texts(random, 3)
  found = score(references, [references[1], *texts(random, 3)], cell, [1, 1, 1, 1])
  assert set(found) == set(text_metrics.AGGREGATIONS)
  for name, values in found.items():
    assert values.argmax() == 0, name  # a distance has had its sign changed
  best = {"greedy": 1.0, "transport": 1.0, "barycenter": 0.0}
  if not cell[1]:  # under IDF the two sides weigh alike only with one table
    for name, value in best.items():
      assert found[name][0] == pytest.approx(value, abs=1e-5)


def test_one_table_for_greedy_matching_and_two_for_transport():
  random = np.random.RandomState(1)
  references, hypotheses = texts(random, 4), texts(random, 4)
  cell, source = (False, True, "all", True), np.arange(4)
  found = score(references, hypotheses, cell, source)
  of_r, of_h = (
    text_metrics.inverse_document_frequency([t.ids for t in side], 30)
    for side in (references, hypotheses)
  )
  ones = np.ones((1, 9))
  for i, (r, h) in enumerate(zip(references, hypotheses, strict=True)):
    sides = h.hidden[None, 5], r.hidden[None, 5]
    _, _, f = text_metrics.bert_score(*sides, of_r[h.ids][None], of_r[r.ids][None], ones, ones)
    assert found["greedy"][i] == pytest.approx(float(f[0]), abs=1e-5)
    mover = text_metrics.mover_score(h.hidden[-5:], r.hidden[-5:], of_h[h.ids], of_r[r.ids])
    assert found["transport"][i] == pytest.approx(mover, abs=1e-6)
    # the released BaryScore takes the tables the other way round
    exchanged = text_metrics.mover_score(h.hidden[-5:], r.hidden[-5:], of_r[h.ids], of_h[r.ids])
    assert abs(exchanged - mover) > 1e-4


def test_which_side_is_the_reference_matters():
  random = np.random.RandomState(2)
  references, hypotheses = texts(random, 4), texts(random, 4, length=6)
  for name in ("greedy", "transport"):
    there, back = (
      score(*sides, (False, True, "all", True), np.arange(4))[name]
      for sides in ((references, hypotheses), (hypotheses, references))
    )
    if name == "greedy":  # the table is the reference's
      assert np.abs(there - back).max() > 1e-4
    else:
      np.testing.assert_allclose(there, back, atol=1e-9)


def test_agreement():
  source, target = np.array([0, 0, 0, 1, 1]), np.array([0, -1, -2, 0, -1])
  perfect = np.array([5.0, 4.0, 3.0, -1.0, -2.0])
  assert text_metrics.agreement("kendall", perfect, target, source) == 1
  assert text_metrics.agreement("kendall", -perfect, target, source) == -1
  assert text_metrics.agreement("kendall", 0 * perfect, target, source) == -1  # ties
  swapped = np.array([4.0, 5.0, 3.0, -1.0, -2.0])
  assert text_metrics.agreement("kendall", swapped, target, source) == pytest.approx(0.5)
  assert text_metrics.agreement("pearson", 2.0 * target + 1, target, source) == pytest.approx(1)
