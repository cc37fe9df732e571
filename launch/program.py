"""A task as compiled programs: initialise, k updates in one call, one batch of an evaluation.

Everything here works from shapes alone, so that a stage can be compiled with no data and for
devices that are not there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import inputs
from launch import mesh as meshes
from launch.errors import ConfigurationError
from launch.task import Loss, State, Task, gradient_step


@dataclasses.dataclass(frozen=True)
class Program:
  """A task on a mesh, for n seeds side by side."""

  task: Task
  mesh: Mesh
  seeds: tuple[int, ...]

  def __post_init__(self) -> None:
    check_divisible(self.task, self.mesh)

  # Shapes and shardings

  @property
  def _whole(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @functools.cached_property
  def abstract_state(self) -> State:
    """Shapes, dtypes and shardings of the state."""
    boxed = jax.eval_shape(self._variables, self._raw_keys())
    shapes = jax.eval_shape(self._new_state, self._raw_keys(), meshes.unboxed(boxed))
    placed = meshes.variables_shardings(boxed, self.mesh, self.task.rules, leading=1)
    shardings = State(
      step=self._whole,
      key=self._whole,
      params=placed["params"],
      variables={k: v for k, v in placed.items() if k != "params"},
      opt_state=meshes.like_parameters(
        shapes.opt_state, shapes.params, placed["params"], self.mesh
      ),
    )
    return jax.tree.map(
      lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings
    )

  @property
  def state_shardings(self) -> State:
    return jax.tree.map(lambda s: s.sharding, self.abstract_state)

  @functools.cached_property
  def parameters(self) -> int:
    """Trained parameters of one seed."""
    leaves = jax.tree.leaves(self.abstract_state.params)
    return sum(leaf.size for leaf in leaves) // len(self.seeds)

  def _specs(self, leading: int) -> dict[str, NamedSharding]:
    task = self.task
    return {
      name: meshes.batch_sharding(
        self.mesh, task.rules, ("batch", *task.axes.get(name, ())), leading
      )
      for name in (*task.example, "mask")
    }

  @functools.cached_property
  def batch_shardings(self) -> dict[str, NamedSharding]:
    """Of k updates' batches, fields (k, S, B, ...)."""
    return self._specs(leading=2)

  @functools.cached_property
  def evaluation_shardings(self) -> dict[str, NamedSharding]:
    """Of an evaluation's batch, fields (B, ...), the same for all seeds."""
    return self._specs(leading=0)

  def abstract_batches(self, updates: int) -> dict[str, jax.ShapeDtypeStruct]:
    lead = (updates, len(self.seeds), self.task.batch_size)
    fields = {k: ((*lead, *v.shape), v.dtype) for k, v in self.task.example.items()}
    fields["mask"] = (lead, np.float32)
    return {
      k: jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_shardings[k])
      for k, (shape, dtype) in fields.items()
    }

  @property
  def rows(self) -> tuple[int, ...]:
    """The rows of a training batch that this process feeds."""
    return inputs.local_rows(self.batch_shardings["mask"], self.task.batch_size, 2)

  # Programs

  def _raw_keys(self) -> jax.Array:
    return jnp.stack([jax.random.key_data(jax.random.key(seed)) for seed in self.seeds])

  def _variables(self, keys: jax.Array) -> Any:
    # fold_in separates initialisation from the keys of the steps, which fold in 0, 1, ...
    return jax.vmap(
      lambda raw: self.task.init(jax.random.fold_in(jax.random.wrap_key_data(raw), 2**31))
    )(keys)

  def _new_state(self, keys: jax.Array, variables: Any, opt_state: Any = None) -> State:
    params = variables["params"]
    return State(
      step=jnp.zeros((), jnp.int32),
      key=keys,
      params=params,
      variables={k: v for k, v in variables.items() if k != "params"},
      opt_state=jax.vmap(self.task.optimizer.init)(params) if opt_state is None else opt_state,
    )

  def initial_state(self, variables: Any = None, opt_state: Any = None) -> State:
    """A fresh state: initialised, or starting from what is given (leading seed axis)."""
    state = self.abstract_state
    if variables is not None:
      _check_start(variables, {"params": state.params, **state.variables})
    if opt_state is not None:
      _check_start({"opt_state": opt_state}, {"opt_state": state.opt_state})

    def new(keys, variables, opt_state):
      if variables is None:
        variables = meshes.unboxed(self._variables(keys))
      return self._new_state(keys, variables, opt_state)

    with self.context():
      start = jax.jit(new, out_shardings=self.state_shardings)
      return start(self._raw_keys(), variables, opt_state)

  def context(self):
    return meshes.use(self.mesh, self.task.rules)

  @functools.cached_property
  def update(self) -> jax.stages.Wrapped:
    """`(state, batches) -> (state, metrics)`: as many updates as the batches' leading axis.

    The state is donated. Metrics are `{name: (total, count)}` with arrays (updates, S).
    """
    one = self.task.update or gradient_step(self.task)

    def seed_update(params, variables, opt_state, raw, step, batch):
      state = State(step=step, key=raw, params=params, variables=variables, opt_state=opt_state)
      key = jax.random.fold_in(jax.random.wrap_key_data(raw), step)
      state, metrics = one(state, batch, key)
      return (state.params, state.variables, state.opt_state), metrics

    def body(state, batch):
      mapped = jax.vmap(seed_update, in_axes=(0, 0, 0, 0, None, 0))
      new, metrics = mapped(
        state.params, state.variables, state.opt_state, state.key, state.step, batch
      )
      params, variables, opt_state = new
      state = state.replace(
        step=state.step + 1, params=params, variables=variables, opt_state=opt_state
      )
      return state, metrics

    return jax.jit(
      lambda state, batches: jax.lax.scan(body, state, batches),
      in_shardings=(self.state_shardings, self.batch_shardings),
      out_shardings=(self.state_shardings, self._whole),
      donate_argnums=0,
    )

  def compile_update(self, updates: int = 1):
    """The update compiled ahead of time, from shapes alone."""
    with self.context():
      return self.update.lower(self.abstract_state, self.abstract_batches(updates)).compile()

  def evaluation(self, loss: Loss) -> Callable[[Any, Any, Any, Any], Any]:
    """`(params, variables, batch, index) -> {name: (total, count)}`, arrays (S,).

    What a loss draws depends on the batch's index alone: the same for all seeds and at every
    evaluation, so that two of them differ by what was learnt.
    """

    def seed_metrics(params, variables, batch, index):
      key = jax.random.fold_in(jax.random.key(0), index)
      return loss(params, variables, batch, key, train=False)[1][0]

    return jax.jit(
      jax.vmap(seed_metrics, in_axes=(0, 0, None, None)),
      in_shardings=(
        self.state_shardings.params,
        self.state_shardings.variables,
        self.evaluation_shardings,
        self._whole,
      ),
      out_shardings=self._whole,
    )


