"""The seven odd shapes through the engine: claims, seeds, sharding, resume, fresh starts."""

import dataclasses
import importlib.util
import pathlib
import re
import signal

import jax
import numpy as np
import optax
import pytest
import rich.console

from launch import ConfigurationError, Task, interruption, run, runner
from launch import mesh as meshes
from launch.checkpoints import Checkpoints
from launch.lab import Lab
from launch.program import Program
from launch.progress import Progress


def _load():
  path = pathlib.Path(__file__).parent / "odd_shapes.py"
  spec = importlib.util.spec_from_file_location("odd_shapes", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


odd = _load()
NAMES = [module.__name__ for module in odd.MODULES]
by_name = dict(zip(NAMES, odd.MODULES, strict=True))
first_arm = {name: next(iter(m.STUDIES[0].arms)) for name, m in by_name.items()}


def states(workdir: pathlib.Path) -> dict[str, dict]:
  """The final state of every stage of every arm, as numpy arrays."""
  found = {}
  for done in sorted(workdir.glob("toy/*/checkpoints/*/done.json")):
    checkpoints = Checkpoints(done.parent)
    state = checkpoints.manager.restore(checkpoints.latest())["state"]
    checkpoints.close()
    found[str(done.parent.relative_to(workdir))] = jax.tree.map(np.asarray, state)
  return found


def close(a, b, **tolerance):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
  """Runs every experiment once, on one device."""
  cache = {}

  def get(name):
    if name not in cache:
      workdir = tmp_path_factory.mktemp(name)
      cache[name] = workdir, run(by_name[name], workdir=workdir, mesh=one_device)
    return cache[name]

  return get


@pytest.mark.parametrize("name", NAMES)
def test_its_claims_hold(name, finished):
  _, results = finished(name)
  assert results["claims"]
  for claim in results["claims"]:
    assert (claim["verdict"], claim["seeds"]) == ("held", 3), claim


@pytest.mark.parametrize("name", NAMES)
def test_sharded_it_ends_where_it_ends_unsharded(name, finished, tmp_path):
  workdir, _ = finished(name)
  run(by_name[name], arm=first_arm[name], workdir=tmp_path, mesh="data=4,tensor=2")
  whole, parts = states(workdir), states(tmp_path)
  assert parts
  for stage, state in parts.items():
    close(state["params"], whole[stage]["params"], rtol=2e-3, atol=2e-4)
    close(state["variables"], whole[stage]["variables"], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_alone_is_that_seed_among_three(name, finished, one_device, tmp_path):
  workdir, results = finished(name)
  alone = run(by_name[name], arm=first_arm[name], seeds=[2], workdir=tmp_path, mesh=one_device)
  arm = f"toy/{first_arm[name]}"
  for metric, values in alone["arms"][arm]["metrics"].items():
    wanted = results["arms"][arm]["metrics"][metric][2]
    assert values[0] == pytest.approx(wanted, rel=2e-2, abs=1e-3)
  for stage, state in states(tmp_path).items():
    third = jax.tree.map(lambda x: x[2:], states(workdir)[stage]["params"])
    close(state["params"], third, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("reads", [2, 10])
@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_resumed_it_ends_the_same(
  name, reads, finished, one_device, tmp_path, monkeypatch
):
  class After(interruption.Interruption):
    """A signal that arrives after so many updates, in whichever stage."""

    count = 0

    @property
    def signal(self):
      After.count += 1
      return signal.SIGTERM if After.count > reads else None

    @signal.setter
    def signal(self, value): ...

  workdir, results = finished(name)
  with monkeypatch.context() as patch:
    patch.setattr(runner, "Interruption", After)
    with pytest.raises(interruption.Stopped):
      run(by_name[name], arm=first_arm[name], workdir=tmp_path, mesh=one_device)
  resumed = run(by_name[name], arm=first_arm[name], workdir=tmp_path, mesh=one_device)
  arm = f"toy/{first_arm[name]}"
  assert resumed["arms"][arm]["metrics"] == results["arms"][arm]["metrics"]
  whole = states(workdir)
  for stage, state in states(tmp_path).items():
    close(state, whole[stage], rtol=0, atol=0)


def test_the_second_stage_starts_from_what_the_first_found(finished, one_device):
  """Half of each kernel is zero, and the momentum of the optimizer begins at zero."""
  workdir, _ = finished("two_stage")
  module = by_name["two_stage"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "handed on")
  task = module.stages(config)["pruned"]
  found = states(workdir)["toy/handed-on/checkpoints/dense"]["params"]
  start = jax.vmap(odd.prune)(found)
  state = Program(task, one_device, (0, 1, 2)).initial_state({"params": start})
  kernel = np.asarray(state.params["hidden"]["kernel"])
  assert ((kernel == 0).mean(axis=(1, 2)) == 0.5).all()
  close(state.params["logits"], found["logits"], rtol=0)
  assert all(not np.asarray(m).any() for m in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (
      lambda p: p | {"logits": {"kernel": p["logits"]["kernel"]}},
      r"start from params/logits/bias: nothing is given; the stage has float32\[1, 4\]",
    ),
    (
      lambda p: jax.tree.map(lambda x: x[..., :1], p),
      r"start from params/hidden/bias: float32\[1, 1\] is given; the stage has float32\[1, 16\]",
    ),
    (
      lambda p: p | {"more": p["logits"]},
      r"start from params/more/bias: float32\[1, 4\] is given; the stage has nothing",
    ),
  ],
)
def test_a_start_that_does_not_fit_is_named(spoil, message, one_device):
  module = by_name["two_stage"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "anew")
  program = Program(module.stages(config)["dense"], one_device, (0,))
  params = program.initial_state().params
  with pytest.raises(ConfigurationError, match=message):
    program.initial_state({"params": spoil(params)})


@pytest.mark.parametrize("map_seeds", [True, False])
def test_a_stage_goes_on_with_the_optimizer_of_another(map_seeds, one_device, tmp_path):
  """Two halves of a schedule are the whole; every batch is all of the data."""
  init, loss = odd.supervised(odd.Network(), odd.cross_entropy, odd.EXAMPLE)
  rate = optax.linear_schedule(0.1, 0.0, 8)
  whole = Task(
    init=init,
    loss=loss,
    optimizer=optax.adam(rate),
    example=odd.EXAMPLE,
    data=lambda: odd.Clusters(0, odd.BATCH),
    batch_size=odd.BATCH,
    steps=8,
    map_seeds=map_seeds,
  )
  half = dataclasses.replace(whole, steps=4)
  console = rich.console.Console(quiet=True)
  fit = Lab(one_device, tmp_path, (0, 1), "arm", Progress(console), interruption.Interruption()).fit
  first = fit("first", half)
  start = {"params": first.params}
  second, fresh = fit("second", half, start, first.opt_state), fit("fresh", half, start)
  want = fit("whole", whole)
  close(second.params, want.params, rtol=1e-4, atol=1e-6)
  close(second.opt_state, want.opt_state, rtol=1e-4, atol=1e-6)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), fresh.params, want.params)
  assert min(jax.tree.leaves(moved)) > 1e-2
  close(fit("second", half).opt_state, second.opt_state, rtol=0)  # read back
  with pytest.raises(ConfigurationError, match="start from opt_state/0/count: nothing is given"):
    fit("other", half, start, optax.sgd(0.1).init(start))


