"""State space layers with a diagonal transition: S5 and its baseline S4D.

S5: Smith, Warrington and Linderman, arXiv:2208.04933. S4D: Gu, Goel, Gupta and Ré,
arXiv:2206.11893.

Complex numbers are pairs (re, im) of float32 arrays throughout. Both layers are mixers: they are
called `mixer(u_BLH, *, dt=None, step_rescale=1.0)` and return `y_BLH` in the dtype of `u`. With one
direction they stream, see `models.mixers`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models import mixers
from models.kernels import linear_scan, long_conv, partition, s5_apply

Pair = tuple[jax.Array, jax.Array]

EXACT = lax.Precision.HIGHEST


# HiPPO


def hippo_legs(size: int) -> np.ndarray:
  """The HiPPO-LegS transition (size, size), float64 (arXiv:2008.07669).

  A_nk is -sqrt(2n+1) sqrt(2k+1) for n > k, -(n+1) for n = k and 0 for n < k.
  """
  root = np.sqrt(2 * np.arange(size) + 1.0)
  return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(size) + 1.0)


@functools.cache
def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues (size,) and unitary eigenvectors (size, size) of HiPPO-N, complex128.

  HiPPO-N is the normal part of HiPPO-LegS, S = A + p p^T with p_n = sqrt(n + 1/2).
  S + 1/2 is skew-symmetric: its product with -i is Hermitian, and every real part is -1/2.
  Imaginary parts ascend: for even sizes the first half is negative, the second its conjugate.
  """
  p = np.sqrt(np.arange(size) + 0.5)
  normal = hippo_legs(size) + np.outer(p, p)
  imaginary, vectors = np.linalg.eigh(-1j * (normal + 0.5 * np.eye(size)))
  eigenvalues = -0.5 + 1j * imaginary
  for array in (eigenvalues, vectors):
    array.setflags(write=False)  # shared through the cache
  return eigenvalues, vectors


# Discretisation


def expm1_ratio(x: jax.Array, y: jax.Array) -> Pair:
  """(exp(z) - 1) / z at z = x + iy, accurate in float32 for every z, with finite gradients at 0.

  The plain formula loses all digits for small |z|; below 0.1 this is a Taylor series.
  """
  square = x * x + y * y
  small = square < 0.01
  # In the branch not taken arguments are replaced, which keeps overflow and 0/0 out of gradients.
  near_x, near_y = jnp.where(small, x, 0.0), jnp.where(small, y, 0.0)
  re, im = jnp.ones_like(square), jnp.zeros_like(square)
  for n in (7, 6, 5, 4, 3, 2):
    re, im = 1 + (near_x * re - near_y * im) / n, (near_x * im + near_y * re) / n
  # exp(z) - 1 without the subtraction.
  num_re = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2
  num_im = jnp.exp(x) * jnp.sin(y)
  square = jnp.where(small, 1.0, square)
  return (
    jnp.where(small, re, (num_re * x + num_im * y) / square),
    jnp.where(small, im, (num_im * x - num_re * y) / square),
  )


def zoh(lam: Pair, step: jax.Array) -> tuple[Pair, Pair]:
  """Zero-order hold: exp(lam step) and (exp(lam step) - 1) / lam.

  Args:
    lam: eigenvalues of the continuous system, 1/time.
    step: real step sizes, of a shape that broadcasts with `lam`.

  Returns: the discrete decay, and the scale by which B is to be multiplied; pairs.
  """
  x, y = lam[0] * step, lam[1] * step
  decay = jnp.exp(x) * jnp.cos(y), jnp.exp(x) * jnp.sin(y)
  ratio = expm1_ratio(x, y)
  return decay, (ratio[0] * step, ratio[1] * step)


def bilinear(lam: Pair, step: jax.Array) -> tuple[Pair, Pair]:
  """Bilinear transform: (1 + z) / (1 - z) and step / (1 - z) with z = lam step / 2; as `zoh`."""
  x, y = lam[0] * step / 2, lam[1] * step / 2
  square = (1 - x) ** 2 + y**2
  decay = (1 - x**2 - y**2) / square, 2 * y / square
  return decay, (step * (1 - x) / square, step * y / square)


DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}
SPECTRA = ("hippo", "gaussian")
C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")
S4D_SPECTRA = ("legs", "lin", "inv")


def _check(field: str, value: Any, accepted: Sequence[str]) -> None:
  if value not in accepted:
    raise ValueError(f"{field}={value!r}; accepted: {', '.join(accepted)}")


def _log_uniform(low: float, high: float) -> nn.initializers.Initializer:
  """Uniform between log low and log high."""

  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))

  return init


def _pair(x: jax.Array) -> Pair:
  return x[..., 0], x[..., 1]


# S5


def transformed_b(vectors: np.ndarray, blocks: int) -> nn.initializers.Initializer:
  """B: LeCun-normal B0 (P, H), real, standard deviation 1/sqrt(P), to V^* B0 (Ph, H, 2).

  `vectors` (R, Rh) are the kept eigenvectors of one block; V has `blocks` copies on its diagonal.
  """

  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    size, features = vectors.shape[0], shape[1]
    b_PH = nn.initializers.lecun_normal()(key, (blocks * size, features), dtype)
    b_JRH = b_PH.reshape(blocks, size, features)
    v_RS2 = jnp.stack([vectors.real, -vectors.imag], axis=-1).astype(dtype)
    return jnp.einsum("rsz,jrh->jshz", v_RS2, b_JRH, precision=EXACT).reshape(shape)

  return init


def transformed_c(vectors: np.ndarray, blocks: int, name: str) -> nn.initializers.Initializer:
  """C: a complex C0 (H, P) to C0 V (H, Ph, 2); `vectors` as in `transformed_b`.

  JAX takes the fan-in from axis -2 times the leading axes, so that each part of C0 has the standard
  deviation 1/sqrt(P H) under "lecun_normal"; "trunc_standard_normal" draws row by row: 1/sqrt(P).
  """

  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    size, features = vectors.shape[0], shape[0]
    batch_axis = () if name == "lecun_normal" else (0,)
    draw = nn.initializers.lecun_normal(batch_axis=batch_axis)
    c_HP2 = draw(key, (features, blocks * size, 2), dtype)
    re, im = _pair(c_HP2.reshape(features, blocks, size, 2))
    v_re, v_im = jnp.asarray(vectors.real, dtype), jnp.asarray(vectors.imag, dtype)
    product = functools.partial(jnp.einsum, "hjr,rs->hjs", precision=EXACT)
    parts = product(re, v_re) - product(im, v_im), product(re, v_im) + product(im, v_re)
    return jnp.stack(parts, axis=-1).reshape(shape)

  return init


