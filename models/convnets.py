"""Image classifiers that papers compare on: MLP, LeNet, VGG, WideResNet and ResNet.

VGG: arXiv:1409.1556; WideResNet: arXiv:1605.07146; ResNet: arXiv:1512.03385. Images are (B, height,
width, channels) float; there are no gates, and no other layers than these, unless the fields
`dense` and `conv` say so. For example, with and without gates that may close a channel,

    WideResNet(classes=10, depth=28, widen=10)
    WideResNet(classes=10, conv=functools.partial(gates.GatedConv, drop_rate=0.3))
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Factory = Callable[..., Any]


def kaiming(fan: Literal["fan_in", "fan_out"], gain: float = 1.0) -> Any:
  """Normal of variance 2 gain^2 / fan, for layers before a ReLU."""
  return nn.initializers.variance_scaling(2.0 * gain**2, fan, "normal")


class Dense(nn.Module):
  """x_BD -> x W + b in JAX's default precision; what the field `dense` stands for.

  A replacement is called `dense(features, axes, name=...)(x, train=train)`.

  Attributes:
    features: of the outputs.
    axes: logical axes of W.
    kernel_init: of W; default: Kaiming-normal by fan-out.
    bias_init: of b.
  """

  features: int
  axes: tuple[str | None, str | None] = ("embed", "mlp")
  kernel_init: Callable[..., jax.Array] = kaiming("fan_out")
  bias_init: Callable[..., jax.Array] = nn.initializers.normal(0.01)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    return self.project(x, self.kernel_init)

  def project(self, x: jax.Array, kernel_init: Any) -> jax.Array:
    """The layer itself, for subclasses that start otherwise."""
    box, dtype = nn.with_logical_partitioning, jnp.result_type(float)
    shape = (x.shape[-1], self.features)
    kernel: Any = self.param("kernel", box(kernel_init, self.axes), shape, dtype)
    bias: Any = self.param("bias", box(self.bias_init, self.axes[1:]), shape[1:], dtype)
    return x @ kernel + bias


class Conv(nn.Module):
  """A convolution, Kaiming-normal by fan-in; what the field `conv` stands for.

  A replacement is called `conv(features, kernel, stride=..., bias=..., padding=..., name=...)` and
  its module `(x, train=train)`. It returns the convolution and which channels are open, (features,)
  with 0 for a closed one, or None for all, which is what `BatchNorm` wants to know.

  Attributes:
    features: channels of the outputs.
    kernel: its width and height.
    stride: in both directions.
    bias: whether there is one.
    padding: "SAME" or "VALID".
  """

  features: int
  kernel: int
  stride: int = 1
  bias: bool = False
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array | None]:
    return self.convolve(x), None

  def convolve(self, x: jax.Array, gain: float = 1.0) -> jax.Array:
    """The layer itself; the weights and the bias that it starts with are multiplied by `gain`."""
    box = nn.with_logical_partitioning
    shape = (self.kernel, self.kernel, x.shape[-1], self.features)
    init = box(kaiming("fan_in", gain), (None, None, "embed", "mlp"))
    kernel: Any = self.param("kernel", init, shape)
    y = jax.lax.conv_general_dilated(
      x, kernel, (self.stride,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    if not self.bias:
      return y
    bias_init = box(nn.initializers.normal(0.01 * gain), ("mlp",))
    bias: Any = self.param("bias", bias_init, (self.features,))
    return y + bias


class BatchNorm(nn.Module):
  """Batch normalisation (epsilon 1e-5) that leaves closed channels alone.

  With gates `z`, channels whose gate is 0 stay 0, and their running statistics as they were.
  """

  momentum: float = 0.9

  @nn.compact
  def __call__(self, x: jax.Array, z: jax.Array | None = None, *, train: bool = False) -> jax.Array:
    shape, box = (x.shape[-1],), functools.partial(nn.with_logical_partitioning, names=("mlp",))
    scale: Any = self.param("scale", box(nn.initializers.ones), shape)
    bias: Any = self.param("bias", box(nn.initializers.zeros), shape)
    mean: Any = self.variable("batch_stats", "mean", box(nn.initializers.zeros), None, shape)
    var: Any = self.variable("batch_stats", "var", box(nn.initializers.ones), None, shape)
    open_C = jnp.ones(shape, bool) if z is None else z > 0
    m, v = mean.value, var.value
    if train:
      m, v = x.mean((0, 1, 2)), x.var((0, 1, 2))
      if not self.is_initializing():
        for kept, new in ((mean, m), (var, v)):
          old = kept.value
          kept.value = jnp.where(open_C, old + (1 - self.momentum) * (new - old), old)
    y = (x - m) * (jax.lax.rsqrt(v + 1e-5) * scale) + bias
    return jnp.where(open_C, y, 0)


class MLP(nn.Module):
  """Flattened inputs through ReLU layers of these widths, then logits.

  Attributes:
    widths: of the hidden layers.
    classes: number of classes.
    dense: makes the layers, called `layer_0`, `layer_1`, ...
    first: makes the first one, where it differs.
  """

  widths: tuple[int, ...]
  classes: int
  dense: Factory = Dense
  first: Factory | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate((*self.widths, self.classes)):
      axes = (("embed", "mlp"), ("mlp", "embed"))[i % 2]
      make = self.dense if i or self.first is None else self.first
      x = make(width, axes, name=f"layer_{i}")(nn.relu(x) if i else x, train=train)
    return x


class TwoLayer(nn.Module):
  """Flattened inputs through one hidden layer, `hidden`, to `logits`; LeCun-normal, biases of 0.

  Attributes:
    width: of the hidden layer.
    classes: number of classes.
    activation: of the hidden layer.
  """

  width: int
  classes: int
  activation: Callable[[jax.Array], jax.Array] = nn.gelu

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    start = nn.initializers.lecun_normal(), nn.initializers.zeros
    hidden = Dense(self.width, (None, "mlp"), *start, name="hidden")
    logits = Dense(self.classes, ("mlp", None), *start, name="logits")
    return logits(self.activation(hidden(x.reshape(len(x), -1))))


class LeNet(nn.Module):
  """LeNet-5 with 20 and 50 filters of 5x5 and 500 neurons."""

  classes: int
  dense: Factory = Dense
  conv: Factory = Conv

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    for i, filters in enumerate((20, 50)):
      conv = self.conv(filters, 5, bias=True, padding="VALID", name=f"conv_{i}")
      x = nn.max_pool(nn.relu(conv(x, train=train)[0]), (2, 2), (2, 2))
    return MLP((500,), self.classes, self.dense, name="head")(x, train=train)


VGG11 = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)


class VGG(nn.Module):
  """Convolutions of 3x3 with ReLU, without normalisation, and one linear layer without bias.

  Convolutions are Kaiming-normal by fan-out, with biases of 0; the head is N(0, 0.01^2).

  Attributes:
    classes: number of classes.
    plan: channels of the convolutions in turn; None halves the image.
    pool: by which means, over windows of 2x2.
    frozen: the head is not trained: it is in the collection `frozen` in place of `params`.
  """

  classes: int
  plan: tuple[int | None, ...] = VGG11
  pool: Callable[..., jax.Array] = nn.max_pool
  frozen: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    box = nn.with_logical_partitioning
    for i, features in enumerate(self.plan):
      if features is None:
        x = self.pool(x, (2, 2), (2, 2))
        continue
      init = box(kaiming("fan_out"), (None, None, "embed", "mlp"))
      zeros = box(nn.initializers.zeros, ("mlp",))
      conv = nn.Conv(features, (3, 3), kernel_init=init, bias_init=zeros, name=f"conv_{i}")
      x = nn.relu(conv(x))
    x = x.reshape(len(x), -1)
    normal, shape = nn.initializers.normal(0.01), (x.shape[-1], self.classes)
    if not self.frozen:
      kernel: Any = self.param("head", box(normal, ("embed", "vocab")), shape)
      return x @ kernel
    head = self.variable("frozen", "head", lambda: normal(self.make_rng("params"), shape))
    return x @ head.value


def _classify(x: jax.Array, classes: int) -> jax.Array:
  """Logits of the mean over the image."""
  init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
  return nn.Dense(classes, kernel_init=init, bias_init=zeros, name="classifier")(x.mean((1, 2)))


class WideResNet(nn.Module):
  """Wide residual network for small images (B, 32, 32, 3), pre-activation blocks.

  Raises: ValueError for another depth.

  Attributes:
    classes: number of classes.
    depth: 6 n + 4.
    widen: the width is 16, 32 and 64 times this.
    conv: makes the first convolution of each block; the second, ordinary, has the block's stride.
  """

  classes: int
  depth: int = 28
  widen: int = 10
  conv: Factory = Conv

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    if (self.depth - 4) % 6:
      raise ValueError(f"depth={self.depth}; accepted: 6 n + 4")
    x, _ = Conv(16, 3, name="stem")(x)
    blocks = (self.depth - 4) // 6
    for i in range(3 * blocks):
      group, first = i // blocks, i % blocks == 0
      width, stride = 16 * 2**group * self.widen, 2 if first and group else 1
      h = nn.relu(BatchNorm(name=f"norm_{i}_0")(x, train=train))
      short, _ = Conv(width, 1, stride, name=f"short_{i}")(h) if first else (x, None)
      y, z = self.conv(width, 3, name=f"conv_{i}_0")(h, train=train)
      y = nn.relu(BatchNorm(name=f"norm_{i}_1")(y, z, train=train))
      y, _ = Conv(width, 3, stride, name=f"conv_{i}_1")(y)
      x = nn.with_logical_constraint(short + y, ("batch", None, None, None))
    return _classify(nn.relu(BatchNorm(name="norm")(x, train=train)), self.classes)


class ResNet(nn.Module):
  """Residual network.

  Attributes:
    classes: number of classes.
    blocks: in each of the four groups: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) with bottleneck
      ResNet-50.
    bottleneck: 1x1, 3x3, 1x1 convolutions a block in place of two of 3x3.
    small: for images of 32x32: a 3x3 stem without pooling.
    conv: makes all convolutions of the blocks; stem and shortcuts are ordinary.
  """

  classes: int
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  small: bool = False
  conv: Factory = Conv

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x, _ = Conv(64, *((3,) if self.small else (7, 2)), name="stem")(x)
    x = nn.relu(BatchNorm(name="norm")(x, train=train))
    if not self.small:
      x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
    for group, blocks in enumerate(self.blocks):
      for i in range(blocks):
        width, stride = 64 * 2**group, 2 if group and not i else 1
        name, out = f"{group}_{i}", width * (4 if self.bottleneck else 1)
        plan = [(width, 3, stride), (width, 3, 1)]
        if self.bottleneck:
          plan = [(width, 1, 1), (width, 3, stride), (out, 1, 1)]
        y = x
        for j, (features, kernel, step) in enumerate(plan):
          conv = self.conv(features, kernel, stride=step, name=f"conv_{name}_{j}")
          y = BatchNorm(name=f"norm_{name}_{j}")(*conv(y, train=train), train=train)
          y = nn.relu(y) if j < len(plan) - 1 else y
        if x.shape != y.shape:
          x, _ = Conv(out, 1, stride, name=f"short_{name}")(x)
          x = BatchNorm(name=f"short_norm_{name}")(x, train=train)
        x = nn.with_logical_constraint(nn.relu(x + y), ("batch", None, None, None))
    return _classify(x, self.classes)


def named(
  name: str,
  classes: int,
  *,
  widths: tuple[int, ...] = (),
  small: bool = False,
  dense: Factory = Dense,
  first: Factory | None = None,
  conv: Factory = Conv,
) -> nn.Module:
  """One of the networks above: `mlp`, `lenet`, `wrn` (28 layers, 10 wide), `resnet18`, `resnet50`.

  Args:
    name: of the network.
    classes: number of classes.
    widths, first: of an MLP.
    small: whether a ResNet is for images of 32x32.
    dense, conv: make the layers that the network does not keep ordinary.

  Raises: ValueError for another name.
  """
  networks = {
    "mlp": MLP(widths, classes, dense, first),
    "lenet": LeNet(classes, dense, conv),
    "wrn": WideResNet(classes, conv=conv),
    "resnet18": ResNet(classes, small=small, conv=conv),
    "resnet50": ResNet(classes, (3, 4, 6, 3), bottleneck=True, small=small, conv=conv),
  }
  if name not in networks:
    raise ValueError(f"network={name!r}; accepted: {', '.join(networks)}")
  return networks[name]
