"""Operands sharded over batch, states or time give the results of one device.

The eight CPU devices come from `tests/conftest.py`.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models.kernels import linear_scan, s5_apply

# Sizes tell the axes apart.
BATCH, LENGTH, WIDTH, STATES = 8, 40, 24, 16
SIZES = {"batch": {BATCH}, "length": {LENGTH}, "state": {STATES, 2 * STATES}}


def random(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair(seed, *shape, size=1.0):
  return size * random(seed, *shape), size * random(seed + 1, *shape)


def decay(seed, *shape):
  rng = np.random.default_rng(seed)
  size, angle = rng.uniform(0.5, 1.0, shape), rng.uniform(-3, 3, shape)
  return jnp.float32(size * np.cos(angle)), jnp.float32(size * np.sin(angle))


def scan_problem(*decay_shape):
  operands = (
    decay(0, *decay_shape),
    pair(2, BATCH, LENGTH, STATES),
    pair(4, BATCH, STATES),
  )
  return linear_scan, operands


def s5_problem():
  def apply(u, a, scale, B, C, D, x0):
    return s5_apply(u, a, B, C, D, x0, scale=scale, bidirectional=True)

  operands = (
    random(0, BATCH, LENGTH, WIDTH),
    decay(1, BATCH, LENGTH, STATES),
    pair(3, BATCH, LENGTH, STATES),
    pair(5, STATES, WIDTH, size=0.1),
    pair(7, WIDTH, 2 * STATES, size=0.1),
    random(9, WIDTH),
    pair(10, BATCH, STATES),
  )
  return apply, operands


PROBLEMS = {
  "constant": scan_problem(STATES),
  "per step": scan_problem(BATCH, LENGTH, STATES),
  "s5": s5_problem(),
}


def with_gradients(function, *operands):
  results, pullback = jax.vjp(function, *operands)
  # Cotangents that differ from place to place, without another operand to shard.
  return results, pullback(jax.tree.map(jnp.cos, results))


def mesh():
  if jax.device_count() < 8:
    pytest.skip("needs eight devices")
  return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def assert_same(got, expected):
  for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_axes(problem):
  function, operands = PROBLEMS[problem]
  run = jax.jit(partial(with_gradients, function))
  expected = run(*operands)
  for axis, sizes in SIZES.items():
    names = jax.tree.map(
      lambda x, sizes=sizes: P(*("x" if n in sizes else None for n in x.shape)), operands
    )
    sharded = jax.device_put(operands, jax.tree.map(partial(NamedSharding, mesh()), names))
    compiled = run.lower(*sharded).compile()
    assert_same(compiled(*sharded), expected)
    if axis != "length":
      # Sums over a sharded axis may travel, sequences may not. What else may is C, whose halves for
      # the two directions are not the halves that the devices hold.
      moved = {"all-gather", "all-to-all", "collective-permute"}
      moved -= {"all-to-all", "collective-permute"} if (axis, problem) == ("state", "s5") else set()
      assert not moved & set(re.findall(r"[a-z-]+", compiled.as_text()))


def test_shard_map_over_batch():
  function, operands = PROBLEMS["constant"]
  mapped = jax.shard_map(
    function, mesh=mesh(), in_specs=(P(), P("x"), P("x")), out_specs=P("x"), check_vma=False
  )
  got = jax.jit(partial(with_gradients, mapped))(*operands)
  assert_same(got, jax.jit(partial(with_gradients, function))(*operands))
