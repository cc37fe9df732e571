"""Formats against their definitions and float64; the layer against Dense, in memory and sharded."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import mesh as meshes
from models import quantised
from models.quantised import FORMATS, QuantisedDense, dequantise, quantise
from models.transformer import Transformer


def test_nf4_is_the_published_table():
  levels = FORMATS["nf4"].levels
  np.testing.assert_allclose(levels, quantised.normal_float(4), atol=2e-7)
  assert len(levels) == 16 and sum(np.array(levels) < 0) == 7 and levels[1] == -0.6961928009986877


@pytest.mark.parametrize("name", FORMATS)
def test_levels_ascend_from_minus_one_to_one(name):
  levels = np.array(FORMATS[name].levels)
  assert levels[0] == -1 and levels[-1] == 1 and (np.diff(levels) > 0).all()
  assert (0 in levels) or FORMATS[name].centred


def test_the_map_of_scales():
  levels = np.array(quantised.SCALES)
  assert len(levels) == 256 and (np.diff(levels) > 0).all()
  assert levels[-1] == 1 and 0 in levels and levels[0] > -1
  for i in range(7):  # 2^i values of either sign in each decade
    inside = (levels > 10.0 ** (i - 7)) & (levels < 10.0 ** (i - 6))
    assert inside.sum() == 2**i


@pytest.mark.parametrize("per_byte", [1, 2, 4])
def test_packing(per_byte):
  codes = np.random.RandomState(0).randint(0, 2 ** (8 // per_byte), (3, 16)).astype(np.uint8)
  packed = quantised.pack(codes, per_byte)
  assert packed.shape == (3, 16 // per_byte) and packed.dtype == jnp.uint8
  np.testing.assert_array_equal(quantised.unpack(packed, per_byte), codes)
  first = np.array([[1] + [0] * (per_byte - 1)], np.uint8)
  assert quantised.pack(first, per_byte)[0, 0] == 2 ** (8 - 8 // per_byte)  # the highest bits


def oracle(w_IO, name, block=64):
  """Rounded weights in float64, every level tried; and the scales (O, N)."""
  levels, centred = np.array(FORMATS[name].levels), FORMATS[name].centred
  w = np.asarray(w_IO, np.float64).T.reshape(w_IO.shape[1], -1, block)
  middle = (w.max(-1, keepdims=True) + w.min(-1, keepdims=True)) / 2 if centred else 0.0
  scale = np.abs(w - middle).max(-1, keepdims=True)
  near = np.abs(((w - middle) / scale)[..., None] - levels).argmin(-1)
  return (levels[near] * scale + middle).reshape(w_IO.shape[1], -1).T, scale[..., 0]


@pytest.mark.parametrize("name", FORMATS)
def test_against_float64(name):
  block = 32 if name == "int4" else 64
  w_IO = np.random.RandomState(1).randn(128, 24).astype(np.float32)
  stored = quantise(jnp.array(w_IO), name, block=block, double=False)
  wanted, scale_ON = oracle(w_IO, name, block)
  np.testing.assert_allclose(dequantise(stored, name), wanted, atol=1e-6)
  np.testing.assert_allclose(stored["scale"], scale_ON, rtol=1e-6)
  widest = np.diff(FORMATS[name].levels).max() / 2
  bound = np.repeat(scale_ON, block, axis=1).T * widest + 1e-6
  assert (np.abs(dequantise(stored, name) - w_IO) <= bound).all()
  if not FORMATS[name].centred:  # what is on the grid stays
    again = quantise(dequantise(stored, name), name, block=block, double=False)
    np.testing.assert_array_equal(again["codes"], stored["codes"])


def test_halfway_goes_down_and_zeros_stay():
  assert quantised.nearest(jnp.array([0.5, -0.5, 0.51]), (-1.0, 0.0, 1.0)).tolist() == [1, 0, 2]
  for double in (False, True):
    stored = quantise(jnp.zeros((64, 3)), "nf4", double=double)
    np.testing.assert_array_equal(dequantise(stored, "nf4"), np.zeros((64, 3)))


@pytest.mark.parametrize(
  ("name", "normal", "uniform"),
  [
    ("nf4", 0.0085, 0.0083),
    ("int4", 0.0116, 0.0049),
    ("affine4", 0.0083, 0.0040),
    ("fp4", 0.0149, None),
    ("fp4_e2m1", 0.0112, None),  # with subnormals as floats have them, level with int4
    ("fp4_e3m0", 0.035, None),
  ],
)
def test_squared_error_of_blocks_of_64(name, normal, uniform):
  random = np.random.RandomState(0)
  drawn = {"normal": random.randn(64, 4000), "uniform": random.uniform(-1, 1, (64, 4000))}
  for kind, wanted in (("normal", normal), ("uniform", uniform)):
    w = drawn[kind].astype(np.float32)
    rounded = dequantise(quantise(jnp.array(w), name, double=False), name)
    error = ((rounded - w) ** 2).sum() / (w**2).sum()
    assert wanted is None or error == pytest.approx(wanted, rel=0.04)


def test_double_quantisation():
  """arXiv:2305.14314, section 3: 0.373 bits less a weight, at next to no further error."""
  w_IO = jax.random.normal(jax.random.key(0), (1024, 640))
  once, twice = (quantise(w_IO, "nf4", double=double) for double in (False, True))
  assert 8 * sum(x.nbytes for x in once.values()) / w_IO.size == 4.5
  assert quantised.bits({"a": once, "b": {"c": once}}, "nf4") == 4.5
  assert quantised.bits(twice, "nf4") == pytest.approx(4.127, abs=1e-3)
  errors = [float(((dequantise(s, "nf4") - w_IO) ** 2).mean()) for s in (once, twice)]
  assert errors[1] < 1.01 * errors[0]
  # Scales are positive: without the mean, the code's negative half would be idle.
  scale = once["scale"].ravel()
  kept = np.array(quantised.SCALES)[quantised.nearest(scale / scale.max(), quantised.SCALES)]
  rounded = twice["scale_codes"].astype(jnp.int32)
  assert rounded.min() < 20 and rounded.max() == 255
  index = np.arange(scale.size) // 256
  ours = np.array(quantised.SCALES)[rounded.ravel()] * twice["scale_scale"][index]
  ours += twice["scale_mean"]
  assert np.square(ours - scale).mean() < 0.3 * np.square(kept * scale.max() - scale).mean()


def test_a_last_block_of_scales_may_be_short():
  w_IO = jax.random.normal(jax.random.key(0), (576, 100))  # 900 scales
  stored = quantise(w_IO, "nf4")
  assert stored["scale_scale"].shape == (4,)
  np.testing.assert_allclose(
    dequantise(stored, "nf4"), dequantise(quantise(w_IO, "nf4", double=False), "nf4"), atol=0.03
  )


def test_refusals():
  with pytest.raises(ValueError, match="in=96; accepted: multiples of block=64"):
    quantise(jnp.ones((96, 4)), "nf4")
  with pytest.raises(ValueError, match="format='nf5'; accepted: nf4, nf2"):
    quantise(jnp.ones((64, 4)), "nf5")


@pytest.mark.parametrize("fields", [{}, {"double": False}, {"format": "affine4"}, {"remat": False}])
def test_the_layer_is_dense_with_the_rounded_kernel(fields):
  layer = QuantisedDense(12, ("embed", "mlp"), **fields)
  x_BI = jax.random.normal(jax.random.key(1), (5, 128))
  variables = meshes.unboxed(jax.jit(layer.init)(jax.random.key(0), x_BI))
  assert list(variables["params"]) == ["bias"]
  kernel_IO = dequantise(variables["quantised"]["kernel"], layer.format)

  def ours(x):
    return layer.apply(variables, x)

  value, slope = jax.jit(jax.value_and_grad(lambda x: (ours(x) ** 2).sum() / 2))(x_BI)
  y_BO = x_BI @ kernel_IO
  np.testing.assert_allclose(ours(x_BI), y_BO, atol=1e-5)
  np.testing.assert_allclose(value, (y_BO**2).sum() / 2, rtol=1e-5)
  np.testing.assert_allclose(slope, y_BO @ kernel_IO.T, atol=1e-4)
  assert ours(x_BI.astype(jnp.bfloat16)).dtype == jnp.bfloat16


SIZES = {"vocab": 11, "features": 64, "layers": 2, "heads": 2, "mlp": 128, "position": "rotary"}


@pytest.mark.parametrize("scan", [False, True])
def test_pretrained_kernels_become_the_collection(scan):
  """A model's own quantisation and `quantise_tree` agree in structure; seeds are mapped."""
  model = Transformer(**SIZES, scan=scan, use_bias=False)
  low = model.clone(dense=QuantisedDense)
  tokens = jnp.zeros((1, 3), jnp.int32)

  def start(model, key):
    return meshes.unboxed(model.init(key, tokens))

  seeds = jax.random.split(jax.random.key(0), 2)
  params = jax.jit(jax.vmap(functools.partial(start, model)))(seeds)["params"]
  rest, stored = jax.jit(lambda p: quantised.quantise_tree(p, "nf4"))(params)
  abstract = jax.eval_shape(jax.vmap(functools.partial(start, low)), seeds)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert shapes(abstract["params"]) == shapes(rest)
  assert shapes(abstract["quantised"]) == shapes(stored)
  rounded = quantised.dequantise_tree(rest, stored, "nf4")
  assert shapes(rounded) == shapes(params)
  text = jax.random.randint(jax.random.key(3), (2, 7), 0, 11)
  apply = lambda model, v: jax.jit(jax.vmap(lambda v: model.apply(v, text)))(v)  # noqa: E731
  ours = apply(low, {"params": rest, "quantised": stored})
  np.testing.assert_allclose(ours, apply(model, {"params": rounded}), atol=1e-4)
  assert jnp.abs(ours - apply(model, {"params": params})).max() > 1e-3


