"""Plans: names of topologies, what the compiled text says, warnings, exit codes, libtpu."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from launch import ConfigurationError, Task
from launch import mesh as meshes
from launch import plan as plans
from launch.plan import __main__ as command
from launch.plan import hlo, libtpu, roofline, stages, topologies
from launch.program import Program

with_libtpu = pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed")
ROOT = pathlib.Path(__file__).parents[2]


# Topologies


@pytest.mark.parametrize(
  ("name", "chips", "shape"),
  [
    ("v5e-1", 1, "1x1"),
    ("v5e-8", 8, "2x4"),
    ("v5e-16", 16, "4x4"),
    ("v6e-256", 256, "16x16"),
    ("v5e-256x4", 1024, "16x16"),
    ("v4-8", 4, "2x2x1"),
    ("v4-32", 16, "2x2x4"),
    ("v5p-2", 1, "1x1x1"),
    ("v5p-16", 8, "2x2x2"),
    ("v5p-128", 64, "4x4x4"),
    ("v5p-2048", 1024, "8x8x16"),
    ("host-8", 8, ""),
    ("cuda-64", 64, ""),
  ],
)
def test_names(name, chips, shape):
  topology = topologies.parse(name)
  assert (topology.chips, topology.shape) == (chips, shape)


@pytest.mark.parametrize(
  "name", ["v5e", "v5e-3", "v5e-512", "v5p-1", "v7-8", "host-0", "host-8x2", "v5e-8x0", "v5e-8 x2"]
)
def test_unknown_names(name):
  with pytest.raises(ConfigurationError, match=r"--topology=.*accepted: v5e-N with N = 1, 2, 4"):
    topologies.parse(name)


@with_libtpu
@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v4-8", "v5p-2", "v5p-4", "v6e-16", "v5e-4x2"])
def test_every_topology_has_one_device_a_chip(name):
  topology = topologies.parse(name)
  devices = topology.devices()
  assert len(devices) == topology.chips
  assert len({getattr(d, "slice_index", 0) for d in devices}) == topology.slices


# What the text says


def mesh_of(**sizes):
  count = math.prod(sizes.values())
  types = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:count]
  )


def compiled(function, *shapes, mesh, specs):
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    for shape, spec in zip(shapes, specs, strict=True)
  ]
  return jax.jit(function).lower(*arguments).compile()


def constrain(x, mesh, *spec):
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize(
  ("attributes", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}, x={}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4], device_ids=([2,2]T(1,0)) {'a':(1)2}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4,'b'=1], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 2, 1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
  ],
)
def test_groups_in_every_notation(attributes, groups):
  found = hlo._groups(attributes)
  assert sorted(map(sorted, found)) == sorted(map(sorted, groups))


@pytest.mark.parametrize(
  ("text", "size", "bytes_", "space"),
  [
    ("f32[3,5]", 15, 60, 0),
    ("f32[]{:T(128)}", 1, 512, 0),
    ("f32[3,5]{1,0:T(8,128)}", 15, 8 * 128 * 4, 0),
    ("bf16[3,5]{0,1:T(8,128)(2,1)S(1)}", 15, 8 * 128 * 2, 1),
    ("bf16[1,25,2048,2,8]{2,3,1,0,4:T(2,128)(2,1)}", 819200, 819200 * 2, 0),
    ("pred[7]{0}", 7, 7, 0),
    ("c64[7]{0}", 7, 56, 0),
    ("f8e4m3fn[7]{0}", 7, 7, 0),
  ],
)
def test_sizes_in_memory(text, size, bytes_, space):
  (found,) = hlo._ARRAY.finditer(text)
  array = hlo._array(*found.groups())
  assert (array.size, array.bytes, array.space) == (size, bytes_, space)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_collectives_are_told_by_kind_axis_and_bytes(axis):
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  rows = {}
  for name, out in (("gather", (None, None)), ("move", (None, axis))):
    function = lambda x, out=out: constrain(x * 2, mesh, *out) + 1  # noqa: E731
    program = compiled(function, (64, 128), mesh=mesh, specs=[(axis, None)])
    rows[name] = hlo.collectives(hlo.parse(program.as_text()), mesh.shape)
  total = compiled(lambda x: x.sum(0), (64, 128), mesh=mesh, specs=[(axis, None)])
  rows["sum"] = hlo.collectives(hlo.parse(total.as_text()), mesh.shape)
  expected = {  # of two devices each sends half of what it ends with, twice for a sum
    "gather": ("all-gather", 64 * 128 * 4 // 2),
    "move": ("all-to-all", 64 * 64 * 4 // 2),
    "sum": ("all-reduce", 128 * 4),
  }
  for name, (kind, size) in expected.items():
    assert rows[name] == [{"kind": kind, "axes": axis, "count": 1, "bytes": size}]


def test_collectives_in_loops_count_as_often_as_they_run():
  mesh = mesh_of(data=2, tensor=4)

  def step(_, x):
    return constrain(jnp.sin(constrain(x, mesh, "tensor")), mesh, None)

  program = compiled(lambda x: jax.lax.fori_loop(0, 5, step, x), (64,), mesh=mesh, specs=[(None,)])
  module = hlo.parse(program.as_text())
  assert hlo.iterations(module) == 5
  (row,) = hlo.collectives(module, mesh.shape)
  assert row == {"kind": "all-gather", "axes": "tensor", "count": 5, "bytes": 5 * 64 * 4 * 3 // 4}


def matmuls(x, w):
  for _ in range(3):
    x = jnp.tanh(x @ w)
  return x


def test_traffic_without_loops_is_the_compilers():
  mesh = mesh_of(data=1)
  program = compiled(
    jax.grad(lambda x, w: matmuls(x, w).sum()),
    (64, 32),
    (32, 32),
    mesh=mesh,
    specs=[(), ()],
  )
  module = hlo.parse(program.as_text())
  counted = program.cost_analysis()["flops"]
  assert hlo.flops(module, counted) == counted
  assert hlo.traffic(module) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.05)


def test_loops_count_as_often_as_they_run():
  """Nested: 4 x 3 products in a loop, none of it counted twice, rows read and written in place."""
  mesh = mesh_of(data=1)

  def outer(i, carry):
    x, w, rows = carry
    x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
    return x, w, jax.lax.dynamic_update_slice(rows, x[None, :1], (i, 0, 0))

  def function(x, w, rows):
    return jax.lax.fori_loop(0, 4, outer, (x, w, rows))[::2]

  program = compiled(function, (64, 32), (32, 32), (4096, 1, 32), mesh=mesh, specs=[(), (), ()])
  module = hlo.parse(program.as_text())
  assert hlo.iterations(module) == 4 + 12
  flops = hlo.flops(module, program.cost_analysis()["flops"])
  assert flops == pytest.approx(12 * 2 * 64 * 32 * 32, rel=0.1)
  assert hlo.traffic(module) < 3 * 4096 * 32 * 4  # the rows in and out, not at every step
  assert hlo.loop_copies(module) < 1000


def test_resharding_is_noticed_where_nothing_asked_for_it():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  everything = ("fsdp", "data", "tensor")
  programs = {
    "moved": (lambda x: constrain(jnp.sin(x), mesh, None, "tensor") + 1, ("tensor", None)),
    "gathered, then sliced": (
      lambda x: constrain(jnp.sin(x), mesh, "tensor", "data") + 1,
      (everything, None),
    ),
    "gathered over data": (lambda x: constrain(jnp.sin(x), mesh, None) + 1, ("data", None)),
    "whole weights": (lambda x: constrain(jnp.sin(x), mesh, None) + 1, ("fsdp", None)),
    "asked for": (
      jax.shard_map(
        lambda x: jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True),
        mesh=mesh,
        in_specs=PartitionSpec("tensor", None),
        out_specs=PartitionSpec(None, "tensor"),
      ),
      ("tensor", None),
    ),
  }
  found = {}
  for name, (function, spec) in programs.items():
    program = compiled(function, (512, 512), mesh=mesh, specs=[spec])
    found[name] = hlo.reshardings(hlo.parse(program.as_text()), mesh.shape, at_least=1000)
  kinds = {name: [kind for _, kind, _ in rows] for name, rows in found.items()}
  assert kinds == {
    "moved": ["all-to-all"],
    "gathered, then sliced": ["all-gather"],
    "gathered over data": ["all-gather"],
    "whole weights": [],
    "asked for": [],
  }
  assert found["moved"][0][0] == "sin"
  assert found["moved"][0][2] == 512 * 256 * 4


@with_libtpu
def test_flops_of_loops_on_a_tpu():
  """Batched products, which a TPU's compiler writes as convolutions that are mostly padding."""
  (device,) = topologies.parse("v5e-1").devices()
  sharding = jax.sharding.SingleDeviceSharding(device)
  x, w = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    for shape in ((6, 256, 128), (6, 128, 128))
  )

  def text(steps):
    function = lambda x, w: jax.lax.fori_loop(0, steps, lambda _, x: x @ w, x)  # noqa: E731
    program, _ = plans._compile(jax.jit(function).lower(x, w))
    return roofline.roofline(program, device.device_kind).flops

  assert text(7) == pytest.approx(7 * 2 * 6 * 256 * 128 * 128, rel=0.02)


