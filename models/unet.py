"""The U-Net of diffusion models, in the form of ADM (Dhariwal and Nichol, arXiv:2105.05233).

Residual blocks told of the timestep by scale and shift, that halve and double the image too, and
attention where the image is small. For example, 93 M parameters for images of 256 x 256:

    model = UNet(128, (1, 1, 2, 2, 4, 4), outputs=6, attention=(16,))
    outputs = model.apply(variables, images, timesteps)
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import Attention, dense, sinusoids

INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as in the released code
ZEROS = nn.initializers.zeros


class Conv(nn.Module):
  """A convolution with stride 1 that keeps the size of its image.

  Attributes:
    features: channels out.
    axes: logical names of the channels in and out.
    kernel_init: of the kernel (size, size, in, out).
    size: of the kernel, odd.
    im2col: as one matrix product with the shifted copies of the image side by side: the same map.
      XLA's grouped convolutions, which seeds side by side become, have gradients on a CPU that
      take fifty times as long.
  """

  features: int
  axes: tuple[str | None, str | None]
  kernel_init: Any = INIT
  size: int = 3
  im2col: bool = False

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    (batch, height, width, channels), size = x_BHWC.shape, self.size
    kernel: Any = self.param(
      "kernel",
      nn.with_logical_partitioning(self.kernel_init, (None, None, *self.axes)),
      (size, size, channels, self.features),
    )
    bias_init = nn.with_logical_partitioning(ZEROS, self.axes[1:])
    bias: Any = self.param("bias", bias_init, (self.features,))
    kernel, bias = kernel.astype(x_BHWC.dtype), bias.astype(x_BHWC.dtype)
    if self.im2col:
      pad = size // 2
      padded = jnp.pad(x_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
      shifted = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
      columns = jnp.concatenate(shifted, axis=-1).reshape(batch * height * width, -1)
      y = columns @ kernel.reshape(-1, self.features)
      return y.reshape(batch, height, width, self.features) + bias
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x_BHWC, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return y + bias


def norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
  """Group normalisation; the statistics are float32."""
  return nn.GroupNorm(
    groups,
    epsilon=1e-5,
    use_fast_variance=False,
    dtype=dtype,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
    bias_init=nn.with_logical_partitioning(ZEROS, (None,)),
    name=name,
  )


def resize(x: jax.Array, change: str | None) -> jax.Array:
  """An image of half the size by means of 2 x 2 ("down"), of twice the size by copies ("up")."""
  batch, height, width, channels = x.shape
  if change == "down":
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
  if change == "up":
    return x.repeat(2, axis=1).repeat(2, axis=2)
  return x


def fold(x: jax.Array, patch: int) -> jax.Array:
  """(B, H, W, C) as (B, H / patch, W / patch, patch^2 C): a square of pixels is a position."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
  return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, patch**2 * channels)


def unfold(x: jax.Array, patch: int) -> jax.Array:
  """What `fold` was given."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, patch, patch, channels // patch**2).swapaxes(2, 3)
  return x.reshape(batch, height * patch, width * patch, -1)


class Block(nn.Module):
  """x + Conv(Drop(SiLU((1 + scale) Norm(Conv(resize(SiLU(Norm(x))))) + shift))).

  Scale and shift come from the embedded timestep; the last convolution begins at zero.
  """

  features: int
  groups: int
  dropout: float = 0.0
  change: str | None = None
  im2col: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, time_BE: jax.Array, train: bool = False) -> jax.Array:
    dtype = x.dtype
    conv = functools.partial(Conv, im2col=self.im2col)
    h = resize(nn.silu(norm(self.groups, dtype, "norm_in")(x)), self.change)
    h = conv(self.features, ("embed", "mlp"), name="conv_in")(h)
    told = dense(2 * self.features, (None, "mlp"), dtype=dtype, kernel_init=INIT, name="time")
    scale, shift = jnp.split(told(nn.silu(time_BE))[:, None, None], 2, axis=-1)
    h = nn.silu(norm(self.groups, dtype, "norm_out")(h) * (1 + scale) + shift)
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = conv(self.features, ("mlp", "embed"), ZEROS, name="conv_out")(h)
    x = resize(x, self.change)
    if x.shape[-1] != self.features:
      x = dense(self.features, (None, "embed"), dtype=dtype, kernel_init=INIT, name="skip")(x)
    return nn.with_logical_constraint(x + h, ("batch", None, None, None))


def _projection(features: int, axes: tuple[str | None, str | None], *, name: str, **fields: Any):
  """Attention's; what is added to the residual begins at zero."""
  return dense(features, axes, name=name, kernel_init=ZEROS if name == "out" else INIT, **fields)


