"""The state-space core and its adjoint in numpy float64, on native complex128: the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.kernels.linear_scan import reference as scans


def s5_apply(
  u: np.ndarray,
  a: tuple[np.ndarray, ...],
  scale: tuple[np.ndarray, ...],
  B: np.ndarray,
  C: np.ndarray,
  D: np.ndarray,
  x0: np.ndarray,
  *,
  reverses: tuple[bool, ...],
) -> tuple[np.ndarray, np.ndarray]:
  """y (B, L, H) and x_last (B, P); `a` and `scale` hold one array a direction."""
  states, lasts = _states(u, a, scale, B, x0, reverses)
  return (np.concatenate(states, -1) @ C.T).real + D * u, lasts[0]


def gradients(
  u: np.ndarray,
  a: tuple[np.ndarray, ...],
  scale: tuple[np.ndarray, ...],
  B: np.ndarray,
  C: np.ndarray,
  D: np.ndarray,
  x0: np.ndarray,
  dy: np.ndarray,
  dx_last: np.ndarray,
  *,
  reverses: tuple[bool, ...],
) -> dict[str, Any]:
  """By name of the operand, where d of re + i im means d re + i d im."""
  states, _ = _states(u, a, scale, B, x0, reverses)
  starts = [x0, np.zeros_like(x0)]
  ends = [dx_last, np.zeros_like(dx_last)]
  drive = u @ B.T
  out: dict[str, Any] = {"a": [], "scale": [], "x0": None}
  ddrive = np.zeros_like(drive)
  for k, dx in enumerate(np.split(dy @ np.conj(C), len(a), axis=-1)):
    da, dv, dx0 = scans.gradients(
      a[k], scale[k] * drive, starts[k], dx, ends[k], reverse=reverses[k]
    )
    dscale = dv * np.conj(drive)
    out["a"].append(da)
    out["scale"].append(dscale if scale[k].ndim > 1 else dscale.sum((0, 1)))
    out["x0"] = dx0 if k == 0 else out["x0"]
    ddrive += dv * np.conj(scale[k])
  out["u"] = (ddrive @ np.conj(B)).real + D * dy
  out["B"] = np.einsum("blp,blh->ph", ddrive, u)
  out["C"] = np.einsum("blh,blk->hk", dy, np.conj(np.concatenate(states, -1)))
  out["D"] = (dy * u).sum((0, 1))
  return out


def _states(
  u: np.ndarray,
  a: tuple[np.ndarray, ...],
  scale: tuple[np.ndarray, ...],
  B: np.ndarray,
  x0: np.ndarray,
  reverses: tuple[bool, ...],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  drive = u @ B.T
  starts = [x0, np.zeros_like(x0)]
  pairs = [
    scans.linear_scan(a_k, scale_k * drive, start, reverse=reverse)
    for a_k, scale_k, start, reverse in zip(a, scale, starts, reverses, strict=False)
  ]
  return [x for x, _ in pairs], [last for _, last in pairs]
