"""Networks against published sizes, layers against flax's, and the hooks for other layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import convnets

KEY = jax.random.key(0)
IMAGE = (1, 32, 32, 3)
LARGE = (1, 224, 224, 3)


def made(model, shape, key=KEY):
  return nn.meta.unbox(model.init({"params": key, "dropout": key}, jnp.zeros(shape)))


def test_closed_channels_stay_zero_and_keep_their_statistics():
  norm = convnets.BatchNorm()
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
  ("model", "shape", "parameters"),
  [
    (convnets.MLP((300, 100), 10), (1, 28, 28, 1), 266_610),
    (convnets.TwoLayer(32, 10), (1, 8, 8, 1), 2_410),
    (convnets.LeNet(10), (1, 28, 28, 1), 431_080),
    (convnets.VGG(10), IMAGE, 9_220_480 + 512 * 10),
    (convnets.WideResNet(10), IMAGE, 36_479_194),
    (convnets.ResNet(10, small=True), IMAGE, 11_173_962),
    (convnets.ResNet(1000), LARGE, 11_689_512),
    (convnets.ResNet(1000, (3, 4, 6, 3), bottleneck=True), LARGE, 25_557_032),
  ],
  ids=["mlp", "two layers", "lenet", "vgg11", "wrn", "resnet18 small", "resnet18", "resnet50"],
)
def test_published_sizes(model, shape, parameters):
  variables = jax.eval_shape(functools.partial(made, model, shape))
  assert sum(x.size for x in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.parametrize(("stride", "padding", "bias"), [(1, "SAME", False), (2, "VALID", True)])
def test_layers_are_those_of_flax(stride, padding, bias):
  x = jax.random.normal(KEY, (2, 9, 9, 3))
  conv = convnets.Conv(5, 3, stride=stride, bias=bias, padding=padding)
  variables = made(conv, x.shape)
  assert ("bias" in variables["params"]) == bias
  reference = nn.Conv(5, (3, 3), stride, padding=padding, use_bias=bias)
  y, open_channels = conv.apply(variables, x)
  assert open_channels is None
  np.testing.assert_allclose(y, reference.apply(variables, x), rtol=1e-5, atol=1e-6)
  dense = convnets.Dense(4)
  variables, x = made(dense, (1, 6)), jax.random.normal(KEY, (3, 6))
  np.testing.assert_allclose(dense.apply(variables, x), nn.Dense(4).apply(variables, x), rtol=1e-5)


def test_where_layers_start():
  """Kaiming: fan-out for linear layers and VGG, fan-in for convolutions; LeCun for two layers."""
  dense = made(convnets.Dense(400), (1, 300))["params"]
  np.testing.assert_allclose(dense["kernel"].std(), (2 / 400) ** 0.5, rtol=0.02)
  np.testing.assert_allclose(dense["bias"].std(), 0.01, rtol=0.15)
  conv = made(convnets.Conv(128, 3), (1, 4, 4, 64))["params"]
  np.testing.assert_allclose(conv["kernel"].std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
  vgg = made(convnets.VGG(10, plan=(32, 64, None)), (1, 8, 8, 3))["params"]
  np.testing.assert_allclose(vgg["conv_1"]["kernel"].std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
  np.testing.assert_allclose(vgg["head"].std(), 0.01, rtol=0.02)
  two = made(convnets.TwoLayer(200, 10), (1, 100))["params"]
  np.testing.assert_allclose(two["hidden"]["kernel"].std(), 0.1, rtol=0.02)
  assert not two["hidden"]["bias"].any()


def test_two_layers_follow_the_default_precision():
  with jax.enable_x64(True):
    model, x = convnets.TwoLayer(3, 2), np.random.RandomState(0).randn(4, 5)
    params = made(model, (1, 5))["params"]
    y = model.apply({"params": params}, x)
  assert y.dtype == params["logits"]["kernel"].dtype == np.float64
  h = jax.nn.gelu(np.asarray(x, np.float32) @ np.asarray(params["hidden"]["kernel"], np.float32))
  np.testing.assert_allclose(y, h @ np.asarray(params["logits"]["kernel"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [nn.max_pool, nn.avg_pool])
def test_a_frozen_head_is_no_parameter(pool):
  x = jax.random.normal(KEY, (2, 8, 8, 3))
  plan = (4, None, 8, None)
  whole, frozen = (convnets.VGG(10, plan, pool, frozen=f) for f in (False, True))
  variables = made(frozen, x.shape)
  assert set(variables["params"]) == {"conv_0", "conv_2"}
  head = variables["frozen"]["head"]
  assert head.shape == (2 * 2 * 8, 10)
  ours = frozen.apply(variables, x)
  theirs = whole.apply({"params": variables["params"] | {"head": head}}, x)
  np.testing.assert_array_equal(ours, theirs)


class Doubled(nn.Module):
  """Another convolution: nothing is learnt, everything is known."""

  features: int
  kernel: int
  stride: int = 1
  bias: bool = False
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x, *, train=False):
    y = jnp.repeat(x[:, :: self.stride, :: self.stride].mean(-1, keepdims=True), self.features, -1)
    return y, jnp.arange(self.features) % 2


@pytest.mark.parametrize("name", ["wrn", "resnet18", "resnet50"])
def test_other_convolutions_take_the_place_of_those_in_blocks(name):
  """None of the blocks' own is left; and normalisation hears which channels are closed."""
  model = convnets.named(name, 10, small=True, conv=Doubled)
  shapes = jax.eval_shape(functools.partial(made, model, IMAGE))["params"]
  left = {n for n in shapes if n.startswith("conv")}
  assert left == ({f"conv_{i}_1" for i in range(12)} if name == "wrn" else set())


def test_a_network_by_blocks_trains_and_keeps_statistics():
  model = convnets.ResNet(10, (1, 1), small=True)
  x = jax.random.normal(KEY, (4, 8, 8, 3))
  variables = made(model, x.shape)

  def loss(params):
    y, updated = model.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
    return (y**2).mean(), updated["batch_stats"]

  slopes, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  assert all(float(jnp.abs(s).max()) > 0 for s in jax.tree.leaves(slopes))
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), stats, variables["batch_stats"])
  assert min(jax.tree.leaves(moved)) > 0
  first, again = (model.apply(variables, x[:n], train=False)[:2] for n in (2, 4))
  np.testing.assert_allclose(first, again, rtol=1e-5)  # an image does not depend on the others


def test_mistakes():
  with pytest.raises(ValueError, match="depth=11; accepted: 6 n \\+ 4"):
    made(convnets.WideResNet(10, depth=11), IMAGE)
  with pytest.raises(ValueError, match="network='x'; accepted: mlp, lenet, wrn, resnet18"):
    convnets.named("x", 10)
