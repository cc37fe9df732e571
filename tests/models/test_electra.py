"""ELECTRA with probes: an oracle, who trains which layer, padding, axes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models import t5
from models.electra import Electra, Encoder

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MODEL = Electra(20, 16, 2, 2, probes=(1, 2, 4), max_length=8, std=0.3, relative_std=0.5)
TOKENS = jax.random.randint(jax.random.key(0), (3, 7), 0, 20)
POSITIONS = jnp.array([[0, 3], [6, 2], [1, 4]])


@functools.cache
def params():
  return nn.meta.unbox(jit(MODEL.init)(jax.random.key(1), TOKENS))["params"]


def apply(params, *arguments, **fields):
  return MODEL.apply({"params": params}, *arguments, **fields)


def test_the_encoder_is_its_definition():
  """In float64: norms after the sums, exact GELU, one relative bias for all layers."""
  tree = jax.tree.map(np.float64, params()["discriminator"])
  tokens = np.array(TOKENS)

  def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

  def linear(x, p):
    return x @ p["kernel"] + p["bias"]

  x = norm(np.float64(params()["embedding"])[tokens] + tree["position"][:7], tree["norm"])
  bias = tree["relative"][t5.relative_buckets(7, 7)].transpose(2, 0, 1)
  for i in (1, 2):
    layer = tree[f"layer_{i}"]
    q, k, v = (
      linear(x, layer["attention"][n]).reshape(3, 7, 2, 8) for n in ("query", "key", "value")
    )
    a = special.softmax(np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(8) + bias, axis=-1)
    mixed = np.einsum("bnls,bsnd->blnd", a, v).reshape(3, 7, 16)
    x = norm(x + linear(mixed, layer["attention"]["out"]), layer["attention_norm"])
    up = linear(x, layer["mlp"]["up"])
    y = linear(up * special.ndtr(up), layer["mlp"]["down"])
    x = norm(x + y, layer["mlp_norm"])
  found = jit(lambda p: apply(p, TOKENS, method="encode"))(params())
  np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("probe", "trained"), [(0, {1}), (1, {2}), (2, {3, 4})])
def test_a_probe_trains_the_layers_since_the_one_before(probe, trained):
  def of_states(p):
    return jnp.sin(3 * apply(p, TOKENS, POSITIONS, method="generate")[probe]).sum()

  gradient = jit(jax.grad(of_states))(params())
  learns = {n for n, g in gradient["generator"].items() if any(x.any() for x in jax.tree.leaves(g))}
  assert {n for n in learns if n.startswith("layer")} == {f"layer_{i}" for i in trained}
  assert bool(gradient["embedding"].any()) == (probe == 0)


def test_probes_of_one_network():
  """States of a probe are those of a generator cut there; one-hot codes are tokens."""
  states = jit(lambda p: apply(p, TOKENS, POSITIONS, method="generate"))(params())
  assert states.shape == (3, 3, 2, 16)
  cut = MODEL.clone(probes=(2,))
  one = jit(lambda p: cut.apply({"params": p}, TOKENS, POSITIONS, method="generate"))(params())
  np.testing.assert_array_equal(one[0], states[1])
  codes = jax.nn.one_hot(TOKENS, 20)
  np.testing.assert_array_equal(*(apply(params(), x, method="embed") for x in (codes, TOKENS)))
  logits = apply(params(), states, method="unembed")
  assert logits.shape == (3, 3, 2, 20) and logits.dtype == jnp.float32


def test_padding_is_not_seen():
  lengths = jnp.array([7, 5, 2])
  encode = jit(lambda t: apply(params(), t, lengths=lengths, method="encode"))
  inside = (jnp.arange(7) < lengths[:, None])[..., None]
  other = jnp.where(inside[..., 0], TOKENS, (TOKENS + 1) % 20)
  np.testing.assert_array_equal(encode(TOKENS) * inside, encode(other) * inside)


def test_remat_changes_no_value():
  def value(model):
    return lambda p: jnp.sin(model.apply({"params": p}, TOKENS, method="discriminate")).sum()

  plain, again = (jit(jax.grad(value(m)))(params()) for m in (MODEL, MODEL.clone(remat=True)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_every_parameter_names_its_axes():
  boxed = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  assert all(isinstance(x, nn.LogicallyPartitioned) for x in leaves)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"max_length": 3}, "length=7; accepted: up to max_length=3"),
    ({"outputs": (2, 1)}, r"outputs=\(2, 1\); accepted"),
    ({"outputs": (0, 2)}, r"outputs=\(0, 2\); accepted"),
    ({"heads": 3}, "heads=3; accepted"),
  ],
)
def test_mistakes(fields, message):
  model = Encoder(**{"layers": 2, "heads": 2, "mlp": 8, "max_length": 7} | fields)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 7, 16)))