def temporaries(remat, layers=8, width=512):
  """What a compiled gradient of scanned layers needs, over the bytes of their float weights."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return jnp.tanh(QuantisedDense(width, ("embed", "mlp"), remat=remat)(x)), None

  axes = {"variable_axes": {True: 0}, "split_rngs": {True: True}, "length": layers}
  stack = nn.scan(Layer, **axes, metadata_params={nn.PARTITION_NAME: "layers"})()
  x_BI = jax.ShapeDtypeStruct((4, width), jnp.float32)
  abstract = meshes.unboxed(jax.eval_shape(stack.init, jax.random.key(0), x_BI, None))

  def loss(params, stored, x):
    return stack.apply({"params": params, "quantised": stored}, x, None)[0].sum()

  compiled = (
    jax.jit(jax.grad(loss)).lower(abstract["params"], abstract["quantised"], x_BI).compile()
  )
  return compiled.memory_analysis().temp_size_in_bytes / (layers * width**2 * 4)


def test_no_float_copy_of_the_weights_is_kept():
  assert temporaries(remat=True) < 0.25, "one of eight matrices at a time"
  assert temporaries(remat=False) > 1, "all eight"


def test_sharded_as_one():
  """Codes and scales shard along the kernel's axes, and nothing changes."""
  layer = QuantisedDense(64, ("embed", "mlp"), use_bias=False)
  x_BI = jax.random.normal(jax.random.key(1), (8, 256))
  boxed = jax.eval_shape(layer.init, jax.random.key(0), x_BI)
  variables = meshes.unboxed(layer.init(jax.random.key(0), x_BI))
  mesh = meshes.make({"data": 1, "fsdp": 4, "tensor": 2})
  shardings = meshes.variables_shardings(boxed, mesh, meshes.RULES)
  placed = jax.device_put(variables, shardings)
  codes = placed["quantised"]["kernel"]["codes"]
  assert codes.sharding.shard_shape(codes.shape) == (32, 32)  # of (64, 128)
  function = jax.jit(
    lambda v, x: (layer.apply(v, x), jax.grad(lambda x: layer.apply(v, x).sum())(x))
  )
  with meshes.use(mesh, meshes.RULES):
    ours = function(placed, x_BI)
  for a, b in zip(ours, function(variables, x_BI), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
