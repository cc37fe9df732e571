"""Attention: who sees whom, positions, and the module, which is also a sequence mixer of its own.

Vaswani et al., arXiv:1706.03762. Rotary positions: Su et al., arXiv:2104.09864. Grouped-query
attention: Ainslie et al., arXiv:2305.13245. `models/transformer.py` builds on it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MASKS = ("causal", "full", "prefix")

KERNEL_INIT = nn.initializers.lecun_normal()

Factory = Callable[..., nn.Module]


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  name: str | None = None,
  dtype: Any = None,
  use_bias: bool = True,
  kernel_init: Callable[..., jax.Array] = KERNEL_INIT,
  bias_init: Callable[..., jax.Array] = nn.initializers.zeros,
) -> nn.Dense:
  """A Dense layer whose kernel (in, out) has the logical `axes`; what the field `dense` stands for.

  A replacement is called `dense(features, axes, name=..., dtype=..., use_bias=...)` and makes a
  module that maps (..., in) to (..., features); another initialisation is
  `functools.partial(dense, kernel_init=...)`.
  """
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(bias_init, axes[1:]),
    name=name,
  )


def attention_mask(
  kind: str,
  length: int,
  *,
  segments: jax.Array | None = None,
  prefix: jax.Array | None = None,
  lengths: jax.Array | None = None,
  start: jax.Array | None = None,
  slots: int | None = None,
) -> jax.Array | None:
  """Who sees whom: bool, broadcastable to (B, 1, L, S), True where query l sees key s.

  Args:
    kind: "full": every key; "causal": none behind the query; "prefix": none behind the query unless
      the key belongs to the prefix.
    length: L, number of queries.
    segments: (B, L) int; a query sees keys of its own segment only.
    prefix: (B,) int, how many leading positions form the prefix, or (B, L) bool, True at the
      positions that do: those at the start of each segment, where several are packed in a row.
    lengths: (B,) int; keys beyond them are not seen.
    start: (B,) int, the keys that precede the first query; zero by default.
    slots: S, number of keys; L by default.

  Returns None where every query sees every key.
  """
  accept("mask", kind, MASKS)
  slots = length if slots is None else slots
  first_B11 = jnp.zeros((1, 1, 1), jnp.int32) if start is None else start[:, None, None]
  query_BL1 = first_B11 + jnp.arange(length)[:, None]
  key_S = jnp.arange(slots)
  conditions = []
  if kind != "full":
    seen = key_S <= query_BL1
    if kind == "prefix" and prefix is not None:
      seen |= key_S < prefix[:, None, None] if prefix.ndim == 1 else prefix[:, None, :]
    conditions.append(seen)
  if lengths is not None:
    conditions.append(key_S < first_B11 + lengths[:, None, None])
  if segments is not None:
    conditions.append(segments[:, :, None] == segments[:, None, :])
  return functools.reduce(operator.and_, conditions)[:, None] if conditions else None


def segment_positions(segments_BL: jax.Array) -> jax.Array:
  """(B, L) int32: the position of each token in its segment (a run of equals), from 0."""
  index_L = jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
  first_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1] - 1) != 0
  return index_L - jax.lax.cummax(jnp.where(first_BL, index_L, 0), axis=1)


def sinusoids(positions: jax.Array, features: int) -> jax.Array:
  """(..., features) float32: sin and cos of position / 10000^(2 i / features), in turn.

  arXiv:1706.03762, section 3.5.
  """
  rates = 10_000 ** (-2 * jnp.arange((features + 1) // 2) / features)
  angles = positions[..., None] * rates
  both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return both.reshape(*positions.shape, -1)[..., :features]


def rotate(x_BLND: jax.Array, positions_BL: jax.Array, base: float = 10_000.0) -> jax.Array:
  """Turns the pair (x_i, x_{i + D/2}) by position * base^(-2 i / D) (arXiv:2104.09864, eq. 14, 15).

  The pairs are those of released models (halves, not neighbours). Dtype of `x`, float32 inside.
  """
  half = x_BLND.shape[-1] // 2
  angle_BLD = positions_BL[..., None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  sin, cos = jnp.sin(angle_BLD)[:, :, None], jnp.cos(angle_BLD)[:, :, None]
  a, b = jnp.split(x_BLND.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLND.dtype)


class Attention(nn.Module):
  """Multi-head attention with grouped keys and values; also a sequence mixer of its own.

  `Attention(heads=4, causal=True)(u_BLH)` is (B, L, H), in the dtype of `u`.

  Attributes:
    heads: number of query heads.
    kv_heads: number of heads of keys and values, a divisor of `heads` (arXiv:2305.13245); `heads`
      by default.
    head_dim: width of a head; H / heads by default.
    causal: no position sees those behind it; of effect where the call gives no mask.
    rotary: base of rotary positions; None for none.
    use_bias: of the four projections.
    dense: makes the projections `query`, `key`, `value` and `out`, see `dense`.
    implementation: of `jax.nn.dot_product_attention`.
  """

  heads: int
  kv_heads: int | None = None
  head_dim: int | None = None
  causal: bool = False
  rotary: float | None = None
  use_bias: bool = True
  dense: Factory = dense
  implementation: Any = None

  @nn.compact
  def __call__(
    self,
    u_BLH: jax.Array,
    *,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: tuple[jax.Array, jax.Array] | None = None,
    start: jax.Array | None = None,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> Any:
    """The mixed sequence (B, L, H); with `cache`, that and the updated cache.

    Args:
      u_BLH: floating point.
      mask: bool, broadcastable to (B, heads, L, S), True where a query sees a key. A query that
        sees none takes the mean of all values.
      positions: (B, L), for rotary; 0, 1, .. by default.
      cache: keys and values (B, S, kv_heads, head_dim) of earlier positions; the call's own are
        written at `start` (B,) int, each row's own, and dropped beyond S. It needs a mask.
      dt, step_rescale: attention knows no step sizes; ValueError unless left at their defaults.

    Raises: ValueError also for heads that do not divide each other or H, and odd rotary widths.
    """
    if dt is not None or not (isinstance(step_rescale, int | float) and step_rescale == 1):
      name = "dt: given" if dt is not None else f"step_rescale={step_rescale}"
      raise ValueError(f"{name}; accepted: dt=None and step_rescale=1 (attention has no step size)")
    batch, length, features = u_BLH.shape
    head_dim, kv_heads = head_sizes(features, self.heads, self.kv_heads, self.head_dim)

    make = functools.partial(self.dense, dtype=u_BLH.dtype, use_bias=self.use_bias)

    def project(name: str, heads: int, axis: str) -> jax.Array:
      y = make(heads * head_dim, ("embed", axis), name=name)(u_BLH)
      return y.reshape(batch, length, heads, head_dim)

    q_BLND = project("query", self.heads, "heads")
    k_BSKD = project("key", kv_heads, "kv_heads")
    v_BSKD = project("value", kv_heads, "kv_heads")
    if self.rotary is not None:
      if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}; accepted: an even number, under rotary positions")
      at_BL = jnp.arange(length)[None] if positions is None else positions
      q_BLND, k_BSKD = (rotate(x, at_BL, self.rotary) for x in (q_BLND, k_BSKD))
    if cache is not None:
      if mask is None or start is None:
        raise ValueError("cache: given without mask or start; accepted: all three")

      @jax.vmap
      def write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return old.at[start + jnp.arange(length)].set(new.astype(old.dtype), mode="drop")

      cache = write(cache[0], k_BSKD, start), write(cache[1], v_BSKD, start)
      k_BSKD, v_BSKD = (x.astype(u_BLH.dtype) for x in cache)
    y_BLND = jax.nn.dot_product_attention(
      q_BLND,
      k_BSKD,
      v_BSKD,
      mask=mask,
      is_causal=self.causal and mask is None,
      implementation=self.implementation,
    )
    y_BLH = make(features, ("heads", "embed"), name="out")(y_BLND.reshape(batch, length, -1))
    return y_BLH if cache is None else (y_BLH, cache)


def head_sizes(
  features: int, heads: int, kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
  """(head_dim, kv_heads) with their defaults; ValueError where they do not fit."""
  kv_heads = heads if kv_heads is None else kv_heads
  if heads % kv_heads:
    raise ValueError(f"kv_heads={kv_heads}; accepted: a divisor of heads={heads}")
  if head_dim is None and features % heads:
    raise ValueError(f"heads={heads}; accepted: a divisor of features={features}, or a head_dim")
  return features // heads if head_dim is None else head_dim, kv_heads


def accept(name: str, value: Any, accepted: Any) -> None:
  """ValueError for a value that is not among those accepted."""
  if value not in accepted:
    raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(str, accepted))}")


def check_range(name: str, values: jax.Array, low: int, high: int) -> None:
  """ValueError for integers outside of low to high, where they are known (not under `jit`)."""
  if isinstance(values, jax.core.Tracer) or not np.size(values):
    return
  for value in (np.min(known := np.asarray(values)), np.max(known)):
    if not low <= value <= high:
      raise ValueError(f"{name}: {value}; accepted: {low} to {high}")