def test_microbatches_are_one_batch(one_device, tmp_path):
  """Equal masks: the mean of means. What is counted and running statistics see every part."""
  init, plain = odd.supervised(odd.Network(), odd.cross_entropy, odd.EXAMPLE)

  def loss(params, variables, batch, key, *, train):
    value, (metrics, _) = plain(params, {}, batch, key, train=train)
    return value, (metrics, {"seen": {"rows": variables["seen"]["rows"] + batch["mask"].sum()}})

  whole = Task(
    init=lambda key: init(key) | {"seen": {"rows": np.zeros((), np.float32)}},
    loss=loss,
    optimizer=optax.sgd(0.1),
    example=odd.EXAMPLE,
    batch_size=odd.BATCH,
    steps=1,
  )
  fields = {k: v[None, None] for k, v in odd.Clusters(0, odd.BATCH).fields.items()}
  batch = fields | {"mask": np.ones((1, 1, odd.BATCH), np.float32)}

  def updated(parts, mesh):
    program = Program(dataclasses.replace(whole, microbatches=parts), mesh, (0,))
    return program, jax.device_get(program.update(program.initial_state(), batch))

  _, (want, metrics) = updated(1, one_device)
  for parts, sizes in ((4, {"data": 1}), (2, {"data": 8})):
    program, (state, found) = updated(parts, meshes.make(sizes, jax.devices()[: sizes["data"]]))
    close(state.params, want.params, rtol=1e-4, atol=1e-6)
    assert state.variables["seen"]["rows"] == odd.BATCH
    for name, (total, count) in metrics.items():
      np.testing.assert_allclose(found[name][0] / found[name][1], total / count, rtol=1e-4)
    assert found["accuracy"][1] == odd.BATCH
  # Every part is of all devices: no row moves between them.
  assert "all-to-all" not in program.compile_update().as_text()
  assert "collective-permute" not in program.compile_update().as_text()
  for parts, mesh, message in (
    (3, one_device, "microbatches = 3 of batch_size = 16; a divisor of it is accepted"),
    (4, meshes.make({"data": 8}), "batch_size / microbatches = 4 does not divide"),
  ):
    with pytest.raises(ConfigurationError, match=message):
      Program(dataclasses.replace(whole, microbatches=parts), mesh, (0,))


