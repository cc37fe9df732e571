"""S5 at paper scale: parameter counts, settings, and update steps that compile sharded."""

import jax
import pytest

from experiments import s5
from launch import mesh as meshes
from launch import runner
from launch.program import Program

PARAMETERS = {
  "listops": 188_490,
  "text": 1_321_154,
  "retrieval": 772_098,
  "image": 5_133_706,
  "pathfinder": 1_113_602,
  "pathx": 694_018,
  "speech": 283_523,
}


@pytest.mark.parametrize("row", PARAMETERS)
def test_published_parameter_counts(row):
  (task,) = s5.stages(s5.get_config(f"paper/{row}")).values()
  assert Program(task, meshes.make({}, jax.devices()[:1]), (0,)).parameters == PARAMETERS[row]


def test_laptop_arms_have_equal_parameters():
  study = s5.STUDIES[0]
  counts = {}
  for arm in study.arms:
    (task,) = s5.stages(runner.compose(s5, "laptop", study, arm)).values()
    counts[arm] = Program(task, meshes.make({}, jax.devices()[:1]), (0,)).parameters
  assert counts == {"s5": 6_890, "s4d": 6_858, "gru": 6_730, "random spectrum": 6_890}


def test_published_lengths_of_training():
  """Epochs times whole batches of the training set, and one epoch of warm-up, none for text."""
  listops, text = (s5.get_config(f"paper/{row}").optimizer for row in ("listops", "text"))
  assert (listops.total_steps, listops.warmup_steps) == (40 * 1920, 1920)
  assert (text.total_steps, text.warmup_steps) == (35 * 500, 0)


@pytest.mark.parametrize("row", s5.PAPER)
def test_the_update_compiles_on_eight_devices(row):
  """Data, fsdp, tensor and, where the length is cut, sequence axes, at the published sizes."""
  config = s5.get_config(f"paper/{row}")
  (task,) = s5.stages(config).values()
  sizes = {"data": 2, "fsdp": 2, "tensor": 2}
  if config.batch_size % 4:
    sizes = {"data": 2, "tensor": 2, "sequence": 2}
  program = Program(task, meshes.make(sizes), (0,))
  compiled = program.compile_update()
  memory = compiled.memory_analysis()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
  batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_batches(1)))
  assert memory.argument_size_in_bytes < 0.9 * (whole + batch)  # a device holds a part of it
  assert memory.alias_size_in_bytes > 0  # the state is donated


def test_s4d_compiles_at_paper_scale_too():
  study = next(s for s in s5.STUDIES if s.name == "lra")
  (task,) = s5.stages(runner.compose(s5, "paper/listops", study, "s4d")).values()
  program = Program(task, meshes.make({"data": 2, "tensor": 4}), (0,))
  assert program.compile_update().cost_analysis()["flops"] > 0
