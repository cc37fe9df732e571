import jax
import numpy as np
import pytest

from launch import ConfigurationError, run
from launch.finished import load


@pytest.fixture(scope="module", params=[True, False], ids=["mapped", "one after another"])
def finished(request, toy, tmp_path_factory):
  """A workdir and its results, of a toy run on all devices; its seeds are not in order."""
  workdir = tmp_path_factory.mktemp("run")
  overrides = {"steps": 20, "map_seeds": request.param}
  seeds = [4, 1]
  return workdir, run(
    toy, arm="adam", seeds=seeds, workdir=workdir, mesh="fsdp=8", overrides=overrides
  )


def test_what_was_learnt_gives_the_results(finished, toy):
  workdir, results = finished
  adam = load(workdir, "learning/adam")
  assert adam.seeds == (4, 1)
  assert adam.config.optimizer.lr == 1e-2
  assert {"params", "batch_stats"} <= set(adam.variables)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(adam.variables))
  model, data = toy.Network(adam.config.width, adam.config.layers), toy.Clusters(1)
  for seed, found in zip(
    adam.seeds, results["arms"]["learning/adam"]["metrics"]["test/accuracy"], strict=True
  ):
    hits = model.apply(adam.seed(seed), data.x, train=False).argmax(-1) == data.labels
    assert float(hits.mean()) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("learning/adma",), "no arm 'learning/adma'; did you mean 'learning/adam'"),
    (("learning/adam", "tune"), "stage='tune'; accepted: train"),
  ],
)
def test_what_is_not_there_is_named(finished, arguments, message):
  workdir, _ = finished
  with pytest.raises(ConfigurationError, match=message):
    load(workdir, *arguments)
  with pytest.raises(ConfigurationError, match="seed=0; accepted: 4, 1"):
    load(workdir, "learning/adam").seed(0)


def test_an_unfinished_stage_is_refused(finished):
  workdir, _ = finished
  marks = list(workdir.glob("learning/adam/checkpoints/*/done.json"))
  words = marks[-1].read_text()
  marks[-1].unlink()
  try:
    with pytest.raises(ConfigurationError, match="is not finished; run the same command again"):
      load(workdir, "learning/adam")
  finally:
    marks[-1].write_text(words)