def test_frozen_leaves_keep_their_type_and_value(finished, one_device):
  workdir, _ = finished("frozen")
  module = by_name["frozen"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "trained")
  first = Program(module.stages(config)["train"], one_device, (0, 1, 2)).initial_state()
  last = states(workdir)["toy/trained/checkpoints/train"]
  codes = last["variables"]["quantised"]["codes"]
  assert codes.dtype == np.int8
  assert len(np.unique(codes)) > 50
  jax.tree.map(np.testing.assert_array_equal, last["variables"], dict(first.variables))
  names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(first.opt_state)}
  assert not any("codes" in name for name in names)
  assert any("Dense_0" in name for name in names)


def test_multipliers_rise_while_the_constraint_is_broken(finished):
  workdir, _ = finished("min_max")
  bound, free = (
    states(workdir)[f"toy/{arm}/checkpoints/train"]["variables"]["multipliers"]["norm"]
    for arm in ("bound", "free")
  )
  assert (bound > 0).all()
  assert (free == 0).all()


def test_the_hessian_trace_is_the_trace_of_the_hessian():
  """The mean over random signs against the dense Hessian."""
  init, plain = odd.supervised(odd.Network(width=3), odd.cross_entropy, odd.EXAMPLE)
  params = meshes.unboxed(init(jax.random.key(0)))["params"]
  data = odd.Clusters(0, 16)
  batch = {**data.fields, "mask": np.ones(16, np.float32)}

  def loss(params):
    return plain(params, {}, batch, jax.random.key(2), train=False)[0]

  flat, unravel = jax.flatten_util.ravel_pytree(params)
  dense = np.trace(jax.hessian(lambda x: loss(unravel(x)))(flat))
  keys = jax.random.split(jax.random.key(1), 2000)
  draws = jax.vmap(lambda key: odd.hessian_trace(loss, params, key))(keys)
  assert float(draws.mean()) == pytest.approx(float(dense), abs=4 * float(draws.std()) / 2000**0.5)


