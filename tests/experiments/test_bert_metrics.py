"""Metrics and what is done before them: edits, conventions of each side, the sharded stage."""

import types

import jax
import numpy as np
import pytest

from experiments import bert_metrics
from experiments.datasets import sentences, stable, weights
from launch import ConfigurationError, runner
from launch import mesh as meshes
from launch.program import Program
from objectives import text_metrics

STUDY = bert_metrics.STUDIES[0]
STOPWORDS = frozenset({"the", "a", "of", "is", "and"})
TEXT = "The value of a mapping is deleted, and every key disappears quietly forever."


def config(arm="english", **overrides):
  return runner.compose(bert_metrics, "laptop", STUDY, arm, overrides)


@pytest.mark.parametrize("severity", range(6))
def test_severity_is_the_number_of_content_words_that_change(severity):
  original = {"value", "mapping", "deleted", "every", "key", "disappears", "quietly", "forever"}
  for seed in range(20):
    draw = stable.draws(seed, 0)
    text = bert_metrics.edited(TEXT, severity, draw, STOPWORDS, ["zebra"])
    words = [word.strip(",.").lower() for word in text.split()]
    assert len(original - set(words)) == severity
    assert words.count("zebra") <= severity
    for word in ("of", "is", "and"):  # articles may go, other function words stay
      assert word in words


def test_noise_changes_no_content():
  found = {bert_metrics.edited(TEXT, 0, stable.draws(seed, 0), STOPWORDS, []) for seed in range(40)}
  assert len(found) > 10
  assert any(t.isupper() for t in found) and any(not t.endswith(".") for t in found)
  articles = {t.lower().split().count("the") + t.lower().split().count("a") for t in found}
  assert articles == {1, 2}


def test_a_resampling_is_its_seed_and_hypotheses_know_their_reference():
  one, again, other = (bert_metrics.load(config(), seed)[0] for seed in (100, 100, 101))
  assert one.hypotheses == again.hypotheses and one.references != other.references
  assert len(one.references) == 24 and len(one.hypotheses) == 24 * 6
  assert one.source.tolist() == np.repeat(np.arange(24), 6).tolist()
  assert one.target[:6].tolist() == [0, -1, -2, -3, -4, -5]
  with pytest.raises(ConfigurationError, match=r"data.references=5000; accepted: up to"):
    bert_metrics.load(config(**{"data.references": 5000}), 100)


def texts(random, count, length=9):
  """Encoded texts of words, a comma and continuations, with random hidden states."""
  pieces = ["[CLS]", "the", "word", "##s", "go", ",", "far", "##ther", "[SEP]"][:length]
  return [
    bert_metrics.Text(
      np.array([1, *random.randint(3, 30, length - 2), 2]), pieces, random.randn(7, length, 8)
    )
    for _ in range(count)
  ]


def segments(source):
  count = len(source)
  return bert_metrics.Segments([], [], -np.arange(count), np.array(source), frozenset({"the"}))


def score(references, hypotheses, cell, source):
  small = config(vocab=30, length=16)
  return bert_metrics.scores(small, references, hypotheses, segments(source), cell)


@pytest.mark.parametrize("cell", bert_metrics.GRID)
def test_the_reference_itself_scores_best(cell):
  random = np.random.RandomState(0)
  references = texts(random, 3)
  found = score(references, [references[1], *texts(random, 3)], cell, [1, 1, 1, 1])
  assert set(found) == set(bert_metrics.AGGREGATIONS)
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
  assert bert_metrics.agreement("kendall", perfect, target, source) == 1
  assert bert_metrics.agreement("kendall", -perfect, target, source) == -1
  assert bert_metrics.agreement("kendall", 0 * perfect, target, source) == -1  # ties
  swapped = np.array([4.0, 5.0, 3.0, -1.0, -2.0])
  assert bert_metrics.agreement("kendall", swapped, target, source) == pytest.approx(0.5)
  assert bert_metrics.agreement("pearson", 2.0 * target + 1, target, source) == pytest.approx(1)


