"""Races: contestants timed in turn in one run, so that a ratio means something."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np


class Host(NamedTuple):
  """A contestant that is called as it is: a function of another library, on its own arrays."""

  function: Callable[..., Any]


def race(
  contestants: Mapping[str, tuple[Callable[..., Any] | Host, Sequence[Any]]], rounds: int = 20
) -> dict[str, dict[str, Any]]:
  """Times functions in interleaved rounds, each after a call of its own that is not timed.

  That call finds cold caches, and the memory that the contestant before it is only then freeing,
  which would be a quarter of some times. The next one finds what it does when called in a loop.

  Args:
    contestants: name -> (function, arguments); the function is jitted here, unless it is a `Host`.
    rounds: timed calls of each.

  Returns: name -> {"seconds": [one a round], "compile_s": float, "temporaries": bytes of the
  compiled program's temporary buffers}; both are None for a `Host`.
  """
  results: dict[str, dict[str, Any]] = {}
  compiled: dict[str, Callable[..., Any]] = {}
  for name, (function, arguments) in contestants.items():
    results[name] = {"seconds": [], "compile_s": None, "temporaries": None}
    if isinstance(function, Host):
      compiled[name] = function.function
    else:
      began = time.perf_counter()
      anew = functools.partial(function)  # of what ran before jax keeps the program
      program = jax.jit(anew).lower(*arguments).compile()
      results[name]["compile_s"] = time.perf_counter() - began
      memory = program.memory_analysis()
      results[name]["temporaries"] = memory.temp_size_in_bytes if memory is not None else None
      compiled[name] = program
    jax.block_until_ready(compiled[name](*arguments))
  for _ in range(rounds):
    for name, (_, arguments) in contestants.items():
      jax.block_until_ready(compiled[name](*arguments))
      began = time.perf_counter()
      jax.block_until_ready(compiled[name](*arguments))
      results[name]["seconds"].append(time.perf_counter() - began)
  return results


def by_length(
  module: nn.Module,
  baseline: nn.Module,
  lengths: Sequence[int],
  batch: int,
  features: int,
  *,
  repeats: int = 3,
  rounds: int = 10,
) -> dict[str, list[float]]:
  """A module (B, L, H) -> (B, L, H) against a baseline, forward and gradient, by length.

  Returns: for KIND "forward" and "gradient" (of the mean square of the output, by parameters and
  input) and each length L, one value a repeat of
    "KIND time/L": median time over the baseline's,
    "KIND per second/L": calls of the module a second,
    "KIND memory/L": temporary bytes over the baseline's.
  """
  metrics: dict[str, list[float]] = {}
  modules = {"module": module, "baseline": baseline}
  for length in lengths:
    u_BLH = jax.random.normal(jax.random.key(0), (batch, length, features))

    def forward(variables, u_BLH, *, which):
      return modules[which].apply(variables, u_BLH)

    def gradient(variables, u_BLH, *, which, forward=forward):
      loss = lambda v, u: (forward(v, u, which=which) ** 2).mean()  # noqa: E731
      return jax.grad(loss, argnums=(0, 1))(variables, u_BLH)

    arguments = {k: (m.init(jax.random.key(1), u_BLH), u_BLH) for k, m in modules.items()}
    for kind, function in (("forward", forward), ("gradient", gradient)):
      contestants = {k: (functools.partial(function, which=k), arguments[k]) for k in modules}
      results = race(contestants, rounds * repeats)
      ours, theirs = (
        np.median(np.reshape(results[k]["seconds"], (repeats, rounds)), axis=1) for k in modules
      )
      memory = results["module"]["temporaries"] / results["baseline"]["temporaries"]
      metrics[f"{kind} time/{length}"] = (ours / theirs).tolist()
      metrics[f"{kind} per second/{length}"] = (1 / ours).tolist()
      metrics[f"{kind} memory/{length}"] = [memory] * repeats
  return metrics