def _check_start(given: Any, wanted: Any) -> None:
  """What a stage starts from must be what it has."""
  leaves = [
    {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    for flat in map(jax.tree_util.tree_leaves_with_path, (wanted, dict(given)))
  ]
  for name in [*leaves[0], *leaves[1]]:
    here, there = (
      f"{x.dtype}{list(x.shape)}" if (x := tree.get(name)) is not None else "nothing"
      for tree in leaves
    )
    if here != there:
      raise ConfigurationError(f"start from {name}: {there} is given; the stage has {here}")


def check_divisible(task: Task, mesh: Mesh) -> None:
  """The batch must divide into microbatches, these and sharded axes among the devices."""
  if task.microbatches < 1 or task.batch_size % task.microbatches:
    raise ConfigurationError(
      f"microbatches = {task.microbatches} of batch_size = {task.batch_size}; a divisor of it is"
      " accepted"
    )
  rows = "batch_size" if task.microbatches == 1 else "batch_size / microbatches"
  sizes = [(rows, task.batch_size // task.microbatches, "batch")]
  for field, axes in task.axes.items():
    for position, axis in enumerate(axes):
      if axis is not None:
        sizes.append((f"{axis} of {field!r}", task.example[field].shape[position], axis))
  for name, size, axis in sizes:
    parts, by = meshes.ways(mesh, task.rules, axis)
    if size % parts:
      raise ConfigurationError(
        f"{name} = {size} does not divide among the mesh's {by}; a multiple of {parts} does"
      )
