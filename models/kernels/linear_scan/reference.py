"""The recurrence and its adjoint in numpy float64 or complex128, one step at a time: the oracle."""

from __future__ import annotations

import numpy as np


def linear_scan(
  a: np.ndarray, b: np.ndarray, h0: np.ndarray | None = None, *, reverse: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """y (..., L, N) and h_last (..., N); operands as in `interface.py`, complex ones native."""
  a, b, h = _wide(a, b, h0)
  y = np.empty_like(b)
  for t in _order(b.shape[-2], reverse):
    h = a[..., t, :] * h + b[..., t, :]
    y[..., t, :] = h
  return y, h


def gradients(
  a: np.ndarray,
  b: np.ndarray,
  h0: np.ndarray | None,
  dy: np.ndarray,
  dh_last: np.ndarray,
  *,
  reverse: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(da, db, dh0) for cotangents of both results, where d of re + i im means d re + i d im."""
  y, _ = linear_scan(a, b, h0, reverse=reverse)
  shape = np.shape(a)
  a, b, h0 = _wide(a, b, h0)
  c = np.asarray(dh_last, b.dtype)
  da, db = np.zeros_like(b), np.zeros_like(b)
  order = list(_order(b.shape[-2], reverse))
  for i, t in reversed(list(enumerate(order))):
    g = np.asarray(dy)[..., t, :] + c
    da[..., t, :] = g * np.conj(y[..., order[i - 1], :] if i else h0)
    db[..., t, :] = g
    c = np.conj(a[..., t, :]) * g
  return (da if len(shape) > 1 else da.sum(tuple(range(da.ndim - 1)))), db, c


def _wide(
  a: np.ndarray, b: np.ndarray, h0: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  dtype = np.result_type(np.float64, np.asarray(a), np.asarray(b))
  b = np.asarray(b, dtype)
  h = np.zeros((*b.shape[:-2], b.shape[-1]), dtype)
  h = h if h0 is None else np.asarray(h0, dtype)
  return np.broadcast_to(np.asarray(a, dtype), b.shape), b, h


def _order(length: int, reverse: bool) -> range:
  return range(length - 1, -1, -1) if reverse else range(length)
