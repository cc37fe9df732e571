"""Networks whose neurons or channels stand behind learned gates, and the same networks without.

Hard-concrete gates: Louizos et al., arXiv:1712.01312, as Gallego-Posada et al. use them,
arXiv:2208.04425. A gate has one parameter, log alpha; drawn in training, it is exactly 0 or exactly
1 with positive probability; in evaluation it is its median.

MLP, LeNet, WideResNet (arXiv:1605.07146) and ResNet (arXiv:1512.03385) take `drop_rate`, the
probability with which a gate is closed at first; None builds the ordinary network. For example

    model = WideResNet(classes=10, depth=28, widen=10, drop_rate=0.3)
    variables = model.init({"params": key, "dropout": key}, images)
    share = expected_density(variables["params"])                    # of the gated layers
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # gamma, zeta, beta
EPSILON = 1e-6

Axes = tuple[str | None, ...]


def sample_gates(key: jax.Array, log_alpha: jax.Array) -> jax.Array:
  """Gates in [0, 1] as in training: clip(sigmoid((logit u + log alpha) / beta) (z - g) + g)."""
  u = jax.random.uniform(key, log_alpha.shape, log_alpha.dtype, EPSILON, 1 - EPSILON)
  return _stretched(jax.nn.sigmoid((jax.scipy.special.logit(u) + log_alpha) / TEMPERATURE))


def median_gates(log_alpha: jax.Array) -> jax.Array:
  """Gates in [0, 1] as in evaluation: sigmoid(log alpha / beta), stretched and clipped."""
  return _stretched(jax.nn.sigmoid(log_alpha / TEMPERATURE))


def active_probability(log_alpha: jax.Array) -> jax.Array:
  """P(gate > 0) = 1 - sigmoid(beta log(-g / z) - log alpha), kept within [1e-6, 1 - 1e-6]."""
  closed = jax.nn.sigmoid(TEMPERATURE * jnp.log(-LOW / HIGH) - log_alpha)
  return 1 - jnp.clip(closed, EPSILON, 1 - EPSILON)


def _stretched(s: jax.Array) -> jax.Array:
  return jnp.clip(s * (HIGH - LOW) + LOW, 0, 1)


def gated_layers(params: Any) -> Iterator[tuple[str, Mapping[str, jax.Array]]]:
  """Path and parameters of every layer that has gates."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    *parents, last = (entry.key for entry in path)
    if last == "log_alpha":
      layer = functools.reduce(lambda tree, key: tree[key], parents, params)
      assert layer["log_alpha"] is leaf
      yield "/".join(parents), layer


def group_size(layer: Mapping[str, jax.Array]) -> int:
  """Parameters behind one gate: a neuron's outgoing weights, or a channel's kernel and bias."""
  groups, kernel = layer["log_alpha"].size, layer["kernel"].size
  if layer["kernel"].ndim == 2:
    return kernel // groups
  return kernel // groups + ("bias" in layer)


def layer_sizes(params: Any) -> dict[str, int]:
  """Parameters of every gated layer, those of no gate (a linear layer's bias) too."""
  return {
    name: layer["kernel"].size + (layer["bias"].size if "bias" in layer else 0)
    for name, layer in gated_layers(params)
  }


def layer_densities(params: Any) -> dict[str, jax.Array]:
  """Expected share of each gated layer's parameters that are active, scalars in [0, 1]."""
  sizes = layer_sizes(params)
  return {
    name: active_probability(layer["log_alpha"]).sum() * group_size(layer) / sizes[name]
    for name, layer in gated_layers(params)
  }


def expected_density(params: Any) -> jax.Array:
  """Expected share of the parameters of all gated layers together that are active."""
  sizes = layer_sizes(params)
  densities = layer_densities(params)
  return jnp.asarray(sum(sizes[n] * d for n, d in densities.items())) / sum(sizes.values())


def remaining_density(params: Any) -> jax.Array:
  """The same share after gates whose median is 0 are taken away: what a purged network keeps."""
  kept = sum(
    (median_gates(layer["log_alpha"]) > 0).sum() * group_size(layer)
    for _, layer in gated_layers(params)
  )
  return jnp.asarray(kept) / sum(layer_sizes(params).values())


