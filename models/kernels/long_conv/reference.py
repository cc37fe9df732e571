"""The convolution and its adjoint in numpy float64: the oracle.

A kernel here is one array (H, 2L - 1) of the lags -(L-1) .. L-1. Up to L = 512 sums are direct,
over a Toeplitz matrix for each feature; beyond, by complex FFT.
"""

from __future__ import annotations

import numpy as np

DIRECT = 512

Optional = np.ndarray | None


def long_conv(
  u: np.ndarray,
  k: np.ndarray,
  D: np.ndarray,
  k_backward: Optional = None,
  pre: Optional = None,
  post: Optional = None,
) -> np.ndarray:
  """y (B, L, H); float64 operands as in `interface.py`."""
  u, c, pre, post = _prepare(u, k, D, k_backward, pre, post)
  return post * _convolve(pre * u, c)


def gradients(
  u: np.ndarray,
  k: np.ndarray,
  D: np.ndarray,
  k_backward: Optional,
  pre: Optional,
  post: Optional,
  dy: np.ndarray,
) -> dict[str, np.ndarray]:
  """By name of the operand, with those of operands that are not given."""
  length = u.shape[1]
  u, c, pre, post = _prepare(u, k, D, k_backward, pre, post)
  v, dz = pre * u, post * dy
  dv = _convolve(dz, c[:, ::-1])
  dc = _correlate(dz, v)
  dk = np.zeros_like(k)
  past = dc[:, length - 1 :][:, : k.shape[1]]
  dk[:, : past.shape[1]] = past
  dk_backward = np.zeros_like(k if k_backward is None else k_backward)
  future = dc[:, : length - 1][:, ::-1][:, : dk_backward.shape[1]]
  dk_backward[:, : future.shape[1]] = future
  return {
    "u": pre * dv,
    "k": dk,
    "D": (dz * v).sum((0, 1)),
    "k_backward": dk_backward,
    "pre": u * dv,
    "post": dy * _convolve(v, c),
  }


def _prepare(
  u: np.ndarray,
  k: np.ndarray,
  D: np.ndarray,
  k_backward: Optional,
  pre: Optional,
  post: Optional,
) -> tuple[np.ndarray, ...]:
  length = u.shape[1]
  c = np.zeros((k.shape[0], 2 * length - 1))
  past = k[:, :length]
  c[:, length - 1 : length - 1 + past.shape[1]] = past
  c[:, length - 1] += D
  if k_backward is not None:
    future = k_backward[:, : length - 1]
    c[:, length - 1 - future.shape[1] : length - 1] = future[:, ::-1]
  one = np.ones_like(u)
  return u, c, one if pre is None else pre, one if post is None else post


def _convolve(v: np.ndarray, c: np.ndarray) -> np.ndarray:
  """y_t = sum_s c[t - s + L - 1] v_s."""
  length = v.shape[1]
  if length <= DIRECT:
    t = np.arange(length)
    return np.einsum("hts,bsh->bth", c[:, t[:, None] - t + length - 1], v)
  size = 3 * length - 2
  spectrum = np.fft.fft(v, size, axis=1) * np.fft.fft(c, size).T
  return np.fft.ifft(spectrum, axis=1).real[:, length - 1 : 2 * length - 1]


def _correlate(dz: np.ndarray, v: np.ndarray) -> np.ndarray:
  """dc[m] = sum_bt dz_t v_{t - (m - L + 1)}."""
  length = v.shape[1]
  if length <= DIRECT:
    products = np.einsum("bth,bsh->hts", dz, v)
    return np.stack([np.trace(products, -m, 1, 2) for m in range(1 - length, length)], axis=1)
  size = 2 * length - 1
  spectrum = np.fft.fft(dz, size, axis=1) * np.conj(np.fft.fft(v, size, axis=1))
  return np.roll(np.fft.ifft(spectrum.sum(0), axis=0).real, length - 1, axis=0).T
