"""Seven experiments whose training is not one gradient step on one loss, as toys (no papers).

Each is small but whole: stages, arms, claims, and a `run` where stages hand parameters on. They
show where in the nouns an odd shape goes:

  two_stage      `run` hands transformed parameters to a second stage with a fresh optimizer
  frozen         collections beside `params`: integer weights, a scale, a mask
  min_max        `Task.update` descends on parameters and ascends on multipliers
  curvature      an objective that differentiates a gradient
  evaluate_only  a stage of no steps
  averaged       `launch.independent`: models on the data axis, then their mean
  policy         `Task.update` samples actions inside `jit` and takes several steps on them
"""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from launch import Claim, Evaluation, Study, Task, independent, supervised
from launch import mesh as meshes

FEATURES, CLASSES, BATCH = 12, 4, 16


class Clusters:
  """Noisy clusters; with `models`, as many disjoint sets side by side, each short of a class."""

  def __init__(self, split: int, size: int = 192, models: int = 0) -> None:
    random = np.random.RandomState(split)
    centres = np.random.RandomState(9).randn(CLASSES, FEATURES)
    labels = random.randint(0, CLASSES, (size, max(models, 1)))
    if models:
      labels = (labels % (CLASSES - 1) + np.arange(models)) % CLASSES
    inputs = centres[labels] + 1.2 * random.randn(*labels.shape, FEATURES)
    self.fields = {"inputs": inputs.astype(np.float32), "labels": labels.astype(np.int32)}
    if not models:
      self.fields = {k: v[:, 0] for k, v in self.fields.items()}

  def __len__(self) -> int:
    return len(self.fields["labels"])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {k: v[index] for k, v in self.fields.items()}


EXAMPLE = {
  "inputs": jax.ShapeDtypeStruct((FEATURES,), np.float32),
  "labels": jax.ShapeDtypeStruct((), np.int32),
}


def dense(features, axes, **fields):
  init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
  return nn.Dense(features, kernel_init=init, **fields)


class Network(nn.Module):
  width: int = 16

  @nn.compact
  def __call__(self, x_BD, *, train: bool = False):
    hidden_BH = nn.tanh(dense(self.width, (None, "mlp"), name="hidden")(x_BD))
    return dense(CLASSES, ("mlp", None), name="logits")(hidden_BH)


def cross_entropy(logits_BC, batch):
  losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch["labels"])
  hits_B = logits_BC.argmax(-1) == batch["labels"]
  mask_B = batch["mask"]
  count, total = mask_B.sum(), (losses_B * mask_B).sum()
  return total / count, {"loss": (total, count), "accuracy": ((hits_B * mask_B).sum(), count)}


def task(init, loss, config, **fields) -> Task:
  """What the seven have in common."""
  common = {
    "optimizer": optax.adam(config.lr),
    "example": EXAMPLE,
    "data": lambda: Clusters(0),
    "batch_size": BATCH,
    "steps": config.steps,
    "evaluate": {"test": Evaluation(lambda: Clusters(1))},
    "evaluate_every": 10,
    "checkpoint_every": 5,
    "steps_per_dispatch": 3,
  }
  return Task(init=init, loss=loss, **common | fields)


def experiment(stages, arms, claims, run=None, **config) -> types.ModuleType:
  """A module such as an experiment's file is."""
  module = types.ModuleType(stages.__name__)
  module.__file__ = __file__
  module.SCALES = ("laptop",)
  module.get_config = lambda scale: ml_collections.ConfigDict({"steps": 30, "lr": 1e-2} | config)
  module.stages = stages
  module.STUDIES = [Study("toy", arms=arms, claims=claims)]
  if run is not None:
    module.run = functools.partial(run, stages)
  return module


better = functools.partial(Claim, metric="test/accuracy")


# Two stages. The first finds which inputs matter, the second starts from the pruned network, its
# optimizer anew.


def two_stage(config) -> dict[str, Task]:
  init, loss = supervised(Network(), cross_entropy, EXAMPLE)
  return {
    "dense": task(init, loss, config),
    "pruned": task(init, loss, config, optimizer=optax.sgd(config.lr, momentum=0.9), steps=5),
  }


def prune(params):
  """The half of the hidden kernel that is largest, of one seed."""
  kernel = params["hidden"]["kernel"]
  kept = jnp.where(jnp.abs(kernel) >= jnp.median(jnp.abs(kernel)), kernel, 0)
  return params | {"hidden": params["hidden"] | {"kernel": kept}}


