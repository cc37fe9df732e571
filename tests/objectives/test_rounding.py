"""Rounded losses: the same loss with other kernels, and their error in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from models import quantised
from objectives import rounding


def network(key):
  one, two = (jax.random.normal(k, (2, 64, 8)) for k in jax.random.split(key))
  return {"embedding": one[0], "a": {"kernel": one}, "b": {"kernel": two, "bias": two[0, 0]}}


def loss(params, variables, batch, key, *, train):
  assert not train
  value = sum(jnp.tanh(x).sum() for x in jax.tree.leaves(params)) * batch["x"].sum()
  return value, ({"loss": (value, jnp.ones(()))}, variables)


def test_errors_and_losses_are_of_rounded_kernels_alone():
  params, batch, key = network(jax.random.key(0)), {"x": jnp.array([0.5, 0.25])}, jax.random.key(1)
  formats = {"int2": ("int2", False), "nf4+dq": ("nf4", True)}
  measure = jax.jit(
    lambda p: rounding.rounded(loss, tuple(formats))(p, {"left": 3.0}, batch, key, train=False)
  )
  value, (metrics, variables) = measure(params)
  assert variables == {"left": 3.0} and float(metrics["loss"][0]) == float(value)
  for name, (form, double) in formats.items():
    other = quantised.round_tree(params, form, double=double)
    np.testing.assert_array_equal(other["embedding"], params["embedding"])
    np.testing.assert_array_equal(other["b"]["bias"], params["b"]["bias"])
    wanted = loss(other, {}, batch, key, train=False)[0]
    np.testing.assert_allclose(metrics[f"loss {name}"][0], wanted, rtol=1e-5)
    flat, rounded = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, other))
    kernels = [path for path in flat if path.endswith("kernel")]
    apart = sum(np.square(np.float64(flat[p]) - np.float64(rounded[p])).sum() for p in kernels)
    whole = sum(np.square(np.float64(flat[p])).sum() for p in kernels)
    np.testing.assert_allclose(metrics[f"error {name}"], [apart, whole], rtol=1e-5)


def test_losses_one_format_at_a_time():
  params, key = network(jax.random.key(2)), jax.random.key(1)
  batches = [{"x": jnp.ones(n)} for n in (1, 2)]

  def plain(params, batch):
    return loss(params, {}, batch, key, train=False)[0]

  found = rounding.losses(plain, params, batches, ("int3",))
  assert list(found) == ["as released", "int3"]
  other = quantised.round_tree(params, "int3", double=False)
  for name, tree in (("as released", params), ("int3", other)):
    np.testing.assert_allclose(found[name], [plain(tree, b) for b in batches], rtol=1e-5)
