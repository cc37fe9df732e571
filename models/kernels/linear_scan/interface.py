"""The diagonal linear recurrence: public function, validation, derivative, choice of backend.

Inside, every operand is a tuple of real arrays: `(x,)` for a real problem, `(re, im)` for a complex
one. A backend is a pair of functions on such tuples:

    forward(a, b, h0, *, reverse, states=True) -> (y, h_last)
    backward(a, y, h0, dy, dh_last, *, reverse) -> (da, db, dh0)

with `b`, `y`, `dy`, `db` of shape (..., L, N) in the dtype of `b`; `h0`, `h_last` of shape (..., N)
and `a`, of shape (N,) or that of `b`, in the dtype of the carry (float32 or float64). With
`states=False` only h_last is wanted, and y is ().
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.kernels import dispatch, partition
from models.kernels.linear_scan import associative, partitioned, xla
from models.kernels.partition import Axes

# An array, or (re, im).
Operand = Any
Parts = tuple[jax.Array, ...]

HERE = "models.kernels.linear_scan"
IMPLEMENTATIONS = {
  "pallas_tpu": dispatch.kernel(f"{HERE}.tpu", "tpu"),
  "xla": dispatch.Implementation(xla.forward, xla.backward, ("cpu",)),
  "associative": dispatch.Implementation(
    partial(xla.forward, scan=associative.scan, last=associative.last),
    partial(xla.backward, adjoint=associative.adjoint),
  ),
  "mosaic_gpu": dispatch.kernel(f"{HERE}.gpu", "cuda"),
  "pallas_tpu_interpreted": dispatch.interpreted(f"{HERE}.tpu"),
  "mosaic_gpu_interpreted": dispatch.interpreted(f"{HERE}.gpu"),
}


def linear_scan(
  a: Operand,
  b: Operand,
  h0: Operand | None = None,
  *,
  reverse: bool = False,
  spec: PartitionSpec | None = None,
  implementation: str | None = None,
) -> tuple[Operand, Operand]:
  """y_t = a_t * y_{t-1} + b_t along axis -2, elementwise in the channels, with y_{-1} = h0.

  Each operand is a real array, a pair (re, im) of real arrays, or a native complex array; a real
  problem has three real operands, a complex one none. Results come in the form of `b`. Prefer pairs
  inside models: no accelerator kernel takes native complex arrays.

  The carry is float32, or float64 where an operand is. Gradients flow into a, b and h0 from both
  results, and are bitwise reproducible. The backward pass keeps `a`, `y` and `h0`, so that for
  constant `a` the one sequence kept is `y`. Second derivatives are right, but their cost grows with
  the square of L, and the Pallas kernels have none.

  Operands may be sharded. With `spec` each device runs its part: over batch and channels nothing
  but a gradient's sum is moved, over time a state for each part. Without, it is left to XLA, which
  gathers what is sharded over time. Inside `jax.shard_map` pass it check_vma=False.

  Args:
    a: (N,) for a constant decay, or exactly the shape of `b`. Nothing in between is broadcast.
      float32 or float64: a decay near one does not survive bfloat16.
    b: (..., L, N), usually (B, L, N); float32, float64, bfloat16 or float16. L = 0 is allowed.
    h0: (..., N), the state before the first step; zeros by default.
    reverse: runs y_t = a_t * y_{t+1} + b_t from the last step to the first, with y_L = h0.
    spec: axes of the current mesh (`jax.set_mesh`) over which (batch, time, channels) lie, such as
      P("data", "sequence", "tensor"), where the batch is the first axis of `b`; by default those of
      `b` where the mesh's axes are Explicit. An axis that does not divide its size is left out.
    implementation: a key of IMPLEMENTATIONS; by default the best for the platform and the shapes.

  Returns:
    y: (..., L, N) in the dtype of `b`.
    h_last: (..., N) in the dtype of the carry: the state after the last step taken, which with
      `reverse` is the one at t = 0. With bfloat16 `b` it is more exact than the end of `y`.

  Raises:
    ValueError: for operands of mixed kinds or wrong shapes, for axes that the mesh does not have,
      and for an implementation that is unknown or cannot run here.
    TypeError: for a dtype not listed above.
  """
  a_parts, b_parts = _parts("a", a), _parts("b", b)
  h0_parts = None if h0 is None else _parts("h0", h0)
  _check(a_parts, b_parts, h0_parts)

  carry = jnp.result_type(jnp.float32, *a_parts, *b_parts, *(h0_parts or ()))
  a_parts = tuple(x.astype(carry) for x in a_parts)
  if h0_parts is None:
    shape = (*b_parts[0].shape[:-2], b_parts[0].shape[-1])
    h0_parts = tuple(jnp.zeros(shape, carry) for _ in b_parts)
  else:
    h0_parts = tuple(x.astype(carry) for x in h0_parts)

  dispatch.check(IMPLEMENTATIONS, implementation, a_parts, b_parts, h0_parts)
  shape = b_parts[0].shape
  sizes = (shape[0] if len(shape) > 2 else 1, *shape[-2:])
  axes = partition.find("linear_scan", spec, b_parts[0], sizes)
  y, h_last = _scan(a_parts, b_parts, h0_parts, reverse, implementation, axes)
  return _like(b, y), _like(b, h_last)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _scan(
  a: Parts, b: Parts, h0: Parts, reverse: bool, implementation: str | None, axes: Axes | None
) -> tuple[Parts, Parts]:
  return _scan_fwd(a, b, h0, reverse, implementation, axes)[0]


def _scan_fwd(
  a: Parts, b: Parts, h0: Parts, reverse: bool, implementation: str | None, axes: Axes | None
) -> tuple[tuple[Parts, Parts], tuple[Parts, Parts, Any]]:
  forward = partial(dispatch.forward, IMPLEMENTATIONS, implementation)
  if axes is None:
    y, h_last = forward(a, b, h0, reverse=reverse)
  else:
    y, h_last, h0 = partitioned.forward(forward, a, b, h0, reverse=reverse, axes=axes)
  return (y, h_last), (a, y, h0)


def _scan_bwd(
  reverse: bool,
  implementation: str | None,
  axes: Axes | None,
  residuals: tuple[Parts, Parts, Any],
  cotangents: tuple[Parts, Parts],
) -> tuple[Parts, Parts, Parts]:
  backward = partial(_run_back, implementation, reverse=reverse)
  if axes is None:
    return backward(*residuals, *cotangents)
  forward = partial(dispatch.forward, IMPLEMENTATIONS, implementation)
  return partitioned.backward(
    forward, backward, *residuals, *cotangents, reverse=reverse, axes=axes
  )


_scan.defvjp(_scan_fwd, _scan_bwd)


def _run_back(name: str | None, *operands: Parts, reverse: bool) -> tuple[Parts, Parts, Parts]:
  return dispatch.backward(IMPLEMENTATIONS, name, operands[:3], *operands, reverse=reverse)


def _parts(name: str, x: Operand) -> Parts:
  """The real arrays that make up an operand: one, or the real and the imaginary part."""
  if isinstance(x, tuple | list):
    if len(x) != 2:
      raise ValueError(f"{name}: a sequence of {len(x)}; accepted: an array or a pair (re, im)")
    parts = tuple(jnp.asarray(part) for part in x)
    if parts[0].shape != parts[1].shape or parts[0].dtype != parts[1].dtype:
      raise ValueError(
        f"{name}: parts {parts[0].dtype}{parts[0].shape} and {parts[1].dtype}{parts[1].shape};"
        " accepted: a pair (re, im) of one shape and dtype"
      )
  else:
    whole = jnp.asarray(x)
    is_complex = jnp.issubdtype(whole.dtype, jnp.complexfloating)
    parts = (whole.real, whole.imag) if is_complex else (whole,)
  if not jnp.issubdtype(parts[0].dtype, jnp.floating):
    raise TypeError(f"{name}: dtype {parts[0].dtype}; accepted: floating point or complex")
  return parts


def _check(a: Parts, b: Parts, h0: Parts | None) -> None:
  kinds = {len(a), len(b)} | ({len(h0)} if h0 is not None else set())
  if len(kinds) > 1:
    word = {1: "real", 2: "complex"}
    given = {"a": a, "b": b} | ({"h0": h0} if h0 is not None else {})
    described = ", ".join(f"{name} {word[len(x)]}" for name, x in given.items())
    raise ValueError(f"operands: {described}; accepted: all real or all complex")
  shape = b[0].shape
  if len(shape) < 2:
    raise ValueError(f"b: shape {shape}; accepted: (..., L, N)")
  if a[0].shape not in {shape, shape[-1:]}:
    raise ValueError(
      f"a: shape {a[0].shape}; accepted: {shape[-1:]} or {shape}, the shape of b"
      " (broadcast it explicitly)"
    )
  if a[0].dtype not in (jnp.float32, jnp.float64):
    raise TypeError(f"a: dtype {a[0].dtype}; accepted: float32, float64")
  if h0 is not None and h0[0].shape != (*shape[:-2], shape[-1]):
    raise ValueError(f"h0: shape {h0[0].shape}; accepted: {(*shape[:-2], shape[-1])}")


def _like(form: Operand, parts: Parts) -> Operand:
  """`parts` in the form of the operand `form`: a real array, a pair, or a native complex array."""
  if isinstance(form, tuple | list):
    return parts
  return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)
