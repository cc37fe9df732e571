"""Operands sharded over batch, states or time give the results of one device, by XLA's partitioning
and with the axes known.

The eight CPU devices come from `tests/conftest.py`.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from launch import mesh as meshes
from models.kernels import dispatch, linear_scan, long_conv, s5_apply
from models.kernels.linear_scan import interface
from models.long_conv import SGConv
from models.recurrent import LRU, RGLRU
from models.ssm import S5

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="on eight devices")

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
  def apply(u, a, scale, B, C, D, x0, **options):
    return s5_apply(u, a, B, C, D, x0, scale=scale, bidirectional=True, **options)

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


def conv_problem():
  def apply(u, k, k_backward, gate, **options):
    return long_conv(u, k, k_backward=k_backward, gates=(None, gate), **options)

  u, gate = random(0, BATCH, LENGTH, WIDTH), random(1, BATCH, LENGTH, WIDTH)
  return apply, (u, random(2, WIDTH, LENGTH), random(3, WIDTH, LENGTH // 2), gate)


def with_gradients(function, *operands):
  results, pullback = jax.vjp(function, *operands)
  # Cotangents that differ from place to place, without another operand to shard.
  return results, pullback(jax.tree.map(jnp.cos, results))


def mesh(kind=AxisType.Auto, **sizes):
  if jax.device_count() < 8:
    pytest.skip("needs eight devices")
  sizes = sizes or {"x": 8}
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


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


SPECS = [
  P(("x", "y")),  # the batch over both axes
  P(None, "x", "y"),
  P("x", ("y", "z"), None),
  P("x", "y", "z"),
]
CUT = {"x": 2, "y": 2, "z": 2}
KNOWN = PROBLEMS | {"conv": conv_problem()}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("problem", KNOWN)
def test_known_axes(problem, spec):
  function, operands = KNOWN[problem]
  expected = jax.jit(partial(with_gradients, function))(*operands)
  with jax.set_mesh(mesh(**CUT)):
    run = jax.jit(partial(with_gradients, partial(function, spec=spec)))
    assert_same(run(*operands), expected)


@pytest.mark.parametrize("problem", ["per step", "s5", "conv"])
def test_kernels_on_a_mesh(problem):
  """Interpreted, with every axis cut; reversed, which passes states on the other way."""
  function, operands = KNOWN[problem]
  options = {"reverse": True} if problem == "per step" else {}
  expected = jax.jit(partial(with_gradients, partial(function, **options)))(*operands)
  options |= {"spec": P("x", "y", "z"), "implementation": "pallas_tpu_interpreted"}
  with jax.set_mesh(mesh(**CUT)):
    assert_same(jax.jit(partial(with_gradients, partial(function, **options)))(*operands), expected)


@pytest.mark.parametrize("axis", ["batch", "length"])
def test_what_is_exchanged(axis):
  """Over the batch gradients' sums, over time a state for each part, and no sequence."""
  function, operands = PROBLEMS["constant"]
  spec = P("x") if axis == "batch" else P(None, "x")
  names = jax.tree.map(lambda x: P(*("x" if n in SIZES[axis] else None for n in x.shape)), operands)
  sharded = jax.device_put(operands, jax.tree.map(partial(NamedSharding, mesh()), names))
  with jax.set_mesh(mesh()):
    run = jax.jit(partial(with_gradients, partial(function, spec=spec)))
    text = run.lower(*sharded).compile().as_text()
  moved = re.findall(r"= \(?\w+\[([\d,]*)\].* (all-gather|all-to-all|collective-permute)\(", text)
  assert bool(moved) == (axis == "length")
  assert all(
    np.prod([int(n) for n in shape.split(",")]) <= 8 * BATCH * STATES for shape, _ in moved
  )


def test_explicit_axes_are_found():
  function, (a, b, h0) = PROBLEMS["per step"]
  expected = jax.jit(partial(with_gradients, function))(a, b, h0)
  with jax.set_mesh(mesh(AxisType.Explicit, **CUT)):
    b = jax.device_put(b, P("x", "y", "z"))
    (y, h_last), gradients = jax.jit(partial(with_gradients, function))(a, b, h0)
    assert jax.typeof(y[0]).sharding.spec == P("x", "y", "z")
    assert jax.typeof(h_last[0]).sharding.spec == P("x", "z")
    assert_same(((y, h_last), gradients), expected)


def test_axes_that_do_not_divide_and_axes_that_are_not_there():
  function, operands = PROBLEMS["constant"]
  with jax.set_mesh(mesh()):
    assert_same(function(*operands, spec=P(None, None, "x")), function(*operands))
    odd = jax.tree.map(lambda x: x[..., :13], operands)
    assert_same(function(*odd, spec=P(None, None, "x")), function(*odd))
    with pytest.raises(
      ValueError, match=r"spec of linear_scan: y; accepted: axes of the mesh \(x\)"
    ):
      function(*operands, spec=P("y"))
  with pytest.raises(ValueError, match="no mesh is current"):
    function(*operands, spec=P("x"))


def test_kernels_are_chosen_where_devices_have_their_parts(monkeypatch):
  monkeypatch.setattr(dispatch, "_platform", lambda: "tpu")
  b = jnp.ones((8, 16, 4))
  chosen = []

  def part(b):
    a, h0 = jnp.ones(4), jnp.ones((len(b), 4))
    names = dispatch.choose(interface.IMPLEMENTATIONS, None, (a,), (b,), (h0,))
    chosen.append((names["tpu"], names["cpu"]))
    return b

  part(b)
  with jax.set_mesh(mesh()):
    part(b)
    jax.shard_map(part, in_specs=P("x"), out_specs=P("x"))(b)
  assert chosen == [("associative", "xla"), ("associative", "xla"), ("pallas_tpu", "xla")]


LAYERS = {
  "S5": S5(state=16, blocks=2),
  "S5, both ways": S5(state=16, bidirectional=True),
  "LRU": LRU(8),
  "RG-LRU": RGLRU(),
  "SGConv": SGConv(kernel_dim=4, max_length=16),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_name_their_axes(layer):
  """Under the rules of a mesh the sequence axis is used, and values and gradients are the same."""
  u = random(0, 4, 16, 8)
  params = nn.meta.unbox(layer.init(jax.random.key(0), u))
  run = partial(with_gradients, lambda u, params: layer.apply(params, u))
  expected = jax.jit(run)(u, params)
  with meshes.use(meshes.make({"data": 2, "sequence": 2, "tensor": 2}), meshes.RULES):
    compiled = jax.jit(run).lower(u, params).compile()
    assert_same(compiled(u, params), expected)
  assert ("all-to-all" if isinstance(layer, SGConv) else "all-gather") in compiled.as_text()