def run_two_stage(stages, config, lab):
  tasks = stages(config)
  found = lab.fit("dense", tasks["dense"])
  params = jax.vmap(prune)(found.params) if config.warm else None
  second = lab.fit("pruned", tasks["pruned"], {"params": params} if config.warm else None)
  return second.metrics


# Frozen and integer leaves: int8 weights with a scale, and low-rank corrections that are trained.


class Quantised(nn.Module):
  rank: int = 2

  @nn.compact
  def __call__(self, x_BD, *, train: bool = False):
    def quantise():
      kernel = nn.initializers.lecun_normal()(self.make_rng("params"), (FEATURES, CLASSES))
      scale = jnp.abs(kernel).max() / 127
      return jnp.round(kernel / scale).astype(jnp.int8), scale

    def boxed(index):
      return lambda: nn.LogicallyPartitioned(quantise()[index], (None, "mlp")[: 2 - 2 * index])

    codes = self.variable("quantised", "codes", boxed(0)).value
    scale = self.variable("quantised", "scale", lambda: quantise()[1]).value
    y_BC = x_BD @ (codes.astype(jnp.float32) * scale)
    return y_BC + dense(CLASSES, (None, None))(dense(self.rank, (None, None))(x_BD))


def frozen(config) -> dict[str, Task]:
  init, loss = supervised(Quantised(), cross_entropy, EXAMPLE)
  return {"train": task(init, loss, config)}


# A game: the smallest loss whose constraint g <= 0 holds, multipliers rising where it does not.


