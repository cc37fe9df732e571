"""What `bench.py` races the cores against: the usual ways of writing them, and other libraries.

Functions of JAX take the operands of the core. Those of a library come as `{name: Call}`, without
the libraries that are not installed; they get arrays in the layout that suits them and give theirs
back. They run where JAX does, on a CPU or a GPU; so that a GPU has memory for both, set
XLA_PYTHON_CLIENT_PREALLOCATE=false. Of these libraries accelerated-scan, flash-linear-attention,
mamba-ssm and flash-fft-conv need CUDA, and have not met this file there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import scipy
from jax import lax

from models.kernels import timing

Call = tuple[Callable[..., Any] | timing.Host, tuple[Any, ...]]


# Scans


def _combine(first, second):
  return second[0] * first[0], second[0] * first[1] + second[1]


def associative_scan(a, b):
  """h_t = a_t h_{t-1} + b_t of arrays (B, L, N), complex ones native, as a tree."""
  return lax.associative_scan(_combine, (a, b), axis=1)[1]


def sequential_scan(a, b):
  """The same step by step, time moved to the front and back."""

  def step(h, element):
    h = element[0] * h + element[1]
    return h, h

  a, b = a.swapaxes(0, 1), b.swapaxes(0, 1)
  return lax.scan(step, jnp.zeros_like(b[0]), (a, b))[1].swapaxes(0, 1)


def constant_scans(a_N: np.ndarray, b_BLN: np.ndarray) -> dict[str, Call]:
  """scipy's filter, channel by channel."""

  def by(a_N, b_BLN):
    channels = [
      scipy.signal.lfilter([1.0], [1.0, -a], b_BLN[..., n], axis=1) for n, a in enumerate(a_N)
    ]
    return np.stack(channels, axis=-1)

  return {"scipy lfilter": (timing.Host(by), (np.float64(a_N), np.float64(b_BLN)))}


def scans(a_BLN: np.ndarray, b_BLN: np.ndarray, gradients: bool) -> dict[str, Call]:
  """Of real numbers, with a decay for each step. On CPUs PyTorch's loop, else kernels for CUDA."""
  length, device = a_BLN.shape[1], _device()
  if device is None or not _installed("torch"):
    return {}
  import torch

  def loop(a, b):
    h, states = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
      h = a_t * h + b_t
      states.append(h)
    return torch.stack(states, dim=1)

  if device == "cpu":
    return {"torch loop": _torch(loop, (a_BLN, b_BLN), gradients)}
  found: dict[str, Call] = {}
  a_BNL, b_BNL = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (a_BLN, b_BLN))
  if _installed("accelerated_scan") and length == 1 << length.bit_length() - 1:

    def warp(a, b):
      from accelerated_scan.warp import scan

      return scan(a, b).swapaxes(1, 2)

    found["accelerated-scan"] = _torch(warp, (a_BNL, b_BNL), gradients)
  if _installed("fla"):

    def hgrn(log_a, b):
      from fla.ops.hgrn import fused_recurrent_hgrn

      return fused_recurrent_hgrn(b, log_a)[0]

    found["fla HGRN"] = _torch(hgrn, (np.log(a_BLN), b_BLN), gradients)
  if _installed("mamba_ssm"):
    # h_t = exp(delta A) h + delta B u with one state, A = -1, B = C = 1: the same recurrence.
    ones, delta = np.ones((a_BLN.shape[0], 1, length), np.float32), -np.log(a_BNL)

    def selective(delta, u):
      from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

      one = torch.as_tensor(ones, device=u.device)
      minus = -torch.ones(u.shape[1], 1, device=u.device)
      return selective_scan_fn(u, delta, minus, one, one).swapaxes(1, 2)

    found["mamba, one state"] = _torch(selective, (delta, b_BNL / delta), gradients)
  return found


def gated(params: Any, u_BLH: jax.Array, wrap: Callable[..., Any]) -> dict[str, Call]:
  """`wrap` of RecurrentGemma's RG-LRU, with the parameters of `models.recurrent.RGLRU`."""
  if not _installed("recurrentgemma"):
    return {}
  from recurrentgemma.jax.layers import RGLRU

  blocks, size, _ = params["input_kernel"].shape
  layer = RGLRU(width=u_BLH.shape[-1], num_heads=blocks)
  theirs = {
    "a_param": -params["Lambda"],
    **{
      name: {"w": params[f"{gate}_kernel"], "b": params[f"{gate}_bias"].reshape(blocks, size)}
      for name, gate in (("a_gate", "recurrence"), ("input_gate", "input"))
    },
  }
  # Position 0 would be a reset, whose input has another scale.
  positions = 1 + jnp.broadcast_to(jnp.arange(u_BLH.shape[1]), u_BLH.shape[:2])

  def apply(params, u_BLH):
    return layer.apply({"params": params}, u_BLH, positions, return_cache=False)[0]

  return {"recurrentgemma": (wrap(apply), (theirs, u_BLH))}


