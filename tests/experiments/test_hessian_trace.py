"""The penalty: its gradient, interval, sign guard, control; and the paper's networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import hessian_trace
from experiments.datasets import labelled
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from launch.task import State
from models import convnets
from objectives import curvature

PARAMETERS = {
  "cifar10-resnet18": 11_173_962,
  "cifar100-resnet18": 11_220_132,
  "cifar10-wrn": 36_479_194,
  "cifar100-wrn": 36_536_884,
}


def composed(arm="full", **overrides):
  study = hessian_trace.STUDIES[0]
  keys = {key.replace("__", "."): value for key, value in overrides.items()}
  small = {"measured_probes": 4, "batch_size": 20, "optimizer.total_steps": 6}
  config = runner.compose(hessian_trace, "laptop", study, arm).unlock()
  config.update_from_flattened_dict(small | {"steps_per_dispatch": 1} | keys)
  return config


def batch_of(size=20):
  return labelled.load("digits", "train[:200]").gather(range(size)) | {
    "mask": np.ones(size, np.float32)
  }


def gradients(config):
  """Of one update: that of the loss alone and of all that the optimizer is given."""
  task = hessian_trace.stages(config)["train"]
  program = Program(task, meshes.make({}, jax.devices()[:1]), (0,))
  state = jax.tree.map(lambda x: x[0] if x.ndim else x, program.initial_state())
  seen = {}

  def update(grads, opt_state, params):
    seen["grads"] = grads
    return grads, opt_state

  spy = optax.GradientTransformation(task.optimizer.init, update)
  loss = hessian_trace.training_loss(config, convnets.named("mlp", 10, widths=(128, 128)))
  key = jax.random.key(5)
  _, metrics = hessian_trace.penalised_update(config, loss, spy)(state, batch_of(), key)
  loss_key, probe_key = jax.random.split(key)
  objective = lambda p: loss(p, {}, batch_of(), loss_key, train=True)[0]  # noqa: E731
  return seen["grads"], jax.grad(objective)(state.params), metrics, (objective, state, probe_key)


def apart(a, b):
  return float(optax.tree.norm(optax.tree.sub(a, b)))


def test_the_penalty_has_a_third_order_gradient():
  """That of strength * v' H v, here by differentiating products with v in reverse three times."""
  config = composed(strength=0.1)
  whole, plain, metrics, (objective, state, key) = gradients(config)
  v = curvature.probe(jax.random.split(key, 1)[0], state.params)

  def along(f):
    return lambda p: optax.tree.vdot(jax.grad(f)(p), v)

  trace, third = jax.value_and_grad(along(along(objective)))(state.params)
  np.testing.assert_allclose(metrics["trace"][0], trace, rtol=1e-4)
  extra, wanted = optax.tree.sub(whole, plain), optax.tree.scale(config.strength, third)
  assert apart(extra, wanted) < 1e-3 * float(optax.tree.norm(wanted))
  assert optax.tree.norm(wanted) > 0.1


def test_under_a_stop_gradient_it_has_none():
  whole, plain, metrics, _ = gradients(composed("stopped"))
  jax.tree.map(np.testing.assert_array_equal, whole, plain)
  assert float(metrics["trace"][0]) != 0  # and is still reported


def test_no_bit_differs_over_training_without_gradient():
  config = composed("stopped")
  mesh = meshes.make({}, jax.devices()[:1])
  batches = jax.tree.map(lambda x: np.stack([[x, x]] * 3), batch_of())
  results = []
  for task in hessian_trace.stages(config).values():
    program = Program(task, mesh, (0, 1))
    results.append(program.update(program.initial_state(), batches)[0].params)
  jax.tree.map(np.testing.assert_array_equal, *results)
  trained = Program(hessian_trace.stages(composed("full"))["train"], mesh, (0, 1))
  differing = trained.update(trained.initial_state(), batches)[0].params
  assert apart(differing, results[0]) > 0


def test_the_interval_leaves_steps_out():
  config = composed(trace__interval=3)
  program = Program(hessian_trace.stages(config)["train"], meshes.make({}, jax.devices()[:1]), (0,))
  batches = jax.tree.map(lambda x: np.stack([[x]] * 6), batch_of())
  _, metrics = program.update(program.initial_state(), batches)
  np.testing.assert_array_equal(metrics["trace"][1][:, 0], [1, 0, 0, 1, 0, 0])
  assert (np.asarray(metrics["trace"][0][:, 0]) != 0).tolist() == [True, False, False] * 2


