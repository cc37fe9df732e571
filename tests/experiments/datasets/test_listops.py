"""ListOps: an independent evaluator, the bounds, the distribution, and which example is where."""

import statistics

import numpy as np
import pytest

from experiments.datasets import listops, sources, views

SPLITS = ("train", "validation", "test")
SMALL = dict(min_length=10, max_length=80, train=400, validation=60, test=60, seed=3)


@pytest.fixture(scope="module")
def small(data_dir):
  return {s: sources.load("listops", s, data_dir=data_dir, **SMALL) for s in SPLITS}


def words(example):
  return [listops.VOCABULARY[t] for t in example["tokens"]]


def parse(text):
  """(value, depth, rest, widths) of the first node of a list of words, recursively."""
  head, rest = text[0], text[1:]
  if head.isdigit():
    return int(head), 1, rest, []
  values, depths, widths = [], [], []
  while rest[0] != "X":
    value, depth, rest, inner = parse(rest)
    values.append(value)
    depths.append(depth)
    widths += inner
  value = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda v: int(statistics.median(v)),
    "[SM": lambda v: sum(v) % 10,
  }[head](values)
  return value, 1 + max(depths), rest[1:], [*widths, len(values)]


def test_vocabulary():
  assert listops.VOCABULARY[:3] == ("<pad>", "<unk>", "<eos>")
  assert len(listops.VOCABULARY) == len(set(listops.VOCABULARY)) == 18 <= listops.WIDTH == 20
  assert views.PAD == listops.PAD == 0


@pytest.mark.parametrize("split", SPLITS)
def test_values_lengths_and_arguments(small, split):
  assert len(small[split]) == SMALL[split]
  for i in range(len(small[split])):
    example = small[split][i]
    *text, end = words(example)
    assert end == "<eos>"
    assert SMALL["min_length"] < len(text) < SMALL["max_length"]
    value, depth, rest, widths = parse(text)
    assert not rest
    assert value == example["label"]
    assert depth <= 10
    assert 2 <= min(widths) <= max(widths) <= 10


def test_no_expression_occurs_twice(small):
  texts = [small[s][i]["tokens"].tobytes() for s in SPLITS for i in range(len(small[s]))]
  assert len(texts) == len(set(texts))


def test_even_a_crowded_space_has_disjoint_splits():
  # 200 of the 400 expressions of two digits are asked for, so that collisions are certain.
  config = listops.config(min_length=3, max_length=5, max_args=2, train=100, validation=50, test=50)
  texts = [t for s in SPLITS for t, _ in listops.expressions(config, s)]
  assert len(texts) == len(set(texts)) == 200


def test_a_larger_training_set_extends_a_smaller_one():
  few = listops.config(**{**SMALL, "train": 50})
  many = listops.config(**SMALL)
  assert list(listops.expressions(few, "train")) == list(listops.expressions(many, "train"))[:50]
  assert list(listops.expressions(few, "test")) == list(listops.expressions(many, "test"))


def test_distribution_follows_the_rule():
  # At depth 2 nothing is rejected but lone digits, so the rule's own probabilities show.
  config = listops.config(
    min_length=1, max_length=2_000, max_depth=3, max_args=10, train=4_000, validation=1, test=1
  )
  operators, arguments, inner, digits = np.zeros(4), [], 0, np.zeros(10)
  for tokens, _ in listops.expressions(config, "train"):
    depth, children = 0, []
    for token in tokens[:-1]:
      word = listops.VOCABULARY[token]
      if word == "X":
        depth -= 1
        continue
      if depth == 1:
        children.append(word)
      if word.isdigit():
        digits[int(word)] += 1
      else:
        operators[token - listops.OPERATOR] += 1
        depth += 1
    arguments.append(len(children))
    inner += sum(not c.isdigit() for c in children)
  # Rejected duplicates are mostly of two digits, which is why the bounds are not tighter.
  assert np.abs(operators / operators.sum() - 0.25).max() < 0.02
  assert np.abs(digits / digits.sum() - 0.1).max() < 0.01
  assert abs(np.mean(arguments) - 6) < 0.2
  assert abs(inner / sum(arguments) - 0.25) < 0.02


def test_arena_lengths(data_dir):
  config = listops.config(train=30, validation=1, test=1)
  lengths = [len(t) - 1 for t, _ in listops.expressions(config, "train")]
  assert 500 < min(lengths) <= max(lengths) < 2_000
  assert 800 < np.mean(lengths) < 1_300  # 1,036 over 1,500 expressions


def test_parameters_and_seed_make_different_sets():
  one = list(listops.expressions(listops.config(**SMALL), "test"))
  assert one == list(listops.expressions(listops.config(**SMALL), "test"))
  assert one != list(listops.expressions(listops.config(**{**SMALL, "seed": 4}), "test"))
  names = {listops.config(**{**SMALL, k: v + 1}).name for k, v in SMALL.items()}
  assert len(names) == len(SMALL)


def test_golden_digests(small, digest):
  assert {s: digest(source, "label", "tokens") for s, source in small.items()} == {
    "train": "1858b5f631659c6a",
    "validation": "9ca3bb65d462e996",
    "test": "9c603d96aa0bd895",
  }


def test_padded_view(small):
  padded = small["test"].map(views.pad(SMALL["max_length"]))
  batch = padded.gather([0, 5])
  assert batch["inputs"].shape == (2, 80)
  assert batch["inputs"].dtype == batch["lengths"].dtype == np.int32
  with pytest.raises(ValueError, match=r"views\.pad"):
    small["test"].gather([0, 1, 2])


@pytest.mark.parametrize(
  ("parameters", "error", "match"),
  [
    (dict(minlength=3), TypeError, "no parameter 'minlength'; it takes min_length"),
    (dict(train=0.5), TypeError, "train must be an int, got 0.5"),
    (dict(min_length=10, max_length=11), ValueError, "max_length must be at least 12, got 11"),
    (dict(max_args=1), ValueError, "max_args must be at least 2"),
    (dict(seed=-1), ValueError, "seed must be at least 0"),
  ],
)
def test_wrong_parameters(tmp_path, parameters, error, match):
  with pytest.raises(error, match=match):
    sources.load("listops", "train", data_dir=tmp_path, **parameters)


def test_impossible_parameters_end(monkeypatch):
  monkeypatch.setattr(listops, "PATIENCE", 2_000)
  config = listops.config(min_length=50, max_length=60, max_depth=2)
  with pytest.raises(ValueError, match="no new expression of length between 50 and 60"):
    next(listops.expressions(config, "test"))
