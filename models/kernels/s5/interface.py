"""The state-space core of S5: public function, validation, derivative, choice of backend.

A backend is a pair of functions. Complex operands are pairs (re, im). `a`, `scale`, `x0` and
`x_last` hold one for each direction of `reverses`, which is (False,), (True,) or (False, True):

    forward(u, a, scale, B, C, D, x0, *, reverses) -> (y, x_last, saved)
    backward(saved, u, a, scale, B, C, D, x0, dy, dx_last, *, reverses)
      -> (du, da, dscale, dB, dC, dD, dx0)

`saved` is what the backend keeps between the two. All but `u`, `dy` and `du` have the dtype of the
states.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.kernels import dispatch, partition
from models.kernels.linear_scan import associative
from models.kernels.partition import Axes
from models.kernels.s5 import partitioned, xla

Pair = tuple[jax.Array, jax.Array]

IMPLEMENTATIONS = {
  "pallas_tpu": dispatch.kernel("models.kernels.s5.tpu", "tpu"),
  "xla": dispatch.Implementation(xla.forward, xla.backward, ("cpu",)),
  "associative": dispatch.Implementation(
    partial(xla.forward, scan=associative.scan), partial(xla.backward, adjoint=associative.adjoint)
  ),
  "mosaic_gpu": dispatch.kernel("models.kernels.s5.gpu", "cuda"),
  "pallas_tpu_interpreted": dispatch.interpreted("models.kernels.s5.tpu"),
  "mosaic_gpu_interpreted": dispatch.interpreted("models.kernels.s5.gpu"),
}


def s5_apply(
  u_BLH: jax.Array,
  a: Pair,
  B: Pair,
  C: Pair,
  D: jax.Array,
  x0: Pair | None = None,
  *,
  scale: Pair | None = None,
  reverse: bool = False,
  bidirectional: bool = False,
  a_reverse: Pair | None = None,
  scale_reverse: Pair | None = None,
  spec: PartitionSpec | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, Pair]:
  """x_t = a_t x_{t-1} + scale_t (B u_t), y_t = Re(C x_t) + D u_t (arXiv:2208.04933, section 3).

  H is the width of the layer, P the number of stored states. Complex operands are pairs (re, im) of
  real arrays, already discretised. Under conjugate symmetry the factor two belongs in C:
  `C = (2 * C_re, 2 * C_im)`.

  With a zero-order hold either fold (exp(lambda step) - 1) / lambda into B, or pass it as `scale`;
  the second is the way for steps that differ in time, since a B of shape (L, P, H) never arises.

  The states are float32, or float64 where an operand is. With bfloat16 `u` the factors of the
  matrix products are rounded to bfloat16, the products summed in float32. Those of float32 factors
  are as precise as `jax.default_matmul_precision` says, which on TPUs and GPUs is by default no
  more than that. Gradients are as in `linear_scan`, and so is what holds for sharded operands.

  Args:
    u_BLH: (B, L, H), floating point.
    a: pair of (P,), or of (B, L, P) where steps differ in time; float32 or float64, because a decay
      near one does not survive bfloat16.
    B: pair of (P, H).
    C: pair of (H, P); (H, 2 P) if bidirectional, the forward states first.
    D: (H,), the direct term.
    x0: pair of (B, P), the state before the first step; zeros by default. If bidirectional it
      belongs to the forward direction, and the backward one starts from zero.
    scale: pair of (P,) or (B, L, P); one by default.
    reverse: runs from the last step to the first.
    bidirectional: adds the states of a second scan from the last step to the first.
    a_reverse, scale_reverse: those of the second scan, by default `a` and `scale`. With gaps
      between samples they differ: forwards the state decays over the gap before a sample, backwards
      over the gap after it.
    spec: axes of the current mesh over which (batch, time, states) lie, see `linear_scan`; by
      default, where axes are Explicit, those of the batch and time of `u`.
    implementation: a key of IMPLEMENTATIONS; by default the best for the platform and the shapes.

  Returns:
    y_BLH: (B, L, H) in the dtype of `u`.
    x_last: pair of (B, P): the state after the last step taken. With `reverse` that is the one at
      t = 0; if bidirectional, the forward direction's.

  Raises:
    ValueError: for wrong shapes, arguments that exclude each other, axes that the mesh does not
      have, and for an implementation that is unknown or cannot run here.
    TypeError: for a dtype not listed above.
  """
  if reverse and bidirectional:
    raise ValueError("reverse=True with bidirectional=True; accepted: one of them")
  for name, given in (("a_reverse", a_reverse), ("scale_reverse", scale_reverse)):
    if given is not None and not bidirectional:
      raise ValueError(f"{name}: given with bidirectional=False; accepted: bidirectional=True")
  u = jnp.asarray(u_BLH)
  if u.ndim != 3:
    raise ValueError(f"u_BLH: shape {u.shape}; accepted: (B, L, H)")
  if not jnp.issubdtype(u.dtype, jnp.floating):
    raise TypeError(f"u_BLH: dtype {u.dtype}; accepted: floating point")
  batch, length, width = u.shape
  if not _is_pair(B) or jnp.ndim(B[0]) != 2:
    raise ValueError(
      f"B: {_describe(B[0] if _is_pair(B) else B)}; accepted: a pair (re, im) of (P, {width})"
    )
  states = jnp.shape(B[0])[0]
  by_step = ((states,), (batch, length, states))

  operands = (
    _pair("a", a, *by_step),
    _pair("a_reverse", a_reverse, *by_step),
    _pair("scale", scale, *by_step),
    _pair("scale_reverse", scale_reverse, *by_step),
    _pair("B", B, (states, width)),
    _pair("C", C, (width, states * (2 if bidirectional else 1))),
    _array("D", D, (width,)),
    _pair("x0", x0, (batch, states)),
  )
  dtype = jnp.result_type(jnp.float32, u, *jax.tree.leaves(operands))
  operands = jax.tree.map(lambda x: x.astype(dtype), operands)
  a, a_reverse, scale, scale_reverse, B, C, D, x0 = operands

  if scale is not None and scale[0].ndim == 1 and scale_reverse is None:
    B, scale = _scale_rows(scale, B), None  # P H products in place of B L P
  zeros = (jnp.zeros((batch, states), dtype),) * 2
  decays, scales, starts, reverses = [a], [scale], [zeros if x0 is None else x0], [reverse]
  if bidirectional:
    decays.append(a if a_reverse is None else a_reverse)
    scales.append(scale if scale_reverse is None else scale_reverse)
    starts.append(zeros)
    reverses.append(True)

  arguments = (u, tuple(decays), tuple(scales), B, C, D, tuple(starts))
  dispatch.check(IMPLEMENTATIONS, implementation, *arguments)
  sizes = (batch, length, states)
  axes = partition.find("s5_apply", spec, u, sizes)
  y, x_last = _apply(tuple(reverses), implementation, axes, *arguments)
  return y, x_last[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(
  reverses: tuple[bool, ...], implementation: str | None, axes: Axes | None, *operands: Any
) -> Any:
  return _apply_fwd(reverses, implementation, axes, *operands)[0]


def _apply_fwd(
  reverses: tuple[bool, ...], implementation: str | None, axes: Axes | None, *operands: Any
) -> Any:
  chosen = IMPLEMENTATIONS, implementation
  run = partial(dispatch.forward, *chosen, at_once=True, reverses=reverses)
  if axes is None:
    y, x_last, saved = run(*operands)
  else:
    y, x_last, saved = partitioned.forward(run, *operands, reverses=reverses, axes=axes)
  return (y, x_last), (saved, operands)


def _apply_bwd(
  reverses: tuple[bool, ...], implementation: str | None, axes: Axes | None, residuals: Any,
  cotangents: Any,
) -> tuple[Any, ...]:  # fmt: skip
  saved, operands = residuals
  run = partial(_run_back, implementation, reverses=reverses)
  if axes is None:
    return run(saved, *operands, *cotangents)
  return partitioned.backward(run, saved, *operands, *cotangents, reverses=reverses, axes=axes)


_apply.defvjp(_apply_fwd, _apply_bwd)


def _run_back(name: str | None, saved: Any, *operands: Any, reverses: tuple[bool, ...]) -> Any:
  options: dict[str, Any] = {"at_once": True, "reverses": reverses}
  return dispatch.backward(IMPLEMENTATIONS, name, operands[:-2], saved, *operands, **options)


def _scale_rows(scale: Pair, B: Pair) -> Pair:
  (sr, si), (br, bi) = (scale[0][:, None], scale[1][:, None]), B
  return sr * br - si * bi, sr * bi + si * br


def _pair(name: str, pair: Pair | None, *shapes: tuple[int, ...]) -> Pair | None:
  if pair is None:
    return None
  if not _is_pair(pair):
    raise ValueError(f"{name}: {_describe(pair)}; accepted: a pair (re, im)")
  re, im = (_array(name, part, *shapes) for part in pair)
  if re.shape != im.shape:
    raise ValueError(f"{name}: parts {re.shape} and {im.shape}; accepted: one shape")
  return re, im


def _is_pair(x: Any) -> bool:
  return isinstance(x, tuple | list) and len(x) == 2


def _describe(x: Any) -> str:
  return f"a sequence of {len(x)}" if isinstance(x, tuple | list) else f"shape {jnp.shape(x)}"


def _array(name: str, x: jax.Array, *shapes: tuple[int, ...]) -> jax.Array:
  x = jnp.asarray(x)
  if x.shape not in shapes:
    raise ValueError(f"{name}: shape {x.shape}; accepted: {' or '.join(map(str, shapes))}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name}: dtype {x.dtype}; accepted: floating point")
  if name in {"a", "a_reverse"} and x.dtype not in (jnp.float32, jnp.float64):
    raise TypeError(f"{name}: dtype {x.dtype}; accepted: float32, float64")
  return x
