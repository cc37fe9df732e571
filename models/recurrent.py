"""Gated recurrent networks as mixers, the baselines of the state space layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class GRU(nn.Module):
  """Gated recurrent unit over a sequence (Cho et al., arXiv:1406.1078; flax's `GRUCell`).

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
    cell = functools.partial(
      nn.GRUCell,
      hidden,
      kernel_init=named(nn.initializers.lecun_normal(), ("embed", "mlp")),
      recurrent_kernel_init=named(nn.initializers.orthogonal(), (None, "mlp")),
      bias_init=named(nn.initializers.zeros, ("mlp",)),
    )
    u32_BLH = u_BLH.astype(jnp.float32)
    _, y_BLK = nn.RNN(cell(name="cell"), return_carry=True)(u32_BLH)
    if self.bidirectional:
      cell_reverse = cell(name="cell_reverse")
      backward = nn.RNN(cell_reverse, reverse=True, keep_order=True, return_carry=True)
      y_BLK = jnp.concatenate([y_BLK, backward(u32_BLH)[1]], axis=-1)
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
