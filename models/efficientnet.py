"""EfficientNet-lite: image classifiers of inverted residuals for small devices.

Tan and Le, arXiv:1905.11946, in the lite variant: ReLU6, no squeeze-and-excitation, a stem and a
head that do not grow with the width. Inputs are (pixels - 127) / 128, RGB. For example

    logits = EfficientNetLite().apply(variables, images)                        # lite0, 224 x 224
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import dense


class Stage(NamedTuple):
  """Blocks in a row; the first has the stride. Their number and width are before scaling."""

  blocks: int
  kernel: int
  stride: int
  expansion: int
  width: int


STAGES = (  # arXiv:1905.11946, table 1
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


def convolution(
  features: int, kernel: int, *, stride: int = 1, groups: int = 1, dtype: Any, name: str
) -> nn.Conv:
  """A convolution without bias; its inputs are split between devices, not its outputs."""
  axes = (None, None, "embed" if groups == 1 else None, None)
  init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
  return nn.Conv(
    features,
    (kernel, kernel),
    stride,
    padding="SAME",
    feature_group_count=groups,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(init, axes),
    name=name,
  )


class Block(nn.Module):
  """Expansion, depthwise convolution, projection, and the residual where shapes allow it."""

  width: int
  kernel: int
  stride: int
  expansion: int

  @nn.compact
  def __call__(self, x: jax.Array, norm: Any) -> jax.Array:
    inputs, y = x, x
    hidden = x.shape[-1] * self.expansion
    if self.expansion != 1:
      y = convolution(hidden, 1, dtype=x.dtype, name="expand")(y)
      y = nn.relu6(norm(name="expand_norm")(y))
    y = convolution(
      hidden, self.kernel, stride=self.stride, groups=hidden, dtype=x.dtype, name="depthwise"
    )(y)
    y = nn.relu6(norm(name="depthwise_norm")(y))
    y = norm(name="project_norm")(convolution(self.width, 1, dtype=x.dtype, name="project")(y))
    return y + inputs if y.shape == inputs.shape else y


class EfficientNetLite(nn.Module):
  """Stem, stages of blocks, head, mean over the image, Dropout, Dense.

  The defaults are lite0's. Running statistics are in the collection batch_stats.

  Attributes:
    classes: number of classes; None for the 1280 features.
    width, depth: factors of the stages' widths (rounded to multiples of 8) and block numbers; those
      of the first and last stage stay.
    dropout: rate, of the features.
    momentum: of the running statistics.
    dtype: of the activations.
  """

  classes: int | None = 1000
  width: float = 1.0
  depth: float = 1.0
  dropout: float = 0.2
  momentum: float = 0.99
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Logits (B, classes), or features (B, 1280), float32, of images (B, height, width, 3)."""
    ones, zeros = (
      nn.with_logical_partitioning(init, (None,))
      for init in (nn.initializers.ones, nn.initializers.zeros)
    )
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=self.momentum,
      epsilon=1e-3,
      dtype=self.dtype,
      scale_init=ones,
      bias_init=zeros,
    )
    x = images.astype(self.dtype)
    x = convolution(STEM, 3, stride=2, dtype=self.dtype, name="stem")(x)
    x = nn.relu6(norm(name="stem_norm")(x))
    for i, (width, kernel, stride, expansion) in enumerate(blocks(self.width, self.depth)):
      x = Block(width, kernel, stride, expansion, name=f"block_{i}")(x, norm)
      x = nn.with_logical_constraint(x, ("batch", None, None, None))
    x = nn.relu6(norm(name="head_norm")(convolution(HEAD, 1, dtype=self.dtype, name="head")(x)))
    x = x.mean(axis=(1, 2), dtype=jnp.float32)
    if self.classes is None:
      return x
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return dense(self.classes, ("embed", "vocab"), name="classifier")(x)


def blocks(width: float = 1.0, depth: float = 1.0) -> list[tuple[int, int, int, int]]:
  """(width, kernel, stride, expansion) of each block under the factors `width` and `depth`."""
  rows = []
  for i, stage in enumerate(STAGES):
    scaled = stage.width * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    rounded += 8 if rounded < 0.9 * scaled else 0
    count = stage.blocks if i in (0, len(STAGES) - 1) else math.ceil(stage.blocks * depth)
    for j in range(count):
      rows.append((rounded, stage.kernel, stage.stride if j == 0 else 1, stage.expansion))
  return rows