LIBRARY_CALLS = """HloModule jit_f

%condition (c: (s32[], bf16[64,32])) -> pred[] {
  %c = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %b = (s32[], bf16[64,32]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%b), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%b), index=1
  %w = bf16[32,32]{1,0} constant({...})
  %gemm = (bf16[64,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/while/body/dot_general"}, \
backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %y = bf16[64,32]{1,0} get-tuple-element(%gemm), index=0
  ROOT %t = (s32[], bf16[64,32]{1,0}) tuple(%k, %y)
}

ENTRY %main (p: (s32[], bf16[64,32]), u: f32[4,8,8,16], v: f32[3,3,16,5]) -> f32[] {
  %p = (s32[], bf16[64,32]{1,0}) parameter(0)
  %u = f32[4,8,8,16]{3,2,1,0} parameter(1)
  %v = f32[3,3,16,5]{3,2,1,0} parameter(2)
  %d = f32[4,6,6,5]{3,2,1,0} parameter(3)
  %loop = (s32[], bf16[64,32]{1,0}) while(%p), condition=%condition, body=%body
  %forward = (f32[4,6,6,5]{3,2,1,0}, u8[0]{0}) custom-call(%u, %v), window={size=3x3}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %input = (f32[4,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%d, %v), window={size=3x3}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput"
  ROOT %filter = (f32[3,3,16,5]{3,2,1,0}, u8[0]{0}) custom-call(%u, %d), window={size=3x3}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
}
"""