class S5(nn.Module):
  """Multi-input, multi-output diagonal state space layer (arXiv:2208.04933, section 3).

  x'(t) = A x(t) + B u(t), y(t) = Re(C x(t)) + D u(t), discretised at every application and scanned.
  Maps `u_BLH` to `y_BLH` of the same dtype; states, decays and step sizes are float32.

  Attributes:
    state: P, the full size of the paper's tables; P/2 states are stored under `conj_sym`.
    blocks: J equal HiPPO-N blocks of size P/J on the initial diagonal.
    spectrum: "hippo"; "gaussian" draws the stored eigenvalues as -1/2 + i N(0, 1) and leaves the
      initial B and C as they are under "hippo", so that only the spectrum differs.
    c_init: "lecun_normal", "trunc_standard_normal" (not unit variance, see `transformed_c`) or
      "complex_normal" (standard deviation sqrt(1/2) a part, not multiplied by V).
    discretization: "zoh" or "bilinear".
    dt_min, dt_max: range of the initial step sizes, log-uniform, one a stored state.
    clip_eigs: uses min(Re Lambda, -1e-4), without gradient where that clips.
    bidirectional: a second scan from the end, read out by a C of its own.
    conj_sym: one of each conjugate pair is stored and the output doubled.
    implementation: of `kernels.s5_apply`.

  Parameters, float32: Lambda_re, Lambda_im (Ph,), B (Ph, H, 2), C (H, Ph, 2) or, bidirectional, C1
  and C2 (under "complex_normal" one C (H, 2 Ph, 2)), D (H,), log_step (Ph, 1).

  Raises: ValueError for blocks that do not divide P, for odd blocks and for unknown options.
  """

  state: int
  blocks: int = 1
  spectrum: str = "hippo"
  c_init: str = "lecun_normal"
  discretization: str = "zoh"
  dt_min: float = 1e-3
  dt_max: float = 1e-1
  clip_eigs: bool = False
  bidirectional: bool = False
  conj_sym: bool = True
  implementation: str | None = None

  @property
  def stored(self) -> int:
    """Ph, the number of states that are computed with."""
    if self.blocks < 1 or self.state % self.blocks or self.state < 1:
      raise ValueError(
        f"blocks={self.blocks}; accepted: a divisor of state={self.state}, both positive"
      )
    if not self.conj_sym:
      return self.state
    if (self.state // self.blocks) % 2:
      raise ValueError(
        f"state={self.state}, blocks={self.blocks}: blocks of {self.state // self.blocks};"
        " accepted: blocks of even size, which halve into conjugates"
      )
    return self.state // 2

  def __call__(
    self,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> jax.Array:
    """The layer's output for whole sequences.

    Args:
      u_BLH: inputs, floating point.
      dt: (B, L) gaps t_k - t_{k-1} between samples, with dt_0 = 1; None is all ones. In units of
        the learnt step sizes.
      step_rescale: multiplies all step sizes: 2 for a sequence sampled at half the training rate.
    """
    return self._map(None, u_BLH, dt, step_rescale)[1]

  def extend(
    self,
    state: Pair,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[Pair, jax.Array]:
    """State and outputs after a further chunk, see `models.mixers`; ValueError if bidirectional."""
    mixers.refuse_bidirectional(self)
    return self._map(state, u_BLH, dt, step_rescale)

  step = mixers.step

  def initial_state(self, batch: int, features: int | None = None) -> Pair:
    """Zeros: (re, im), each (batch, Ph) float32, whatever the `features`."""
    del features
    return jnp.zeros((batch, self.stored)), jnp.zeros((batch, self.stored))

  def _map(
    self,
    state: Pair | None,
    u_BLH: jax.Array,
    dt: jax.Array | None,
    step_rescale: float | jax.Array,
  ) -> tuple[Pair, jax.Array]:
    lam_P, b_PH, c_HP, d_H, step_P = self._parameters(u_BLH.shape[-1])
    discretize = DISCRETIZATIONS[self.discretization]
    step_P = step_P * step_rescale
    a_reverse = scale_reverse = None
    if dt is None:
      a, scale = discretize(lam_P, step_P)
    else:
      a, scale = discretize(lam_P, dt[..., None] * step_P)
      if self.bidirectional:
        # Seen from the end, the gap before a sample is the one after it.
        gaps_BL = jnp.concatenate([dt[:, 1:], jnp.ones_like(dt[:, :1])], axis=1)
        a_reverse, scale_reverse = discretize(lam_P, gaps_BL[..., None] * step_P)
    y_BLH, state = s5_apply(
      u_BLH,
      a,
      b_PH,
      c_HP,
      d_H,
      state,
      scale=scale,
      bidirectional=self.bidirectional,
      a_reverse=a_reverse,
      scale_reverse=scale_reverse,
      spec=partition.named("batch", "length", "state"),
      implementation=self.implementation,
    )
    return state, y_BLH

  @nn.compact
  def _parameters(self, features: int) -> tuple[Pair, Pair, Pair, jax.Array, jax.Array]:
    """Lambda (Ph,), B (Ph, H), the read-out C with its factor of 2, D (H,) and step sizes (Ph,)."""
    _check("spectrum", self.spectrum, SPECTRA)
    _check("c_init", self.c_init, C_INITS)
    _check("discretization", self.discretization, tuple(DISCRETIZATIONS))
    stored = self.stored
    lam_R, vectors = hippo_normal(self.state // self.blocks)
    kept = stored // self.blocks
    lam_P, vectors = np.tile(lam_R[:kept], self.blocks), vectors[:, :kept]

    parameter = functools.partial(mixers.parameter, self)

    def constant(value: np.ndarray):
      return lambda key, shape: jnp.asarray(value, jnp.float32)

    if self.spectrum == "gaussian":
      imaginary = nn.initializers.normal(1.0)
    else:
      imaginary = constant(lam_P.imag)
    lam_re = parameter("Lambda_re", constant(lam_P.real), (stored,), ("state",))
    lam_im = parameter("Lambda_im", imaginary, (stored,), ("state",))
    if self.clip_eigs:
      lam_re = jnp.minimum(lam_re, -1e-4)

    b = transformed_b(vectors, self.blocks)
    b_PH2 = parameter("B", b, (stored, features, 2), ("state", "embed", None))

    c_axes = ("embed", "state", None)
    if self.c_init == "complex_normal":
      width = 2 * stored if self.bidirectional else stored
      c = nn.initializers.normal(math.sqrt(0.5))
      c_HP2 = parameter("C", c, (features, width, 2), c_axes)
    else:
      c = transformed_c(vectors, self.blocks, self.c_init)
      names = ("C1", "C2") if self.bidirectional else ("C",)
      parts = [parameter(name, c, (features, stored, 2), c_axes) for name in names]
      c_HP2 = jnp.concatenate(parts, axis=1)
    if self.conj_sym:
      c_HP2 = 2 * c_HP2

    d_H = parameter("D", nn.initializers.normal(1.0), (features,), ("embed",))
    timescale = _log_uniform(self.dt_min, self.dt_max)
    log_step = parameter("log_step", timescale, (stored, 1), ("state", None))
    return (lam_re, lam_im), _pair(b_PH2), _pair(c_HP2), d_H, jnp.exp(log_step[:, 0])


# S4D


def s4d_spectrum(name: str, size: int) -> np.ndarray:
  """The N/2 initial eigenvalues of S4D, complex128 (arXiv:2206.11893, section 4).

  "lin": -1/2 + i pi n; "inv": -1/2 + (i/pi) N (N/(2n+1) - 1); "legs": HiPPO-N. `size` is N.
  """
  _check("spectrum", name, S4D_SPECTRA)
  if size < 2 or size % 2:
    raise ValueError(
      f"state={size}; accepted: a positive even number, which halves into conjugates"
    )
  n = np.arange(size // 2)
  if name == "lin":
    return -0.5 + 1j * np.pi * n
  if name == "inv":
    return -0.5 + 1j / np.pi * size * (size / (2 * n + 1) - 1)
  return hippo_normal(size)[0][: size // 2]


def vandermonde_kernel(w: Pair, z: Pair, length: int) -> jax.Array:
  """K_hl = 2 Re sum_n w_hn exp(z_hn l) for l = 0 .. length-1, (H, length) float32.

  Powers l = q R + r with R near sqrt(length) turn the sum into a matrix product of two small
  Vandermonde matrices, so that no (H, N, length) array exists, forward or backward.
  """
  fine = math.isqrt(length - 1) + 1
  coarse = -(-length // fine)

  def powers(count: int, stride: int) -> Pair:
    at = stride * jnp.arange(count, dtype=jnp.float32)
    size = jnp.exp(z[0][..., None] * at)
    return size * jnp.cos(z[1][..., None] * at), size * jnp.sin(z[1][..., None] * at)

  u_re, u_im = powers(coarse, fine)
  v_re, v_im = powers(fine, 1)
  w_re, w_im = w[0][..., None], w[1][..., None]
  v_re, v_im = w_re * v_re - w_im * v_im, w_re * v_im + w_im * v_re
  product = functools.partial(jnp.einsum, "hnq,hnr->hqr", precision=EXACT)
  kernel = 2 * (product(u_re, v_re) - product(u_im, v_im))
  return kernel.reshape(kernel.shape[0], -1)[:, :length]


class S4D(nn.Module):
  """H independent single-input diagonal state spaces (arXiv:2206.11893), as a convolution.

  K_h[l] = 2 Re sum_n C_hn B_hn (exp(step_h A_hn) - 1) / A_hn exp(step_h A_hn l), y = K * u + D u.
  Maps `u_BLH` to `y_BLH` of the same dtype; kernel and FFT are float32. B is one and no parameter:
  only the product C B acts. The paper follows this with GELU and a position-wise GLU, which here is
  the block's activation.

  Attributes:
    state: N, of which N/2 are stored.
    spectrum: "legs", "lin" or "inv", see `s4d_spectrum`.
    dt_min, dt_max: range of the initial step sizes, log-uniform, one a feature.
    bidirectional: a second kernel, with a C of its own, for the inputs after a position (lags -1,
      -2, ...), as in the S4 code.

  Parameters, float32: log_A_re (log of minus the real part) and A_im (H, N/2), C (H, N/2, 2) or C1
  and C2, D (H,), log_step (H, 1).

  Raises: ValueError for an odd `state`, an unknown `spectrum` and irregular sampling.
  """

  state: int = 64
  spectrum: str = "legs"
  dt_min: float = 1e-3
  dt_max: float = 1e-1
  bidirectional: bool = False

  def __call__(
    self,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> jax.Array:
    """As `S5.__call__`; `dt` is there to be refused: a convolution has one kernel for all steps."""
    if dt is not None:
      raise ValueError("dt: given; S4D, a convolution, accepts only None (regular sampling)")
    length = u_BLH.shape[1]
    lam_HN, cs, d_H, step_H1 = self._parameters(u_BLH.shape[-1])
    step_H1 = step_H1 * step_rescale
    z_HN = lam_HN[0] * step_H1, lam_HN[1] * step_H1
    _, scale_HN = zoh(lam_HN, step_H1)
    kernels = [vandermonde_kernel(_multiply(c, scale_HN), z_HN, length) for c in cs]
    future = kernels[1] if self.bidirectional else None
    return long_conv(u_BLH, kernels[0], d_H, k_backward=future)

  def extend(
    self,
    state: Pair,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[Pair, jax.Array]:
    """As `S5.extend`, by the recurrence, which needs no equal gaps: `dt` is (B, L) or None.

    The states of a chunk are kept, (B, L, H, N/2): short chunks need less memory.
    """
    mixers.refuse_bidirectional(self)
    lam_HN, (c_HN,), d_H, step_H1 = self._parameters(u_BLH.shape[-1])
    gaps = step_H1 * step_rescale
    if dt is not None:
      gaps = dt[..., None, None] * gaps
    a, scale = zoh(lam_HN, gaps)
    u_BLH1 = u_BLH[..., None].astype(jnp.float32)
    drive = scale[0] * u_BLH1, scale[1] * u_BLH1
    flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), (a, drive, state))
    (re, im), state = jax.tree.map(
      lambda x: x.reshape(*x.shape[:-1], *lam_HN[0].shape), linear_scan(*flat)
    )
    y_BLH = 2 * (c_HN[0] * re - c_HN[1] * im).sum(-1) + d_H * u_BLH
    return state, y_BLH.astype(u_BLH.dtype)

  step = mixers.step

  def initial_state(self, batch: int, features: int) -> Pair:
    """Zeros: (re, im), each (batch, features, N/2) float32."""
    shape = (batch, features, self.state // 2)
    return jnp.zeros(shape), jnp.zeros(shape)

  @nn.compact
  def _parameters(self, features: int) -> tuple[Pair, list[Pair], jax.Array, jax.Array]:
    """A (H, N/2), one C (H, N/2) a direction, D (H,) and step sizes (H, 1)."""
    eigenvalues = s4d_spectrum(self.spectrum, self.state)
    shape, axes = (features, self.state // 2), ("embed", "state")

    parameter = functools.partial(mixers.parameter, self)

    def constant(value: np.ndarray):
      return lambda key, shape: jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape)

    log_re = parameter("log_A_re", constant(np.log(-eigenvalues.real)), shape, axes)
    im = parameter("A_im", constant(eigenvalues.imag), shape, axes)
    c = nn.initializers.normal(math.sqrt(0.5))
    names = ("C1", "C2") if self.bidirectional else ("C",)
    cs = [_pair(parameter(name, c, (*shape, 2), (*axes, None))) for name in names]
    d_H = parameter("D", nn.initializers.normal(1.0), (features,), ("embed",))
    timescale = _log_uniform(self.dt_min, self.dt_max)
    log_step = parameter("log_step", timescale, (features, 1), ("embed", None))
    return (-jnp.exp(log_re), im), cs, d_H, jnp.exp(log_step)


def _multiply(x: Pair, y: Pair) -> Pair:
  return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