def test_spread_tells_preprocessing_from_aggregation():
  cells = np.array([0.01 * (cell[1] + 2 * (cell[2] == "all")) for cell in bert_metrics.GRID])
  table = 0.5 + cells[None] + np.array([[0.0], [0.02], [0.05]])
  found = bert_metrics.spread(table)
  assert found["range/preprocessing"] == pytest.approx(0.03)
  assert found["range/aggregation"] == pytest.approx(0.05)
  assert found["range/ratio"] == pytest.approx(0.6)
  assert found["effect/idf"] == pytest.approx(0.01)
  assert found["effect/subword"] == pytest.approx(0.02)
  assert found["effect/punctuation"] == pytest.approx(0)
  assert found["agreement/transport as published"] == pytest.approx(0.53)


def installed():
  try:
    sentences.catalogue("fi")
    return weights.minilm()
  except FileNotFoundError as e:
    pytest.skip(str(e))


def test_a_small_resampling_whatever_the_batch_size():
  installed()
  lab = types.SimpleNamespace(seeds=(100,), parameters=0)
  found = []
  for size in (7, 16):
    small = config("english catalogue", **{"data.references": 2, "batch_size": size})
    found.append(bert_metrics.sensitivity(small, lab))
  assert lab.parameters == 22_565_376
  for name, values in found[0].items():
    assert values == pytest.approx(found[1][name], abs=1e-9), name
  for claim in STUDY.claims:
    assert claim.metric in found[0] and (claim.against_metric or claim.metric) in found[0]


@pytest.mark.parametrize("scale", bert_metrics.SCALES[1:])
def test_what_paper_scale_lacks_is_said(scale):
  paper = runner.compose(bert_metrics, scale, bert_metrics.STUDIES[1], "as rated")
  with pytest.raises(FileNotFoundError, match=r"bert-base-uncased/model.safetensors: no"):
    bert_metrics.encoder(paper)
  with pytest.raises(FileNotFoundError, match="WMT's human scores are in no package"):
    bert_metrics.load(paper, 0)


@pytest.mark.parametrize("scale", bert_metrics.SCALES[1:])
def test_bert_base_scores_a_corpus_on_eight_devices(scale):
  paper = runner.compose(bert_metrics, scale, bert_metrics.STUDIES[1], "as rated")
  (task,) = bert_metrics.stages(paper).values()
  assert (task.steps, paper.layer) == (0, 9)
  program = Program(task, meshes.make({"data": 2, "fsdp": 2, "tensor": 2}), (0,))
  assert program.parameters == 108_891_648  # BERT-base without its pooler
  if scale != "paper/wmt17":
    return
  batch = {
    k: jax.ShapeDtypeStruct(v.shape[2:], v.dtype) for k, v in program.abstract_batches(1).items()
  }
  state = program.abstract_state
  with program.context():
    lowered = program.evaluation(task.loss).lower(
      state.params, state.variables, batch, jax.ShapeDtypeStruct((), np.int32)
    )
  memory = lowered.compile().memory_analysis()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  assert memory.argument_size_in_bytes < 0.5 * whole


def test_the_stage_scores_as_the_grid_does():
  """BERTScore of a corpus through the engine is the mean of greedy matching as published."""
  tensors = installed()
  small = config(**{"data.references": 4, "length": 32, "batch_size": 8})
  model, variables, tokenizer = bert_metrics.encoder(small)
  del tensors
  (part,) = bert_metrics.load(small, 100)
  r, h = (
    bert_metrics.encode(small, model, variables, tokenizer, list(side))
    for side in (part.references, part.hypotheses)
  )
  cell = (False, False, "all", True)
  wanted = bert_metrics.scores(small, r, h, part, cell)["greedy"][:8]
  (task,) = bert_metrics.stages(small).values()
  batch = {"mask": np.ones(8, np.float32)}
  for side, chosen in (("hypothesis", part.hypotheses[:8]), ("reference", None)):
    lines = chosen or [part.references[i] for i in part.source[:8]]
    batch[side], batch[f"{side}_lengths"] = sentences.rows(tokenizer, lines, 32)
    inside = np.arange(32) < batch[f"{side}_lengths"][:, None] - 1
    batch[f"{side}_weights"] = np.float32(inside & (np.arange(32) > 0))
  loss, (metrics, _) = jax.jit(task.loss, static_argnames="train")(
    variables["params"], {}, batch, jax.random.key(0), train=False
  )
  total, count = metrics["f"]
  assert float(total / count) == pytest.approx(wanted.mean(), abs=1e-5)
  assert float(loss) == pytest.approx(-wanted.mean(), abs=1e-5)
