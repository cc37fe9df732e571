"""Task: what a training stage needs and nothing else."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from launch import mesh as meshes

Variables = Any  # a flax variable tree
Batch = Mapping[str, jax.Array]
Metrics = Mapping[str, tuple[jax.Array, jax.Array]]  # name -> (total, count)
Loss = Callable[..., tuple[jax.Array, tuple[Metrics, Variables]]]


class Source(Protocol):
  """Random access to examples: dicts of arrays, finite, in a fixed order.

  `gather(indices) -> dict of stacked arrays` is an optional, faster way to read many at once.
  """

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class State(flax.struct.PyTreeNode):
  """What training changes. Under a comparison every leaf but `step` has a leading seed axis."""

  step: Any  # () int32, updates done
  key: Any  # (2,) uint32, the raw key that all randomness of the seed is derived from
  params: Any
  variables: Any  # the other flax collections: running statistics, frozen or quantised weights
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Metrics over a whole set of examples.

  Attributes:
    data: called when the stage starts; returns the examples.
    loss: its metrics are what is measured; default: the task's.
    example: shapes of one example where they differ from the task's.
  """

  data: Callable[[], Source]
  loss: Loss | None = None
  example: Mapping[str, jax.ShapeDtypeStruct] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One training stage, as pure functions.

  Attributes:
    init: `init(key) -> variables`, a flax variable dict whose `params` are trained; boxes with
      logical axis names are kept for sharding and removed for everything else.
    loss: `loss(params, variables, batch, key, *, train) -> (loss, (metrics, variables))`, with
      metrics as `{name: (total, count)}` and the collections other than `params` as they are after
      the step.
    optimizer: an optax transformation over `params`.
    example: shapes and dtypes of one example, without a batch axis: enough to initialise, plan and
      compile the stage with no data at hand.
    data: called once when training starts; returns the training examples. None without steps.
    batch_size: examples an update, over all devices.
    microbatches: parts of a batch whose gradients the usual `update` makes one after another.
    steps: updates; 0 for a stage that only measures what it starts from.
    evaluate: name -> what is measured, at the end and every `evaluate_every` updates.
    evaluate_every: 0 for the end only.
    select: a metric such as `validation/accuracy`: every result is then read at the evaluation
      where it was highest, for each seed; None reads the last evaluation.
    update: `update(state, batch, key) -> (state, metrics)` for one seed, where one gradient step of
      `loss` is not the rule (min-max games, policy gradients, two backward passes). The state's
      `step` is the engine's to count.
    axes: logical axes of batch fields beyond the first, such as `{"inputs": ("length", None)}`.
    rules: logical axis name -> mesh axes.
    steps_per_dispatch: updates inside one compiled call.
    checkpoint_every: updates between checkpoints; 0 for the end only.
    map_seeds: False for stages that `jax.vmap` cannot map: the seeds then run one after another.
  """

  init: Callable[[jax.Array], Variables]
  loss: Loss
  optimizer: optax.GradientTransformation
  example: Mapping[str, jax.ShapeDtypeStruct]
  batch_size: int
  microbatches: int = 1
  steps: int
  data: Callable[[], Source] | None = None
  evaluate: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
  evaluate_every: int = 0
  select: str | None = None
  update: Callable[..., tuple[State, Metrics]] | None = None
  axes: Mapping[str, Sequence[str | None]] = dataclasses.field(default_factory=dict)
  rules: meshes.Rules = meshes.RULES
  steps_per_dispatch: int = 1
  checkpoint_every: int = 0
  map_seeds: bool = True


def supervised(
  model: Any,
  objective: Callable[[Any, Batch], tuple[jax.Array, Metrics]],
  example: Mapping[str, jax.ShapeDtypeStruct],
  inputs: Sequence[str] = ("inputs",),
) -> tuple[Callable[[jax.Array], Variables], Loss]:
  """`init` and `loss` of a model trained on `objective(model(inputs), batch)`.

  Args:
    model: a flax module; called as `model(batch[inputs[0]], **{other inputs by name}, train=bool)`.
    objective: `objective(outputs, batch) -> (loss, metrics)`.
    example: shapes and dtypes of one example.
    inputs: the batch fields that the model reads, the first by position, the others by name.

  The loss hands further keyword arguments on to the model, so that an evaluation may differ by
  `functools.partial(loss, step_rescale=2.0)`.
  """
  first, *others = inputs

  def init(key: jax.Array) -> Variables:
    zeros = {k: jnp.zeros((1, *example[k].shape), example[k].dtype) for k in inputs}
    keys = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
    return model.init(keys, zeros[first], **{k: zeros[k] for k in others}, train=False)

  def loss(params, variables, batch, key, *, train, **options):
    arguments = {k: batch[k] for k in others} | options
    outputs, updated = model.apply(
      {"params": params, **variables},
      batch[first],
      **arguments,
      train=train,
      rngs={"dropout": key},
      mutable=list(variables) if train else [],
    )
    value, metrics = objective(outputs, batch)
    return value, (metrics, updated if train and variables else variables)

  return init, loss


def independent(
  init: Callable[[jax.Array], Variables], loss: Loss, models: int, own: str = ""
) -> tuple[Callable[[jax.Array], Variables], Loss]:
  """`init` and `loss` of several models trained side by side that share nothing, or a part.

  Every variable gets a leading axis with the logical name "models"; under `mesh.MODEL_RULES` each
  device holds and trains its own models, and no gradient is exchanged. Batch fields have the
  models' axis second, (B, models, ...), so that each model may have data of its own.

  The loss is the sum over models, its metrics those of all models together.

  Args:
    own: a regular expression; what has a path that it is not found in, such as
      `params/layer_0/mlp/up/kernel`, has no such axis and is of all models. Then the loss is the
      mean over models. Of other collections than `params` everything is a model's own.
  """

  def add_axis(x: Any) -> nn.LogicallyPartitioned:
    boxed = isinstance(x, nn.Partitioned)
    value, names = (x.value, x.names) if boxed else (x, (None,) * (x.ndim - 1))
    return nn.LogicallyPartitioned(value, ("models", *names))

  def is_own(path: Any) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return not name.startswith("params/") or re.search(own, name) is not None

  def init_all(key: jax.Array) -> Variables:
    return jax.tree_util.tree_map_with_path(
      lambda path, one, stacked: add_axis(stacked) if is_own(path) else one,
      init(key),
      jax.vmap(init)(jax.random.split(key, models)),
      is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )

  def loss_all(params, variables, batch, key, *, train, **options):
    def one(params, variables, fields, key):
      whole = {**fields, "mask": batch["mask"]}
      return loss(params, variables, whole, key, train=train, **options)

    axes = jax.tree_util.tree_map_with_path(
      lambda path, _: 0 if is_own(path) else None, {"params": params}
    )["params"]
    fields = {name: value for name, value in batch.items() if name != "mask"}
    keys = jax.random.split(key, models)
    values, (metrics, variables) = jax.vmap(one, (axes, 0, 1, 0))(params, variables, fields, keys)
    alone = all(axis == 0 for axis in jax.tree.leaves(axes, is_leaf=lambda x: x is None))
    value = values.sum() if alone else values.mean()
    return value, (jax.tree.map(jnp.sum, metrics), variables)

  return init_all, loss_all


def gradient_step(task: Task) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
  """The usual `update`: one optimizer step along the gradient of the loss, for one seed.

  Of several microbatches it is the mean of their gradients, each of its own mean.
  """

  def gradient(params: Any, variables: Any, batch: Batch, key: jax.Array) -> Any:
    def loss_fn(params):
      return task.loss(params, variables, batch, key, train=True)

    (loss, (metrics, variables)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return variables, (grads, {"loss": (loss, jnp.ones(()))} | dict(metrics))

  def accumulated(params: Any, variables: Any, batch: Batch, key: jax.Array) -> Any:
    parts = task.microbatches

    def split(x: jax.Array) -> jax.Array:  # part i has the rows i, i + parts, ..: of all devices
      return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def one(carry: Any, part: Any) -> Any:
      variables, sums = carry
      variables, found = gradient(params, variables, *part)
      return (variables, jax.tree.map(jnp.add, sums, found)), None

    xs = jax.tree.map(split, dict(batch)), jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], xs)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(gradient, params, variables, *first)[1],
    )
    (variables, (grads, metrics)), _ = jax.lax.scan(one, (variables, zeros), xs)
    return variables, (jax.tree.map(lambda g: g / parts, grads), metrics)

  def update(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
    found = gradient if task.microbatches == 1 else accumulated
    variables, (grads, metrics) = found(state.params, state.variables, batch, key)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    state = state.replace(
      params=optax.apply_updates(state.params, updates), variables=variables, opt_state=opt_state
    )
    return state, metrics

  return update