def min_max(config) -> dict[str, Task]:
  init_network, loss = supervised(Network(), cross_entropy, EXAMPLE)

  def init(key):
    return {**init_network(key), "multipliers": {"norm": jnp.zeros(())}}

  def square_norm(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

  def constrained(params, variables, batch, key, *, train):
    value, (metrics, _) = loss(params, {}, batch, key, train=train)
    return value, (metrics | {"norm": (square_norm(params), jnp.ones(()))}, variables)

  optimizer = optax.adam(config.lr)

  def update(state, batch, key):
    multiplier = state.variables["multipliers"]["norm"]

    def lagrangian(params):
      value, (metrics, _) = constrained(params, state.variables, batch, key, train=True)
      return value + multiplier * (square_norm(params) - config.budget), (value, metrics)

    grads, (value, metrics) = jax.grad(lagrangian, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    excess = square_norm(state.params) - config.budget
    risen = jnp.maximum(multiplier + config.dual_lr * excess, 0)  # ascent
    state = state.replace(
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      variables={"multipliers": {"norm": risen}},
    )
    return state, metrics | {"loss": (value, jnp.ones(())), "multiplier": (risen, jnp.ones(()))}

  return {"train": task(init, constrained, config, update=update, optimizer=optimizer)}


# Second derivatives: the trace of the Hessian by random signs, as a penalty and as a metric.


def hessian_trace(loss_fn, params, key):
  """E[v' H v] over random signs v, one draw, by differentiating the gradient."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
  v = jax.tree.unflatten(tree, signs)
  _, hv = jax.jvp(jax.grad(loss_fn), (params,), (v,))
  return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(hv), strict=True))


def curvature(config) -> dict[str, Task]:
  init, plain = supervised(Network(), cross_entropy, EXAMPLE)

  def loss(params, variables, batch, key, *, train):
    value, (metrics, variables) = plain(params, variables, batch, key, train=train)
    trace = hessian_trace(lambda p: plain(p, variables, batch, key, train=train)[0], params, key)
    metrics |= {"trace": (trace, jnp.ones(()))}
    return value + config.penalty * trace, (metrics, variables)

  return {"train": task(init, loss, config)}


# An arm that trains nothing: what its start is worth.


def evaluate_only(config) -> dict[str, Task]:
  init, loss = supervised(Network(), cross_entropy, EXAMPLE)
  return {"train": task(init, loss, config, data=(lambda: Clusters(0)) if config.steps else None)}


# Four models that share nothing but the device mesh, each blind to one class; then their mean.

MODELS = 4


def averaged(config) -> dict[str, Task]:
  init, loss = supervised(Network(), cross_entropy, EXAMPLE)

  def one_start(key):
    """All models start alike: means of unrelated networks mean nothing."""
    alike = init_all(key)
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), alike)

  init_all, loss_all = independent(init, loss, MODELS)
  example = {k: jax.ShapeDtypeStruct((MODELS, *s.shape), s.dtype) for k, s in EXAMPLE.items()}
  branches = task(
    one_start,
    loss_all,
    config,
    example=example,
    data=lambda: Clusters(0, models=MODELS),
    evaluate={"blind": Evaluation(lambda: Clusters(1, models=MODELS))},
    axes={"inputs": ("models", None), "labels": ("models",)},
    rules=meshes.MODEL_RULES,
  )
  return {"branches": branches, "mean": task(init, loss, config, steps=0, data=None)}


def run_averaged(stages, config, lab):
  tasks = stages(config)
  branches = lab.fit("branches", tasks["branches"])
  if config.mean:
    merged = jax.tree.map(lambda x: x.mean(axis=1), branches.params)
  else:
    merged = jax.tree.map(lambda x: x[:, 0], branches.params)
  return lab.fit("mean", tasks["mean"], {"params": merged}).metrics | branches.metrics


# A bandit: the action is drawn from the policy inside the update, which then takes two clipped
# steps on what was drawn.


def policy(config) -> dict[str, Task]:
  init, _ = supervised(Network(), cross_entropy, EXAMPLE)

  def act(params, batch, key):
    logits_BA = Network().apply({"params": params}, batch["inputs"])
    action_B = jax.random.categorical(key, logits_BA)
    return action_B, log_probability(logits_BA, action_B)

  def log_probability(logits_BA, action_B):
    return jnp.take_along_axis(nn.log_softmax(logits_BA), action_B[:, None], axis=1)[:, 0]

  def reward(action_B, batch):
    return (action_B == batch["labels"]).astype(jnp.float32)

  def loss(params, variables, batch, key, *, train):
    reward_B = reward(act(params, batch, key)[0], batch)
    total, count = (reward_B * batch["mask"]).sum(), batch["mask"].sum()
    return -total / count, ({"accuracy": (total, count)}, variables)

  optimizer = optax.adam(config.lr)

  def update(state, batch, key):
    action_B, before_B = act(state.params, batch, key)
    reward_B = reward(action_B, batch)
    advantage_B = reward_B - reward_B.mean() if config.baseline else jnp.zeros_like(reward_B)

    def surrogate(params):
      logits_BA = Network().apply({"params": params}, batch["inputs"])
      ratio_B = jnp.exp(log_probability(logits_BA, action_B) - before_B)
      clipped_B = jnp.clip(ratio_B, 0.8, 1.2)
      return -jnp.minimum(ratio_B * advantage_B, clipped_B * advantage_B).mean()

    def step(carry, _):
      params, opt_state = carry
      value, grads = jax.value_and_grad(surrogate)(params)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), value

    carry, values = jax.lax.scan(step, (state.params, state.opt_state), length=2)
    params, opt_state = carry
    metrics = {"loss": (values[0], jnp.ones(())), "reward": (reward_B.sum(), 1.0 * BATCH)}
    return state.replace(params=params, opt_state=opt_state), metrics

  return {"train": task(init, loss, config, update=update, optimizer=optimizer)}


MODULES = [
  experiment(
    two_stage,
    arms={"handed on": {}, "anew": {"warm": False}},
    claims=[better("a pruned start helps", of="handed on", against="anew", at_least=0.05)],
    run=run_two_stage,
    warm=True,
    steps=20,
  ),
  experiment(
    frozen,
    arms={"trained": {}, "still": {"lr": 0.0}},
    claims=[better("corrections learn", of="trained", against="still", at_least=0.0)],
    steps=60,
    lr=5e-2,
  ),
  experiment(
    min_max,
    arms={"bound": {}, "free": {"budget": 1e6}},
    claims=[
      Claim("the multiplier holds the norm", "test/norm", "bound", at_most=14.0),
      Claim("which would grow", "test/norm", "bound", "free", at_most=-4.0),
    ],
    budget=10.0,
    dual_lr=5e-4,
    steps=100,
  ),
  experiment(
    curvature,
    arms={"penalty": {}, "none": {"penalty": 0.0}},
    claims=[Claim("the penalty flattens", "test/trace", "penalty", "none", at_most=0.0)],
    penalty=0.1,
  ),
  experiment(
    evaluate_only,
    arms={"trained": {}, "start": {"steps": 0}},
    claims=[better("training helps", of="trained", against="start", at_least=0.1)],
  ),
  experiment(
    averaged,
    arms={"mean": {}, "one": {"mean": False}},
    claims=[better("the mean knows every class", of="mean", against="one", at_least=0.02)],
    run=run_averaged,
    mean=True,
  ),
  experiment(
    policy,
    arms={"advantage": {}, "no signal": {"baseline": False}},
    claims=[better("reward is learnt from", of="advantage", against="no signal", at_least=0.1)],
    baseline=True,
  ),
]
