"""Every experiment: what its file must have, and a few steps of every arm at laptop scale."""

import dataclasses
import functools
import pathlib
import re

import jax
import pytest

from launch import ConfigurationError, runner
from launch import mesh as meshes
from launch.program import Program

NAMES = runner.names()


def laptop_arms():
  for name in NAMES:
    for study in runner.find(name).STUDIES:
      if study.at("laptop") and study.run is None and not study.optional:
        for i, arm in enumerate(study.arms):
          marks = pytest.mark.slow if i else ()
          yield pytest.param(name, study, arm, id=f"{name}-{study.name}-{arm}", marks=marks)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_teaches_its_paper(name):
  module = runner.find(name)
  doc = module.__doc__
  assert re.search(r"arXiv:\d{4}\.\d{4,5}", doc)
  assert "Claim" in doc
  assert f"python -m experiments.{name}" in doc
  assert module.SCALES[0] == "laptop"
  assert any(scale.startswith("paper") for scale in module.SCALES)
  assert all(study.claims or study.optional for study in module.STUDIES)
  assert all(any(study.at(scale) for study in module.STUDIES) for scale in module.SCALES)
  with pytest.raises((ConfigurationError, KeyError)):
    module.get_config("paper/nothing")


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_result_belongs_to_the_claims(name):
  import json

  module = runner.find(name)
  path = pathlib.Path(module.__file__).parent / "results" / f"{name}.json"
  results = json.loads(path.read_text())
  claims = {
    (s.name, c.name): c.statement for s in module.STUDIES if s.at("laptop") for c in s.claims
  }
  assert {(c["study"], c["name"]): c["statement"] for c in results["claims"]} == claims
  assert all(c["verdict"] in ("held", "refuted", "undecided") for c in results["claims"])
  arms = {
    f"{s.name}/{a}" for s in module.STUDIES if s.at("laptop") and not s.optional for a in s.arms
  }
  assert arms <= set(results["arms"])
  for c in results["claims"]:
    assert c["seeds"] >= 3


class Few:
  """The first examples of a source."""

  def __init__(self, source, count: int) -> None:
    self.source, self.count = source, min(count, len(source))
    if hasattr(source, "gather"):
      self.gather = source.gather

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int):
    return self.source[index]


class Brief(runner.Lab):
  """Cuts every stage to two updates, and every evaluation to two batches of the real data."""

  def fit(self, stage, task, *start):
    return super().fit(stage, self.brief(task), *start)

  def evaluate(self, task, name, evaluation, variables):
    task = self.brief(task)
    return super().evaluate(task, name, self.few(evaluation, task.batch_size), variables)

  def brief(self, task):
    return dataclasses.replace(
      task,
      steps=min(task.steps, 2),
      steps_per_dispatch=1,
      evaluate_every=0,
      checkpoint_every=0,
      evaluate={n: self.few(e, task.batch_size) for n, e in task.evaluate.items()},
    )

  def few(self, evaluation, batch_size):
    return dataclasses.replace(evaluation, data=lambda: Few(evaluation.data(), 2 * batch_size))


@pytest.mark.parametrize(("name", "study", "arm"), list(laptop_arms()))
def test_a_few_steps(name, study, arm, tmp_path):
  """Trains two updates of every stage with two seeds on the real data and measures everything."""
  module = runner.find(name)
  config = runner.compose(module, "laptop", study, arm)
  mesh = meshes.make({}, jax.devices()[:1])
  lab = Brief(mesh, tmp_path, (0, 1), arm, runner.Progress(quiet()), runner.Interruption())
  run = getattr(module, "run", functools.partial(runner.run_stages, module))
  try:
    metrics = run(config, lab)
  except FileNotFoundError as error:  # released weights that are not installed
    pytest.skip(str(error))
  for claim in study.claims:
    against = claim.against_metric or claim.metric
    for other, metric in ((claim.of, claim.metric), (claim.against, against)):
      if other == arm:
        assert len(metrics[metric]) == 2
  assert lab.failed == {}


def quiet():
  import rich.console

  return rich.console.Console(quiet=True)


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_claimed_better_has_no_more_parameters(name):
  """At most 5 % more, where a claim at laptop scale compares two models on accuracy or error.

  Of the stage that trains longest: P2's last one holds a model for each training length.
  """
  module = runner.find(name)
  mesh = meshes.make({}, jax.devices()[:1])
  for study in module.STUDIES:
    if study.run is not None or not study.at("laptop"):
      continue
    counts = {}
    for arm in study.arms:
      stages = module.stages(runner.compose(module, "laptop", study, arm)).values()
      longest = max(stages, key=lambda task: task.steps)
      counts[arm] = Program(longest, mesh, (0,)).parameters
    for claim in study.claims:
      if claim.against is not None:
        assert counts[claim.of] <= 1.05 * counts[claim.against], claim.name
