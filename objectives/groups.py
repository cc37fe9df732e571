"""Losses and metrics of groups of examples, such as label and background.

A group's metrics are `name/group_K`, with groups numbered from 0. The worst group's is no mean over
examples: `worst` takes it from the groups', once they are over the whole set.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def by_group(
  name: str, values_B: jax.Array, groups_B: jax.Array, count: int, mask_B: jax.Array | None = None
) -> Metrics:
  """`{name/group_K: (total, count)}`, float32, of a value an example has; 0 of 0 for no example.

  Args:
    name: of the metric.
    values_B: float or bool.
    groups_B: (B,) int in 0 .. count - 1.
    count: number of groups.
    mask_B: 0 leaves a row out.
  """
  mask_B = jnp.ones(values_B.shape) if mask_B is None else mask_B.astype(jnp.float32)
  member_BG = jax.nn.one_hot(groups_B, count) * mask_B[:, None]
  totals_G, counts_G = values_B.astype(jnp.float32) @ member_BG, member_BG.sum(0)
  return {f"{name}/group_{k}": (totals_G[k], counts_G[k]) for k in range(count)}


def worst(metrics: Mapping[str, Sequence[float]], name: str, highest: bool = False) -> list[float]:
  """For each seed the least mean of any group (or the `highest`, for a loss); NaN groups count not.

  Args:
    metrics: means, `{"test/accuracy/group_0": [a value a seed], ...}`.
    name: such as "test/accuracy".

  Raises: ValueError where no group has such a metric.
  """
  values = [v for key, v in metrics.items() if key.startswith(f"{name}/group_")]
  if not values:
    raise ValueError(f"name={name!r}; accepted: what comes before /group_ in {', '.join(metrics)}")
  return (np.nanmax if highest else np.nanmin)(np.array(values, np.float64), axis=0).tolist()


def robust_weights(q_G: jax.Array, losses_G: jax.Array, step: float) -> jax.Array:
  """Group DRO's adversary: q_g exp(step loss_g), normalised (Sagawa et al., arXiv:1911.08731).

  Algorithm 1. q_G (G,) float32 sums to 1; `losses_G` are the groups' mean losses in the batch,
  0 for a group that the batch lacks.
  """
  risen_G = jnp.log(q_G) + step * losses_G
  return jax.nn.softmax(risen_G)


def group_dro(
  loss_B: jax.Array, q_G: jax.Array, groups_B: jax.Array, step: float, mask_B: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Group DRO's loss, sum_g q_g loss_g, after the adversary has moved, and its weights then.

  Args:
    loss_B: of each example.
    q_G: the adversary's weights, to be kept from one update to the next; 1 / G at first.
    groups_B: (B,) int in 0 .. G - 1.
    step: the adversary's.
    mask_B: 0 leaves a row out.
  """
  sums = by_group("loss", loss_B, groups_B, len(q_G), mask_B).values()
  means_G = jnp.stack([total / jnp.maximum(count, 1) for total, count in sums])
  q_G = robust_weights(q_G, jax.lax.stop_gradient(means_G), step)
  return (q_G * means_G).sum(), q_G
