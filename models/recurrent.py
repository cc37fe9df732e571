"""Gated recurrent networks as mixers, the baselines of the state space layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def gru_scan(
  x_BLG: jax.Array, recurrent_KG: jax.Array, bias_K: jax.Array, *, reverse: bool = False
) -> jax.Array:
  """The recurrence of a gated recurrent unit, whose input projections are given.

    r = sigmoid(x_r + U_r h),  z = sigmoid(x_z + U_z h),  n = tanh(x_n + r * (U_n h + b)),
    h' = (1 - z) * n + z * h

  in the variant of cuDNN and flax, which apply r after the product with U_n.

  Args:
    x_BLG: (B, L, 3 K) float32, the three projections side by side in the order r, z, n.
    recurrent_KG: (K, 3 K), U in the same order.
    bias_K: (K,), b.
    reverse: runs from the last step to the first.

  Returns: the states h, (B, L, K).
  """
  width = recurrent_KG.shape[0]

  def step(h_BK, x_BG):
    u_BG = h_BK @ recurrent_KG
    gates = jax.nn.sigmoid(x_BG[:, : 2 * width] + u_BG[:, : 2 * width])
    r_BK, z_BK = jnp.split(gates, 2, axis=-1)
    n_BK = jnp.tanh(x_BG[:, 2 * width :] + r_BK * (u_BG[:, 2 * width :] + bias_K))
    h_BK = (1 - z_BK) * n_BK + z_BK * h_BK
    return h_BK, h_BK

  start_BK = jnp.zeros((x_BLG.shape[0], width), x_BLG.dtype)
  _, h_LBK = jax.lax.scan(step, start_BK, jnp.moveaxis(x_BLG, 1, 0), reverse=reverse)
  return jnp.moveaxis(h_LBK, 0, 1)


def orthogonal_gates(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
  """An orthogonal matrix for each of the three gates, (K, 3 K)."""
  parts = [
    nn.initializers.orthogonal()(k, (shape[0],) * 2, dtype) for k in jax.random.split(key, 3)
  ]
  return jnp.concatenate(parts, axis=1)


class GRU(nn.Module):
  """Gated recurrent unit over a sequence (Cho et al., arXiv:1406.1078), see `gru_scan`.

  Maps `u_BLH` to `y_BLH` of the same dtype; the recurrence is float32. Causal, so that padding at
  the end does not reach earlier outputs; the backward direction sees it.

  Attributes:
    hidden: width of the carry; None is H.
    bidirectional: a second unit from the end. Both outputs are concatenated.

  A Dense layer brings the output back to H where `hidden` is not H or `bidirectional` is set.
  """

  hidden: int | None = None
  bidirectional: bool = False

  @nn.compact
  def __call__(
    self,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> jax.Array:
    """The outputs at every step.

    A GRU has no notion of time: `step_rescale` is ignored, and `dt`, which says that the gaps
    matter, is a ValueError.
    """
    del step_rescale
    if dt is not None:
      raise ValueError("dt: given; a GRU, which knows no gaps, accepts only None")
    features = u_BLH.shape[-1]
    hidden = self.hidden or features
    named = nn.with_logical_partitioning
    zeros = named(nn.initializers.zeros, ("mlp",))

    def direction(name: str, reverse: bool) -> jax.Array:
      kernel = named(nn.initializers.lecun_normal(), ("embed", "mlp"))
      project = nn.Dense(3 * hidden, kernel_init=kernel, bias_init=zeros, name=f"input{name}")
      recurrent_KG: Any = self.param(
        f"recurrent{name}", named(orthogonal_gates, (None, "mlp")), (hidden, 3 * hidden)
      )
      bias_K: Any = self.param(f"bias{name}", zeros, (hidden,))
      return gru_scan(project(u_BLH.astype(jnp.float32)), recurrent_KG, bias_K, reverse=reverse)

    y_BLK = direction("", False)
    if self.bidirectional:
      y_BLK = jnp.concatenate([y_BLK, direction("_reverse", True)], axis=-1)
    y_BLK = y_BLK.astype(u_BLH.dtype)
    if y_BLK.shape[-1] == features and not self.bidirectional:
      return y_BLK
    return nn.Dense(
      features,
      dtype=u_BLH.dtype,
      kernel_init=named(nn.initializers.lecun_normal(), ("mlp", "embed")),
      bias_init=named(nn.initializers.zeros, ("embed",)),
      name="project",
    )(y_BLK)
