"""The two algorithms where their limits are known, and that everything is computed in float64."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import edge_of_stability
from launch import mesh as meshes
from launch import runner
from launch.program import Program


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def composed(study="network", arm="normalised", **overrides):
  chosen = next(s for s in edge_of_stability.STUDIES if s.name == study)
  keys = {key.replace("__", "."): value for key, value in overrides.items()}
  scale = next(s for s in edge_of_stability.SCALES if chosen.at(s))
  config = runner.compose(edge_of_stability, scale, chosen, arm).unlock()
  config.update_from_flattened_dict(keys)
  return config


class Seeds:
  seeds = (0, 1)


@pytest.mark.parametrize(("arm", "tau", "where"), [("N", 6.0, 1.962), ("S", 2.0, 1.1036)])
def test_the_toy_follows_its_flow(arm, tau, where):
  """At the rates 1/4 of log lambda_1 and 1/8 of lambda_1, with an error that falls with eta."""
  errors = edge_of_stability.toy(composed("toy", arm), Seeds)
  np.testing.assert_allclose(errors["error at half, x"], where, atol=1e-3)
  assert max(errors["error"]) < 3 * 0.05**2
  assert max(errors["error at half"]) < 0.5 * min(errors["error"])


SMALL = {"approach__steps": 100, "taus": (0.004, 0.008), "inner": 20, "pairs": 2, "lanczos": 12}


def drift(stage, sizes=(("data", 1),), **overrides):
  """State before and after all updates of a stage, in float64, from the initial weights."""
  config = composed(**SMALL | {"flow__lr": 5e-4, "flow__projections": 5} | overrides)
  task = edge_of_stability.stages(config)[stage]
  mesh = meshes.make(dict(sizes), jax.devices()[: int(np.prod([n for _, n in sizes]))])
  program = Program(task, mesh, (0, 1))
  source = task.data()[0]
  batches = {k: np.broadcast_to(v, (task.steps, 2, 1, *v.shape)) for k, v in source.items()}
  batches["mask"] = np.ones((task.steps, 2, 1), np.float32)
  state = program.initial_state()
  before = jax.tree.map(np.asarray, state.params)
  after, metrics = program.update(state, batches)
  evaluated = program.evaluation(next(iter(task.evaluate.values())).loss)(
    after.params,
    after.variables,
    {k: v[None] for k, v in source.items()} | {"mask": np.ones(1, np.float32)},
    np.int32(0),
  )
  return config, task, before, after, metrics, evaluated


def dense_top(config, params, batch):
  """lambda_1 by the dense Hessian of the squared loss, written out."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)

  def loss(flat):
    p = unravel(flat)
    x = batch["inputs"].reshape(len(batch["inputs"]), -1)
    h = jax.nn.gelu(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    logits = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    return ((logits - jax.nn.one_hot(batch["labels"], 10)) ** 2).sum() / len(x)

  return jnp.linalg.eigvalsh(jax.jit(jax.hessian(loss))(flat))[-1]


def test_curvature_is_that_of_the_loss_in_float64_at_the_right_times(x64):
  config, task, before, after, metrics, evaluated = drift("drift", width=4, lanczos=60)
  assert task.steps * config.inner * config.eta**2 == pytest.approx(config.taus[-1])
  assert {x.dtype for x in jax.tree.leaves((after.params, metrics["loss"][0]))} == {np.dtype(float)}
  history = after.variables["history"]["lambda"]
  assert history.shape == (2, 2)  # seeds; tau = 0 and the first
  batch = task.data()[0]
  for when, params in ((history[:, 0], before), (evaluated["lambda"][0], after.params)):
    own = jax.tree.map(lambda x: x[0], params)
    np.testing.assert_allclose(when[0], dense_top(config, own, batch), rtol=1e-6)
  fall = evaluated["fall at 0.008"][0]
  np.testing.assert_allclose(fall, evaluated["lambda"][0] / history[:, 0], rtol=1e-9)


def test_nothing_is_switched_on_for_the_whole_process():
  with jax.enable_x64(True):
    assert jnp.zeros(()).dtype == jnp.float64
  assert jnp.zeros(()).dtype == jnp.float32


@pytest.mark.parametrize("stage", ["drift", "flow"])
def test_sharded_over_images_is_the_same(x64, stage):
  *_, whole, _, _ = drift(stage, width=8)
  *_, parts, _, _ = drift(stage, (("data", 2), ("tensor", 2)), width=8)
  for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_paper_scale():
  """9,000 steps and 120,000 on MNIST, 20,000 on CIFAR-10 from the start, the head frozen."""
  stages = edge_of_stability.stages(composed("mnist"))
  assert [stages[s].steps * 500 for s in ("approach", "drift")] == [9_000, 120_000]
  assert stages["flow"].steps == 300
  mesh = meshes.make({}, jax.devices()[:1])
  assert Program(stages["drift"], mesh, (0,)).parameters == 784 * 128 + 128 + 128 * 10 + 10
  (task,) = edge_of_stability.stages(composed("cifar")).values()
  state = Program(task, mesh, (0,)).abstract_state
  assert (task.steps, task.evaluate_every) == (20_000, 500)
  channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
  convs = sum(9 * a * b + b for a, b in itertools.pairwise(channels))
  assert sum(x.size for x in jax.tree.leaves(state.params)) == convs
  assert state.variables["frozen"]["head"].shape == (1, 512, 10)


def test_mistakes():
  config = edge_of_stability.get_config()
  config.algorithm = "x"
  accepted = re.escape("algorithm='x'; accepted: gd, normalised, root")
  with pytest.raises(ValueError, match=accepted):
    edge_of_stability.stages(config)
