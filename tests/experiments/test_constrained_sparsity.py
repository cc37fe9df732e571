"""The game: what each player sees, restarts, bisection; and the authors' settings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import constrained_sparsity
from experiments.datasets import labelled
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from models import convnets, gates

STUDY = constrained_sparsity.STUDIES[0]


def composed(arm="constrained 0.2", **overrides):
  keys = {key.replace("__", "."): value for key, value in overrides.items()}
  config = runner.compose(constrained_sparsity, "laptop", STUDY, arm).unlock()
  config.update_from_flattened_dict(keys)
  return config


def one_seed(config, **multipliers):
  """The task, and its first state for one seed without the seed axis."""
  task = next(iter(constrained_sparsity.stages(config).values()))
  program = Program(task, meshes.make({}, jax.devices()[:1]), (0,))
  state = program.initial_state()
  state = jax.tree.map(lambda x: x[0] if x.ndim and x is not state.step else x, state)
  if multipliers:
    state = state.replace(
      variables={**state.variables, "multipliers": jax.tree.map(jnp.float32, multipliers)}
    )
  return task, state


def batch(size=16):
  fields = labelled.load("digits", "train").gather(range(size))
  return fields | {"mask": np.ones(size, np.float32)}


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_gates_descend_along_the_expected_density(penalty):
  """The multiplier adds penalty * d density / d log alpha to what the loss itself asks for."""
  config = composed(optimizer__kind="sgd", optimizer__gates_lr=0.1, optimizer__lr=0.0)
  key = jax.random.key(3)
  moved = {}
  for value in (0.0, penalty):
    task, state = one_seed(config, model=value)
    new, _ = jax.jit(task.update)(state, batch(), key)
    moved[value] = new.params
  slopes = jax.grad(gates.expected_density)(state.params)
  for (name, before), (_, after), (_, slope) in zip(
    gates.gated_layers(moved[0.0]),
    gates.gated_layers(moved[penalty]),
    gates.gated_layers(slopes),
    strict=True,
  ):
    wanted = -0.1 * penalty * slope["log_alpha"]
    np.testing.assert_allclose(
      after["log_alpha"] - before["log_alpha"], wanted, atol=2e-6, err_msg=name
    )
    np.testing.assert_array_equal(after["kernel"], before["kernel"])  # at a rate of 0


@pytest.mark.parametrize(
  ("target", "restarts", "start", "wanted"),
  [(0.5, True, 0.3, "rises"), (0.9, True, 0.3, 0.0), (0.9, False, 0.3, "falls")],
)
def test_multipliers_rise_above_the_target_and_restart_below(target, restarts, start, wanted):
  """From the density of this step's forward pass: that of the parameters before the step."""
  config = composed(target=target, restarts=restarts)
  task, state = one_seed(config, model=start)
  density = float(gates.expected_density(state.params))
  assert 0.5 < density < 0.9
  new, metrics = jax.jit(task.update)(state, batch(), jax.random.key(0))
  multiplier = float(new.variables["multipliers"]["model"])
  if wanted == 0.0:
    assert multiplier == 0
  else:
    expected = start + config.optimizer.dual_lr * (density - target)
    assert multiplier == pytest.approx(expected, rel=1e-5)
    assert (multiplier > start) == (wanted == "rises")
  assert float(metrics["density"][0]) == pytest.approx(density, rel=1e-5)
  lowest = float(new.variables["history"]["lowest"])
  assert lowest == pytest.approx(density, rel=1e-5)


def test_the_constraint_is_on_the_expected_density_not_on_a_draw():
  task, state = one_seed(composed())
  update = jax.jit(task.update)
  found = [float(update(state, batch(), jax.random.key(k))[1]["density"][0]) for k in range(3)]
  assert len(set(found)) == 1
  losses = {float(update(state, batch(), jax.random.key(k))[1]["loss"][0]) for k in range(3)}
  assert len(losses) == 3  # while the loss is of drawn gates


def test_a_fixed_penalty_stays_as_given():
  task, state = one_seed(composed("penalised"), model=0.7)
  new, _ = jax.jit(task.update)(state, batch(), jax.random.key(0))
  assert float(new.variables["multipliers"]["model"]) == pytest.approx(0.7)


def test_every_layer_has_its_own_multiplier():
  task, state = one_seed(composed("every layer"))
  new, _ = jax.jit(task.update)(state, batch(), jax.random.key(0))
  found = new.variables["multipliers"]
  densities = gates.layer_densities(state.params)
  assert set(found) == set(densities) == {"layer_0", "layer_1", "layer_2"}
  for name, density in densities.items():
    rise = 0.03 * max(float(density) - 0.35, 0)
    assert float(found[name]) == pytest.approx(rise, rel=1e-4)


def test_gates_are_clamped_and_not_decayed():
  config = composed(optimizer__weight_decay=0.1, optimizer__gates_lr=100.0)
  task, state = one_seed(config)
  new, _ = jax.jit(task.update)(state, batch(), jax.random.key(0))
  for _, layer in gates.gated_layers(new.params):
    limits = np.log([0.01, 100.0])
    assert (layer["log_alpha"] >= limits[0] - 1e-6).all()
    assert (layer["log_alpha"] <= limits[1] + 1e-6).all()
  slopes = jax.grad(gates.weight_decay)(state.params)
  for _, layer in gates.gated_layers(slopes):
    assert float(jnp.abs(layer["log_alpha"]).max()) == 0
    assert float(jnp.abs(layer["kernel"]).max()) > 0


