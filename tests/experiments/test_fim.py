"""FIM: what is trained on, what is measured, and the paper's sizes."""

import jax
import numpy as np
import pytest

from experiments import fim
from experiments.datasets import sources, tokenization
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from objectives import corruption

BYTES = fim.tokenizer("bytes", 0, "")
PRE, SUF, MID, EOT = (BYTES.specials[m] for m in corruption.MARKERS)
EOS = BYTES.specials["<eos>"]
SMALL = {"length": 48, "width": 16, "layers": 1, "heads": 2, "measured": 8, "batch_size": 4}


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


def test_every_token_counts_but_padding():
  rows = np.array([[PRE, 7, SUF, 8, MID, 9, EOT, 0], [7, 8, 9, 7, 8, 9, 7, 8]])
  np.testing.assert_array_equal(
    fim.rows_of(rows)["weights"], [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
  )


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


def test_document_level_moves_before_it_packs(monkeypatch):
  documents = [np.append(BYTES.encode("abcdefghij" * n), EOS) for n in (3, 8, 1)]
  monkeypatch.setattr(fim.text, "tokens", lambda *_: documents)
  fim.documents_first.cache_clear()
  rows = fim.documents_first("made up", 10, 1.0, 1.0).fields["inputs"]
  fim.documents_first.cache_clear()
  stream = rows.reshape(-1).tolist()
  assert rows.shape[1] == 10
  ends = [t for t in stream if t in (PRE, EOT, EOS)]
  assert ends == ([PRE, EOT, EOS] * 3)[: len(ends)] and len(ends) > 6
  at = stream.index(EOS)
  assert sorted(stream[:at]) == sorted([PRE, SUF, MID, EOT, *documents[0][:-1]])
  assert at > 10, "a document's pieces are in several rows"


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_cuts_of_characters_encode_the_pieces_by_themselves(spm_rate, tmp_path):
  made = tokenization.train_bpe(
    ["the cat sat on the mat naïve café " * 20], 300, markers=corruption.MARKERS, data_dir=tmp_path
  )
  (pre, suf, mid, eot), end = fim.ids(made).values()
  documents = ["the cat sat on the mat", "naïve café the cat"]
  tokens = np.concatenate([np.append(made.encode(d), end) for d in documents])
  straddled = 0
  for extra in range(20):  # another context, other draws
    row = fim.by_characters(
      np.append(tokens, made.encode("the" * extra)), made, length=200, rate=1.0, spm_rate=spm_rate
    )
    first = row[: row.tolist().index(end)].tolist()
    assert first[0] == pre and first[-1] == eot
    if spm_rate:
      suffix, rest = first[2 : first.index(mid)], first[first.index(mid) + 1 : -1]
      # Prefix and middle run on, each encoded by itself.
      assert first[1] == suf and made.decode(rest) + made.decode(suffix) == documents[0]
      straddled += rest != made.encode(made.decode(rest)).tolist()
    else:
      a, b = first.index(suf), first.index(mid)
      prefix, suffix, middle = first[1:a], first[a + 1 : b], first[b + 1 : -1]
      assert made.decode(prefix) + made.decode(middle) + made.decode(suffix) == documents[0]
      for piece in (prefix, suffix, middle):
        np.testing.assert_array_equal(made.encode(made.decode(piece)), piece)
      joined = prefix + middle + suffix
      straddled += joined != made.encode(documents[0]).tolist()
    assert row.tolist().count(end) == 2 and not row[np.flatnonzero(row)[-1] + 1 :].any()
  assert straddled > 0, "cuts fall inside what would be one token"


def test_fragments_of_characters_at_the_edges_are_left_out():
  whole = BYTES.encode("é = 1")
  row = fim.by_characters(whole[1:], BYTES, length=20, rate=0.0, spm_rate=0.0)
  assert BYTES.decode(row) == " = 1"


def test_contexts_and_mistakes():
  config = fim.get_config()
  held_out = fim.contexts(config, "validation")
  assert held_out.fields["inputs"].shape == (config.measured, config.length - 3)
  for key, value in (("level", "line"), ("tokenizer", "words")):
    wrong = fim.get_config()
    wrong[key] = value
    with pytest.raises(ValueError, match=f"{key}='{value}'; accepted: "):
      fim.stages(wrong)
