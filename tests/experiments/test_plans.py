"""Every paper scale of every experiment fits on the topology that its file names.

A compiler takes 10 to 30 seconds for each. So plans.json records the plans by content: a test
lowers its program, as sharded, and looks up what the compiler made of the very same one. What has
changed since is compiled anew, for the first paper scale of an experiment, or with
ROUNDUP_PLANS=all for all; to compile what has changed and to record it:

    python tests/experiments/test_plans.py
"""

import dataclasses
import json
import math
import os
import pathlib

import jax
import pytest

from launch import mesh as meshes
from launch import plan, runner
from launch.metrics import write_json
from launch.plan import libtpu, stages, topologies

RECORDS = pathlib.Path(__file__).with_name("plans.json")
SCALES = [
  (name, scale)
  for name in runner.names()
  for scale in runner.find(name).SCALES
  if scale.startswith("paper")
]
FIRST = dict(reversed(SCALES)).items()
ids = [f"{name}-{scale}" for name, scale in SCALES]
# A third of the compiler's time: the program takes about as much memory, and more traffic. And
# without the lines and files that kernels were written on, which are not to count.
QUICK = {"jax_optimization_level": "O0", "jax_traceback_in_locations_limit": 0}


@pytest.mark.parametrize(("name", "scale"), SCALES, ids=ids)
def test_a_topology_is_named(name, scale):
  where = stages.named(runner.find(name), scale)
  assert where is not None, f"experiments/{name}.py: TOPOLOGIES names none for {scale}"
  topology, sizes = topologies.parse(where[0]), meshes.parse(where[1])
  assert topology.chips % math.prod(sizes.values()) == 0


@pytest.fixture
def quick():
  old = {key: getattr(jax.config, key) for key in QUICK}
  for key, value in QUICK.items():
    jax.config.update(key, value)
  yield
  for key, value in old.items():
    jax.config.update(key, value)


def known_plans() -> pathlib.Path:
  """The user's folder of plans, with the recorded ones."""
  folder = plan.cache_folder()
  folder.mkdir(parents=True, exist_ok=True)
  for record in json.loads(RECORDS.read_text()) if RECORDS.exists() else []:
    path = folder / f"{record['content']}.json"
    if not path.exists():
      write_json(path, record)
  return folder


@pytest.fixture(scope="module")
def cache():
  return known_plans()


@pytest.mark.slow
@pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed")
@pytest.mark.parametrize(("name", "scale"), SCALES, ids=ids)
def test_it_fits(name, scale, quick, cache):
  """The first arm of the scale, with the seeds that a run has."""
  compiling = (name, scale) in FIRST or os.environ.get("ROUNDUP_PLANS") == "all"
  try:
    plans = stages.plans(name, scale, cache=cache, cached_only=not compiling)
  except LookupError:
    pytest.skip("changed since it was recorded: python tests/experiments/test_plans.py")
  for stage, made in plans.items():
    assert made.fits, f"{stage}: {made.error or made.total}; largest: {made.largest}"


def record() -> None:
  """Writes plans.json."""
  jax.config.update("jax_platforms", "cpu")
  for key, value in QUICK.items():
    jax.config.update(key, value)
  folder = known_plans()
  made = [p for name, scale in SCALES for p in stages.plans(name, scale, cache=folder).values()]
  write_json(RECORDS, [dataclasses.asdict(p) for p in made])


if __name__ == "__main__":
  record()
