"""Every paper scale of every experiment fits on the topology that its file names."""

import math

import jax
import pytest

from launch import mesh as meshes
from launch import plan, runner
from launch.plan import libtpu, stages, topologies

SCALES = [
  (name, scale)
  for name in runner.names()
  for scale in runner.find(name).SCALES
  if scale.startswith("paper")
]
ids = [f"{name}-{scale}" for name, scale in SCALES]


@pytest.mark.parametrize(("name", "scale"), SCALES, ids=ids)
def test_a_topology_is_named(name, scale):
  where = stages.named(runner.find(name), scale)
  assert where is not None, f"experiments/{name}.py: TOPOLOGIES names none for {scale}"
  topology, sizes = topologies.parse(where[0]), meshes.parse(where[1])
  assert topology.chips % math.prod(sizes.values()) == 0


@pytest.fixture
def quick():
  """A third of the compiler's time: the program takes about as much memory, and more traffic."""
  old = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", "O0")
  yield
  jax.config.update("jax_optimization_level", old)


@pytest.mark.slow
@pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed")
@pytest.mark.parametrize(("name", "scale"), SCALES, ids=ids)
def test_it_fits(name, scale, quick):
  """The first arm of the scale, with the seeds that a run has."""
  plans = stages.plans(name, scale, cache=plan.cache_folder())
  assert plans
  for stage, made in plans.items():
    assert made.fits, f"{stage}: {made.error or made.total}; largest: {made.largest}"
