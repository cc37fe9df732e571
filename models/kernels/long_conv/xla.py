"""Long convolution by real FFTs of the zero-padded operands, which a module `fft` provides.

Its functions are `rfft(x, size)` and `irfft(x, size)`, along the last axis. Forward is a transform
of the inputs, one of the kernel, and one back; backward transforms inputs and cotangents anew, and
goes back once for the inputs and once for the kernel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from scipy.fft import next_fast_len

Optional = jax.Array | None


def forward(
  u: jax.Array, k: jax.Array, k_backward: Optional, pre: Optional, post: Optional, *, fft: Any
) -> jax.Array:
  """See `interface.py`."""
  return filtered(u, spectrum(k, k_backward, u.shape[1], fft=fft), pre, post, fft=fft)


def spectrum(k: jax.Array, k_backward: Optional, length: int, *, fft: Any) -> jax.Array:
  """(H, F) complex, of kernels for sequences of this length."""
  size = _size(length, k, k_backward)
  return fft.rfft(circular(k, k_backward, size), size)


def filtered(
  u: jax.Array, k_HF: jax.Array, pre: Optional, post: Optional, *, fft: Any
) -> jax.Array:
  """`forward` of kernels that are transformed already."""
  size = 2 * (k_HF.shape[1] - 1)
  v_BHF = fft.rfft(_rows(u, pre, k_HF.real.dtype), size)
  y_BLH = _sequence(fft.irfft(v_BHF * k_HF, size), u.shape[1])
  return _times(post, y_BLH).astype(u.dtype)


def backward(
  u: jax.Array,
  k: jax.Array,
  k_backward: Optional,
  pre: Optional,
  post: Optional,
  dy: jax.Array,
  *,
  fft: Any,
) -> tuple[jax.Array, jax.Array, Optional, Optional, Optional]:
  """See `interface.py`."""
  # Else the compiler keeps the spectra of the forward pass: two to four times the bytes of `u`.
  u, k, k_backward, pre, post, dy = lax.optimization_barrier((u, k, k_backward, pre, post, dy))
  length = u.shape[1]
  k_HF, size = spectrum(k, k_backward, length, fft=fft), _size(length, k, k_backward)
  v_BHF = fft.rfft(_rows(u, pre, k.dtype), size)
  dy_BHF = fft.rfft(_rows(dy, post, k.dtype), size)
  dv_BLH = _sequence(fft.irfft(jnp.conj(k_HF) * dy_BHF, size), length)
  dk_HN = fft.irfft((jnp.conj(v_BHF) * dy_BHF).sum(0), size)
  dk_backward = dpre = dpost = None
  if k_backward is not None:
    dk_backward = dk_HN[:, : -k_backward.shape[1] - 1 : -1]
  if pre is not None:
    dpre = (u * dv_BLH).astype(pre.dtype)
  if post is not None:
    dpost = (dy * _sequence(fft.irfft(v_BHF * k_HF, size), length)).astype(post.dtype)
  return _times(pre, dv_BLH).astype(u.dtype), dk_HN[:, : k.shape[1]], dk_backward, dpre, dpost


def _size(length: int, k: jax.Array, k_backward: Optional) -> int:
  """The least fast even size at which no tap wraps round onto the positions of the sequence."""
  back = 0 if k_backward is None else k_backward.shape[1]
  least = length + max(k.shape[1] - 1, back)
  return 2 * next_fast_len(-(-least // 2), real=True)


def circular(k: jax.Array, k_backward: Optional, size: int) -> jax.Array:
  """The kernel in which lag -j is at size - j; (H, N), or (H, T) where there are no such lags."""
  if k_backward is None:
    return k
  gap = jnp.zeros((k.shape[0], size - k.shape[1] - k_backward.shape[1]), k.dtype)
  return jnp.concatenate([k, gap, k_backward[:, ::-1]], axis=1)


def _rows(x_BLH: jax.Array, gate: Optional, dtype: jnp.dtype) -> jax.Array:
  """(B, H, L), gated."""
  return _times(gate, x_BLH.astype(dtype)).swapaxes(1, 2)


def _sequence(x_BHN: jax.Array, length: int) -> jax.Array:
  """(B, L, H), the padding cut off."""
  return x_BHN[..., :length].swapaxes(1, 2)


def _times(gate: Optional, x: jax.Array) -> jax.Array:
  return x if gate is None else gate * x
