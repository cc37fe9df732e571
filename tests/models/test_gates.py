"""Gates against their distribution, densities by hand, gated networks by their counts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import convnets, gates

KEY = jax.random.key(0)
IMAGE = (1, 32, 32, 3)


def gated(drop_rate, *layers):
  """What makes a network's layers gated ones: `dense` and `conv`, or those named."""
  makes = {"dense": gates.GatedDense, "conv": gates.GatedConv}
  return {k: functools.partial(makes[k], drop_rate=drop_rate) for k in layers or makes}


def made(model, shape, key=KEY):
  variables = model.init({"params": key, "dropout": key}, jnp.zeros(shape))
  return nn.meta.unbox(variables)


def sizes(model, shape):
  variables = jax.eval_shape(functools.partial(made, model, shape))
  counts = {
    jax.tree_util.keystr(p): x.size
    for p, x in jax.tree_util.tree_leaves_with_path(variables["params"])
  }
  ours = sum(n for name, n in counts.items() if "log_alpha" in name)
  return sum(counts.values()) - ours, gates.layer_sizes(variables["params"])


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0])
def test_gates_have_their_distribution(log_alpha):
  """The shares of exact zeros and ones by quantiles of the logistic, in float64."""
  z = np.asarray(gates.sample_gates(KEY, jnp.full(200_000, log_alpha)))
  logit = lambda p: np.log(p / (1 - p))  # noqa: E731
  below = lambda level: 1 / (1 + np.exp(-(2 / 3 * logit(level) - log_alpha)))  # noqa: E731
  closed, full = below(0.1 / 1.2), 1 - below(1.1 / 1.2)
  np.testing.assert_allclose([(z == 0).mean(), (z == 1).mean()], [closed, full], atol=4e-3)
  np.testing.assert_allclose(
    gates.active_probability(jnp.float32(log_alpha)), 1 - closed, rtol=1e-5
  )
  median = np.median(z)
  np.testing.assert_allclose(gates.median_gates(jnp.float32(log_alpha)), median, atol=6e-3)


def test_a_closed_gate_is_no_number_and_the_probability_stays_inside():
  far = jnp.array([-1e3, 1e3])
  np.testing.assert_allclose(gates.active_probability(far), [1e-6, 1 - 1e-6], rtol=0.1)
  slopes = jax.grad(lambda x: gates.sample_gates(KEY, x).sum())(jnp.zeros(1000))
  assert jnp.isfinite(slopes).all()
  assert ((slopes > 0).mean() > 0.3) and ((slopes == 0).mean() > 0.1)  # flat where clipped


def test_density_of_a_linear_layer_counts_its_bias_as_never_gated():
  params = made(convnets.MLP((4,), 2, **gated(0.5, "dense")), (1, 3))["params"]
  pi = [gates.active_probability(params[f"layer_{i}"]["log_alpha"]) for i in range(2)]
  wanted = [pi[0].sum() * 4 / (3 * 4 + 4), pi[1].sum() * 2 / (4 * 2 + 2)]
  found = gates.layer_densities(params)
  np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-6)
  whole = (16 * wanted[0] + 10 * wanted[1]) / 26
  np.testing.assert_allclose(gates.expected_density(params), whole, rtol=1e-6)


def test_a_channel_is_gated_with_its_bias():
  conv = gates.GatedConv(6, 3, bias=True, drop_rate=0.3)
  params = made(conv, (1, 5, 5, 2))["params"]
  assert gates.group_size(params) == 3 * 3 * 2 + 1
  params = params | {"bias": jnp.ones(6), "log_alpha": jnp.array([-9.0, 9, -9, 9, 9, -9])}
  y, z = conv.apply({"params": params}, jnp.ones((1, 5, 5, 2)))
  np.testing.assert_array_equal(z, [0, 1, 0, 1, 1, 0])
  assert (y[..., ::2][..., 0] == 0).all() and (y[..., 1] != 0).all()


def test_one_draw_a_forward_pass_shared_by_the_batch():
  dense = gates.GatedDense(5, drop_rate=0.5)
  params = made(dense, (1, 8))["params"]
  x = jnp.ones((7, 8))
  run = lambda key: dense.apply({"params": params}, x, train=True, rngs={"dropout": key})  # noqa: E731
  first, second = run(KEY), run(jax.random.key(1))
  np.testing.assert_allclose(first, jnp.broadcast_to(first[:1], first.shape), rtol=1e-6)
  assert not np.allclose(first, second)
  np.testing.assert_array_equal(
    dense.apply({"params": params}, x), dense.apply({"params": params}, x)
  )


def test_initial_weights_make_up_for_closed_gates():
  """Kaiming over 1 - rate: fan-out for linear layers, fan-in for convolutions."""
  dense = made(gates.GatedDense(400, drop_rate=0.2), (1, 300))["params"]
  np.testing.assert_allclose(dense["kernel"].std(), (2 / 400) ** 0.5 / 0.8, rtol=0.02)
  np.testing.assert_allclose(dense["bias"].std(), 0.01, rtol=0.15)
  np.testing.assert_allclose(dense["log_alpha"].mean(), np.log(0.8 / 0.2), atol=0.003)
  conv = made(gates.GatedConv(128, 3, drop_rate=0.3), (1, 4, 4, 64))["params"]
  np.testing.assert_allclose(conv["kernel"].std(), (2 / (9 * 64)) ** 0.5 / 0.7, rtol=0.02)


