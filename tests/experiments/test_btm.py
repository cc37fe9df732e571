"""BTM: who reads what, what is copied at the branch, what is exchanged, and the paper's sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import btm
from experiments.datasets import domains, sources
from launch import mesh as meshes
from launch import runner
from launch.plan import hlo
from launch.program import Program
from models import merging
from objectives import ensembles

SMALL = {"length": 12, "width": 16, "layers": 1, "heads": 2, "measured": 8, "batch_size": 4}
SMALL |= {"optimizer.total_steps": 8, "position": "learned"}
SMALL |= {"optimizer.name": "adamw", "optimizer.lr": 5e-3}
# Adam moves what has no gradient but rounding, such as the bias of keys, by a little.
WEIGHTS, MOMENTS = {"rtol": 1e-3, "atol": 3e-5}, {"rtol": 1e-3, "atol": 1e-7}


@functools.cache
def tasks(**overrides):
  config = runner.compose(btm, "laptop", btm.STUDIES[0], "btm", SMALL | overrides)
  return config, btm.stages(config)


@functools.cache
def one_device():
  return meshes.make({}, jax.devices()[:1])


def batches(task, updates=1, seeds=1, rows=None):
  """Random tokens for `updates` updates."""
  random = np.random.RandomState(3)
  shape = (updates, seeds, rows or task.batch_size)
  fields = {
    k: random.randint(5, 261, (*shape, *v.shape), np.int32) for k, v in task.example.items()
  }
  return fields | {"mask": np.ones(shape, np.float32)}


@functools.cache
def fresh(kind, **overrides):
  """A task, its start for one seed, and one update of it."""
  config, made = tasks(**overrides)
  task = made[{"dense": "dense", "forest": "experts", "demix": "demix"}[kind]]
  program = Program(task, one_device(), (0,))
  return config, task, program


def trained(program, batch, start=()):
  return jax.device_get(program.update(program.initial_state(*start), batch)[0])


def close(a, b, **options):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), a, b)


# Data


def test_an_expert_reads_one_domain_and_no_phase_what_another_reads():
  config, _ = tasks()
  whole = btm.training(config, "both").fields["inputs"]
  seed, rest = (btm.training(config, phase).fields["inputs"] for phase in ("seed", "branches"))
  assert len(seed) + len(rest) == len(whole) and abs(len(seed) - len(rest)) <= 1
  rows = lambda x: {row.tobytes() for row in x.reshape(-1, *x.shape[2:])}  # noqa: E731
  assert sorted(map(bytes, [*seed, *rest])) == sorted(map(bytes, whole))
  for column, name in enumerate(config.domains):
    own = rows(domains.side_by_side([name], "train", config.length).fields["inputs"])
    assert rows(rest[:, column : column + 1]) <= own
  # A random split has the same windows, and each column those of every domain.
  mixed = btm.training(config, "branches", at_random=True).fields
  assert sorted(map(bytes, mixed["inputs"].reshape(-1, config.length))) == sorted(
    map(bytes, rest.reshape(-1, config.length))
  )
  np.testing.assert_array_equal(mixed["inputs"][..., 1:], mixed["targets"][..., :-1])
  home = {row.tobytes(): c for c in range(len(config.domains)) for row in rest[:, c]}
  for column in range(len(config.domains)):
    shares = np.bincount([home[row.tobytes()] for row in mixed["inputs"][:, column]]) / len(rest)
    np.testing.assert_allclose(shares, 1 / len(config.domains), atol=0.04)


def test_held_out_domains_and_splits():
  config, made = tasks()
  assert not set(config.domains) & set(config.held_out)
  # The prior is estimated on development data, and what is measured on is not that.
  prior, test = made["merged"].data(), made["merged"].evaluate["test"].data()
  everywhere = config.domains + config.held_out
  for source, split in ((prior, "validation"), (test, "test")):
    wanted = domains.side_by_side(everywhere, split, config.length, len(source))
    np.testing.assert_array_equal(source.fields["inputs"], wanted.fields["inputs"])
  assert len(prior) == made["merged"].steps * made["merged"].batch_size == 96
  tuning = next(s for s in btm.STUDIES if s.name == "tuning")
  for arm in tuning.arms:
    assert runner.compose(btm, "laptop", tuning, arm).split == "validation"


def test_all_arms_see_as_many_tokens():
  config, made = tasks()
  tokens = {
    name: task.steps * task.batch_size * task.example["inputs"].shape[0] * config.length
    for name, task in made.items()
  }
  assert tokens["unseeded"] == tokens["demix"] == tokens["seed"] + tokens["dense"]
  assert tokens["dense"] == tokens["experts"] == tokens["random"]


# Training


@functools.cache
def reference(**overrides):
  """An update of one model on one batch, by hand, compiled."""
  config, _ = tasks(**overrides)

  def loss(params, inputs_BL, targets_BL):
    logits = model(config).apply({"params": params}, inputs_BL)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets_BL).mean()

  @jax.jit
  def update(params, moments, inputs_BL, targets_BL):
    return clipped(config, params, moments, jax.grad(loss)(params, inputs_BL, targets_BL))

  return update


def clipped(config, params, moments, grads):
  norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
  grads = jax.tree.map(lambda g: g * jnp.minimum(1, config.optimizer.clip / norm), grads)
  updates, moments = btm.optimizer(config, "dense").update(grads, moments, params)
  return optax.apply_updates(params, updates), moments, norm


def model(config):
  from models.transformer import Transformer

  return Transformer(261, config.width, config.layers, config.heads, max_length=config.length)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_train_as_they_would_alone(optimizer):
  """From one branched state, each on its own column, clipped by its own norm."""
  own = {"optimizer.name": optimizer}
  config, dense, program = fresh("dense", **own)
  state = trained(program, batches(dense, updates=2))
  whole = state.params, state.opt_state
  _, task, experts = fresh("forest", **own)
  after = trained(experts, batches(dense), btm.branch(task, *whole))
  norms = []
  for j in range(len(config.domains)):
    rows = (batches(dense)[name][0, 0, :, j] for name in ("inputs", "targets"))
    start = jax.tree.map(lambda x: x[0], whole)
    params, moments, norm = reference(**own)(*start, *rows)
    norms.append(norm)
    close(jax.tree.map(lambda x, j=j: x[0, j], after.params), params, **WEIGHTS)
    if optimizer == "adamw":
      mu = jax.tree.map(lambda x, j=j: x[0, j], after.opt_state[1][0].mu)
      close(mu, moments[1][0].mu, **MOMENTS)
  assert min(norms) > config.optimizer.clip and np.ptp(norms) > 1e-3  # it matters whose norm


def test_the_dense_model_reads_all_columns():
  config, dense, program = fresh("dense")
  began = jax.device_get(program.initial_state())
  start = jax.tree.map(lambda x: x[0], (began.params, began.opt_state))
  batch = batches(dense)
  after = trained(program, batch)
  rows = (batch[name].reshape(-1, config.length) for name in ("inputs", "targets"))
  params, moments, _ = reference()(*start, *rows)
  close(jax.tree.map(lambda x: x[0], after.params), params, **WEIGHTS)
  close(jax.tree.map(lambda x: x[0], after.opt_state[1][0].mu), moments[1][0].mu, **MOMENTS)


def test_the_branch_copies_the_whole_state():
  """Weights, moments and the count of updates, by which the schedule goes on where it was."""
  config, dense, program = fresh("dense")
  state = trained(program, batches(dense, updates=3))
  start = btm.branch(fresh("forest")[1], state.params, state.opt_state)
  began = jax.device_get(fresh("forest")[2].initial_state(*start))
  adam, _, schedule = began.opt_state[1]
  assert int(adam.count[0]) == int(schedule.count[0]) == 3
  moments = state.opt_state[1][0]
  for copied, one in (
    (began.params, state.params),
    (adam.mu, moments.mu),
    (adam.nu, moments.nu),
  ):
    assert max(np.abs(x).max() for x in jax.tree.leaves(one)) > 0
    for j in range(len(config.domains)):
      jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, j=j: x[:, j], copied), one)


def test_the_schedule_warms_up_once():
  config, _ = tasks(**{"optimizer.total_steps": 100})
  params = {"w": jnp.ones(())}
  adam = btm.optimizer(config, "dense")
  state, moved = adam.init(params), []
  for _ in range(100):
    updates, state = adam.update({"w": jnp.ones(())}, state, params)
    moved.append(-float(updates["w"]))
  rate = np.array(moved) / 1.1  # a constant gradient moves by the rate, and decay by a tenth of it
  assert rate.argmax() == 7  # of 100 updates, 8 warm up
  np.testing.assert_allclose(
    rate[[0, 3, 7]], config.optimizer.lr * np.array([1, 4, 8]) / 8, rtol=1e-4
  )
  np.testing.assert_allclose(np.diff(rate[7:]), np.diff(rate[7:]).mean(), rtol=1e-2)
  np.testing.assert_allclose(rate[-1], config.optimizer.lr / 93, rtol=1e-2)


def test_demix_shares_all_but_feed_forward_layers():
  config, task, program = fresh("demix")
  start = jax.device_get(program.initial_state())
  batch = batches(task)
  after = trained(program, batch)
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(after.params)
  }
  one = jax.eval_shape(model(config).init, jax.random.key(0), batch["inputs"][0, 0, :, 0])["params"]
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(meshes.unboxed(one))
  }
  for name, shape in flat.items():
    assert shape == (1, *(4,) * ("/mlp/" in name), *shapes[name]), name
  assert sum("/mlp/" in name for name in flat) == 4
  # The gradient is that of one model whose feed-forward layers depend on the domain.
  columns = [
    jax.tree.map(lambda x, j=j: x[0, 0, :, j], {k: batch[k] for k in task.example})
    for j in range(4)
  ]

  def loss(params):
    total = 0.0
    for j, rows in enumerate(columns):
      own = jax.tree_util.tree_map_with_path(
        lambda path, x, j=j: (
          x[j] if "/mlp/" in jax.tree_util.keystr(path, simple=True, separator="/") else x
        ),
        params,
      )
      logits = model(config).apply({"params": own}, rows["inputs"])
      total += optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"]).mean() / 4
    return total

  state = jax.tree.map(lambda x: x[0], (start.params, start.opt_state))
  params, moments, _ = jax.jit(lambda p, m: clipped(config, p, m, jax.grad(loss)(p)))(*state)
  close(jax.tree.map(lambda x: x[0], after.params), params, **WEIGHTS)
  close(jax.tree.map(lambda x: x[0], after.opt_state[1][0].mu), moments[1][0].mu, **MOMENTS)
  # Spread out, it is a forest like any other.
  forest = btm.branch(tasks()[1]["merged"], after.params)[0]["params"]
  assert all(x.shape[:2] == (1, 4) for x in jax.tree.leaves(forest))
  np.testing.assert_array_equal(forest["embedding"][:, 3], after.params["embedding"])
  up = [tree["layer_0"]["mlp"]["up"]["kernel"] for tree in (forest, after.params)]
  np.testing.assert_array_equal(*up)


def test_unseeded_experts_start_apart():
  _, _, program = fresh("forest")
  kernel = np.asarray(program.initial_state().params["embedding"][0])
  assert min(np.abs(kernel[i] - kernel[j]).max() for i in range(4) for j in range(i)) > 0.01


def test_microbatches_change_nothing():
  made = [fresh("forest", **parts) for parts in ({}, {"microbatches": 2})]
  a, b = (trained(program, batches(task)) for _, task, program in made)
  close(a.params, b.params, **WEIGHTS)
  close(a.opt_state[1][0].mu, b.opt_state[1][0].mu, **MOMENTS)


# Merging


def merged(config, task, seed=0):
  params = meshes.unboxed(jax.jit(task.init)(jax.random.key(seed)))["params"]
  start = jax.tree.map(lambda x: x[None], params)
  shape = (1, len(config.domains + config.held_out), len(config.domains))
  return params, {"params": start, "prior": jnp.full(shape, 1 / shape[-1])}


@functools.cache
def answers():
  """log p of the tokens that came, of one model, compiled."""
  config, _ = tasks()

  @jax.jit
  def answer(params, inputs, targets):
    logits = model(config).apply({"params": params}, inputs)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, targets)

  return answer


def predictions(params, batch, domain):
  return answers()(params, *(batch[name][:, domain] for name in ("inputs", "targets")))


def test_the_prior_is_a_moving_average_over_development_batches():
  config, made = tasks()
  task = made["merged"]
  params, start = merged(config, task)
  program = Program(task, one_device(), (0,))
  batch = batches(task, updates=2)
  state, metrics = program.update(program.initial_state(start), batch)
  wanted = jnp.full(4, 0.25)
  for step in range(2):
    rows = {k: batch[k][step, 0] for k in task.example}
    found = jnp.stack(
      [predictions(jax.tree.map(lambda x, j=j: x[j], params), rows, 5) for j in range(4)]
    )
    wanted = ensembles.update_prior(wanted, ensembles.log_posterior(found, wanted))
  np.testing.assert_allclose(state.variables["prior"][0, 5], wanted, rtol=1e-3)
  assert np.abs(wanted - 0.25).max() > 1e-3
  np.testing.assert_allclose(state.variables["prior"].sum(-1), 1, rtol=1e-5)
  # Nothing is trained.
  close(jax.tree.map(lambda x: x[0], jax.device_get(state.params)), params, rtol=0)
  assert np.isfinite(metrics["loss"][0]).all()


@pytest.fixture(scope="module")
def measured():
  """Bits of an untrained forest under a prior of its own for each domain."""
  config, made = tasks()
  task = made["merged"]
  params, _ = merged(config, task)
  prior = np.random.RandomState(5).dirichlet(np.ones(4), 7).astype(np.float32)
  batch = {k: v[0, 0] for k, v in batches(task, rows=3).items()} | {"mask": np.array([1.0, 1, 0])}
  found, after = jax.jit(lambda p, v, b: task.loss(p, v, b, jax.random.key(0), train=False)[1])(
    params, {"prior": prior}, batch
  )
  return config, params, prior, batch, found, after


@pytest.mark.parametrize("method", btm.METHODS)
def test_what_is_measured(measured, method):
  config, params, prior, batch, metrics, after = measured
  np.testing.assert_array_equal(after["prior"], prior)  # frozen
  for d, domain in enumerate(config.domains + config.held_out):
    experts = [jax.tree.map(lambda x, j=j: x[j], params) for j in range(4)]
    found = jnp.stack([predictions(expert, batch, d) for expert in experts])
    if "average" in method:
      weights = prior[d] if method == "prior average" else None
      wanted = predictions(merging.average(params, weights), batch, d)
    else:
      kept = {"top 1": 1, "top 2": 2}.get(method, 4)
      form = "token" if method == "one token" else "cumulative"
      posterior = ensembles.log_posterior(found, ensembles.top_k(jnp.array(prior[d]), kept), form)
      wanted = ensembles.mixture(found, posterior)
    total, count = metrics[f"{method}/{domain}"]
    assert count == 2 * config.length  # the padding row does not count
    np.testing.assert_allclose(total / count, -wanted[:2].mean() / np.log(2), rtol=1e-4)


def test_equal_experts_are_the_dense_model():
  config, made = tasks()
  params = meshes.unboxed(jax.jit(made["dense"].init)(jax.random.key(0)))["params"]
  forest = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
  batch = {k: v[0, 0] for k, v in batches(made["merged"]).items()}
  prior = {"prior": jnp.full((7, 4), 0.25)}
  key = jax.random.key(0)
  merged = made["merged"].loss(forest, prior, batch, key, train=False)[1][0]
  dense = made["dense"].evaluate["test"].loss(params, {}, batch, key, train=False)[1][0]
  for domain in config.domains + config.held_out:
    for method in btm.METHODS:
      np.testing.assert_allclose(merged[f"{method}/{domain}"], dense[f"dense/{domain}"], rtol=1e-4)


# Devices and the paper's sizes


def exchanged(name, **sizes):
  """Bytes that an update sends over the mesh axis of experts, and over any axis."""
  task = tasks()[1][name]
  mesh = meshes.make(sizes)
  text = Program(task, mesh, (0,)).compile_update().as_text()
  rows = hlo.collectives(hlo.parse(text), dict(mesh.shape))
  return sum(r["bytes"] for r in rows if "data" in r["axes"]), sum(r["bytes"] for r in rows)


def test_experts_exchange_nothing():
  """Eight devices, two an expert: over the experts' axis go the summed metrics, three pairs of
  numbers, and no gradient; within an expert gradients do, and between the dense model's devices."""
  size = sum(
    x.size
    for x in jax.tree.leaves(
      jax.eval_shape(
        lambda: nn.meta.unbox(
          model(tasks()[0]).init(jax.random.key(0), jnp.zeros((1, 12), jnp.int32))
        )
      )
    )
  )
  between, everywhere = exchanged("experts", data=4, fsdp=2)
  assert between <= 4 * 8 * 2 < size < everywhere
  between, _ = exchanged("dense", data=4, fsdp=2)
  assert between > 4 * size


