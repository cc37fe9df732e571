"""Real FFTs along the last axis by matrix products, the four-step form: rows, twiddles, columns.

With n = N2 n1 + n2 and k = k1 + N1 k2 a transform of N = N1 N2 points is a product with the
N1-point DFT matrix over n1, a product with exp(-2 pi i n2 k1 / N), and one with the N2-point matrix
over n2, of which real data need half the columns. These are more operations than those of a radix
FFT, but such as matrix units do best, and partitioners split them over batch and features. Of
float32 operands the products are exact to float32. The functions are those of `fft.py`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def rfft(x: jax.Array, size: int) -> jax.Array:
  """(..., T) real to (..., size // 2 + 1), `x` padded with zeros to `size`, which is even."""
  *leading, length = x.shape
  rows, columns, twiddles = _steps(size, jnp.result_type(x, jnp.complex64))
  count = rows.shape[0], columns.shape[1]
  used = -(-length // count[1])  # rows that are not all padding
  x = _padded(x, used * count[1]).reshape(*leading, used, count[1])
  x = _product("...an,ak->...kn", x, rows[:used]) * twiddles
  x = _product("...kn,mn->...mk", x, columns)
  return x.reshape(*leading, -1)[..., : size // 2 + 1]


def irfft(x: jax.Array, size: int) -> jax.Array:
  """(..., size // 2 + 1) to (..., size) real; `size` is even."""
  leading = x.shape[:-1]
  rows, columns, twiddles = map(np.conj, _steps(size, x.dtype))
  # Conjugate frequencies are counted by the factor two and by taking the real part.
  weights = np.full(size // 2 + 1, 2 / size)
  weights[[0, -1]] = 1 / size
  x = _padded(x * weights.astype(x.real.dtype), columns.shape[0] * rows.shape[0])
  x = x.reshape(*leading, columns.shape[0], rows.shape[0])
  x = _product("...mk,mn->...kn", x, columns) * twiddles
  return _product("...kn,ak->...an", x, rows).real.reshape(*leading, size)


def _padded(x: jax.Array, length: int) -> jax.Array:
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


@functools.cache
def _steps(size: int, dtype: jnp.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The matrices (N1, N1) and (N2 // 2 + 1, N2), and the twiddle factors (N1, N2)."""
  first = next(n for n in range(math.isqrt(size - 1) + 1, size + 1) if size % n == 0)
  second = size // first

  return (
    powers(first, first, first).astype(dtype),
    powers(second // 2 + 1, second, second).astype(dtype),
    powers(first, second, size).astype(dtype),
  )


def powers(rows: int, columns: int, period: int) -> np.ndarray:
  """exp(-2 pi i m n / period) for all m < rows and n < columns."""
  exponents = np.outer(np.arange(rows), np.arange(columns)) % period
  return np.exp(-2j * np.pi / period * exponents)