def test_decay_shrinks_weights_and_closes_no_gate():
  params = made(convnets.LeNet(10, **gated(0.5)), (1, 28, 28, 1))["params"]
  slopes = jax.jit(jax.grad(gates.expected_square_norm))(params)
  for (_, layer), (_, slope) in zip(
    gates.gated_layers(params), gates.gated_layers(slopes), strict=True
  ):
    pi = gates.active_probability(layer["log_alpha"])
    by_input = layer["kernel"].ndim == 2
    wanted = 2 * layer["kernel"] * (pi[:, None] if by_input else pi)
    np.testing.assert_allclose(slope["kernel"], wanted, rtol=1e-5)
    np.testing.assert_allclose(
      slope["bias"], 2 * layer["bias"] * (1 if by_input else pi), rtol=1e-5
    )
    np.testing.assert_array_equal(slope["log_alpha"], 0)


def test_a_purged_network_gives_the_same_outputs():
  model = convnets.MLP((32, 16), 10, **gated(0.5, "dense"))
  params = made(model, (1, 20))["params"]
  random = np.random.RandomState(0)
  for layer in params.values():
    layer["log_alpha"] = jnp.asarray(random.choice([-4.0, 0.5], layer["log_alpha"].shape))
  x = jnp.asarray(random.randn(5, 20), jnp.float32)
  read, layers = gates.purge(params)
  h = x[:, read]
  for i, (kernel, bias) in enumerate(layers):
    h = (jax.nn.relu(h) if i else h) @ kernel + bias
  np.testing.assert_allclose(h, model.apply({"params": params}, x), rtol=1e-4, atol=1e-5)
  left = sum(k.size + b.size for k, b in layers)
  total = sum(gates.layer_sizes(params).values())
  assert gates.purged_share(params) == left / total
  both = jax.tree.map(lambda x: jnp.stack([x, 0 * x + 9]), params)
  np.testing.assert_array_equal(gates.purged_share(both), [left / total, 1])
  assert left / total < float(gates.remaining_density(params)) + 0.05 < 0.6
  # A gate whose median is 0 is still open two times in five, and counts in the constraint.
  for layer in params.values():
    layer["log_alpha"] = jnp.full_like(layer["log_alpha"], -2.0)
  assert float(gates.expected_density(params)) > 0.35
  assert float(gates.remaining_density(params)) == 0


def test_gates_are_clamped():
  params = {"a": {"log_alpha": jnp.array([-9.0, 0.5, 9.0]), "kernel": jnp.full(2, 9.0)}}
  found = gates.clamp(params)["a"]
  np.testing.assert_allclose(found["log_alpha"], [np.log(0.01), 0.5, np.log(100)], rtol=1e-6)
  np.testing.assert_array_equal(found["kernel"], 9)


def test_decay_counts_all_but_the_gates_once():
  model = convnets.WideResNet(10, depth=10, widen=1, **gated(0.3, "conv"))
  params = jax.jit(functools.partial(made, model, (1, 16, 16, 3)))()["params"]
  layers = dict(gates.gated_layers(params))
  rest = {k: v for k, v in params.items() if k not in layers}
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(rest)]
  wanted = sum((x**2).sum() for x in leaves) + float(gates.expected_square_norm(params)) / 0.7
  np.testing.assert_allclose(gates.weight_decay(params, 1 / 0.7), 0.5 * wanted, rtol=1e-5)
  assert set(layers) == {f"conv_{i}_0" for i in range(3)}


@pytest.mark.parametrize(
  ("name", "shape", "whole", "layers"),
  [
    ("mlp", (1, 28, 28, 1), 266_610, 3),
    ("lenet", (1, 28, 28, 1), 431_080, 4),
    ("wrn", IMAGE, 36_479_194, 12),
    ("resnet18", (1, 224, 224, 3), 11_181_642, 16),
    ("resnet50", (1, 224, 224, 3), 23_528_522, 48),
  ],
)
def test_gated_networks_are_the_ordinary_ones_with_gates(name, shape, whole, layers):
  """Parameters without gates, and how many layers have gates."""
  found, sized = sizes(convnets.named(name, 10, widths=(300, 100), **gated(0.3)), shape)
  assert (found, len(sized)) == (whole, layers)
  assert all("conv" in n or "layer" in n for n in sized)


def test_a_gated_residual_network_trains():
  """Finite gradients reach weights and gates; statistics of open channels move."""
  model = convnets.WideResNet(10, depth=10, widen=1, **gated(0.3, "conv"))
  x = jax.random.normal(KEY, (2, 16, 16, 3))
  variables = made(model, x.shape)

  @jax.jit
  def slopes(params):
    def loss(params):
      options = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
      y, _ = model.apply({**variables, "params": params}, x, **options)
      return (y**2).mean() + gates.expected_density(params)

    return jax.grad(loss)(params)

  found = jax.tree.leaves(slopes(variables["params"]))
  assert all(bool(jnp.isfinite(s).all()) and float(jnp.abs(s).max()) > 0 for s in found)
