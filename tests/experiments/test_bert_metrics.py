"""Resamplings, the grid's statistics, what paper scale lacks, the sharded stage."""

import types

import jax
import numpy as np
import pytest

from experiments import bert_metrics
from experiments.datasets import encoders, sentences, weights
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from objectives import text_metrics

STUDY = bert_metrics.STUDIES[0]


def config(arm="english", **overrides):
  return runner.compose(bert_metrics, "laptop", STUDY, arm, overrides)


def test_a_resampling_is_its_seed():
  one, again, other = (bert_metrics.load(config(), seed)[0][0] for seed in (100, 100, 101))
  assert one.hypotheses == again.hypotheses and one.references != other.references
  assert len(one.references) == 24 and len(one.hypotheses) == 24 * 6
  assert one.target[:6].tolist() == [0, -1, -2, -3, -4, -5]
  with pytest.raises(ValueError, match=r"references=5000; accepted: up to"):
    bert_metrics.load(config(**{"data.references": 5000}), 100)


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
  with pytest.raises(FileNotFoundError, match="encoder='bert-base-uncased': no"):
    encoders.load(paper.encoder)
  with pytest.raises(FileNotFoundError, match="WMT's human scores are in no package"):
    bert_metrics.load(paper, 0)


def test_a_table_tells_its_other_columns(tmp_path):
  installed()
  rows = [
    f"{word} the value is {'kept' if i else 'deleted'}.\t{word} the value is deleted.\t{-i}\t{i}"
    for word in ("Then", "Now")
    for i in range(3)
  ]
  table = tmp_path / "rated.tsv"
  table.write_text("\n".join(["hypothesis\treference\tz\traw", *rows]))
  small = config(**{"data.table": str(table), "data.target": "z", "batch_size": 4})
  found = bert_metrics.sensitivity(small, types.SimpleNamespace(seeds=(0,), parameters=0))
  assert found["target with raw"] == [pytest.approx(-1)]


@pytest.mark.parametrize("scale", bert_metrics.SCALES[1:])
def test_bert_base_scores_a_corpus_on_eight_devices(scale):
  paper = runner.compose(bert_metrics, scale, bert_metrics.STUDIES[1], "as rated")
  (task,) = bert_metrics.stages(paper).values()
  assert (task.steps, paper.metrics.layer) == (0, 9)
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
  installed()
  small = config(**{"data.references": 4, "metrics.length": 32, "batch_size": 8})
  encoder = encoders.load("minilm")
  ((part, _),) = bert_metrics.load(small, 100)
  r, h = (
    encoders.encode(encoder, side, length=32, batch_size=8)
    for side in (part.references, part.hypotheses)
  )
  before = text_metrics.Preprocessing()
  wanted = text_metrics.corpus_scores(r, h, part.source, before, **small.metrics)["greedy"][:8]
  (task,) = bert_metrics.stages(small).values()
  batch = {"mask": np.ones(8, np.float32)}
  for side, chosen in (("hypothesis", part.hypotheses[:8]), ("reference", None)):
    lines = chosen or [part.references[i] for i in part.source[:8]]
    batch[side], batch[f"{side}_lengths"] = sentences.rows(encoder.tokenizer, lines, 32)
    inside = np.arange(32) < batch[f"{side}_lengths"][:, None] - 1
    batch[f"{side}_weights"] = np.float32(inside & (np.arange(32) > 0))
  loss, (metrics, _) = jax.jit(task.loss, static_argnames="train")(
    encoder.params, {}, batch, jax.random.key(0), train=False
  )
  total, count = metrics["f"]
  assert float(total / count) == pytest.approx(wanted.mean(), abs=1e-5)
  assert float(loss) == pytest.approx(-wanted.mean(), abs=1e-5)