class UNet(nn.Module):
  """Blocks down to a small image and up again, each of the way up seeing one of the way down.

  Attributes:
    features: width, before the multipliers.
    multipliers: of the width, one a resolution; each resolution is half the one before.
    outputs: channels out.
    blocks: residual blocks a resolution on the way down; one more on the way up.
    attention: heights of the images that have attention; the smallest of all has it always.
    head_dim: channels of an attention head.
    groups: of the group norms; divides every width.
    dropout: rate.
    im2col: see `Conv`.
    patch: squares of as many pixels a side enter, and leave, as the channels of one position.
    dtype: of the activations.
  """

  features: int
  multipliers: Sequence[int]
  outputs: int
  blocks: int = 1
  attention: Sequence[int] = ()
  head_dim: int = 64
  groups: int = 32
  dropout: float = 0.0
  im2col: bool = False
  patch: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, t_B: jax.Array, *, train: bool = False) -> jax.Array:
    """(B, height, width, outputs) float32; zeros before training.

    Args:
      images: (B, height, width, channels) float.
      t_B: (B,) timesteps, int or float, in the units of the schedule.
      train: draws dropout masks.

    Raises: ValueError for an image that cannot be halved often enough.
    """
    halvings = len(self.multipliers) - 1
    multiple = self.patch * 2**halvings
    if any(size % multiple for size in images.shape[1:3]):
      raise ValueError(
        f"images: {list(images.shape)}; accepted: height and width that are multiples of {multiple}"
      )
    make = functools.partial(dense, dtype=self.dtype, kernel_init=INIT)
    conv = functools.partial(Conv, im2col=self.im2col)
    told_BE = sinusoids(jnp.asarray(t_B, jnp.float32), self.features).astype(self.dtype)
    time_BE = make(4 * self.features, (None, "mlp"), name="time_in")(told_BE)
    time_BE = make(4 * self.features, ("mlp", None), name="time_out")(nn.silu(time_BE))

    def block(x: jax.Array, features: int, name: str, change: str | None = None) -> jax.Array:
      made = Block(features, self.groups, self.dropout, change, self.im2col, name=name)
      return made(x, time_BE, train)

    def attend(x: jax.Array, name: str, always: bool = False) -> jax.Array:
      batch, height, width, channels = x.shape
      if height not in self.attention and not always:
        return x
      heads = max(channels // self.head_dim, 1)
      u = norm(self.groups, x.dtype, f"{name}_norm")(x).reshape(batch, height * width, channels)
      return x + Attention(heads, dense=_projection, name=name)(u).reshape(x.shape)

    widths = [self.features * m for m in self.multipliers]
    x = conv(widths[0], (None, "embed"), name="in")(fold(images.astype(self.dtype), self.patch))
    seen = [x]
    for level, width in enumerate(widths):
      for i in range(self.blocks):
        x = block(x, width, f"down_{level}_{i}")
        seen.append(x := attend(x, f"down_{level}_{i}_attention"))
      if level < halvings:
        seen.append(x := block(x, width, f"down_{level}", "down"))
    x = block(x, widths[-1], "middle_0")
    x = block(attend(x, "middle_attention", always=True), widths[-1], "middle_1")
    for level, width in reversed(list(enumerate(widths))):
      for i in range(self.blocks + 1):
        x = block(jnp.concatenate([x, seen.pop()], axis=-1), width, f"up_{level}_{i}")
        x = attend(x, f"up_{level}_{i}_attention")
      if level:
        x = block(x, width, f"up_{level}", "up")
    x = nn.silu(norm(self.groups, self.dtype, "norm")(x))
    y = conv(self.outputs * self.patch**2, ("embed", None), ZEROS, name="out")(x)
    return unfold(y, self.patch).astype(jnp.float32)
