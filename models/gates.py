"""Layers whose neurons or channels stand behind learned gates, for any network of convnets.

Hard-concrete gates: Louizos et al., arXiv:1712.01312, as Gallego-Posada et al. use them,
arXiv:2208.04425. A gate has one parameter, log alpha; drawn in training, it is exactly 0 or exactly
1 with positive probability; in evaluation it is its median. `drop_rate` is the probability with
which it is closed at first. For example

    model = convnets.WideResNet(classes=10, conv=functools.partial(GatedConv, drop_rate=0.3))
    variables = model.init({"params": key, "dropout": key}, images)
    share = expected_density(variables["params"])                    # of the gated layers
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import convnets

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # gamma, zeta, beta
EPSILON = 1e-6


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


def clamp(params: Any) -> Any:
  """The same with every log alpha within [log 0.01, log 100]: what follows an update."""
  limits = math.log(0.01), math.log(100.0)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.clip(x, *limits) if path[-1].key == "log_alpha" else x, params
  )


def weight_decay(params: Any, gated: float = 1.0) -> jax.Array:
  """Half the expected square norm of all parameters but the gates, a scalar.

  Args:
    params: of a network with gates.
    gated: how often the part of layers with gates counts.
  """
  layers = dict(gated_layers(params))
  flat = jax.tree_util.tree_leaves_with_path(params)
  names = [jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in flat]
  rest = sum((x**2).sum() for n, (_, x) in zip(names, flat, strict=True) if n not in layers)
  return 0.5 * (gated * expected_square_norm(params) + rest)


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


def purged_share(params: Any) -> np.ndarray:
  """The share of an MLP's parameters that `purge` leaves, float64; leading axes are kept."""
  layers = [params[f"layer_{i}"] for i in range(len(params))]
  shapes = [layer["kernel"].shape[-2:] for layer in layers]
  kept = [np.sum(np.asarray(median_gates(layer["log_alpha"])) > 0, -1) for layer in layers]
  left = sum((n + 1) * m for n, m in zip(kept, [*kept[1:], shapes[-1][1]], strict=True))
  return np.asarray(left / sum((n + 1) * m for n, m in shapes))


def _gate(module: Any, groups: int, axis: str | None, train: bool) -> jax.Array:
  """This pass's gates (groups,): one draw for the whole batch."""
  rate = module.drop_rate

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.log((1 - rate) / rate) + 0.01 * jax.random.normal(key, shape, dtype)

  log_alpha: Any = module.param("log_alpha", nn.with_logical_partitioning(init, (axis,)), (groups,))
  return sample_gates(module.make_rng("dropout"), log_alpha) if train else median_gates(log_alpha)


class GatedDense(convnets.Dense):
  """x_BD -> (z * x) W + b: the gates z are those of the input neurons.

  W is Kaiming's over 1 - drop_rate, so that the gated expectation is that of an ungated layer; so
  is what `GatedConv` starts with.
  """

  drop_rate: float = 0.5

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    z = _gate(self, x.shape[-1], self.axes[0], train)
    return self.project(x * z, convnets.kaiming("fan_out", 1 / (1 - self.drop_rate)))


class GatedConv(convnets.Conv):
  """z * conv(x): the gates z are those of the output channels. Returns it and z, (features,)."""

  drop_rate: float = 0.5

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
    z = _gate(self, self.features, "mlp", train)
    return self.convolve(x, 1 / (1 - self.drop_rate)) * z, z