# S5


def authors_s5(u, lam, B, C, D, log_step):
  """Every operand complex, every element of the scan materialised, vmapped over the batch.

  Args: as of `bench.s5_layer`.
  """
  lam, B, C = (lax.complex(x[0], x[1]) for x in (lam, B, C))
  a = jnp.exp(lam * jnp.exp(log_step))
  B = ((a - 1) / lam)[:, None] * B

  def one(u_LH):
    decays = a * jnp.ones((u_LH.shape[0], a.shape[0]))
    drive = jax.vmap(lambda u_H: B @ u_H)(u_LH)
    _, x_LP = lax.associative_scan(_combine, (decays, drive))
    return jax.vmap(lambda x_P: 2 * (C @ x_P).real)(x_LP) + jax.vmap(lambda u_H: D * u_H)(u_LH)

  return jax.vmap(one)(u)


# Convolutions


def fft_conv(u_BLH, k_HT, pre=None, post=None):
  """Causal, one transform of each operand, by `jnp.fft`."""
  length = u_BLH.shape[1]
  v_BLH = u_BLH.astype(jnp.float32) if pre is None else u_BLH.astype(jnp.float32) * pre
  spectrum = jnp.fft.rfft(k_HT.T, 2 * length, axis=0)
  signal = jnp.fft.rfft(v_BLH, 2 * length, axis=1)
  y_BLH = jnp.fft.irfft(signal * spectrum, axis=1)[:, :length]
  return (y_BLH if post is None else y_BLH * post).astype(u_BLH.dtype)


def convs(
  u_BLH: np.ndarray, k_HT: np.ndarray, gates: tuple[np.ndarray, ...] = (), gradients: bool = False
) -> dict[str, Call]:
  """In the layout (B, H, L): scipy's FFT on CPUs, PyTorch's, and FlashFFTConv on CUDA."""
  length, device = u_BLH.shape[1], _device()
  u_BHL, *gates_BHL = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (u_BLH, *gates))

  def by(fft, u_BHL, k_HT, pre=1, post=1):
    product = fft.rfft(u_BHL * pre, 2 * length) * fft.rfft(k_HT, 2 * length)
    return (fft.irfft(product, 2 * length)[..., :length] * post).swapaxes(1, 2)

  given = (u_BHL, k_HT, *gates_BHL)
  found: dict[str, Call] = {}
  if device == "cpu" and not gradients:
    found["scipy.fft"] = timing.Host(functools.partial(by, scipy.fft)), given
  if device is not None and _installed("torch"):
    import torch

    found["torch.fft"] = _torch(functools.partial(by, torch.fft), given, gradients)
  if device == "cuda" and _installed("flashfftconv"):
    import torch
    from flashfftconv import FlashFFTConv

    module = FlashFFTConv(2 * length, dtype=torch.bfloat16).to(device)

    def flash(u, k, *gates):
      return module(u.bfloat16(), k, *(g.bfloat16() for g in gates)).swapaxes(1, 2)

    found["flash-fft-conv"] = _torch(flash, given, gradients)
  return found


# Libraries


def usable(found: dict[str, Call]) -> dict[str, Call]:
  """Those that run here; of the others it is said why not."""
  kept = {}
  for name, (function, operands) in found.items():
    try:
      if isinstance(function, timing.Host):
        function.function(*operands)
      else:
        jax.eval_shape(function, *operands)  # to compile it is part of the race
      kept[name] = function, operands
    except Exception as error:  # a library that was built for something else raises anything
      rich.print(f"{name} is left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
  return kept


def array(x: Any) -> np.ndarray:
  """Of any library, on the host, float32 real parts."""
  if hasattr(x, "detach"):
    x = x.detach().float().cpu().numpy()
  return np.asarray(np.asarray(x).real, np.float32)


def _installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def _device() -> str | None:
  """PyTorch's name of what JAX runs on; None where it cannot run there."""
  backend = jax.default_backend()
  if backend != "gpu" or not _installed("torch"):
    return "cpu" if backend == "cpu" else None
  import torch

  return "cuda" if torch.cuda.is_available() else None


def _torch(
  function: Callable[..., Any], arrays: tuple[np.ndarray, ...], gradients: bool
) -> tuple[timing.Host, tuple[Any, ...]]:
  """A function of tensors, or the sum of its squares with the gradients by all operands."""
  import torch

  device = _device()
  given = tuple(torch.tensor(x, device=device, requires_grad=gradients) for x in arrays)

  def call(*tensors):
    y = function(*tensors)
    if gradients:
      loss = y.float().square().sum()
      y = loss.detach(), *torch.autograd.grad(loss, tensors)
    if device == "cuda":
      torch.cuda.synchronize()
    return y

  return timing.Host(call), given
