"""What a loss becomes when the weights are rounded to few bits, with nothing trained anew.

Formats are keys of `models.quantised.FORMATS`; "nf4+dq" is "nf4" whose scales are quantised too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import quantised
from models.lora import split


def rounded(
  loss: Callable[..., Any], formats: Sequence[str], kernels: str = quantised.KERNELS
) -> Callable[..., Any]:
  """A task's loss whose metrics also say what rounding the kernels to each of `formats` does.

  "loss F" is the loss in the format F, "error F" the relative squared error of the kernels, sum
  (w - w')^2 over sum w^2 of them all.

  Args:
    loss: `loss(params, variables, batch, key, train=bool) -> (value, (metrics, variables))`, with a
      metric "loss".
    formats: see above.
    kernels: regular expression for the paths of what is rounded.
  """

  def measured(params, variables, batch, key, *, train):
    value, (metrics, updated) = loss(params, variables, batch, key, train=train)
    whole = _square(split(params, kernels)[0])
    for name in formats:
      other = _round(params, name, pattern=kernels)
      _, (found, _) = loss(other, variables, batch, key, train=train)
      error = _square(jax.tree.map(jnp.subtract, params, other)), whole
      metrics = metrics | {f"loss {name}": found["loss"], f"error {name}": error}
    return value, (metrics, updated)

  return measured


def losses(
  loss: Callable[[Any, Any], Any],
  params: Any,
  batches: Sequence[Any] | np.ndarray,
  formats: Sequence[str],
) -> dict[str, list[float]]:
  """`loss(params, batch)` of each batch, "as released" and in each of `formats`, on the host.

  For models so large that one rounded copy at a time is enough.
  """
  measured = {"as released": [float(loss(params, batch)) for batch in batches]}
  for name in formats:
    other = jax.jit(functools.partial(_round, name=name))(params)
    measured[name] = [float(loss(other, batch)) for batch in batches]
  return measured


def _round(params: Any, name: str, **options: Any) -> Any:
  form, double, _ = name.partition("+dq")
  return quantised.round_tree(params, form, double=bool(double), **options)


def _square(tree: Any) -> jax.Array:
  return functools.reduce(jnp.add, (jnp.sum(x**2) for x in jax.tree.leaves(tree)), jnp.zeros(()))
