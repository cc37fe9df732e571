"""FIM: what is trained on, what is measured, and the paper's sizes."""

import jax
import numpy as np
import pytest

from experiments import fim
from experiments.datasets import sources
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from objectives import infilling

BYTES = fim.BYTES
PRE, SUF, MID, EOT = (BYTES.specials[m] for m in infilling.MARKERS)
EOS = BYTES.specials["<eos>"]
SMALL = {"model.features": 16, "model.layers": 1, "model.heads": 2}
SMALL |= {"length": 48, "measured": 8, "batch_size": 4}


def task(arm="rate 0.5", **overrides):
  config = runner.compose(fim, "laptop", fim.STUDIES[0], arm, SMALL | overrides)
  return config, fim.stages(config)["train"]


def jitted(loss):
  """`(params, batch) -> metrics` with the draws of one key."""
  return jax.jit(lambda p, b: loss(p, {}, b, jax.random.key(2), train=False)[1][0])


def measured(made):
  return jitted(made.evaluate["test"].loss)


def batch(config, text):
  tokens = BYTES.encode((text * 9).encode())[: config.length - 3]
  return {"inputs": np.stack([tokens] * 4), "mask": np.ones(4, np.float32)}


@pytest.mark.parametrize(
  ("row", "parameters", "tokens"), [("50m", 50e6, 100e9), ("6.9b", 6.9e9, 100e9)]
)
def test_paper_scale(row, parameters, tokens):
  study = next(s for s in fim.STUDIES if s.at(f"paper/{row}"))
  config = runner.compose(fim, f"paper/{row}", study, "rate 0.5")
  made = fim.stages(config)["train"]
  mesh = meshes.make({}, jax.devices()[:1])
  assert Program(made, mesh, (0,)).parameters == pytest.approx(parameters, rel=0.02)
  assert made.steps * made.batch_size * config.length == pytest.approx(tokens, rel=1e-3)
  with pytest.raises(sources.DatasetNotFound, match="in no package"):
    made.data()


def test_the_update_compiles_sharded():
  study = next(s for s in fim.STUDIES if s.at("paper/50m"))
  config = runner.compose(fim, "paper/50m", study, "rate 0.9")
  sharded = Program(fim.stages(config)["train"], meshes.make({"data": 2, "tensor": 4}), (0,))
  assert sharded.compile_update().memory_analysis().alias_size_in_bytes > 0


def test_the_loss_of_rate_0_is_that_of_text_in_order():
  """Markers cost a rate of 0 nothing, and at any other rate the training loss differs."""
  config, plain = task("rate 0")
  params = meshes.unboxed(jax.jit(plain.init)(jax.random.key(0)))["params"]
  some = batch(config, "def f(x):\n  return x\n")
  metrics, found = jitted(plain.loss)(params, some), measured(plain)(params, some)
  np.testing.assert_allclose(metrics["bits"], found["bits"], rtol=1e-5)
  _, moved = task("rate 0.9")
  assert abs(jitted(moved.loss)(params, some)["bits"][0] - metrics["bits"][0]) > 1e-3
  # Measured on text in order and the same middles, whatever the arm was trained on.
  jax.tree.map(np.testing.assert_array_equal, found, measured(moved)(params, some))
  counts = {name: float(count) for name, (_, count) in found.items()}
  assert counts["psm"] == counts["spm"] > 0
  assert counts["psm"] - 4 <= counts["prefix_alone"] <= counts["psm"]  # a first byte has no prefix
  assert counts["bits"] == 4 * (config.length - 4)


def test_infilling_reads_all_but_the_middle_and_counts_ends():
  config, made = task()
  variables = meshes.unboxed(jax.jit(made.init)(jax.random.key(0)))
  fields = batch(config, "abcdefgh")
  loss = jitted(made.evaluate["infill"].loss)
  total, count = loss(variables["params"], fields)["ended"]
  assert 0 <= total <= count == 4
  # A model that knows nothing but <eot> ends at once.
  params = jax.tree.map(np.zeros_like, variables["params"])
  params["final_norm"]["scale"] = np.ones_like(params["final_norm"]["scale"])
  embedding = np.ones_like(params["embedding"])
  embedding[EOT] = 2
  assert loss(params | {"embedding": embedding}, fields)["ended"][0] == 4


def test_what_each_level_and_tokenizer_trains_on(monkeypatch):
  documents = [np.append(BYTES.encode("abcdefghij" * n), EOS) for n in (3, 8, 1)]
  monkeypatch.setattr(fim.text, "tokens", lambda *_: documents)
  fim.documents_first.cache_clear()
  config, made = task("document level", fim_rate=1.0)
  rows = fim.training(config).fields["inputs"]
  fim.documents_first.cache_clear()
  assert rows.shape[1:] == made.example["inputs"].shape == (config.length + 1,)
  assert {PRE, SUF, MID, EOT} < set(rows.reshape(-1).tolist())
  config, made = task(fim_rate=1.0)  # context level: text as it is
  assert made.example["inputs"].shape == (config.length - 3,)
  monkeypatch.setattr(fim.corpora, "rows", lambda *_: sources.InMemory({"inputs": rows[:, 4:]}))
  assert not {PRE, SUF, MID, EOT} & set(fim.training(config).fields["inputs"][:, 40:].reshape(-1))


def test_contexts_and_mistakes():
  config = fim.get_config()
  held_out = fim.stages(config)["train"].evaluate["validation"].data()
  assert held_out.fields["inputs"].shape == (config.measured, config.length - 3)
  for key, value in (("level", "line"), ("tokenizer", "words")):
    wrong = fim.get_config()
    wrong[key] = value
    with pytest.raises(ValueError, match=f"{key}='{value}'; accepted: "):
      fim.stages(wrong)
