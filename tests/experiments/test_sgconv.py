"""SGConv at paper scale: kernel sizes, optimizer groups, schedules, sharded updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import sgconv
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from objectives import optimizers

KERNELS = {  # parameters a layer: both directions, S sub-kernels of d values, H features
  "listops": (3_072, 12, 8),
  "text": (12_288, 12, 6),
  "retrieval": (6_656, 13, 6),
  "image": (196_608, 6, 6),
  "pathfinder": (98_304, 6, 6),
  "pathx": (262_144, 8, 6),
}


def program(row, arm="sgconv", sizes=None):
  study = next(s for s in sgconv.STUDIES if s.name == "lra")
  config = runner.compose(sgconv, f"paper/{row}", study, arm)
  (task,) = sgconv.stages(config).values()
  mesh = meshes.make(sizes) if sizes else meshes.make({}, jax.devices()[:1])
  return config, task, Program(task, mesh, (0,))


def mixers(params):
  flat = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


@pytest.mark.parametrize("row", KERNELS)
def test_published_kernel_sizes(row):
  config, _, paper = program(row)
  size, scales, layers = KERNELS[row]
  kernels = [v for k, v in mixers(paper.abstract_state.params).items() if "sub_kernels" in k]
  assert len(kernels) == config.layers == layers
  for leaf in kernels:
    assert leaf.size == size
    assert leaf.shape[1:] == (scales, 2, config.width, config.kernel.kernel_dim)
  frozen = mixers(paper.abstract_state.variables["frozen"])
  assert sum("norm" in name for name in frozen) == layers
  linear = config.width * 2 * config.width + 2 * config.width
  gates = [v.size for k, v in mixers(paper.abstract_state.params).items() if "gate" in k]
  assert 2 * sum(gates) == layers * linear


@pytest.mark.parametrize(
  ("row", "steps", "warmup", "lr", "decay", "batch"),
  [
    ("listops", 80_000, 1_000, 0.01, 0.05, 50),
    ("text", 50_000, 1_000, 0.01, 0.05, 16),
    ("retrieval", 50_000, 2_500, 0.01, 0.05, 64),
    ("image", 200_000, 1_000, 0.01, 0.05, 50),
    ("pathfinder", 500_000, 2_500, 0.004, 0.03, 64),
    ("pathx", 125_000, 10_000, 0.004, 0.03, 64),
  ],
)
def test_published_training(row, steps, warmup, lr, decay, batch):
  config, task, _ = program(row)
  o = config.optimizer
  assert (o.total_steps, o.warmup_steps, o.lr, o.weight_decay) == (steps, warmup, lr, decay)
  assert (o.kernel_lr, task.batch_size, task.steps) == (1e-3, batch, steps)


def test_every_parameter_trains_at_its_own_rate():
  """Kernels at the kernel rate with decay, S4D's transition without, linear biases without."""
  params = {
    "encoder": {
      "layer_0": {
        "mixer": {"sub_kernels": 1.0, "D": 1.0, "log_step": 1.0, "C": 1.0},
        "gate": {"kernel": 1.0, "bias": 1.0},
        "norm": {"scale": 1.0},
      }
    },
    "decoder": {"kernel": 1.0},
  }
  params = jax.tree.map(jnp.float32, params)
  settings = {"lr": 1e-2, "kernel_lr": 1e-3, "weight_decay": 0.1}
  transform = sgconv.optimizer(**settings, total_steps=10, warmup_steps=0)
  # A gradient of zero leaves decay alone, one that is constant gives a step of the rate.
  for gradient, expected in ((0.0, 0.0), (1.0, 1.0)):
    grads = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params)
    updates, _ = transform.update(grads, transform.init(params), params)
    got = {k.rsplit("/", 2)[-2] + "/" + k.rsplit("/", 1)[-1]: v for k, v in mixers(updates).items()}
    wanted = {
      "mixer/sub_kernels": 1e-3 * (expected + 0.1),
      "mixer/log_step": 1e-3 * expected,
      "mixer/C": 1e-2 * (expected + 0.1),
      "mixer/D": 1e-2 * (expected + 0.1),
      "gate/kernel": 1e-2 * (expected + 0.1),
      "gate/bias": 1e-2 * expected,
      "norm/scale": 1e-2 * (expected + 0.1),
      "decoder/kernel": 1e-2 * (expected + 0.1),
    }
    assert set(got) == set(wanted)
    for name, value in wanted.items():
      assert float(got[name]) == pytest.approx(-value, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("row", sgconv.PAPER)
def test_the_update_compiles_on_eight_devices(row):
  _, _, sharded = program(row, sizes={"data": 1, "fsdp": 2, "tensor": 4})
  compiled = sharded.compile_update()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sharded.abstract_state))
  batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sharded.abstract_batches(1)))
  memory = compiled.memory_analysis()
  assert memory.argument_size_in_bytes < 0.9 * (whole + batch)
  assert memory.alias_size_in_bytes > 0  # the state is donated


def test_s4d_compiles_at_paper_scale_too():
  _, _, sharded = program("listops", "s4d", {"data": 2, "tensor": 4})
  assert sharded.compile_update().cost_analysis()["flops"] > 0


def test_arms_of_the_decay_study_differ_in_their_kernels_alone():
  study = sgconv.STUDIES[0]
  counts = {}
  for arm in study.arms:
    (task,) = sgconv.stages(runner.compose(sgconv, "laptop", study, arm)).values()
    shapes = Program(task, meshes.make({}, jax.devices()[:1]), (0,)).abstract_state.params
    outside = {k: v.shape for k, v in mixers(shapes).items() if "mixer" not in k}
    counts[arm] = outside
  assert all(outside == counts["t=1"] for outside in counts.values())


def test_the_frozen_norm_is_no_parameter_and_does_not_change():
  study = sgconv.STUDIES[0]
  overrides = {"optimizer.total_steps": 3, "optimizer.warmup_steps": 0, "data.length": 32}
  config = runner.compose(sgconv, "laptop", study, "t=1", overrides)
  (task,) = sgconv.stages(config).values()
  small = Program(task, meshes.make({}, jax.devices()[:1]), (0, 1))
  example = {k: np.zeros((2, 2, config.batch_size, 32), np.int32) for k in ("inputs", "targets")}
  batches = example | {"mask": np.ones((2, 2, config.batch_size), np.float32)}
  state = small.initial_state()
  before = jax.tree.map(np.asarray, (state.params, state.variables))
  state, _ = small.update(state, batches)
  jax.tree.map(np.testing.assert_array_equal, before[1], dict(state.variables))
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, before[0], state.params))
  assert float(moved) > 0
  labels = optimizers.by_path(before[0], [("frozen|norm_CH1", "wrong")], "right")
  assert set(jax.tree.leaves(labels)) == {"right"}


def test_mistakes():
  config = sgconv.get_config()
  config.mixer = "s5"
  with pytest.raises(ValueError, match="mixer='s5'; accepted: sgconv, dense, s4d, attention"):
    sgconv.stages(config)
  with pytest.raises(KeyError):
    sgconv.get_config("paper/nothing")
