"""What the TPU's compiler makes of the kernels, on a machine without one.

    python tests/models/kernels/schedules.py [NAME ...]      prints the table as JSON
    python tests/models/kernels/schedules.py --update        renews schedules.json
    python tests/models/kernels/schedules.py --layers        copies in whole layers

libtpu writes the final bundles of instructions of each program to a folder that must be named
before it is loaded, so that this is a program of its own. A bundle is what a core issues in a
cycle; waiting for memory is not in it. Copies are arrays as large as a sequence that are made
around a kernel, for its layout: four decays and scales of 64 states by step, which XLA keeps with
time along the lanes.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import re
import tempfile

GOLDEN = pathlib.Path(__file__).with_name("schedules.json")
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
NAMES = "linear_scan|long_conv(_toeplitz)?|s5"  # of the kernels


def cases():
  """Name -> (function, operands)."""
  import jax
  import jax.numpy as jnp

  from models.kernels.linear_scan import tpu as scan
  from models.kernels.long_conv import toeplitz
  from models.kernels.long_conv import tpu as conv
  from models.kernels.s5 import tpu as s5

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  def of_scan(parts, per_step, dtype, batch=8, length=4096, width=1024):
    a = (array(*((batch, length, width) if per_step else (width,))),) * parts
    b, h = (array(batch, length, width, dtype=dtype),) * parts, (array(batch, width),) * parts
    forward = functools.partial(scan.forward, reverse=False)
    return forward, (a, b, h), functools.partial(scan.backward, reverse=False), (a, b, h, b, h)

  def of_s5(batch, length, width, states, dtype, by_step=False):
    def pair(*shape):
      return array(*shape), array(*shape)

    decay = pair(batch, length, states) if by_step else pair(states)
    u, state = array(batch, length, width, dtype=dtype), pair(batch, states)
    operands = (u, (decay,), (decay if by_step else None,), pair(states, width))
    operands += (pair(width, states), array(width), (state,))
    forward = functools.partial(s5.forward, reverses=(False,))
    saved = jax.eval_shape(forward, *operands)[2]
    backward = functools.partial(s5.backward, reverses=(False,))
    return forward, operands, backward, (saved, *operands, u, (state,))

  def of_conv(batch, length, width, dtype, behind=False, gated=False, taps=None, kernels=conv):
    taps = taps or length
    u, k = array(batch, length, width, dtype=dtype), array(width, taps)
    operands = (u, k, array(width, taps - 1) if behind else None, u if gated else None, None)
    return kernels.forward, operands, kernels.backward, (*operands, u)

  def in_three_passes(forward, operands, backward, more):
    high = jax.default_matmul_precision("high")
    return high(forward), operands, high(backward), more

  f32, bf16 = jnp.float32, jnp.bfloat16
  both = {
    "scan real": of_scan(1, True, f32),
    "scan real bf16": of_scan(1, True, bf16),
    "scan real constant": of_scan(1, False, f32),
    "scan real 128": of_scan(1, True, f32, width=128),
    "scan complex": of_scan(2, True, f32),
    "scan complex constant": of_scan(2, False, f32),
    "s5 512 256 bf16": of_s5(8, 4096, 512, 256, bf16),
    "s5 128 64 f32": of_s5(32, 1024, 128, 64, f32),
    "s5 128 64 f32 in three passes": in_three_passes(*of_s5(32, 1024, 128, 64, f32)),
    "s5 128 64 bf16 by step": of_s5(8, 1000, 128, 64, bf16, by_step=True),
    "conv 8192 bf16": of_conv(8, 8192, 512, bf16),
    "conv 1024 bf16": of_conv(8, 1024, 512, bf16),
    "conv 16384 bf16": of_conv(8, 16384, 128, bf16),
    "conv 8192 f32 in three passes": in_three_passes(*of_conv(8, 8192, 128, f32)),
    "conv 3000 f32 two-sided, gated": of_conv(4, 3000, 200, f32, behind=True, gated=True),
    "toeplitz 8192 bf16": of_conv(8, 8192, 512, bf16, taps=128, kernels=toeplitz),
    "toeplitz 1024 bf16": of_conv(8, 1024, 512, bf16, taps=256, kernels=toeplitz),
    "toeplitz 3000 f32 two-sided, gated": of_conv(
      4, 3000, 200, f32, behind=True, gated=True, taps=200, kernels=toeplitz
    ),
  }
  return {
    f"{name} {way}": made[2 * i : 2 * i + 2]
    for name, made in both.items()
    for i, way in enumerate(("forward", "backward"))
  }


def loops(text):
  """Of the bundles of a program the number in each innermost loop, and in all."""
  rows = []
  for line in text.splitlines():
    if found := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?:?\s*([> ]*):?\s*\{", line):
      rows.append((found[1], found[2].count(">")))
  counts = []
  for i, (label, depth) in enumerate(rows):
    if label != "LB":
      continue
    # Code from behind a loop is interleaved with its end, at a lower depth.
    last = j = i
    for j in range(i + 1, min(len(rows), i + 100_000)):
      if rows[j][0] == "LB" or j - last > 12:
        break
      last = j if rows[j][1] >= depth else last
    inner = not any(rows[k][0] == "LB" for k in range(i + 1, j + 1) if rows[k][1] > depth)
    if inner:
      counts.append(last + 1 - i)
  return {"loops": counts, "all": len(rows)}


def arrays(text):
  """(name, number of elements) of what a compiled program makes around its kernels."""
  entry = text[text.index("\nENTRY") :].split("\n}")[0]
  found = re.findall(r"%(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", entry)
  # copy-done: fetched into fast memory, as it is
  passed_on = {"parameter", "bitcast", "get-tuple-element", "custom-call", "copy-done"}
  return [
    (name, math.prod(map(int, shape.split(","))))
    for name, shape, op in found
    if op not in passed_on
  ]


def copies(text, size):
  """How many arrays of `size` elements or more a compiled program makes around its kernel."""
  return sum(elements >= size for _, elements in arrays(text))


def measure(chip, names):
  """Compiles the cases for a chip."""
  from launch.plan import libtpu

  folder = pathlib.Path(tempfile.mkdtemp())
  os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  import jax
  from jax.sharding import SingleDeviceSharding

  jax.config.update("jax_enable_compilation_cache", False)
  where = SingleDeviceSharding(libtpu.devices(CHIPS[chip])[0])
  found = {}
  for name, (function, operands) in cases().items():
    if names and name not in names:
      continue
    seen = set(folder.iterdir())
    placed = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), operands
    )
    compiled = jax.jit(function).trace(*placed).lower().compile()
    kernels = [
      path
      for path in set(folder.iterdir()) - seen
      if re.search(rf"-({NAMES})(_backward)?[.\d]*-\d+-final_bundles\.txt$", path.name)
    ]
    if len(kernels) != 1:
      raise ValueError(f"{name}: {sorted(p.name for p in kernels)}; expected one kernel")
    size = min(x.size for x in jax.tree.leaves(operands) if x.ndim == 3)
    made = {"copies": copies(compiled.as_text(), size)}
    found[name] = loops(kernels[0].read_text()) | made
    for path in set(folder.iterdir()) - seen:
      path.unlink()
  return {"libtpu": libtpu.version(), **found}


def layers(chip):
  """Copies around the kernels in the whole gradient of a layer, name -> number.

  Of SGConv also the arrays as large as its taps that are not products written where they belong.
  """
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from launch import mesh as meshes
  from launch.plan import libtpu
  from models.long_conv import SGConv
  from models.ssm import S5

  jax.config.update("jax_enable_compilation_cache", False)
  key, found = jax.random.key(0), {}
  mesh = meshes.make({}, libtpu.devices(CHIPS[chip])[:1])
  for name, layer, shape in (
    ("s5", S5(state=512), (8, 4096, 512)),
    ("sgconv", SGConv(kernel_dim=32, max_length=4096), (8, 4096, 256)),
  ):
    u = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    variables = nn.meta.unbox(jax.eval_shape(layer.init, key, u))

    def gradients(variables, u, dy, layer=layer):
      y, pullback = jax.vjp(layer.apply, variables, u)
      return y, pullback(dy)

    with meshes.use(mesh, meshes.RULES):
      everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      traced = jax.jit(gradients, in_shardings=everywhere).trace(variables, u, u)
      text = traced.lower().compile().as_text()
    assert text.count("tpu_custom_call") == 2, "one kernel forward, one backward"
    found[name] = copies(text, math.prod(shape))
    if name == "sgconv":
      taps = math.prod(shape[1:])
      made = [name for name, elements in arrays(text) if elements == taps]
      found["sgconv's taps"] = sum("dynamic-update-slice" not in name for name in made)
  return found


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*")
  parser.add_argument("--chip", default="v5e", choices=CHIPS)
  parser.add_argument("--update", action="store_true")
  parser.add_argument("--layers", action="store_true", help="copies in whole layers instead")
  flags = parser.parse_args()
  found = layers(flags.chip) if flags.layers else measure(flags.chip, flags.names)
  text = json.dumps(found, indent=1)
  if flags.update:
    GOLDEN.write_text(text + "\n")
  print(text)
