"""The long convolution: public function, validation, derivative, choice of backend.

A backend is a pair of functions:

    forward(u, k, k_backward, pre, post) -> y
    backward(u, k, k_backward, pre, post, dy) -> (du, dk, dk_backward, dpre, dpost)

with `u`, the gates, `y`, `dy` and their gradients of shape (B, L, H), `k` of shape (H, T) with
1 <= T <= L and `k_backward` of shape (H, T') with 1 <= T' <= L - 1; `k_backward` and the gates may
be None, and then so are their gradients. Kernels and their gradients are float32 or float64, the
dtype to compute in; `y` and `du` have the dtype of `u`, the gates' gradients that of the gates. The
skip D has become part of `k`, as its tap of lag 0.

"fft" takes XLA's FFT; "dft" makes FFTs of matrix products, which TPUs are better at; "pallas_tpu"
is one kernel of such products, see `tpu.py`, and "mosaic_gpu" another, see `gpu.py`, for bfloat16
sequences of up to 8,192 steps. It has not run on a GPU, so that only who names it gets it. Short
kernels go into "pallas_tpu_toeplitz", which convolves directly, see `toeplitz.py`; longer ones do
only if it is named.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from models.kernels import dispatch, partition
from models.kernels.long_conv import dft, fft, partitioned, xla
from models.kernels.partition import Axes

IMPLEMENTATIONS = {
  "fft": dispatch.Implementation(
    partial(xla.forward, fft=fft), partial(xla.backward, fft=fft), ("cpu", "cuda", "rocm")
  ),
  "pallas_tpu_toeplitz": dispatch.kernel(
    "models.kernels.long_conv.toeplitz", "tpu", names=(*dispatch.NAMES, "worthwhile")
  ),
  "pallas_tpu": dispatch.kernel("models.kernels.long_conv.tpu", "tpu"),
  "dft": dispatch.Implementation(partial(xla.forward, fft=dft), partial(xla.backward, fft=dft)),
  "mosaic_gpu": dispatch.kernel("models.kernels.long_conv.gpu", "cuda"),
  "mosaic_gpu_interpreted": dispatch.interpreted("models.kernels.long_conv.gpu"),
  "pallas_tpu_toeplitz_interpreted": dispatch.interpreted("models.kernels.long_conv.toeplitz"),
  "pallas_tpu_interpreted": dispatch.interpreted("models.kernels.long_conv.tpu"),
}


@partial(jax.tree_util.register_dataclass, data_fields=["re", "im"], meta_fields=["length"])
@dataclasses.dataclass(frozen=True)
class Spectrum:
  """Kernels in the form that sequences are multiplied by.

  re, im: (H, F) float32 or float64: frequencies from 0 to a half, as `jnp.fft.rfft` has them.
  length: that of the longest sequences they serve.
  """

  re: jax.Array
  im: jax.Array
  length: int


def spectrum(
  k_HT: jax.Array,
  D_H: jax.Array | None = None,
  *,
  k_backward: jax.Array | None = None,
  length: int,
) -> Spectrum:
  """What `long_conv` takes in place of its kernels, where many calls share them.

  Layers that are trained no more, and microbatches: gradients are summed as a spectrum and
  transformed back once.

  Raises: as `long_conv`, and ValueError for a `length` below 1.
  """
  if length < 1:
    raise ValueError(f"length={length}; accepted: at least 1")
  k = _array("k_HT", k_HT, None, None)
  k, k_backward = _kernels(k, D_H, k_backward, length, ())
  found_HF = dispatch.forward(_by(xla.spectrum), None, k, k_backward, length=length)
  return Spectrum(found_HF.real, found_HF.imag, length)


def long_conv(
  u_BLH: jax.Array,
  k_HT: jax.Array | Spectrum,
  D_H: jax.Array | None = None,
  *,
  k_backward: jax.Array | None = None,
  gates: tuple[jax.Array | None, jax.Array | None] = (None, None),
  spec: PartitionSpec | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """y = post * (k * (pre u) + D pre u), a convolution for each feature, with gates around it.

  Without a backward kernel y_t = post_t (sum_{j <= t} k_j v_{t-j} + D v_t) with v = pre u. The
  backward kernel adds sum_j k_backward_j v_{t+1+j}: lag 0 belongs to `k` alone. Inputs before the
  first and after the last step are zero; nothing wraps round.

  Taps that reach no input (`k` beyond L, `k_backward` beyond L - 1) do not matter and get zero
  gradients; a shorter kernel is zero beyond its end. One kernel thus serves every length.

  Kernels, spectra and sums are float32, or float64 where an operand is. The backward pass keeps the
  operands and nothing else. Second derivatives (`grad` or `jvp` of a gradient) are right, except
  that the Pallas kernels have none; forward mode alone is refused, as by every `custom_vjp`.

  Operands may be sharded: over batch and features nothing is moved but the sum of a kernel's
  gradient over the batch. Over time the sequences are gathered, or with `spec`, where the devices
  divide the features, dealt out by features and back.

  An FFT mixes all positions: a NaN, an infinity, or the rounding of a huge input reaches the whole
  of its sequence and feature, and no other; causality holds up to rounding, about 1e-6 of the
  largest output. A NaN in the cotangents does the same to `du` and reaches that feature's `dk`. Of
  bfloat16 sequences the Pallas kernels round what they transform to bfloat16, and are causal up to
  that. Where kernels are so short that "pallas_tpu_toeplitz" takes them, what is not finite reaches
  no more blocks of 128 steps than the kernel does, and nothing else is mixed.

  Args:
    u_BLH: (B, L, H), floating point. B = 0 and L = 0 are allowed.
    k_HT: (H, T), taps of the lags 0 .. T-1, T >= 1; floating point. Or the `spectrum` of all
      kernels, by which "fft" and "dft" convolve; the compiler then cuts sharded operands.
    D_H: (H,), the skip; zero by default.
    k_backward: (H, T'), taps of the lags -1 .. -T', T' >= 1; the convolution is causal without.
    gates: (pre, post), each (B, L, H) or None for one; elementwise, as in H3 and Hyena.
    spec: axes of the current mesh over which (batch, time, features) lie, see `linear_scan`.
    implementation: a key of IMPLEMENTATIONS; by default the best for the platform and the shapes.

  Returns: y_BLH, in the dtype of `u`.

  Raises:
    ValueError: for wrong shapes, for axes that the mesh does not have, and for an implementation
      that is unknown or cannot run here.
    TypeError: for an operand that is not floating point.
  """
  u = jnp.asarray(u_BLH)
  if u.ndim != 3:
    raise ValueError(f"u_BLH: shape {u.shape}; accepted: (B, L, H)")
  batch, length, width = u.shape
  pre, post = (None if gate is None else _array("gates", gate, *u.shape) for gate in gates)
  sequences = [x for x in (u, pre, post) if x is not None]
  if isinstance(k_HT, Spectrum):
    if D_H is not None or k_backward is not None or spec is not None:
      raise ValueError("D_H, k_backward or spec: given with a spectrum; accepted: None")
    return _filtered(implementation, k_HT, sequences, u, pre, post)
  k = _array("k_HT", k_HT, width, None)
  k, k_backward = _kernels(k, D_H, k_backward, max(length, 1), sequences)
  if u.size == 0:
    return u

  operands = (u, k, k_backward, pre, post)
  dispatch.check(IMPLEMENTATIONS, implementation, *operands)
  axes = partition.find("long_conv", spec, u, (batch, length, width))
  if axes is not None and axes.length:
    ways = partition.ways(axes.channels + axes.length)
    axes = axes if width % ways == 0 else axes._replace(length=())
  return _apply(implementation, axes, *operands)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(implementation: str | None, axes: Axes | None, *operands: Any) -> jax.Array:
  return _apply_fwd(implementation, axes, *operands)[0]


def _apply_fwd(implementation: str | None, axes: Axes | None, *operands: Any) -> Any:
  run = partial(dispatch.forward, IMPLEMENTATIONS, implementation)
  if axes is None:
    return run(*operands), operands
  return partitioned.forward(run, *operands, axes=axes), operands


def _apply_bwd(
  implementation: str | None, axes: Axes | None, operands: Any, dy: jax.Array
) -> tuple[Any, ...]:
  if axes is None:
    return _run_back(implementation, *operands, dy)
  return partitioned.backward(partial(_run_back, implementation), *operands, dy, axes=axes)


_apply.defvjp(_apply_fwd, _apply_bwd)


def _run_back(name: str | None, *operands: Any) -> tuple[Any, ...]:
  return dispatch.backward(IMPLEMENTATIONS, name, operands[:-1], *operands)


def _by(function: Any) -> dict[str, dispatch.Implementation]:
  """`function` with each `fft`, where this is the one of choice."""
  return {
    name: IMPLEMENTATIONS[name]._replace(forward=partial(function, fft=by))
    for name, by in (("fft", fft), ("dft", dft))
  }


def _filtered(
  implementation: str | None, by: Spectrum, sequences: list[jax.Array], u: jax.Array, *gates: Any
) -> jax.Array:
  """XLA differentiates this."""
  width, length = by.re.shape[0], u.shape[1]
  if u.shape[2] != width or length > by.length:
    raise ValueError(f"u_BLH: shape {u.shape}; accepted: (B, up to {by.length}, {width})")
  dtype = _dtype(*sequences, by.re)
  if u.size == 0:
    return u
  table = _by(xla.filtered)
  dispatch.check(table, implementation)
  k_HF = lax.complex(by.re.astype(dtype), by.im.astype(dtype))
  return dispatch.forward(table, implementation, u, k_HF, *gates)


def _kernels(
  k: jax.Array, D_H: Any, k_backward: Any, length: int, sequences: Any
) -> tuple[jax.Array, jax.Array | None]:
  """Both kernels as a backend takes them, in the dtype to compute in; D is a tap of `k`."""
  D = None if D_H is None else _array("D_H", D_H, len(k))
  if k_backward is not None:
    k_backward = _array("k_backward", k_backward, len(k), None)
  dtype = _dtype(*sequences, *(x for x in (k, D, k_backward) if x is not None))
  k = k[:, :length].astype(dtype)
  if D is not None:
    k = k.at[:, 0].add(D.astype(dtype))  # in place, where a concatenation would be a copy
  if k_backward is not None:
    k_backward = k_backward[:, : length - 1].astype(dtype) if length > 1 else None
  return k, k_backward


def _dtype(*operands: jax.Array) -> Any:
  """float32, or float64 where an operand is."""
  for x in operands:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f"operand of shape {x.shape}: dtype {x.dtype}; accepted: floating point")
  return jnp.result_type(jnp.float32, *operands)


def _array(name: str, x: jax.Array, *shape: int | None) -> jax.Array:
  """`x`, whose axes have the sizes of `shape`, or any but 0 where that is None."""
  x = jnp.asarray(x)
  fits = (n == want or (want is None and n) for n, want in zip(x.shape, shape, strict=False))
  if x.ndim != len(shape) or not all(fits):
    accepted = ", ".join("T >= 1" if n is None else str(n) for n in shape)
    raise ValueError(f"{name}: shape {x.shape}; accepted: ({accepted})")
  return x
