"""S5 as matrix product, loop over time, matrix product; any platform.

All matrix products are real, over the parts of a complex factor side by side (the axis c of size 2
in the names of shapes), so that none is spent on the imaginary part of the output. What the first
product writes is what the loop overwrites and the second product reads. The states are kept for the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.kernels import dispatch
from models.kernels.linear_scan import xla as loop

Pair = tuple[jax.Array, ...]


def forward(
  u: jax.Array,
  a: tuple[Pair, ...],
  scale: tuple[Pair | None, ...],
  B: Pair,
  C: Pair,
  D: jax.Array,
  x0: tuple[Pair, ...],
  *,
  reverses: tuple[bool, ...],
  scan: Callable[..., Any] = loop.scan,
) -> tuple[jax.Array, tuple[Pair, ...], Any]:
  """See `interface.py`. `scan` is what runs between the products."""
  low = _factor_dtype(u, D)
  drive_BLcP = _product("blh,cph->blcp", u, jnp.stack(B), low, D.dtype)
  y_BLH = D * u
  states, lasts = [], []
  for k, C_k in enumerate(_output_matrices(C, len(a))):
    v_BLcP = _times(scale[k], drive_BLcP)
    x_BLcP, last_BP = scan(a[k], v_BLcP, loop.native(x0[k]), reverse=reverses[k])
    y_BLH = _product("blcp,chp->blh", x_BLcP, C_k, low, D.dtype) + y_BLH
    states.append(x_BLcP)
    lasts.append(loop.parts(last_BP))
  # The product with B is needed again only for the gradient of a scale.
  saved = (None if all(s is None for s in scale) else drive_BLcP, tuple(states))
  return y_BLH.astype(u.dtype), tuple(lasts), saved


def backward(
  saved: Any,
  u: jax.Array,
  a: tuple[Pair, ...],
  scale: tuple[Pair | None, ...],
  B: Pair,
  C: Pair,
  D: jax.Array,
  x0: tuple[Pair, ...],
  dy: jax.Array,
  dx_last: tuple[Pair, ...],
  *,
  reverses: tuple[bool, ...],
  adjoint: Callable[..., Any] = loop.adjoint,
) -> tuple[Any, ...]:
  """See `interface.py`. Gradients in the convention where d of (re, im) is d re + i d im."""
  drive_BLcP, states = saved
  low, dtype = _factor_dtype(u, D), D.dtype
  da: list[Pair] = []
  dscale: list[Pair | None] = []
  dC: list[jax.Array] = []
  ddrives: list[jax.Array] = []
  dx0s: list[Pair] = []
  for k, C_k in enumerate(_output_matrices(C, len(a))):
    dC.append(_outer(dy, states[k], low, dtype))
    dx_BLcP = _product("blh,chp->blcp", dy, C_k, low, dtype)
    da_k, dv_BLcP, dx0_k = adjoint(
      a[k], states[k], loop.native(x0[k]), dx_BLcP, loop.native(dx_last[k]), reverse=reverses[k]
    )
    da.append(da_k)
    dx0s.append(loop.parts(dx0_k))
    scale_k = scale[k]
    if scale_k is None:
      dscale.append(None)
      ddrives.append(dv_BLcP)
    else:
      product = loop.native(dv_BLcP) * jnp.conj(loop.native(drive_BLcP))
      dscale.append(loop.parts(product.sum((0, 1)) if scale_k[0].ndim == 1 else product))
      ddrives.append(_times((scale_k[0], -scale_k[1]), dv_BLcP))

  ddrive_BLcP = ddrives[0] if len(a) == 1 else ddrives[0] + ddrives[1]
  du_BLH = _product("blcp,cph->blh", ddrive_BLcP, jnp.stack(B), low, dtype) + D * dy
  dB_HcP = _outer(u, ddrive_BLcP, low, dtype)
  dC_HcP = jnp.concatenate(dC, axis=-1)
  return (
    du_BLH.astype(u.dtype),
    tuple(da),
    tuple(dscale),
    (dB_HcP[:, 0].T, dB_HcP[:, 1].T),
    (dC_HcP[:, 0], -dC_HcP[:, 1]),
    (dy.astype(dtype) * u.astype(dtype)).sum((0, 1)),
    tuple(dx0s),
  )


def drives(u: jax.Array, scale: tuple[Pair | None, ...], B: Pair) -> list[Pair]:
  """What drives the states of each direction, pairs of (B, L, P)."""
  dtype = B[0].dtype
  drive_BLcP = _product("blh,cph->blcp", u, jnp.stack(B), _factor_dtype(u, B[0]), dtype)
  return [loop.parts(loop.native(_times(scale_k, drive_BLcP))) for scale_k in scale]


def slopes(dy: jax.Array, C: Pair) -> list[Pair]:
  """The gradients of the states of each direction by way of y, for C of (H, directions, P)."""
  both, low = jnp.stack([C[0], -C[1]]), _factor_dtype(dy, C[0])
  found = _product("blh,chdp->dblcp", dy, both, low, C[0].dtype)
  return [loop.parts(loop.native(x_BLcP)) for x_BLcP in found]


def _factor_dtype(u: jax.Array, D: jax.Array) -> jnp.dtype:
  """What the factors of a matrix product are rounded to: 16 bits where `u` has no more."""
  return u.dtype if u.dtype.itemsize < 4 else D.dtype


def _product(
  equation: str, x: jax.Array, z: jax.Array, low: jnp.dtype, dtype: jnp.dtype
) -> jax.Array:
  return jnp.einsum(equation, x.astype(low), z.astype(low), preferred_element_type=dtype)


def _outer(x_BLH: jax.Array, z_BLcP: jax.Array, low: jnp.dtype, dtype: jnp.dtype) -> jax.Array:
  """The sum over batch and time of x times z, (H, 2, P), as a product of two plain matrices.

  Of more axes XLA on CPU makes a transposed copy first. Where it cuts operands between devices they
  keep their axes all the same: merged with another, one that is cut would be gathered.
  """
  if not dispatch.whole():
    return _product("blh,blcp->hcp", x_BLH, z_BLcP, low, dtype)
  width, states = x_BLH.shape[-1], z_BLcP.shape[-1]
  sums = _product("th,tk->hk", x_BLH.reshape(-1, width), z_BLcP.reshape(-1, 2 * states), low, dtype)
  return sums.reshape(width, 2, states)


def _output_matrices(C: Pair, directions: int) -> list[jax.Array]:
  """For each direction the real (2, H, P) that takes the parts of x to Re(C x)."""
  return jnp.split(jnp.stack([C[0], -C[1]]), directions, axis=-1)


def _times(scale: Pair | None, x_BLcP: jax.Array) -> jax.Array:
  if scale is None:
    return x_BLcP
  return jnp.stack(loop.parts(loop.native(scale) * loop.native(x_BLcP)), axis=2)
