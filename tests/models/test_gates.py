"""Gates against their distribution, densities by hand, networks against published sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gates

KEY = jax.random.key(0)
IMAGE = (1, 32, 32, 3)


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
  params = made(gates.MLP((4,), 2, 0.5), (1, 3))["params"]
  pi = [gates.active_probability(params[f"layer_{i}"]["log_alpha"]) for i in range(2)]
  wanted = [pi[0].sum() * 4 / (3 * 4 + 4), pi[1].sum() * 2 / (4 * 2 + 2)]
  found = gates.layer_densities(params)
  np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-6)
  whole = (16 * wanted[0] + 10 * wanted[1]) / 26
  np.testing.assert_allclose(gates.expected_density(params), whole, rtol=1e-6)


def test_a_channel_is_gated_with_its_bias():
  conv = gates.GatedConv(6, 3, 0.3, bias=True)
  params = made(conv, (1, 5, 5, 2))["params"]
  assert gates.group_size(params) == 3 * 3 * 2 + 1
  params = params | {"bias": jnp.ones(6), "log_alpha": jnp.array([-9.0, 9, -9, 9, 9, -9])}
  y, z = conv.apply({"params": params}, jnp.ones((1, 5, 5, 2)))
  np.testing.assert_array_equal(z, [0, 1, 0, 1, 1, 0])
  assert (y[..., ::2][..., 0] == 0).all() and (y[..., 1] != 0).all()


def test_one_draw_a_forward_pass_shared_by_the_batch():
  dense = gates.GatedDense(5, 0.5)
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
  dense = made(gates.GatedDense(400, 0.2), (1, 300))["params"]
  np.testing.assert_allclose(dense["kernel"].std(), (2 / 400) ** 0.5 / 0.8, rtol=0.02)
  np.testing.assert_allclose(dense["bias"].std(), 0.01, rtol=0.15)
  np.testing.assert_allclose(dense["log_alpha"].mean(), np.log(0.8 / 0.2), atol=0.003)
  conv = made(gates.GatedConv(128, 3, 0.3), (1, 4, 4, 64))["params"]
  np.testing.assert_allclose(conv["kernel"].std(), (2 / (9 * 64)) ** 0.5 / 0.7, rtol=0.02)


def test_decay_shrinks_weights_and_closes_no_gate():
  params = made(gates.LeNet(10, 0.5), (1, 28, 28, 1))["params"]
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
  model = gates.MLP((32, 16), 10, 0.5)
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
  assert left / total < float(gates.remaining_density(params)) + 0.05 < 0.6
  # A gate whose median is 0 is still open two times in five, and counts in the constraint.
  for layer in params.values():
    layer["log_alpha"] = jnp.full_like(layer["log_alpha"], -2.0)
  assert float(gates.expected_density(params)) > 0.35
  assert float(gates.remaining_density(params)) == 0


def test_closed_channels_stay_zero_and_keep_their_statistics():
  norm = gates.BatchNorm()
  x = jax.random.normal(KEY, (8, 4, 4, 3)) * 2 + 5
  z = jnp.array([1.0, 0.0, 0.5])
  variables = made(norm, x.shape)
  variables["params"]["bias"] = jnp.ones(3)
  y, updated = norm.apply(variables, x * z, z, train=True, mutable=["batch_stats"])
  stats = updated["batch_stats"]
  assert (y[..., 1] == 0).all()
  assert (float(stats["mean"][1]), float(stats["var"][1])) == (0, 1)
  open_ = np.asarray(x * z, np.float64)[..., [0, 2]]
  np.testing.assert_allclose(
    stats["mean"][jnp.array([0, 2])], 0.1 * open_.mean((0, 1, 2)), rtol=1e-5
  )
  wanted = (open_ - open_.mean((0, 1, 2))) / np.sqrt(open_.var((0, 1, 2)) + 1e-5) + 1
  np.testing.assert_allclose(np.asarray(y)[..., [0, 2]], wanted, atol=1e-4)
  plain = nn.BatchNorm(use_running_average=False, momentum=0.9)
  reference = plain.init_with_output(KEY, x)[0]
  ours = norm.apply(made(norm, x.shape), x, train=True, mutable=["batch_stats"])[0]
  np.testing.assert_allclose(ours, reference, atol=1e-5)


@pytest.mark.parametrize(
  ("model", "shape", "whole", "gated"),
  [
    (gates.MLP((300, 100), 10, 0.5, 0.2), (1, 28, 28, 1), 266_610, 3),
    (gates.LeNet(10, 0.5), (1, 28, 28, 1), 431_080, 4),
    (gates.WideResNet(10, drop_rate=0.3), IMAGE, 36_479_194, 12),
    (gates.WideResNet(10), IMAGE, 36_479_194, 0),
    (gates.ResNet(10, small=True), IMAGE, 11_173_962, 0),
    (gates.ResNet(1000, drop_rate=0.3), (1, 224, 224, 3), 11_689_512, 16),
    (gates.ResNet(1000, (3, 4, 6, 3), True, drop_rate=0.05), (1, 224, 224, 3), 25_557_032, 48),
  ],
  ids=["mlp", "lenet", "wrn", "plain wrn", "resnet18 small", "resnet18", "resnet50"],
)
def test_published_sizes(model, shape, whole, gated):
  """Parameters without gates, and how many layers have gates."""
  found, layers = sizes(model, shape)
  assert (found, len(layers)) == (whole, gated)
  assert all("conv" in n or "layer" in n for n in layers)


def test_a_gated_residual_network_trains():
  """Finite gradients reach weights and gates; statistics of open channels move."""
  model = gates.WideResNet(10, depth=10, widen=1, drop_rate=0.3)
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


def test_mistakes():
  with pytest.raises(ValueError, match="depth=11; accepted: 6 n \\+ 4"):
    made(gates.WideResNet(10, depth=11), IMAGE)
