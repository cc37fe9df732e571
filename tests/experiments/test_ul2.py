"""UL2: what each arm reads and is asked for, and the paper's sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ul2
from experiments.datasets import sources
from launch import mesh as meshes
from launch.program import Program
from objectives import corruption

SMALL = {"inputs": 24, "targets": 24, "batch_size": 4}
SMALL |= {"model.features": 16, "model.layers": 1, "model.heads": 2, "model.head_dim": 8}
SMALL |= {"model.mlp": 32}


def task(**overrides):
  config = ul2.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  return config, ul2.stages(config)["train"]


def jitted(loss):
  """`(params, batch) -> metrics` with the draws of one key."""
  return jax.jit(lambda p, b: loss(p, {}, b, jax.random.key(3), train=False)[1][0])


def started(made):
  return meshes.unboxed(jax.jit(made.init)(jax.random.key(0)))["params"]


def batch(config, count=4):
  random = np.random.RandomState(0)
  tokens = random.randint(5, 261, (count, ul2.length(config)), np.int32)
  return {"inputs": tokens, "mask": np.ones(count, np.float32)}


def test_the_seven_denoisers():
  """arXiv:2205.05131, table 1."""
  spans = {(d.span, d.rate, d.mode) for d in ul2.MIXTURES["ul2"]}
  assert spans == {
    (3, 0.15, "R"), (8, 0.15, "R"), (None, 0.25, "S"), (3, 0.5, "X"), (8, 0.5, "X"),
    (64, 0.15, "X"), (64, 0.5, "X"),
  }  # fmt: skip
  assert not {ul2.MEASURED["new"], ul2.MEASURED["X long"]} & set(ul2.MIXTURES["ul2"])


@pytest.mark.parametrize("scale", ul2.SCALES)
def test_sentinels_and_paradigms_are_ids_of_their_own(scale):
  config = ul2.get_config(scale)
  vocab, ids, modes = ul2.special(config)
  taken = [*modes.values(), *ids["sentinels"].tolist()]
  assert len(set(taken)) == len(taken) and max(taken) == vocab - 1
  assert min(taken) >= (261 if config.vocab is None else config.vocab - 3 - len(ids["sentinels"]))
  sizes = {"inputs": config.inputs, "targets": config.targets}
  for mixture in ul2.MIXTURES.values():
    for d in mixture:
      length = corruption.chunk(d, **sizes)
      assert corruption.counts(d, length)[1] <= len(ids["sentinels"])


@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder"])
def test_a_denoiser_is_measured_as_it_is_trained(architecture):
  """With one denoiser the training loss is the measured one, of the same draws."""
  config, made = task(mixture="span corruption", architecture=architecture, paradigms=False)
  params, some, measure = started(made), batch(config), jitted(made.evaluate["test"].loss)
  trained, measured = jitted(made.loss)(params, some), measure(params, some)
  np.testing.assert_allclose(trained["loss"], measured["R"], rtol=1e-5)
  assert not set(ul2.UNTOLD) & set(measured)
  # Padding rows do not count.
  masked = some | {"mask": np.array([1, 0, 0, 0], np.float32)}
  assert measure(params, masked)["X dense"][1] == measured["X dense"][1] / 4


def test_the_paradigm_is_all_that_a_wrong_one_changes():
  config, made = task()
  params, some, measure = started(made), batch(config), jitted(made.evaluate["test"].loss)
  measured = measure(params, some)
  _, _, modes = ul2.special(config)
  embedding = params["embedding"]
  alike = embedding.at[jnp.array(list(modes.values()))].set(embedding[modes["R"]])
  same = measure(params | {"embedding": alike}, some)
  for name in ul2.UNTOLD:
    told = name.removesuffix(" told R")
    assert measured[name][1] == measured[told][1] and measured[name][0] != measured[told][0]
    np.testing.assert_allclose(same[name], same[told], rtol=1e-4)


def test_a_decoder_sees_its_input_in_both_directions_and_nothing_of_its_target(monkeypatch):
  config, made = task(architecture="decoder", mixture="prefix lm")
  params, tokens = started(made), batch(config, 1)["inputs"]
  monkeypatch.setattr(ul2.language, "next_token", lambda logits, _: (logits, {}))
  some = {"mask": np.ones(1, np.float32)}
  key = jax.random.key(3)
  logits = jax.jit(lambda t: made.loss(params, {}, some | {"inputs": t}, key, train=False)[0])

  def change(at):
    """Which positions' logits change with a token of the text."""
    other = tokens.copy()
    other[0, at] = 5 + (other[0, at] - 4) % 256
    return np.abs(np.asarray(logits(other) - logits(tokens))[0]).max(-1) > 1e-6

  length = corruption.chunk(ul2.PREFIX, config.inputs, config.targets)
  assert change(0)[0], "the paradigm's token sees the text behind it"
  seen = change(length - 1)  # the last of the target, read at the row's last but one position
  assert seen.any() and not seen[: np.flatnonzero(seen)[0]].any()
  assert np.flatnonzero(seen)[0] >= length


def test_the_score_is_the_geometric_mean():
  class Lab:
    def fit(self, stage, task):
      values = {f"{s}/{n}": [1.0, 2.0] for s in ("validation", "test") for n in ul2.MEASURED}
      values["test/new"] = [32.0, 64.0]
      return type("Fitted", (), {"metrics": values})

  metrics = ul2.run(ul2.get_config(), Lab())
  np.testing.assert_allclose(metrics["test/score"], [2.0, 4.0])
  np.testing.assert_allclose(metrics["validation/score"], [1.0, 2.0])


@pytest.mark.parametrize(
  ("scale", "architecture", "parameters"),
  [
    ("paper/base", "encoder-decoder", 335e6),
    ("paper/base", "decoder", 167e6),
    ("paper/20b", "encoder-decoder", 20e9),
  ],
)
def test_paper_scale(scale, architecture, parameters):
  config = ul2.get_config(scale)
  config.architecture = architecture
  made = ul2.stages(config)["train"]
  mesh = meshes.make({}, jax.devices()[:1])
  assert Program(made, mesh, (0,)).parameters == pytest.approx(parameters, rel=0.1)
  with pytest.raises(sources.DatasetNotFound, match="in no package"):
    made.data()


def test_mistakes():
  config = ul2.get_config()
  config.architecture = "encoder"
  with pytest.raises(ValueError, match="architecture='encoder'; accepted: encoder-decoder"):
    ul2.stages(config)