@pytest.mark.parametrize("bounded", [False, True])
def test_a_negative_estimate_can_be_left_out(bounded):
  """Under -sum x^4 the trace is -12 |x|^2: its penalty drives x away, unless it is left out."""

  def loss(params, variables, batch, key, *, train):
    return -(params["x"] ** 4).sum(), ({}, variables)

  config = composed(trace__nonnegative=bounded, strength=0.01)
  x = jnp.array([1.0, -2.0])
  update = hessian_trace.penalised_update(config, loss, optax.sgd(1.0))
  state = State(step=0, key=None, params={"x": x}, variables={}, opt_state=optax.sgd(1.0).init(x))
  state, metrics = update(state.replace(step=jnp.zeros((), int)), {}, jax.random.key(0))
  wanted = x + 4 * x**3 + (0 if bounded else 0.01 * 24 * x)
  np.testing.assert_allclose(state.params["x"], wanted, rtol=1e-6)
  assert (metrics["trace"][0], metrics["negative"][0]) == (-60, 1)


def test_the_measured_trace_is_of_the_loss_alone_over_all_of_the_set():
  """Weight decay is the optimizer's: it would add decay times the number of parameters."""
  config = composed("none", measured_probes=400)
  task = hessian_trace.stages(config)["train"]
  params = meshes.unboxed(task.init(jax.random.key(0)))["params"]
  measure = jax.jit(lambda b, k: task.evaluate["train"].loss(params, {}, b, k, train=False)[1][0])
  total, count = measure(batch_of(200), jax.random.key(0))["trace"]
  assert count == 200
  loss = lambda p: task.loss(p, {}, batch_of(200), jax.random.key(0), train=False)[0]  # noqa: E731
  estimate, error = jax.jit(
    lambda k: curvature.hutchinson_trace(loss, params, k, 400, parallel=20)
  )(jax.random.key(7))
  assert abs(total / count - estimate) < 4 * 2**0.5 * error


@pytest.mark.parametrize("kind", ["smoothing", "confidence", "jacobian", "cutout", "mixup"])
def test_every_baseline_changes_the_gradient(kind):
  whole, *_ = gradients(composed(kind, **{"strength": 1.0} if kind == "mixup" else {}))
  none, *_ = gradients(composed("none"))
  assert apart(whole, none) > 1e-3
  idle, *_ = gradients(composed("none", regulariser=kind, strength=1e-7))
  if kind != "mixup":  # Beta(0, 0) is a whole swap of images, or none
    np.testing.assert_allclose(apart(idle, none), 0, atol=1e-5)


@pytest.mark.parametrize("row", PARAMETERS)
def test_paper_scale(row):
  config = hessian_trace.get_config(f"paper/{row}")
  task = hessian_trace.stages(config)["train"]
  program = Program(task, meshes.make({}, jax.devices()[:1]), (0,))
  assert program.parameters == PARAMETERS[row]
  assert (task.batch_size, task.steps, config.optimizer.lr) == (32, 200 * 1562, 0.01)
  assert (config.trace.probes, config.trace.keep, config.trace.interval) == (5, 0.1, 10)
  rate = {"wrn": "steps", "resnet18": "cosine"}[row.partition("-")[2]]
  assert config.optimizer.schedule == rate


def test_the_penalised_update_compiles_sharded(monkeypatch):
  """Third derivatives through a convolution and batch normalisation, over eight devices."""
  small = convnets.WideResNet(10, depth=4, widen=1)  # stem, norm and head
  monkeypatch.setattr(convnets, "named", lambda *arguments, **options: small)
  config = hessian_trace.get_config("paper/cifar10-wrn")
  config.regulariser, config.trace.probes = "trace", 2
  task = hessian_trace.stages(config)["train"]
  program = Program(task, meshes.make({"data": 2, "fsdp": 2, "tensor": 2}), (0,))
  memory = program.compile_update().memory_analysis()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
  batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_batches(1)))
  assert memory.argument_size_in_bytes < 0.5 * (whole + batch)
  assert memory.alias_size_in_bytes > 0


def test_the_step_schedule():
  """A fifth at 60, 120 and 160 of 200 epochs, and decay coupled to the gradient."""
  transform = hessian_trace.sgd(1.0, "steps", 0.1, 200, 0)
  state, rates = transform.init(jnp.ones(1)), []
  for _ in range(200):
    updates, state = transform.update(jnp.zeros(1), state, jnp.ones(1))
    rates.append(float(updates[0]))
  limit = -0.1 / (1 - 0.9)  # momentum's sum of the decays
  for step, scale in ((59, 1), (119, 0.2), (159, 0.04), (199, 0.008)):
    assert rates[step] == pytest.approx(limit * scale, rel=0.02)


NAMES = {"regulariser": "regulariser", "model": "network", "optimizer.schedule": "schedule"}


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("regulariser", "none, trace"),
    ("model", "mlp, lenet, wrn"),
    ("optimizer.schedule", "cosine"),
  ],
)
def test_mistakes(key, message):
  config = hessian_trace.get_config()
  config.update_from_flattened_dict({key: "x"})
  with pytest.raises(ValueError, match=f"{NAMES[key]}='x'; accepted: {message}"):
    hessian_trace.stages(config)