def expected_square_norm(params: Any) -> jax.Array:
  """Sum over gated groups of P(active) ||w||^2, and ungated biases; P(active) is held constant.

  As a weight decay it shrinks weights and closes no gate.
  """
  total = jnp.zeros(())
  for _, layer in gated_layers(params):
    active = jax.lax.stop_gradient(active_probability(layer["log_alpha"]))
    linear = layer["kernel"].ndim == 2
    total += (layer["kernel"] ** 2 * (active[:, None] if linear else active)).sum()
    if "bias" in layer:
      total += (layer["bias"] ** 2 * (1.0 if linear else active)).sum()
  return total


def purge(params: Any) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
  """An MLP without its closed neurons and without gates: fewer parameters, the same outputs.

  Args:
    params: of a gated `MLP`, concrete arrays.

  Returns: the inputs that are still read (ints), and (kernel, bias) of every layer.
  """
  layers = [params[f"layer_{i}"] for i in range(len(params))]
  gates = [np.asarray(median_gates(layer["log_alpha"])) for layer in layers]
  kept = [np.flatnonzero(z) for z in gates] + [np.arange(layers[-1]["bias"].size)]
  small = []
  for i, (layer, z) in enumerate(zip(layers, gates, strict=True)):
    kernel = np.asarray(layer["kernel"]) * z[:, None]
    small.append((kernel[np.ix_(kept[i], kept[i + 1])], np.asarray(layer["bias"])[kept[i + 1]]))
  return kept[0], small


def _gate(module: nn.Module, groups: int, axis: str | None, train: bool) -> jax.Array | None:
  """This pass's gates (groups,): one draw for the whole batch; None without gates."""
  rate = module.drop_rate  # type: ignore[attr-defined]
  if rate is None:
    return None

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.log((1 - rate) / rate) + 0.01 * jax.random.normal(key, shape, dtype)

  log_alpha: Any = module.param("log_alpha", nn.with_logical_partitioning(init, (axis,)), (groups,))
  return sample_gates(module.make_rng("dropout"), log_alpha) if train else median_gates(log_alpha)


def _kaiming(fan: Literal["fan_in", "fan_out"], rate: float | None) -> Any:
  """Kaiming-normal over 1 - rate, so that the gated expectation is that of an ungated layer."""
  return nn.initializers.variance_scaling(2.0 / (1 - (rate or 0)) ** 2, fan, "normal")


class GatedDense(nn.Module):
  """x_BD -> (z * x) W + b: the gates z are those of the input neurons."""

  features: int
  drop_rate: float | None
  axes: tuple[str | None, str | None] = ("embed", "mlp")

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    z = _gate(self, x.shape[-1], self.axes[0], train)
    box = nn.with_logical_partitioning
    shape = (x.shape[-1], self.features)
    kernel: Any = self.param("kernel", box(_kaiming("fan_out", self.drop_rate), self.axes), shape)
    bias_init = box(nn.initializers.normal(0.01), self.axes[1:])
    bias: Any = self.param("bias", bias_init, (self.features,))
    return (x if z is None else x * z) @ kernel + bias