class Fits:
  """Stands for a lab: the density is a falling function of the penalty."""

  seeds = (0, 1)
  mesh = meshes.make({}, jax.devices()[:1])

  def __init__(self):
    self.penalties = []

  def fit(self, stage, task, variables):
    penalty_S = np.asarray(variables["multipliers"]["model"])
    self.penalties.append(penalty_S)
    density_S = np.clip(-np.log10(penalty_S) / 3 + np.array([0.0, 0.3]), 0, 1)
    metrics = {"test/density": density_S.tolist(), "test/accuracy": density_S.tolist()}
    return type("Fitted", (), {"metrics": metrics})


def test_bisection_is_of_the_logarithm_and_each_seed_has_its_own():
  lab = Fits()
  metrics = constrained_sparsity.run(composed("bisected 0.35", between=(-3.0, 0.0)), lab)
  logs = np.log10(lab.penalties)
  np.testing.assert_allclose(logs[:, 0], [-1.5, -0.75, -1.125], atol=1e-5)
  np.testing.assert_allclose(logs[:, 1], [-1.5, -0.75, -0.375], atol=1e-5)
  # The nearest of the three counts, which need not be the last.
  np.testing.assert_allclose(metrics["test/density"], [0.375, 0.425], atol=1e-5)


def test_a_grid_is_told_by_its_nearest_density():
  lab = Fits()
  metrics = constrained_sparsity.run(
    composed("penalised", penalties=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)), lab
  )
  np.testing.assert_allclose([p[0] for p in lab.penalties], [1e-4, 1e-3, 1e-2, 1e-1, 1], rtol=1e-5)
  np.testing.assert_allclose(metrics["density/0.1"], [1 / 3, 0.3 + 1 / 3], atol=1e-5)
  np.testing.assert_allclose(metrics["gap/0.5"], [1 / 6, 0.8 / 6], atol=1e-5)
  gaps = [metrics[f"gap/{t:g}"] for t in (0.1, 0.2, 0.35, 0.5)]
  np.testing.assert_allclose(metrics["gap at worst"], np.max(gaps, axis=0))


ROWS = {  # parameters without gates, gated layers, gates' lr, dual lr, of layers, decay, drop rate
  "mnist-mlp": (266_610, 3, 7e-4, 1e-4, 1e-4, 0.0, 0.5),
  "mnist-lenet": (431_080, 4, 7e-4, 1e-4, 1e-4, 0.0, 0.5),
  "cifar10-wrn": (36_479_194, 12, 6.0, 7e-4, 7e-4, 5e-4, 0.3),
  "cifar100-wrn": (36_536_884, 12, 6.0, 7e-4, 7e-4, 5e-4, 0.3),
  "tinyimagenet-resnet18": (11_279_112, 16, 1.0, 8e-4, 1e-4, 5e-4, 0.3),
  "imagenet-resnet50": (25_557_032, 48, 1.0, 3e-4, 3e-5, 1e-4, 0.05),
}


@pytest.mark.parametrize("row", ROWS)
def test_paper_scale(row):
  config = constrained_sparsity.get_config(f"paper/{row}")
  (task,) = constrained_sparsity.stages(config).values()
  program = Program(task, meshes.make({}, jax.devices()[:1]), (0,))
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                        program.abstract_state.params)  # fmt: skip
  layers = list(gates.gated_layers(params))
  ungated = program.parameters - sum(layer["log_alpha"].size for _, layer in layers)
  o = config.optimizer
  settings = (o.gates_lr, o.dual_lr, o.layer_dual_lr, o.weight_decay, config.drop_rate)
  assert (ungated, len(layers), *settings) == ROWS[row]
  assert task.steps == o.total_steps and task.steps % 10 == 0


def test_rates_fall_for_weights_and_not_for_gates():
  config = constrained_sparsity.get_config("paper/cifar10-wrn")
  settings = config.optimizer.to_dict() | {"total_steps": 200, "lr": 1.0}
  transform = constrained_sparsity.optimizer(**settings)
  params = {"w": jnp.zeros(1), "log_alpha": jnp.zeros(1)}
  state, update = transform.init(params), jax.jit(transform.update)
  steps = {"w": [], "log_alpha": []}
  for _ in range(200):
    updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    for name, value in updates.items():
      steps[name].append(-float(value[0]) * 0.1)  # momentum's sum is 10
  for epoch, scale in ((59, 1), (119, 0.2), (159, 0.04), (199, 0.008)):
    assert steps["w"][epoch] == pytest.approx(scale, rel=0.05)
    assert steps["log_alpha"][epoch] == pytest.approx(6.0, rel=0.05)


def test_the_update_compiles_sharded(monkeypatch):
  conv = functools.partial(gates.GatedConv, drop_rate=0.3)
  small = convnets.WideResNet(10, depth=10, widen=1, conv=conv)
  monkeypatch.setattr(constrained_sparsity, "network", lambda config, classes: small)
  config = constrained_sparsity.get_config("paper/cifar10-wrn")
  (task,) = constrained_sparsity.stages(config).values()
  program = Program(task, meshes.make({"data": 2, "fsdp": 2, "tensor": 2}), (0,))
  memory = program.compile_update().memory_analysis()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
  batches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_batches(1)))
  assert memory.argument_size_in_bytes < 0.5 * (whole + batches)


@pytest.mark.parametrize(
  ("key", "accepted"),
  [
    ("network", "mlp, lenet, wrn, resnet18, resnet50"),
    ("formulation", "constrained, penalised, bisected"),
    ("scope", "model, layer"),
    ("optimizer.kind", "adam, sgd"),
  ],
)
def test_mistakes(key, accepted):
  config = constrained_sparsity.get_config()
  config.update_from_flattened_dict({key: "x"})
  with pytest.raises(ValueError, match=re.escape(f"{key}='x'; accepted: {accepted}")):
    constrained_sparsity.stages(config)
