"""Adapters: what they add, what is trained, and that they can be merged away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from launch import mesh as meshes
from launch import supervised
from models import attention, lora, quantised
from models.quantised import QuantisedDense
from models.transformer import Transformer
from objectives import language

SIZES = {"vocab": 11, "features": 64, "layers": 2, "heads": 2, "mlp": 128, "position": "rotary"}
BASES = {"float": attention.dense, "nf4": QuantisedDense}
EXAMPLE = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((7,), jnp.int32))


def model(base="float", *, scan=False, targets=None, dropout=0.0):
  options = {"rank": 4, "alpha": 8.0, "targets": targets, "dropout": dropout}
  dense = functools.partial(lora.dense, base=BASES[base], **options)
  return Transformer(**SIZES, scan=scan, use_bias=False, dense=dense)


def tokens(batch=3):
  text = jax.random.randint(jax.random.key(3), (batch, 8), 0, 11)
  return {"inputs": text[:, :-1], "targets": text[:, 1:], "mask": jnp.ones(batch)}


def perturbed(params):
  """Adapters that do something: B starts at zero."""
  flat, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(flat))
  return tree.unflatten(
    [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, flat, strict=True)]
  )


def test_the_layer_in_float64():
  layer = lora.dense(5, ("embed", "mlp"), rank=3, alpha=6.0)
  x_BI = jax.random.normal(jax.random.key(1), (4, 16))
  variables = meshes.unboxed(layer.init(jax.random.key(0), x_BI))
  params = perturbed(variables["params"])
  assert set(params) == {"kernel", "bias", "lora_a", "lora_b"}
  kernel, bias, a, b, x = (
    np.asarray(v, np.float64)
    for v in (*(params[k] for k in ("kernel", "bias", "lora_a", "lora_b")), x_BI)
  )
  wanted = x @ kernel + bias + 2.0 * (x @ a) @ b  # alpha / r = 2
  np.testing.assert_allclose(layer.apply({"params": params}, x_BI), wanted, rtol=1e-4, atol=1e-5)


def test_starts_as_the_layer_without():
  """A is uniform within 1 / sqrt(in), B zero, so that A learns from the second step on."""
  adapted, plain = model(), Transformer(**SIZES, use_bias=False)
  params = meshes.unboxed(jax.jit(adapted.init)(jax.random.key(0), tokens()["inputs"]))["params"]
  adapters, rest = lora.split(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
    if path[-1].key == "lora_a":
      assert 0.9 < float(jnp.abs(leaf).max()) * leaf.shape[0] ** 0.5 <= 1
    else:
      assert not leaf.any()
  np.testing.assert_array_equal(
    adapted.apply({"params": params}, tokens()["inputs"]),
    plain.apply({"params": rest}, tokens()["inputs"]),
  )


@pytest.mark.parametrize(("base", "scan"), [("float", False), ("nf4", True)])
def test_merged_is_the_same_model(base, scan):
  adapted, plain = model(base, scan=scan), Transformer(**SIZES, scan=scan, use_bias=False)
  variables = meshes.unboxed(jax.jit(adapted.init)(jax.random.key(0), tokens()["inputs"]))
  adapters, rest = lora.split(variables["params"])
  params = lora.join(perturbed(adapters), rest)
  if base == "nf4":
    with pytest.raises(ValueError, match="kernel: missing"):
      lora.merge(params, 8.0)
    params = quantised.dequantise_tree(params, variables["quantised"], "nf4")
  merged = lora.merge(params, 8.0)
  assert not jax.tree.leaves(lora.split(merged)[0])
  kept = {k: v for k, v in variables.items() if k != "params"}
  whole = lora.join(perturbed(adapters), rest)
  np.testing.assert_allclose(
    jax.jit(adapted.apply)({"params": whole, **kept}, tokens()["inputs"]),
    jax.jit(plain.apply)({"params": merged}, tokens()["inputs"]),
    atol=1e-4,
  )


def test_targets():
  chosen = model(targets=("query", "value"))
  params = jax.eval_shape(chosen.init, jax.random.key(0), tokens()["inputs"])["params"]
  flat = traverse_util.flatten_dict(lora.split(params)[0])
  assert {path[-2] for path in flat} == {"query", "value"} and len(flat) == 2 * 2 * 2
  with pytest.raises(ValueError, match="rank=0; accepted: at least 1"):
    lora.dense(3, (None, None), rank=0, alpha=1.0)


@pytest.mark.parametrize("base", BASES)
def test_dropout_is_of_the_adapter_alone(base):
  layer = lora.dense(5, ("embed", "mlp"), rank=3, alpha=6.0, dropout=0.5, base=BASES[base])
  x_BI = jax.random.normal(jax.random.key(1), (4, 64))
  variables = meshes.unboxed(layer.init(jax.random.key(0), x_BI))
  dropped = functools.partial(layer.apply, rngs={"dropout": jax.random.key(2)})
  np.testing.assert_array_equal(dropped(variables, x_BI), layer.apply(variables, x_BI))  # B = 0
  other = variables | {"params": perturbed(variables["params"])}
  assert jnp.abs(dropped(other, x_BI) - layer.apply(other, x_BI)).max() > 1e-3


@pytest.mark.parametrize(("base", "scan"), [("float", True), ("nf4", False), ("nf4", True)])
def test_only_adapters_learn(base, scan):
  """Two steps of two seeds: adapters move, nothing else does, and moments are of no other."""
  plain = supervised(model(base, scan=scan), language.next_token, EXAMPLE)
  init, loss = lora.freeze(*plain)
  keys = jax.random.split(jax.random.key(0), 2)
  variables = jax.vmap(lambda key: meshes.unboxed(init(key)))(keys)
  params = variables.pop("params")
  paths = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  assert set(paths) == {"lora_a", "lora_b"}
  assert set(variables) == {"frozen"} | ({"quantised"} if base == "nf4" else set())
  optimizer = optax.adam(0.01)

  @jax.jit
  @jax.vmap
  def step(params, variables, state):
    (_, (_, variables)), grads = jax.value_and_grad(
      lambda p: loss(p, variables, tokens(), jax.random.key(0), train=True), has_aux=True
    )(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), variables, state

  state = jax.vmap(optimizer.init)(params)
  moved, after = params, variables
  for _ in range(2):
    moved, after, state = step(moved, after, state)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), params, moved))
  assert jax.tree.structure(after) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, after, variables)
  assert sum(x.size for x in jax.tree.leaves(state[0].mu)) == sum(
    x.size for x in jax.tree.leaves(params)
  )


def test_axes_follow_the_layer():
  init, _ = lora.freeze(*supervised(model("nf4", scan=True), language.next_token, EXAMPLE))
  boxed = jax.eval_shape(init, jax.random.key(0))
  up = boxed["params"]["layer"]["mlp"]["up"]
  assert up["lora_a"].names == ("layers", "embed", None)
  assert up["lora_b"].names == ("layers", None, "mlp")
  stored = boxed["quantised"]["layer"]["mlp"]["up"]["kernel"]
  assert stored["codes"].names == ("layers", "mlp", "embed")
  assert stored["scale_scale"].names == ("layers", None)
