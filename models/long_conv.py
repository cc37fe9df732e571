"""Long convolutions as sequence mixers: SGConv and the dense kernel it is compared with.

Li, Cai, Zhang, Chen and Dey, What Makes Convolutional Models Great on Long Sequence Modeling?,
arXiv:2210.09298. SGConv builds a kernel as long as the sequence from two principles: a number of
parameters that grows with the logarithm of the length, and a decay with distance. `DenseConv` has a
free tap for every lag and the decay as an option, which tells the two apart.

Both layers are mixers, called `mixer(u_BLH, *, dt=None, step_rescale=1.0)`, and return `y_BLH` in
the dtype of `u`; kernels and FFTs are float32. Of their variables `params` are trained; `frozen`
holds what is drawn or computed at init and never again: the norms Z of the initial kernels, and
fixed random decays. It belongs in the checkpoint.

With one direction they stream, see `models.mixers`. The state is the inputs that later outputs see,
one fewer than the kernel has taps, and each chunk is convolved together with all of them: chunks
should not be much shorter than the kernel, unless they are single samples, which need no FFT.

At init a kernel is built over the whole `max_length`, and Z is its norm over all positions. For a
sequence of length L it is cut to its first L taps, or is zero beyond its end; Z stays what it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from models import mixers
from models.kernels import long_conv, partition

DECAYS = ("scale", "position", "learnable")
KERNEL_INITS = ("randn", "cos")
INTERPOLATIONS = ("linear", "nearest")
TOGETHER = 512  # taps of the short sub-kernels that are one product


def _check(field: str, value: str, accepted: Sequence[str]) -> None:
  if value not in accepted:
    raise ValueError(f"{field}={value!r}; accepted: {', '.join(accepted)}")


# Kernels


def number_of_scales(kernel_dim: int, max_length: int, init_scale: int = 0) -> int:
  """S = 1 + ceil(log2(max_length / d)) - c, the number of sub-kernels.

  They then reach over d 2^c 2^(S-1) >= max_length positions.

  Args:
    kernel_dim: d, parameters a sub-kernel.
    max_length: the length to reach.
    init_scale: c, the binary logarithm of the first sub-kernel's upsampling factor.

  Raises: ValueError where one sub-kernel is more than enough.
  """
  if kernel_dim < 1 or init_scale < 0 or kernel_dim << init_scale > max_length:
    raise ValueError(
      f"kernel_dim={kernel_dim}, init_scale={init_scale}, max_length={max_length}; accepted:"
      " kernel_dim >= 1, init_scale >= 0, kernel_dim * 2**init_scale <= max_length"
    )
  # The number of doublings, in integers: the bits of ceil(max_length / (d 2^c)) - 1.
  return 1 + (-(-max_length // (kernel_dim << init_scale)) - 1).bit_length()


def multiscale_kernel(
  w_SCHd: jax.Array,
  decay_H: jax.Array | None = None,
  *,
  init_scale: int = 0,
  length: int | None = None,
  interpolation: str = "linear",
) -> jax.Array:
  """The unnormalised kernel: concatenated over i, m^-i times w_i upsampled (section 3.1).

  The upsampling factors are 2^c, 2^c, 2^(c+1), 2^(c+2), ... with c = `init_scale`: the first *two*
  sub-kernels are equally long, and each further one is twice as long as the one before.

  Each sub-kernel is a product with the weights of the interpolation, which writes its taps where
  they belong; the short ones are one product.

  Args:
    w_SCHd: S sub-kernels of d values, for C kernels of H features.
    decay_H: m, the ratio of the amplitudes of successive scales; one by default. Since positions
      double from scale to scale, m = 2^t is an envelope of about 1 / position^t.
    init_scale: c.
    length: the number of taps wanted; all d 2^c 2^(S-1) by default, and never more.
    interpolation: "linear" between half-pixel centres, constant outside the outermost ones, as
      PyTorch's `interpolate(mode="linear", align_corners=False)`; or "nearest".

  Returns: k_CHT.

  Raises: ValueError for an unknown interpolation.
  """
  _check("interpolation", interpolation, INTERPOLATIONS)
  scales, *lead, d = w_SCHd.shape
  base, dtype = d << init_scale, jnp.result_type(jnp.float32, w_SCHd)
  starts = [base << i - 1 if i else 0 for i in range(scales)]
  sizes = [base << max(i - 1, 0) for i in range(scales)]
  length = sum(sizes) if length is None else min(length, sum(sizes))
  used = sum(start < length for start in starts)
  together = max(1, sum(base << i <= TOGETHER for i in range(scales)))
  if decay_H is not None:
    powers_SH = decay_H ** -jnp.arange(scales, dtype=decay_H.dtype)[:, None]
    w_SCHd = w_SCHd * powers_SH[:, None, :, None]

  k_CHT = jnp.zeros((*lead, length), dtype)
  for some in (range(min(together, used)), *(range(i, i + 1) for i in range(together, used))):
    values_CHd = jnp.moveaxis(w_SCHd[some.start : some.stop], 0, -2).reshape(*lead, -1)
    at = [n * d + _positions(d, sizes[i], interpolation, dtype) for n, i in enumerate(some)]
    at_T = jnp.concatenate(at)[: length - starts[some.start]]
    weights_dT = jnp.maximum(0, 1 - jnp.abs(at_T - jnp.arange(values_CHd.shape[-1])[:, None]))
    taps_CHT = jnp.einsum("chd,dt->cht", values_CHd, weights_dT, precision="highest")
    k_CHT = lax.dynamic_update_slice(k_CHT, taps_CHT, (0, 0, starts[some.start]))
  return k_CHT


def _positions(d: int, size: int, interpolation: str, dtype: Any) -> jax.Array:
  """Where, among the d values of a sub-kernel, each of its `size` taps lies."""
  at, step = jnp.arange(size, dtype=dtype), size // d
  if interpolation == "nearest":
    return jnp.floor(at / step)
  return jnp.clip((at + 0.5) / step - 0.5, 0, d - 1)


def positional_decay(length: int, t_H: jax.Array) -> jax.Array:
  """The envelope (j + 1)^-t for j = 0 .. length-1, (H, length)."""
  return jnp.exp(-t_H[:, None] * jnp.log1p(jnp.arange(length, dtype=t_H.dtype)))


def staircase_conv(u_BLH: jax.Array, heights_SH: jax.Array, *, init_scale: int = 0) -> jax.Array:
  """Causal convolution with a dyadic staircase, the kernel of d = 1, in O(L S) and without FFT.

  Each step of the staircase weighs a sum over a box of inputs, the difference of two prefix sums.
  The boxes being dyadic, the sum over 2n inputs is instead that over n, plus itself n steps
  earlier: blocks in a tree, of which no large prefix is subtracted, so that float32 loses no digits
  however long the sequence is.

  Args:
    u_BLH: inputs, floating point.
    heights_SH: the kernel's values m^-i w_i / Z, on lags [0, b), [b, 2b), [2b, 4b), ... with
      b = 2^c.
    init_scale: c.

  Returns: y_BLH in the dtype of `u`; sums are float32, or float64 where an operand is.
  """
  dtype = jnp.result_type(jnp.float32, u_BLH, heights_SH)

  def delayed(x_BLH: jax.Array, steps: int) -> jax.Array:
    return jnp.pad(x_BLH, ((0, 0), (steps, 0), (0, 0)))[:, : x_BLH.shape[1]]

  box_BLH = u_BLH.astype(dtype)
  for i in range(init_scale):
    box_BLH = box_BLH + delayed(box_BLH, 1 << i)
  y_BLH = heights_SH[0] * box_BLH
  for i, height_H in enumerate(heights_SH[1:]):
    width = 1 << init_scale + i  # of the box, and of the staircase so far
    if width >= u_BLH.shape[1]:
      break
    y_BLH = y_BLH + height_H * delayed(box_BLH, width)
    box_BLH = box_BLH + delayed(box_BLH, width)
  return y_BLH.astype(u_BLH.dtype)


# Layers


def permuted_cosines(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
  """Initial sub-kernels for Path-X, (S, C, H, d): row h is cos(2 pi h tau), tau from 0 to 1.

  The rows are permuted, anew for each scale; both directions have the same values. With d < H high
  rows alias, as they do in the released code.
  """
  scales, kernels, features, size = shape
  rows_Hd = jnp.cos(2 * jnp.pi * jnp.outer(jnp.arange(features), jnp.linspace(0, 1, size)))
  permute = jax.vmap(lambda key: jax.random.permutation(key, rows_Hd))
  w_SHd = permute(jax.random.split(key, scales)).astype(dtype)
  return jnp.broadcast_to(w_SHd[:, None], (scales, kernels, features, size))


class _Convolution(nn.Module):
  """The convolution of `u_BLH` with the kernel and the skip D that a layer's `_kernel` makes."""

  def __call__(
    self: Any,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> jax.Array:
    """The layer's output.

    Args:
      u_BLH: inputs, floating point, of any length.
      dt: only None: a convolution has one kernel for all steps.
      step_rescale: only 1: the kernel is one of positions, not of time.
    """
    mixers.refuse_sampling(self, dt, step_rescale)
    kernel, d_H = self._kernel(u_BLH.shape[-1])
    k_CHT = kernel(max(1, u_BLH.shape[1]))
    return long_conv(
      u_BLH,
      k_CHT[0],
      d_H,
      k_backward=k_CHT[1] if self.bidirectional else None,
      spec=partition.named("batch", "length", "embed"),
      implementation=self.implementation,
    )

  def extend(
    self: Any,
    state_BSH: jax.Array,
    u_BLH: jax.Array,
    *,
    dt: jax.Array | None = None,
    step_rescale: float | jax.Array = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """State and outputs after a further chunk, see `models.mixers`; ValueError if bidirectional."""
    mixers.refuse_sampling(self, dt, step_rescale)
    mixers.refuse_bidirectional(self)
    kernel, d_H = self._kernel(u_BLH.shape[-1])
    k_HT = kernel(None)[0]
    past, length = state_BSH.shape[1], u_BLH.shape[1]
    window_BTH = jnp.concatenate([state_BSH, u_BLH.astype(state_BSH.dtype)], axis=1)
    if length == 1:  # one position's products, in place of an FFT of all
      y_BLH = (window_BTH * k_HT[:, ::-1].T).sum(1, keepdims=True) + d_H * u_BLH
    else:
      y_BTH = long_conv(window_BTH, k_HT, d_H, implementation=self.implementation)
      y_BLH = y_BTH[:, past:]
    return window_BTH[:, length:], y_BLH.astype(u_BLH.dtype)

  step = mixers.step

  def initial_state(self: Any, batch: int, features: int) -> jax.Array:
    """Zeros (batch, taps - 1, features) float32: the inputs that later outputs see."""
    return jnp.zeros((batch, self.reach - 1, features))


class SGConv(_Convolution):
  """Convolution with a kernel of sub-kernels at dyadic scales (arXiv:2210.09298, section 3.1).

  k = Z^-1 concat_i(m^-i Up(w_i)), y = k * u + D u, for each feature. The sum of S d parameters a
  feature, d (1 + log2(max_length / d)), serves a kernel of max_length taps.

  Attributes:
    kernel_dim: d, parameters a sub-kernel.
    max_length: L_max, the longest sequence that the kernel has to reach over.
    init_scale: c, see `number_of_scales`; 1 for Path-X, otherwise 0.
    decay: "scale" weights scale i by m_h^-i, m equally spaced from decay_min to decay_max over the
      features (2 for an envelope of about 1/position); "position" weights tap j by (j+1)^-t_h, with
      t_h drawn uniformly between the two and fixed; "learnable" starts like that and is trained.
    decay_min, decay_max: bounds of m or t.
    kernel_init: of the sub-kernels, "randn" for N(0, 1) or "cos", see `permuted_cosines`.
    interpolation: see `multiscale_kernel`.
    bidirectional: a second kernel for the inputs after a position (lags -1, -2, ...).
    implementation: of `kernels.long_conv`.

  Parameters, float32: sub_kernels (S, C, H, d), C = 2 if bidirectional, else 1; D (H,); exponent
  (H,), if learnable. Frozen: norm (C, H, 1); exponent (H,), if "position".

  Raises: ValueError for sizes that do not fit, unknown options, irregular sampling and rescaled
  steps.
  """

  kernel_dim: int
  max_length: int
  init_scale: int = 0
  decay: str = "scale"
  decay_min: float = 2.0
  decay_max: float = 2.0
  kernel_init: str = "randn"
  interpolation: str = "linear"
  bidirectional: bool = False
  implementation: str | None = None

  @property
  def reach(self) -> int:
    """The number of taps."""
    scales = number_of_scales(self.kernel_dim, self.max_length, self.init_scale)
    return self.kernel_dim << self.init_scale + scales - 1

  @nn.compact
  def _kernel(self, features: int) -> tuple[Callable[[int | None], jax.Array], jax.Array]:
    _check("decay", self.decay, DECAYS)
    _check("kernel_init", self.kernel_init, KERNEL_INITS)
    scales = number_of_scales(self.kernel_dim, self.max_length, self.init_scale)
    init = permuted_cosines if self.kernel_init == "cos" else nn.initializers.normal(1.0)
    shape = (scales, 2 if self.bidirectional else 1, features, self.kernel_dim)
    w_SCHd = mixers.parameter(self, "sub_kernels", init, shape, (None, None, "embed", None))
    if self.decay == "scale":
      m_H, t_H = jnp.linspace(self.decay_min, self.decay_max, features), None
    else:
      m_H, t_H = None, self._exponents(features)

    def kernel(length: int | None, norm_CH1: jax.Array | float) -> jax.Array:
      k_CHT = multiscale_kernel(
        w_SCHd / norm_CH1,
        m_H,
        init_scale=self.init_scale,
        length=length,
        interpolation=self.interpolation,
      )
      return k_CHT if t_H is None else k_CHT * positional_decay(k_CHT.shape[-1], t_H)

    return _normalised(self, kernel, features)

  def _exponents(self, features: int) -> jax.Array:
    """t (H,), uniform between the bounds."""

    def draw(key: jax.Array, shape: Sequence[int]) -> jax.Array:
      return jax.random.uniform(key, shape, jnp.float32, self.decay_min, self.decay_max)

    if self.decay == "learnable":
      return mixers.parameter(self, "exponent", draw, (features,), ("embed",))
    return _frozen(self, "exponent", lambda: draw(self.make_rng("params"), (features,)), ("embed",))


class DenseConv(_Convolution):
  """Convolution with a free tap for every lag, y = k * u + D u, for each feature.

  k_j = Z^-1 w_j (j+1)^-t with w_j ~ N(0, 1) at init: the same norm one, the same envelope and the
  same D as `SGConv` starts from, at max_length parameters a feature instead of its logarithm.

  Attributes:
    max_length: the number of taps.
    decay: t; None for no envelope (t = 0).
    bidirectional, implementation: as for `SGConv`.

  Parameters, float32: taps (C, H, max_length), C = 2 if bidirectional, else 1; D (H,). Frozen: norm
  (C, H, 1).
  """

  max_length: int
  decay: float | None = None
  bidirectional: bool = False
  implementation: str | None = None

  @property
  def reach(self) -> int:
    """The number of taps."""
    return self.max_length

  @nn.compact
  def _kernel(self, features: int) -> tuple[Callable[[int | None], jax.Array], jax.Array]:
    shape = (2 if self.bidirectional else 1, features, self.max_length)
    w_CHT = mixers.parameter(
      self, "taps", nn.initializers.normal(1.0), shape, (None, "embed", None)
    )

    def kernel(length: int | None, norm_CH1: jax.Array | float) -> jax.Array:
      k_CHT = w_CHT[..., :length] / norm_CH1
      if self.decay is None:
        return k_CHT
      return k_CHT * positional_decay(k_CHT.shape[-1], jnp.full(1, self.decay))

    return _normalised(self, kernel, features)


def _normalised(
  layer: Any, kernel: Callable[[int | None, jax.Array | float], jax.Array], features: int
) -> tuple[Callable[[int | None], jax.Array], jax.Array]:
  """What both layers end with: the kernel divided by its frozen norm, and D (H,).

  `kernel(length, norm)` gives the first taps k_CHT, or all for None, divided by a norm.
  """
  norm_CH1 = _frozen(
    layer,
    "norm",
    lambda: jnp.linalg.norm(kernel(None, 1.0), axis=-1, keepdims=True),
    (None, "embed", None),
  )
  d_H = mixers.parameter(layer, "D", nn.initializers.normal(1.0), (features,), ("embed",))
  return lambda length: kernel(length, norm_CH1), d_H


def _frozen(
  layer: nn.Module, name: str, init: Callable[[], jax.Array], axes: tuple[str | None, ...]
) -> Any:
  """A constant of the layer, `init()` once."""
  return layer.variable("frozen", name, nn.with_logical_partitioning(init, axes)).value
