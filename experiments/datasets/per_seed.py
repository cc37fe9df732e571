"""Data that differs from seed to seed of one comparison.

The seeds of a comparison train in one program that reads one source. Where each has data of its own
(another draw, another split), an example holds one of every seed, fields (S, ...), and a seed is
told which is its own by the collection "own", which is not trained:

    data = per_seed.together([draw(seed) for seed in seeds])
    init, loss = per_seed.own(init, loss)
    task = Task(init=init, loss=loss, example=per_seed.example(one, len(seeds)), ...)
    lab.fit("train", task, per_seed.start(task.init, seeds))

Trained without `per_seed.start`, every seed reads the data of the first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import sources

Init = Callable[[jax.Array], Any]  # `launch.Task`'s
Loss = Callable[..., Any]


def together(parts: Sequence[Mapping[str, np.ndarray]]) -> sources.InMemory:
  """The sets of all seeds side by side: from S of fields (N, ...), a source of N of (S, ...)."""
  return sources.InMemory({name: np.stack([part[name] for part in parts], 1) for name in parts[0]})


def example(one: Mapping[str, jax.ShapeDtypeStruct], seeds: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of an example of all seeds, from those of one."""
  return {k: jax.ShapeDtypeStruct((seeds, *v.shape), v.dtype) for k, v in one.items()}


def own(init: Init, loss: Loss, shared: bool = False) -> tuple[Init, Loss]:
  """`init` and `loss` of a seed that reads its own part of a batch with fields (B, S, ...).

  Under `shared` the batch is the same for all, fields (B, ...): what the seeds are tested on.
  """

  def init_own(key: jax.Array) -> Any:
    return {**init(key), "own": {"index": jnp.zeros((), jnp.int32)}}

  def loss_own(params, variables, batch, key, *, train, **options):
    index = variables["own"]["index"]
    rest = {name: value for name, value in variables.items() if name != "own"}
    if not shared:
      batch = {k: v if k == "mask" else v[:, index] for k, v in batch.items()}
    value, (metrics, rest) = loss(params, rest, batch, key, train=train, **options)
    return value, (metrics, {**rest, "own": variables["own"]})

  return init_own, loss_own


def start(init: Init, seeds: Sequence[int]) -> Any:
  """Initial variables, leading seed axis, in which every seed reads its own data."""
  keys = jax.vmap(jax.random.key)(jnp.array(seeds))
  variables = jax.vmap(lambda key: nn.meta.unbox(init(key)))(keys)
  return {**variables, "own": {"index": jnp.arange(len(seeds), dtype=jnp.int32)}}
