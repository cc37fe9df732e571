"""Few-shot pools: nothing tells the class by name, draws share nothing, pairs are SetFit's."""

import re

import numpy as np
import pytest

from experiments.datasets import few_shot


@pytest.mark.parametrize(
  ("sentence", "name", "plain"),
  [
    ("Compute the fast Fourier transform.", ".fft", "Compute the fast Fourier transform."),
    ("Solve a linear system by LAPACK.", ".solve", "something a linear system by LAPACK."),
    ("Return `x_0` of scipy.stats results.", ".f", "Return something of something results."),
    ("The statistical model's signal.", ".Model.fit", "The something something something"),
  ],
)
def test_names_and_code_are_masked(sentence, name, plain):
  assert few_shot.masked(sentence, name, ("stat", "sig")) == plain


@pytest.mark.parametrize("name", few_shot.DOCSTRINGS)
def test_pools(name):
  pool = few_shot.pool(name)
  assert len(pool.classes) == 6
  assert np.bincount(pool.labels).min() >= 8 + (70 if name == "tuning" else 100)
  words = [set(re.findall(r"[a-z]+", t.lower().replace(few_shot.MASK, ""))) for t in pool.texts]
  for i in np.random.RandomState(0).permutation(len(words))[:100]:
    shared = [4 * len(words[i] & w) / max(len(words[i]), len(w)) for w in words]
    assert sorted(shared)[-2] < 3  # nothing else is nearly alike
  for label, label_name in enumerate(pool.classes):
    own = re.split(r"\W", few_shot.DOCSTRINGS[name][1][label_name][0])[-1]
    if len(own) > 3:
      texts = [t for t, c in zip(pool.texts, pool.labels, strict=True) if c == label]
      assert not any(re.search(rf"\b{own}", t.lower()) for t in texts)


def test_the_pool_for_tuning_is_another():
  assert not set(few_shot.pool("science").texts) & set(few_shot.pool("tuning").texts)


def test_draws():
  pool = few_shot.pool("science")
  drawn = few_shot.draw(pool, 8, 50, 0)
  assert np.bincount(pool.labels[drawn.train]).tolist() == [8] * 6
  assert np.bincount(pool.labels[drawn.held_out]).tolist() == [50] * 6
  assert not set(drawn.train) & set(drawn.held_out)
  np.testing.assert_array_equal(few_shot.draw(pool, 8, 50, 0).train, drawn.train)
  assert set(few_shot.draw(pool, 8, 50, 1).train) != set(drawn.train)
  with pytest.raises(ValueError, match="per_class=900 and held_out=50; "):
    few_shot.draw(pool, 900, 50, 0)


def test_a_test_set_of_its_own():
  pool = few_shot.Pool(tuple("abcdefgh"), np.array([0, 1] * 4), ("x", "y"), tested=4)
  drawn = few_shot.draw(pool, 2, 2, 0)
  assert sorted(drawn.train) == [0, 1, 2, 3] and sorted(drawn.held_out) == [4, 5, 6, 7]
  with pytest.raises(ValueError, match="per_class=3 and held_out=1; 'x' has 4"):
    few_shot.draw(pool, 3, 1, 0)


def test_pairs_are_2_r_m_half_of_one_class():
  labels = np.repeat([0, 1, 2], 4)
  rows, targets = few_shot.pairs(labels, 20, 0)
  assert rows.shape == (2 * 20 * 12, 2) and targets.mean() == 0.5
  same = labels[rows[:, 0]] == labels[rows[:, 1]]
  np.testing.assert_array_equal(same, targets == 1)
  assert np.bincount(rows[:, 0]).tolist() == [40] * 12  # each example is an anchor as often
  positive = rows[targets == 1]
  assert 0.1 < (positive[:, 0] == positive[:, 1]).mean() < 0.4  # itself, one time in four
  again, _ = few_shot.pairs(labels, 20, 1)
  assert not np.array_equal(rows, again)


def test_what_only_a_hub_has():
  with pytest.raises(ValueError, match="name='sst5'; accepted: science, tuning, library"):
    few_shot.pool("sst5")