@pytest.mark.parametrize(
  ("size", "parameters", "expert_tokens", "steps"),
  [
    ("125m", 125e6, 131_072, 80_000),
    ("350m", 350e6, 2 * 131_072, 32_000),
    ("750m", 750e6, 4 * 131_072, 24_000),
    ("1.3b", 1.3e9, 8 * 131_072, 12_000),
  ],
)
def test_paper_scale(size, parameters, expert_tokens, steps):
  scale = f"paper/{size}"
  study = next(s for s in btm.STUDIES if s.at(scale))
  config = runner.compose(btm, scale, study, "btm")
  made = btm.stages(config)
  assert (config.optimizer.total_steps, made["seed"].steps) == (steps, steps // 2)
  assert made["experts"].steps == made["dense"].steps == steps // 2
  assert len(config.domains) == len(config.held_out) == 8
  assert config.batch_size * config.length == expert_tokens  # an eighth of the dense model's
  dense, forest = (Program(made[name], one_device(), (0,)) for name in ("dense", "experts"))
  assert dense.parameters == pytest.approx(parameters, rel=0.03)
  assert forest.parameters == 8 * dense.parameters
  topology, mesh = btm.TOPOLOGIES[scale]
  gpus = int(topology.removeprefix("v5e-"))
  # Two sequences a device in each of 32 parts of a batch.
  rows = config.batch_size // config.microbatches
  assert rows * 8 / gpus == 2 and meshes.parse(mesh) == {"data": 8, "fsdp": gpus // 8}
  with pytest.raises(sources.DatasetNotFound, match="in no package"):
    made["seed"].data()


@pytest.mark.parametrize("stage", ["experts", "merged"])
def test_paper_steps_compile_sharded(stage):
  study = next(s for s in btm.STUDIES if s.at("paper/125m"))
  config = runner.compose(btm, "paper/125m", study, "btm")
  program = Program(btm.stages(config)[stage], meshes.make({"data": 4, "fsdp": 2}), (0,))
  up = program.abstract_state.params["layer"]["mlp"]["up"]["kernel"]
  assert up.sharding.shard_shape(up.shape) == (1, 2, 12, 768 // 2, 3072)
  assert program.compile_update().memory_analysis().alias_size_in_bytes > 0