def test_calls_of_a_gpus_libraries_are_counted():
  """In a loop too, without the space that they work in; the compiler counts none of it."""
  module = hlo.parse(LIBRARY_CALLS)
  convolution = 2 * (4 * 6 * 6 * 5) * 3 * 3 * 16
  compares = 5
  flops = 5 * 2 * 64 * 32 * 32 + 3 * convolution + compares
  assert hlo.flops(module, 7.0) == flops
  arrays = 3 * 4 * (4 * 8 * 8 * 16 + 3 * 3 * 16 * 5 + 4 * 6 * 6 * 5)
  assert hlo.traffic(module) == pytest.approx(5 * 2 * (2 * 64 * 32 + 32 * 32) + arrays, rel=0.01)


# Rooflines


def test_a_roofline_of_a_compiled_program():
  mesh = mesh_of(tensor=8)
  program = compiled(lambda x: x @ x.T, (64, 1024), mesh=mesh, specs=[(None, "tensor")])
  found = roofline.roofline(program, "NVIDIA H100 80GB HBM3")
  assert found is not None
  assert found.flops == pytest.approx(2 * 64 * 64 * 128, rel=0.1)
  sent = 2 * 7 / 8 * 64 * 64 * 4
  expected = {"compute": found.flops / 989.5e12, "memory": found.bytes / 3350e9}
  assert found.seconds == pytest.approx(expected | {"interconnect": sent / 450e9})
  assert found.step == max(found.seconds.values()) == found.seconds[found.bound]
  assert found.mfu(2 * found.seconds["compute"]) == pytest.approx(0.5)
  assert found.unknown == ()
  assert roofline.roofline(program, jax.devices()[0].device_kind) is None
  nothing_known = roofline.of_module(hlo.parse(program.as_text()), 0.0, roofline.CHIPS["host"])
  assert nothing_known.unknown == ("compute", "memory", "interconnect")
  assert (nothing_known.step, nothing_known.bound) == (0.0, None)
  assert math.isnan(nothing_known.mfu(1.0))