def test_a_stage_of_no_steps_measures_its_start(finished, one_device):
  workdir, results = finished("evaluate_only")
  module = by_name["evaluate_only"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "start")
  start = Program(module.stages(config)["train"], one_device, (0, 1, 2)).initial_state()
  last = states(workdir)["toy/start/checkpoints/train"]
  jax.tree.map(np.testing.assert_array_equal, last["params"], start.params)
  arm = results["arms"]["toy/start"]
  assert arm["steps"] == 0
  data = odd.Clusters(1)
  for seed, accuracy in enumerate(arm["metrics"]["test/accuracy"]):
    params = jax.tree.map(lambda x, seed=seed: x[seed], start.params)
    hits = odd.Network().apply({"params": params}, data.fields["inputs"]).argmax(-1)
    assert accuracy == pytest.approx(float((hits == data.fields["labels"]).mean()), abs=1e-6)


def test_steps_without_data_are_refused(one_device, tmp_path):
  module = by_name["evaluate_only"]
  stages = lambda config: {  # noqa: E731
    k: odd.task(t.init, t.loss, config, data=None) for k, t in odd.evaluate_only(config).items()
  }
  stages.__name__ = "no_data"
  broken = odd.experiment(stages, module.STUDIES[0].arms, module.STUDIES[0].claims)
  with pytest.raises(ConfigurationError, match="toy/trained train: steps = 30 and no training"):
    run(broken, workdir=tmp_path, mesh=one_device)


def test_independent_models_exchange_no_gradient():
  """Each of four devices updates its own model: all that is summed over devices are metrics."""
  module = by_name["averaged"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "mean")
  mesh = meshes.make({"data": 4}, jax.devices()[:4])
  program = Program(module.stages(config)["branches"], mesh, (0,))
  kernel = program.abstract_state.params["hidden"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 1, odd.FEATURES, 16)
  text = program.compile_update(1).as_text()
  exchanges = re.findall(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text
  )
  sums = [
    np.prod([int(n) for n in shape.split(",") if n])
    for result in exchanges
    for shape in re.findall(r"\w+\[([\d,]*)\]", result)
  ]
  assert sums  # the metrics
  assert max(sums) <= 4


def test_independent_models_train_as_they_would_alone(finished, one_device):
  """Model 1 of four, given its part of the data, key by key."""
  module = by_name["averaged"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "mean")
  program = Program(module.stages(config)["branches"], one_device, (0,))
  state = program.initial_state()
  params = jax.tree.map(lambda x: np.asarray(x[0, 1]), state.params)
  data = odd.Clusters(0, models=odd.MODELS)
  batch = {k: v[: odd.BATCH] for k, v in data.fields.items()} | {
    "mask": np.ones(odd.BATCH, np.float32)
  }
  after, _ = program.update(state, jax.tree.map(lambda x: x[None, None], batch))
  _, plain = odd.supervised(odd.Network(), odd.cross_entropy, odd.EXAMPLE)
  own = {k: v[:, 1] if v.ndim > 1 else v for k, v in batch.items()}
  grads = jax.grad(lambda p: plain(p, {}, own, jax.random.key(2), train=True)[0])(params)
  optimizer = optax.adam(config.lr)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  wanted = optax.apply_updates(params, updates)
  close(jax.tree.map(lambda x: x[0, 1], after.params), wanted, rtol=1e-4, atol=1e-5)


def test_the_policy_draws_anew_at_every_update(one_device):
  """The same batch twice: other actions, other rewards; the same step again: the same ones."""
  module = by_name["policy"]
  config = runner.compose(module, "laptop", module.STUDIES[0], "no signal")
  program = Program(module.stages(config)["train"], one_device, (0, 1))
  data = odd.Clusters(0)
  batch = {k: v[: odd.BATCH] for k, v in data.fields.items()} | {
    "mask": np.ones(odd.BATCH, np.float32)
  }
  repeated = jax.tree.map(lambda x: np.broadcast_to(x, (6, 2, *x.shape)), batch)
  rewards = [
    np.asarray(program.update(program.initial_state(), repeated)[1]["reward"][0]) for _ in range(2)
  ]
  np.testing.assert_array_equal(*rewards)
  assert all(len(set(of_seed)) > 1 for of_seed in rewards[0].T)