class GatedConv(nn.Module):
  """z * conv(x), without bias unless asked: the gates z are those of the output channels.

  Returns the convolution and the gates (features,), None for None.
  """

  features: int
  kernel: int
  drop_rate: float | None = None
  stride: int = 1
  bias: bool = False
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array | None]:
    z = _gate(self, self.features, "mlp", train)
    box = nn.with_logical_partitioning
    shape = (self.kernel, self.kernel, x.shape[-1], self.features)
    init = box(_kaiming("fan_in", self.drop_rate), (None, None, "embed", "mlp"))
    kernel: Any = self.param("kernel", init, shape)
    y = jax.lax.conv_general_dilated(
      x, kernel, (self.stride,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    if self.bias:
      spread = nn.initializers.normal(0.01 / (1 - (self.drop_rate or 0)))
      bias: Any = self.param("bias", box(spread, ("mlp",)), (self.features,))
      y = y + bias
    return (y if z is None else y * z), z


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
  """Flattened inputs through ReLU layers of these widths, then logits; all of them gated.

  Attributes:
    widths: of the hidden layers.
    classes: number of classes.
    drop_rate: of the gates, at first; None for an ordinary network.
    input_drop_rate: of the gates of the network's inputs, where it differs.
  """

  widths: tuple[int, ...]
  classes: int
  drop_rate: float | None = None
  input_drop_rate: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    first = self.input_drop_rate if self.drop_rate and self.input_drop_rate else self.drop_rate
    for i, width in enumerate((*self.widths, self.classes)):
      axes = (("embed", "mlp"), ("mlp", "embed"))[i % 2]
      layer = GatedDense(width, self.drop_rate if i else first, axes, name=f"layer_{i}")
      x = layer(nn.relu(x) if i else x, train=train)
    return x


class LeNet(nn.Module):
  """LeNet-5 with 20 and 50 filters of 5x5 and 500 neurons; all layers gated."""

  classes: int
  drop_rate: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    for i, filters in enumerate((20, 50)):
      conv = GatedConv(filters, 5, self.drop_rate, bias=True, padding="VALID", name=f"conv_{i}")
      x = nn.max_pool(nn.relu(conv(x, train=train)[0]), (2, 2), (2, 2))
    return MLP((500,), self.classes, self.drop_rate, name="head")(x, train=train)


def _classify(x: jax.Array, classes: int) -> jax.Array:
  """Logits of the mean over the image; never gated."""
  init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
  return nn.Dense(classes, kernel_init=init, bias_init=zeros, name="classifier")(x.mean((1, 2)))


class WideResNet(nn.Module):
  """Wide residual network for small images (B, 32, 32, 3), pre-activation blocks.

  The first convolution of each block is gated, the second has the block's stride.
  """

  classes: int
  depth: int = 28  # 6 n + 4
  widen: int = 10
  drop_rate: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    if (self.depth - 4) % 6:
      raise ValueError(f"depth={self.depth}; accepted: 6 n + 4")
    x, _ = GatedConv(16, 3, name="stem")(x)
    blocks = (self.depth - 4) // 6
    for i in range(3 * blocks):
      group, first = i // blocks, i % blocks == 0
      width, stride = 16 * 2**group * self.widen, 2 if first and group else 1
      h = nn.relu(BatchNorm(name=f"norm_{i}_0")(x, train=train))
      short, _ = GatedConv(width, 1, None, stride, name=f"short_{i}")(h) if first else (x, None)
      y, z = GatedConv(width, 3, self.drop_rate, name=f"conv_{i}_0")(h, train=train)
      y = nn.relu(BatchNorm(name=f"norm_{i}_1")(y, z, train=train))
      y, _ = GatedConv(width, 3, None, stride, name=f"conv_{i}_1")(y)
      x = nn.with_logical_constraint(short + y, ("batch", None, None, None))
    return _classify(nn.relu(BatchNorm(name="norm")(x, train=train)), self.classes)


class ResNet(nn.Module):
  """Residual network; all convolutions of its blocks are gated, stem and shortcuts are not.

  Attributes:
    classes: number of classes.
    blocks: in each of the four groups: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) with bottleneck
      ResNet-50.
    bottleneck: 1x1, 3x3, 1x1 convolutions a block in place of two of 3x3.
    small: for images of 32x32: a 3x3 stem without pooling.
    drop_rate: of the gates, at first; None for an ordinary network.
  """

  classes: int
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  small: bool = False
  drop_rate: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x, _ = GatedConv(64, *((3, None) if self.small else (7, None, 2)), name="stem")(x)
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
          conv = GatedConv(features, kernel, self.drop_rate, step, name=f"conv_{name}_{j}")
          y = BatchNorm(name=f"norm_{name}_{j}")(*conv(y, train=train), train=train)
          y = nn.relu(y) if j < len(plan) - 1 else y
        if x.shape != y.shape:
          x, _ = GatedConv(out, 1, None, stride, name=f"short_{name}")(x)
          x = BatchNorm(name=f"short_norm_{name}")(x, train=train)
        x = nn.with_logical_constraint(nn.relu(x + y), ("batch", None, None, None))
    return _classify(x, self.classes)
