"""The U-Net: published size, shapes, the two ways to convolve, axes, sharding, precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import mesh as meshes
from models.unet import Block, Conv, UNet, fold, resize, unfold

# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = UNet(8, (1, 2), outputs=2, attention=(4,), head_dim=8, groups=4)
IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
TIMES = jnp.array([0, 3, 500, 999])


def arbitrary(model, *inputs):
  """Variables without the zeros of initialisation, so that everything is of effect."""
  rng = np.random.default_rng(0)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))

  def leaf(path, x):
    size = np.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.3
    return rng.normal(size=x.shape, scale=size).astype(x.dtype) + (path[-1].key == "scale")

  return jax.tree_util.tree_map_with_path(leaf, shapes)


VARIABLES = arbitrary(SMALL, IMAGES, TIMES)


def test_the_published_size():
  """93 M parameters: the light ADM of arXiv:2204.00227."""
  model = UNet(128, (1, 1, 2, 2, 4, 4), outputs=6, attention=(16,))
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images, jnp.zeros(1))["params"]
  leaves = jax.tree.leaves(nn.meta.unbox(shapes))
  assert sum(x.size for x in leaves) == 93_563_910
  attends = {name for name in shapes if name.endswith("attention")}
  ups = {f"up_4_{i}_attention" for i in range(2)}
  assert attends == {"down_4_0_attention", "middle_attention", *ups}
  assert shapes["middle_attention"]["query"]["kernel"].value.shape == (512, 512)
  out = jax.eval_shape(model.apply, {"params": shapes}, images, jnp.zeros(1))
  assert out.shape == (1, 256, 256, 6)


def test_it_begins_at_zero_and_is_told_the_time():
  fresh = jit(SMALL.init)(jax.random.key(1), IMAGES, TIMES)
  assert not jit(SMALL.apply)(fresh, IMAGES, TIMES).any()
  outputs = jit(SMALL.apply)(VARIABLES, IMAGES, TIMES)
  assert outputs.shape == (4, 8, 8, 2)
  other = jit(SMALL.apply)(VARIABLES, IMAGES, TIMES.at[1].set(4))
  changed = jnp.abs(other - outputs).max(axis=(1, 2, 3)) > 1e-4
  assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_im2col_is_the_convolution(size):
  conv = Conv(6, ("embed", "mlp"), size=size)
  variables = arbitrary(conv, IMAGES)

  def value(variables, images, im2col):
    y = conv.clone(im2col=im2col).apply(variables, images)
    return (y**2).sum(), y

  run = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True), static_argnums=2)
  for a, b in zip(*(jax.tree.leaves(run(variables, IMAGES, p)) for p in (0, 1)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_im2col_is_the_same_network_under_vmap():
  stacked = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), VARIABLES)

  def run(model):
    return jit(jax.vmap(model.apply, (0, None, None)))(stacked, IMAGES, TIMES)

  np.testing.assert_allclose(run(SMALL.clone(im2col=True)), run(SMALL), atol=1e-4)


def test_resize():
  x = jnp.arange(32.0).reshape(1, 4, 4, 2)
  np.testing.assert_array_equal(resize(x, "down"), nn.avg_pool(x, (2, 2), (2, 2)))
  np.testing.assert_array_equal(resize(resize(x, "up"), "down"), x)
  assert resize(x, None) is x


def test_patches():
  """A square of pixels becomes channels, row by row, and comes back; the image is as large."""
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  np.testing.assert_array_equal(fold(x, 2)[1, 1, 2], x[1, 2:4, 4:6].ravel())
  np.testing.assert_array_equal(unfold(fold(x, 2), 2), x)
  model = SMALL.clone(patch=2)
  boxed = jax.eval_shape(model.init, jax.random.key(0), IMAGES, TIMES)
  assert boxed["params"]["in"]["kernel"].value.shape == (3, 3, 12, 8)
  assert jax.eval_shape(model.apply, boxed, IMAGES, TIMES).shape == (4, 8, 8, 2)
  with pytest.raises(ValueError, match="multiples of 4"):
    jax.eval_shape(model.init, jax.random.key(0), IMAGES[:, :6], TIMES)


def test_a_block_is_its_formula():
  block = Block(12, groups=4, change="down")
  time = jax.random.normal(jax.random.key(3), (4, 5))
  x = jax.random.normal(jax.random.key(2), (4, 8, 8, 8))
  v = arbitrary(block, x, time)
  p = v["params"]

  def norm(h, name):
    groups = h.reshape(4, -1, 4, h.shape[-1] // 4)
    centred = groups - groups.mean(axis=(1, 3), keepdims=True)
    normal = centred / jnp.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-5)
    return normal.reshape(h.shape) * p[name]["scale"] + p[name]["bias"]

  def conv(h, name):
    return Conv(12, ("embed", "mlp")).apply({"params": p[name]}, h)

  h = conv(resize(nn.silu(norm(x, "norm_in")), "down"), "conv_in")
  told = nn.silu(time) @ p["time"]["kernel"] + p["time"]["bias"]
  scale, shift = told[:, None, None, :12], told[:, None, None, 12:]
  h = conv(nn.silu(norm(h, "norm_out") * (1 + scale) + shift), "conv_out")
  wanted = resize(x, "down") @ p["skip"]["kernel"] + p["skip"]["bias"] + h
  np.testing.assert_allclose(jit(block.apply)(v, x, time), wanted, atol=1e-4)


def test_group_statistics_are_float32():
  """An offset that bfloat16 squares would lose."""
  low = SMALL.clone(dtype=jnp.bfloat16)
  outputs = jit(low.apply)(VARIABLES, IMAGES, TIMES)
  assert outputs.dtype == jnp.float32
  full = jit(SMALL.apply)(VARIABLES, IMAGES, TIMES)
  assert float(jnp.abs(outputs - full).mean() / jnp.abs(full).mean()) < 0.05


def test_dropout_is_of_training_only():
  model = SMALL.clone(dropout=0.5)

  def train(seed):
    rngs = {"dropout": jax.random.key(seed)}
    return jit(functools.partial(model.apply, train=True))(VARIABLES, IMAGES, TIMES, rngs=rngs)

  assert not np.array_equal(train(0), train(1))
  np.testing.assert_array_equal(
    jit(model.apply)(VARIABLES, IMAGES, TIMES), jit(SMALL.apply)(VARIABLES, IMAGES, TIMES)
  )


def test_every_parameter_names_its_axes():
  boxed = jax.eval_shape(SMALL.init, jax.random.key(0), IMAGES, TIMES)
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  assert all(isinstance(x, nn.LogicallyPartitioned) for x in leaves)


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_sharded_is_unsharded(sizes):
  if jax.device_count() < 8:
    pytest.skip("needs eight devices")
  boxed = jax.eval_shape(SMALL.init, jax.random.key(0), IMAGES, TIMES)

  def loss(variables, images):
    y = SMALL.apply(variables, images, TIMES)
    return (y**2).mean(), y

  run = jax.value_and_grad(loss, has_aux=True)
  expected = jit(run)(VARIABLES, IMAGES)
  mesh = meshes.make(sizes)
  placed = meshes.variables_shardings(boxed, mesh, meshes.RULES)
  rows = meshes.batch_sharding(mesh, meshes.RULES, ("batch",), 0)
  with meshes.use(mesh, meshes.RULES):
    step = jit(run, in_shardings=(placed, rows), out_shardings=(None, placed))
    sharded = step(jax.device_put(VARIABLES, placed), jax.device_put(IMAGES, rows))
  for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  assert sharded[1]["params"]["down_0_0"]["conv_in"]["kernel"].sharding.spec[-1] == "tensor"


def test_an_image_must_be_halved_often_enough():
  with pytest.raises(ValueError, match="accepted: height and width that are multiples of 2"):
    jax.eval_shape(SMALL.init, jax.random.key(0), IMAGES[:, :7], TIMES)
