"""QLoRA: what each method trains and keeps, Guanaco's sizes, and the real weights' own format."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments import qlora
from experiments.datasets import sources, weights
from launch import mesh as meshes
from launch.program import Program
from models import lora, pretrained, quantised

SMALL = {"vocab": 300, "features": 64, "layers": 2, "heads": 2, "mlp": 64, "remat": False}


def small(scale="laptop", **overrides):
  config = qlora.get_config(scale)
  config.update({"model": SMALL, "length": 8})
  config.update_from_flattened_dict(overrides)
  return config


def pretrained_like(config, seeds=(0, 1)):
  init = qlora.base_task(config).init
  keys = jax.random.split(jax.random.key(0), len(seeds))
  return jax.jit(jax.vmap(lambda key: nn.meta.unbox(init(key))))(keys)["params"]


def layer_of(config, method):
  return config.method.to_dict() | qlora.METHODS[method]


def start(config, method, task, params):
  keys, layer = jax.random.split(jax.random.key(1), 2), layer_of(config, method)
  fresh = jax.jit(jax.vmap(lambda key: nn.meta.unbox(task.init(key))))(keys)
  return lora.around(params, fresh, layer["format"], layer["double"])


def batch():
  text = jax.random.randint(jax.random.key(3), (3, 9), 0, 300)
  return {"inputs": text[:, :-1], "targets": text[:, 1:], "mask": jnp.ones(3)}


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qlora qv", "nf3"])
def test_what_a_method_trains_and_starts_from(method):
  """All start as their base says, to the bit or to its rounding; none but `full` trains it."""
  config = small()
  params, task = pretrained_like(config), qlora.adapt_task(config, method)
  started = start(config, method, task, params)
  wanted = Program(task, meshes.make({}, jax.devices()[:1]), (0, 1)).abstract_state
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert shapes({"params": wanted.params, **wanted.variables}) == shapes(started)
  layer = layer_of(config, method)
  trained = list(traverse_util.flatten_dict(started["params"]))
  names = {path[-1] for path in trained}
  assert names == {"lora_a", "lora_b"} if layer["rank"] else "kernel" in names
  if method == "qlora qv":
    assert {path[-2] for path in trained} == {"query", "value"}

  rest = {k: v for k, v in started.items() if k != "params"}
  loss = jax.jit(jax.vmap(lambda p, v: task.loss(p, v, batch(), jax.random.key(0), train=False)[0]))
  base = qlora.base_task(config)
  plain = jax.jit(jax.vmap(lambda p: base.loss(p, {}, batch(), jax.random.key(0), train=False)[0]))
  if layer["format"]:
    params = quantised.round_tree(params, layer["format"], double=layer["double"])
  np.testing.assert_allclose(loss(started["params"], rest), plain(params), rtol=1e-5)


def test_dropout_is_of_training_alone():
  config = small(**{"method.dropout": 0.5})
  params, task = pretrained_like(config), qlora.adapt_task(config, "qlora")
  started = jax.tree.map(lambda x: x[0], start(config, "qlora", task, params))
  adapters = jax.tree.map(lambda x: x + 0.1, started.pop("params"))

  @jax.jit
  def losses(adapters, key):
    evaluated = task.evaluate["test"].loss(adapters, started, batch(), key, train=False)[0]
    return evaluated, task.loss(adapters, started, batch(), key, train=True)[0]

  (once, drawn), (again, other) = (losses(adapters, jax.random.key(i)) for i in (0, 1))
  assert once == again and drawn != other


PARAMETERS = {"7b": 6.74e9, "13b": 13.0e9, "33b": 32.5e9, "65b": 65.3e9}


@pytest.mark.parametrize("size", qlora.PAPER)
def test_guanaco(size):
  """The model's size, adapters on every linear layer, and 4.127 bits for each weight of those."""
  config = qlora.get_config(f"paper/{size}")
  task = qlora.stages(config)["qlora"]
  program = Program(task, meshes.make({}, jax.devices()[:1]), (0,))
  layers, width, _, mlp, lr, _ = qlora.PAPER[size]
  adapters = layers * 64 * (4 * 2 * width + 3 * (width + mlp))
  assert program.parameters == adapters
  state = program.abstract_state
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  kernels = layers * width * (4 * width + 3 * mlp)
  assert count(state.variables["frozen"]) + kernels == pytest.approx(PARAMETERS[size], rel=0.01)
  frozen = traverse_util.flatten_dict(state.variables["frozen"])
  kinds = {path[-1]: leaf.dtype.name for path, leaf in frozen.items()}
  assert kinds == {"embedding": "bfloat16", "unembedding": "bfloat16", "scale": "float32"}
  stored = state.variables["quantised"]
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
  assert 8 * total / kernels == quantised.bits(stored, "nf4")
  assert quantised.bits(stored, "nf4") == pytest.approx(4.127, abs=1e-3)
  assert count(state.opt_state) == pytest.approx(2 * adapters, rel=1e-6)
  assert (config.method.lr, config.adapt.batch_size, config.adapt.steps) == (lr, 16, 1875)
  _, mesh = qlora.TOPOLOGIES.get(f"paper/{size}", qlora.TOPOLOGIES["paper/*"])
  assert (width // 64) % int(mesh.removeprefix("fsdp=")) == 0, "a block would straddle two chips"
  with pytest.raises(sources.DatasetNotFound, match="in no package"):
    task.data()


def test_smollm2_is_released_in_four_bits():
  """Its linear layers are on the asymmetric grid of 32 weights already: see the docstring."""
  try:
    tensors, metadata, _ = weights.smollm2()
  except (FileNotFoundError, ModuleNotFoundError) as error:
    pytest.skip(str(error))
  model, _ = pretrained.llama_gguf(metadata, tied="output.weight" not in tensors)
  assert (model.layers, model.features, model.mlp) == (30, 576, 1536)
  kernel_IO = jnp.array(np.asarray(tensors["blk.0.attn_q.weight"], np.float32)).T
  errors = {}
  for name, block in (("affine4", 32), ("affine4", 64), ("nf4", 64)):
    stored = quantised.quantise(kernel_IO, name, block=block, double=False)
    apart = quantised.dequantise(stored, name) - kernel_IO
    errors[name, block] = float((apart**2).sum() / (kernel_IO**2).sum())
  assert errors["affine4", 32] < 1e-6 < errors["affine4", 64] < 0.02
  assert errors["nf4", 64] < 0.02