@with_libtpu
@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e"])
def test_kinds_of_device_are_known_by_the_names_that_they_have(kind):
  (device,) = topologies.parse(f"{kind}-{2 if kind in topologies.DEEP else 1}").devices()
  assert roofline.KINDS[device.device_kind] == kind


def test_every_kind_has_peaks():
  for chip in roofline.KINDS.values():
    figures = roofline.CHIPS[chip]
    assert figures.flops and figures.bandwidth and figures.links


# Plans


WIDTH = 1024


def task(logical=("embed", "mlp"), width=WIDTH, **fields):
  """One large parameter."""
  import flax.linen as nn

  def init(key):
    w = jax.random.normal(key, (width, width))
    return {"params": {"w": nn.LogicallyPartitioned(w, logical)}}

  def loss(params, variables, batch, key, *, train):
    value = jnp.mean((batch["inputs"] @ params["w"]) ** 2)
    return value, ({"loss": (value, jnp.ones(()))}, variables)

  example = {"inputs": jax.ShapeDtypeStruct((width,), np.float32)}
  defaults = {
    "init": init,
    "loss": loss,
    "optimizer": optax.adam(1e-3),
    "example": example,
    "batch_size": 16,
    "steps": 1,
  }
  return Task(**(defaults | fields))


def test_a_plan_counts_memory_and_arithmetic():
  made = plans.plan(task(), "host-8", {"data": 2, "fsdp": 2, "tensor": 2}, seeds=(0, 1))
  size, rows = WIDTH * WIDTH, 2 * 16 // 4
  assert (made.chips, made.seeds, made.parameters) == (8, 2, size)
  # Weights and two moments of both seeds, a quarter each; the batch is over data and fsdp.
  arguments = 4 * (3 * 2 * size // 4 + rows * WIDTH)
  assert made.arguments == pytest.approx(arguments, rel=0.01)
  assert made.total == made.arguments + made.temporaries
  # Forward and the gradient of the weights: half the columns, a quarter of the rows of 2 seeds.
  # Adam adds to it.
  products = 2 * 2 * rows * size // 2
  assert products < made.flops < 2 * products
  assert {row["axes"] for row in made.collectives} >= {"fsdp"}
  assert made.largest[0]["bytes"] >= 2 * size
  assert made.warnings == []
  assert (made.fits, made.hbm, made.step) == (None, None, None)
  assert "compute time" in made.unknown


def test_a_dispatch_holds_all_its_batches():
  one, four = (plans.plan(task(steps_per_dispatch=n), "host-4") for n in (1, 4))
  batch = (16 * WIDTH + 16) * 4 // 4
  assert four.arguments - one.arguments == 3 * batch
  assert four.flops == one.flops


def test_seeds_that_cannot_be_mapped_are_planned_one_by_one():
  assert plans.plan(task(map_seeds=False), "host-1", seeds=(0, 1, 2)).seeds == 1


@pytest.mark.parametrize(
  ("logical", "width", "warning"),
  [
    (("embed", "mlp"), WIDTH, None),
    ((None, "mlp"), WIDTH, "(None, mlp), 4.2 MB, is replicated over fsdp=2: none .* is embed$"),
    (("embed", None), WIDTH, "(embed, None), .* over tensor=2: none of its axes is vocab or .*mlp"),
    ((None, None), WIDTH, "(None, None), .* over fsdp=2 and tensor=2: none .* embed; none .* mlp"),
    (
      ("embed", "mlp"),
      WIDTH + 1,
      "fsdp=2 and tensor=2: embed = 1025 does not d.*; mlp = 1025",
    ),
    (("embed", "mlp"), 400, None),  # small
  ],
)
def test_large_replicated_parameters_are_named(logical, width, warning):
  mesh = meshes.make({"data": 2, "fsdp": 2, "tensor": 2})
  found = plans._replicated(Program(task(logical, width=width), mesh, (0, 1)))
  assert len(found) == (warning is not None)
  if warning is not None:
    assert found[0].startswith("params/w (")
    assert re.search(warning.replace("(", r"\(").replace(")", r"\)"), found[0])


@pytest.mark.parametrize("topology", ["host-8", pytest.param("v5e-8", marks=with_libtpu)])
def test_what_the_compiler_reshards_at_all_costs_is_told_in_its_words(topology):
  """From all chips on the rows to other chips on both axes there is no way but the whole."""

  def init(key):
    return {"params": {"w": jnp.ones((8, WIDTH))}}

  def loss(params, variables, batch, key, *, train):
    rows = PartitionSpec(("fsdp", "data", "tensor"))
    x = jax.lax.with_sharding_constraint(batch["inputs"], rows)
    y = jax.lax.with_sharding_constraint(jnp.sin(x) * 2, PartitionSpec("tensor", "data"))
    value = jnp.mean(jnp.cos(y) * params["w"].mean())
    return value, ({"loss": (value, jnp.ones(()))}, variables)

  example = {"inputs": jax.ShapeDtypeStruct((WIDTH,), np.float32)}
  moving = task(init=init, loss=loss, example=example, batch_size=512)
  made = plans.plan(moving, topology, {"data": 2, "fsdp": 2, "tensor": 2})
  (line,) = (w for w in made.warnings if w.startswith("involuntary full rematerialization"))
  assert "The compiler cannot go from sharding {" in line
  calm = plans.plan(task(), topology, {"data": 2, "fsdp": 2, "tensor": 2})
  assert calm.warnings == []


def test_a_resharded_activation_is_a_warning():
  def loss(params, variables, batch, key, *, train):
    x = jnp.sin(batch["inputs"] @ params["w"])
    x = jnp.cos(jax.lax.with_sharding_constraint(x, PartitionSpec(None, "data")))
    value = jnp.mean(x)
    return value, ({"loss": (value, jnp.ones(()))}, variables)

  made = plans.plan(task(loss=loss, batch_size=4096), "host-8")
  assert re.match(r"[\w/]+ is resharded by all-gather, 1 x 16\.8 MB", made.warnings[0])


def test_a_plan_is_numbers_and_is_kept_by_content(tmp_path, monkeypatch):
  made = plans.plan(task(), "host-2", cache=tmp_path)
  assert plans.Plan(**json.loads(json.dumps(dataclasses.asdict(made)))) == made
  again = functools.partial(plans.plan, topology="host-2", cache=tmp_path, cached_only=True)
  assert again(task()) == made
  two = {"sizes": {"fsdp": 2}}
  for other, options in (
    (task(batch_size=32), {}),
    (task(optimizer=optax.adam(2e-3)), {}),
    (task(("mlp", "embed")), {}),  # the same program: its warnings could be others
    (task(steps_per_dispatch=2), {}),
    (task(), two),
    (task(), {"seeds": (0, 1)}),
    (task(), {"topology": "host-4"}),
  ):
    with pytest.raises(LookupError):
      again(other, **options)
  monkeypatch.delenv("XLA_FLAGS")  # how many devices this process has is no matter
  assert again(task()) == made
  with monkeypatch.context() as patch, pytest.raises(LookupError):
    patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_anything=true")
    again(task())
  with monkeypatch.context() as patch, pytest.raises(LookupError):
    patch.setattr(jax, "__version__", "0")
    again(task())


def test_what_does_not_fit_says_so_and_names_buffers(monkeypatch):
  monkeypatch.setitem(roofline.CHIPS, "host", roofline.Chip(1e6, 1e9, 1e12, 1e9))
  made = plans.plan(task(), "host-2")
  assert made.fits is False
  assert made.largest[0]["bytes"] == 4 * WIDTH * WIDTH
  assert made.step == max(made.times.values()) == made.times[made.bound]
  assert made.times["compute"] == made.flops / 1e12


def test_gpus_are_lowered_and_the_rest_is_called_unknown():
  made = plans.plan(task(), "cuda-8", {"data": 4, "tensor": 2})
  assert made.arguments == pytest.approx(4 * (3 * WIDTH * WIDTH // 2 + 4 * WIDTH), rel=0.01)
  assert (made.total, made.flops, made.fits) == (None, None, None)
  assert {"temporaries", "collectives", "whether it fits"} <= set(made.unknown)


@with_libtpu
def test_a_plan_for_tpus(tmp_path):
  made = plans.plan(task(), "v5e-8", {"fsdp": 2, "tensor": 2}, cache=tmp_path)
  assert made.fits and made.hbm == 15.75 * 2**30
  assert (made.chips, dict(made.mesh)) == (8, {"data": 2, "fsdp": 2, "tensor": 2})
  assert made.arguments == pytest.approx(4 * (3 * WIDTH * WIDTH // 4 + 4 * WIDTH), rel=0.05)
  assert made.bound in made.times and made.step > 0
  assert plans.plan(task(), "v5e-8", {"fsdp": 2, "tensor": 2}, cache=tmp_path) == made


@with_libtpu
@pytest.mark.parametrize("name", ["v4-32", "v5p-32", "v6e-16"])
def test_meshes_that_split_an_axis_of_the_torus(name):
  made = plans.plan(task(), name, {"data": 2, "fsdp": 2, "tensor": 4})
  assert made.fits and made.chips == 16


@with_libtpu
@pytest.mark.parametrize(("name", "chips"), [("v4-8192", 4096), ("v6e-256x4", 1024)])
def test_beyond_a_pod(name, chips):
  made = plans.plan(task(batch_size=chips), name, {"fsdp": 4, "tensor": 8})
  assert made.fits and dict(made.mesh) == {"data": chips // 32, "fsdp": 4, "tensor": 8}


@with_libtpu
def test_slices_exchange_over_the_network():
  made = plans.plan(task(), "v5e-4x2", {"data": 4, "tensor": 2})
  (row,) = (r for r in made.collectives if r["kind"] == "between slices")
  # The gradient, a half for each part of tensor, in two parts within a slice.
  assert row["bytes"] == pytest.approx(4 * WIDTH * WIDTH // 4, rel=0.01)
  assert made.times["network"] == row["bytes"] / roofline.CHIPS["v5e"].network
  assert (
    plans.plan(task(batch_size=32), "v5e-16x2").warnings == []
  )  # sums are gathered within a slice
  with pytest.raises(ConfigurationError, match="data=1 does not divide among 2 slices"):
    plans.plan(task(), "v5e-4x2", {"data": 1, "tensor": 8})


@with_libtpu
@pytest.mark.parametrize("rows", [2**23, 2**24])  # by little, and by more than the chip has at all
def test_a_tpu_that_is_too_small(rows):
  made = plans.plan(task(batch_size=rows), "v5e-4")
  assert made.fits is False and "RESOURCE_EXHAUSTED" in made.error
  size = rows * WIDTH * 4 // 4
  assert made.largest[:2] == [{"name": n, "bytes": size} for n in ("batch/inputs", "dot_general")]
  assert made.total > made.hbm == 15.75 * 2**30
  assert made.warnings == ["sizes are those on v5p, where there is more room"] or rows < 2**24


@with_libtpu
def test_what_is_too_large_for_every_tpu_is_told_by_its_arguments(monkeypatch):
  monkeypatch.setattr(plans, "_regardless", lambda lowered: None)
  made = plans.plan(task(batch_size=2**24), "v5e-4")
  assert (made.fits, made.total, made.warnings) == (False, None, [])
  assert made.largest[0]["name"] == "batch/inputs"


@pytest.mark.parametrize(
  ("topology", "missing"),
  [
    ("host-2", "nobody_has_this"),
    pytest.param("v5e-4", "nobody_has_this", marks=with_libtpu),
    pytest.param("v5e-4", "eig", marks=with_libtpu),  # refused before there is a program
  ],
)
def test_what_does_not_compile_says_why(topology, missing):
  def loss(params, variables, batch, key, *, train):
    x = jax.lax.stop_gradient(params["w"][:8, :8])
    if missing == "eig":
      x = jnp.abs(jnp.linalg.eig(x)[0])
    else:
      shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
      x = jax.ffi.ffi_call(missing, shape, vmap_method="sequential")(x)
    value = jnp.mean(x)
    return value, ({"loss": (value, jnp.ones(()))}, variables)

  made = plans.plan(task(loss=loss), topology)
  assert made.fits is False
  assert "\n" not in made.error and missing in made.error
  assert made.largest[0]["name"].startswith("state/")


# The command


def test_the_command_prints_tables_or_json(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  words = ["s5", "--scale=laptop", "--topology=host-8", "--study=rate", "--seeds=2"]
  words += ["--mesh=data=4,tensor=2", "--config.width=16", "--config.layers=1"]
  assert command.main([*words, "--json"]) == 0
  (row,) = json.loads(capsys.readouterr().out)
  assert (row["stage"], row["chips"], row["seeds"]) == ("train", 8, 2)
  assert row["mesh"] == {"data": 4, "tensor": 2}
  assert command.main(words) == 0
  shown = capsys.readouterr().out
  for part in ("s5 laptop train: host-8 (8 chips, data=4, tensor=2), 2 seeds", "largest buffers"):
    assert part in shown
  monkeypatch.setitem(roofline.CHIPS, "host", roofline.Chip(hbm=1e5))
  monkeypatch.setattr(plans, "_content", lambda *_: "another")
  assert command.main(words) == 1
  assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["s6"], "unknown experiment 's6'; did you mean 's5'?"),
    (["s5", "--scale=paper/x"], "unknown scale 'paper/x'"),
    (["s5", "--scale=laptop"], "s5 names no topology for scale 'laptop'; give --topology"),
    (["s5", "--scale=laptop", "--topology=v9"], "--topology=v9; accepted:"),
    (["s5", "--scale=laptop", "--topology=host-8", "--study=x"], "unknown study 'x'"),
    (["s5", "--scale=laptop", "--topology=host-8", "--arm=x"], "unknown arm 'x'"),
    (["s5", "--scale=laptop", "--topology=host-8", "--config.widht=8"], "did you mean 'width'?"),
    (["s5", "--scale=laptop", "--topology=host-8", "--mash=8"], "unknown argument '--mash=8'"),
    (["s5", "--scale=laptop", "--topology=host-8", "--mesh=data=3"], "takes 3 devices; 8 are"),
    (["s5", "--scale=laptop", "--topology=host-8", "--config.batch_size=4"], "a multiple of 8"),
    (["s5", "--scale=laptop", "--topology=host-8", "--config.ssm.blocks=5"], "accuracy/s5: "),
    (["s5", "--scale=laptop", "--topology=host-999"], "this process has 8 CPU devices"),
  ],
)
def test_mistakes_are_one_line(words, message, capsys):
  assert command.main(words) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and message in line


def test_without_libtpu_the_extra_is_named(capsys, monkeypatch):
  monkeypatch.setattr(libtpu, "installed", lambda: False)
  assert command.main(["s5", "--scale=paper/pathx"]) == 2
  assert (
    capsys.readouterr().err == "error: TPUs are planned by libtpu: pip install 'roundup[plan]'\n"
  )


def test_the_named_topology_is_the_first_that_fits():
  class module:
    TOPOLOGIES = {"paper/a": ("v5e-4", "data=2"), "paper/*": ("v5e-16", "")}  # noqa: RUF012

  assert stages.named(module, "paper/a") == ("v5e-4", "data=2")
  assert stages.named(module, "paper/b") == ("v5e-16", "")
  assert stages.named(module, "laptop") is None


def fresh(*words):
  """A process with no platform chosen, and nothing from this one's environment about TPUs."""
  kept = {
    k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_", "XLA_", "ALLOW"))
  }
  done = subprocess.run(
    [sys.executable, *words], cwd=ROOT, env=kept, capture_output=True, text=True, check=False
  )
  return done.returncode, done.stdout, done.stderr


@with_libtpu
def test_ordinary_runs_leave_libtpu_alone():
  words = "import launch, launch.plan.roofline, jax; print(jax.devices()[0].platform)"
  loaded = "; print('libtpu.so' in open('/proc/self/maps').read())"
  code, out, err = fresh("-c", words + loaded)
  assert (code, out, err) == (0, "cpu\nFalse\n", "")


@with_libtpu
def test_a_plan_in_its_own_process_says_nothing_else():
  words = ["-m", "launch.plan", "s5", "--scale=laptop", "--topology=v5e-1", "--json"]
  code, out, err = fresh(*words, "--config.layers=1", "--seeds=1")
  assert (code, err) == (0, "")
  assert json.loads(out)[0]["fits"] is True
