"""What the text of a compiled program says that the compiler's own summaries do not.

XLA's cost analysis counts the body of a loop once and does not tell traffic with a TPU's HBM from
traffic within the chip; the text of the program has both, as well as its collectives and buffers.
Sizes are those in memory, with the padding of a TPU's tiles.
"""

import collections
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN = "between slices"  # stands for the transfers that leave a TPU slice
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*->.*\{$")
_CALLED = re.compile(r"(?:calls|condition|body|true_computation|false_computation)=%?([\w.-]+)")
# Instructions that name data and move none.
_STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"}
_STILL |= {"while", "conditional", "call", "partition-id", "replica-id", "opt-barrier", "iota"}
_ELEMENTWISE = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs"}
_ELEMENTWISE |= {"select", "compare"}


class Array(NamedTuple):
  """One array of an instruction's result."""

  dims: tuple[int, ...]
  bytes: int
  space: int  # 0 is the main memory, HBM on a TPU

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def held(self) -> int:
    """Bytes of main memory."""
    return self.bytes if self.space == 0 else 0


class Instruction(NamedTuple):
  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool

  def attribute(self, pattern: str) -> str:
    found = re.search(pattern, self.attributes)
    return found[1] if found else ""

  @property
  def label(self) -> str:
    """The operation of the model that it comes from; empty for the compiler's own."""
    path = self.attribute(r'op_name="(.*?)"').replace("\\'", "'")
    path = re.sub(r"^jit\(.*?\)/(while/body/)?(closed_call/)?(eval_jaxpr/)?", "", path)
    model = re.match(r"(?:\w+\()*(\w*)\)*/", path)
    backward = " (backward)" if model and "transpose(" in model[0] else ""
    inside = re.sub(
      r"(while/body|closed_call|eval_jaxpr|vmap\(\))/", "", path[model.end() :] if model else path
    )
    return "/".join(filter(None, (model[1] if model else "", inside))) + backward


Computation = dict[str, Instruction]


class Module(NamedTuple):
  """A compiled program.

  computations: by name, each its instructions by name.
  runs: how often each computation runs when the program runs once, both branches of a conditional.
  control: those that are not inside one fused instruction.
  """

  computations: dict[str, Computation]
  runs: dict[str, int]
  control: frozenset[str]

  def instructions(self) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction that runs, in its computation, and how often."""
    for name, times in self.runs.items():
      for instruction in self.computations[name].values():
        yield self.computations[name], instruction, times

  def steps(self) -> Iterator[tuple[Computation, Instruction, int]]:
    """As `instructions`, fused ones as one."""
    for name in self.control:
      for instruction in self.computations[name].values():
        yield self.computations[name], instruction, self.runs[name]


def parse(text: str) -> Module:
  """Reads `compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  current, entry = {}, ""
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      root, name, result, opcode, rest = found.groups()
      arrays = tuple(_array(*m.groups()) for m in _ARRAY.finditer(result))
      operands = tuple(re.findall(r"%([\w.-]+)", rest.partition(")")[0]))
      current[name] = Instruction(name, opcode, arrays, operands, rest, bool(root))
  runs: dict[str, int] = collections.Counter()
  control: set[str] = set()

  def visit(name: str, times: int, alone: bool) -> None:
    runs[name] += times
    if alone:
      control.add(name)
    for instruction in computations[name].values():
      inner = alone and instruction.opcode in ("while", "call", "conditional")
      repeats = _trips(computations, instruction) if instruction.opcode == "while" else 1
      called = re.findall(
        r"(?:calls|condition|body|e_computation)=%?([\w.-]+)", instruction.attributes
      )
      called += re.findall(r"[\w.-]+", instruction.attribute(r"branch_computations=\{([^}]*)\}"))
      if instruction.opcode == "call":
        called.append(instruction.attribute(r"to_apply=%?([\w.-]+)"))
      for other in called:
        visit(other, times * repeats, inner)

  visit(entry, 1, True)
  return Module(computations, runs, frozenset(control))


def _array(dtype: str, bits: str, dims: str, order: str | None, tiling: str | None) -> Array:
  sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
  physical = [sizes[int(i)] for i in order.split(",")] if order else list(sizes[::-1])
  if tile := re.search(r"T\(([\d,]+)\)", tiling or ""):
    tiles = [int(t) for t in tile[1].split(",")][::-1]
    physical += [1] * (len(tiles) - len(physical))
    physical[: len(tiles)] = [
      -(-d // t) * t for d, t in zip(physical[: len(tiles)], tiles, strict=True)
    ]
  space = re.search(r"S\((\d+)\)", tiling or "")
  width = 8 if dtype == "pred" else int(bits or 0)
  return Array(sizes, math.prod(physical) * width // 8, int(space[1]) if space else 0)


def _trips(computations: Mapping[str, Computation], loop: Instruction) -> int:
  """How often a loop runs: as the compiler says, else the bound in its condition, else 1."""
  if known := loop.attribute(r"known_trip_count\W+n\W+(\d+)"):
    return int(known)
  pending, bounds = [loop.attribute(r"condition=%?([\w.-]+)")], [1]
  while pending:
    for instruction in computations[pending.pop()].values():
      pending += re.findall(r"calls=%?([\w.-]+)", instruction.attributes)
      if instruction.opcode == "constant":
        bounds += [int(n) for n in re.findall(r"^(\d+)\)", instruction.attributes)]
  return max(bounds)


def iterations(module: Module) -> int:
  """Iterations of loops, one after another."""
  loops = (loop for _, loop, _ in module.steps() if loop.opcode == "while")
  return sum(
    module.runs[loop.attribute(r"body=%?([\w.-]+)")]
    for loop in loops
    if _trips(module.computations, loop) > 1
  )


# Floating point operations


def flops(module: Module, counted: float) -> float:
  """FLOPs of a run, given the compiler's own count.

  That one counts the body of a loop once and, on a GPU, no call of a library.
  """
  every = [(_flops(c, i), n) for c, i, n in module.instructions()]
  return max(counted, sum(f for f, _ in every)) + sum((n - 1) * f for f, n in every)


def _flops(computation: Computation, instruction: Instruction) -> float:
  size = instruction.arrays[0].size if instruction.arrays else 0
  if instruction.opcode in _ELEMENTWISE:
    return size
  library = instruction.attribute(r'custom_call_target="__(cublas|cudnn\$conv)')
  if instruction.opcode not in ("dot", "convolution") and not library:
    return 0
  left, right = (computation[o].arrays[0].dims for o in instruction.operands[:2])
  if instruction.opcode == "dot" or library == "cublas":
    contracted = instruction.attribute(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')
    return 2 * size * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))
  if library:
    return _library_convolution_flops(instruction, left, right)
  return _convolution_flops(instruction, left, right)


def _library_convolution_flops(
  instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
  """Two for each output, tap and input channel of the forward convolution, on padding too."""
  out, outputs, kernel = instruction.arrays[0].dims, left, right
  if "BackwardFilter" in instruction.attributes:
    outputs, kernel = right, out
  elif "BackwardInput" not in instruction.attributes:
    outputs = out
  features = kernel[instruction.attribute(r"dim_labels=\w+?_(\w+)").index("o")]
  return 2.0 * math.prod(outputs) * math.prod(kernel) / features


def _convolution_flops(
  instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
  """Two for each tap that falls on the input rather than on its padding.

  A TPU's compiler writes batched matrix products as convolutions that are nearly all padding.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels is not None
  out = instruction.arrays[0].dims
  flops = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
  window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute(r"window=\{([^}]*)\}")))
  spatial = sorted(c for c in labels[3] if c.isdigit())
  for k, axis in enumerate(spatial):
    each = {key: value.split("x")[k] for key, value in window.items()}
    dilation, step = int(each.get("lhs_dilate", 1)), int(each.get("rhs_dilate", 1))
    start = np.arange(out[labels[3].index(axis)]) * int(each.get("stride", 1))
    taps = np.arange(right[labels[2].index(axis)]) * step
    at = start[:, None] + taps - int(each.get("pad", "0").partition("_")[0])
    end = (left[labels[1].index(axis)] - 1) * dilation + 1
    flops *= np.count_nonzero((at >= 0) & (at < end) & (at % dilation == 0))
  return flops


# Traffic


def traffic(module: Module) -> int:
  """Bytes read from and written to main memory, loops as often as they run.

  An instruction, fused or not, reads its operands and writes its results once; of what is sliced
  it reads the slice, of what is updated in place it writes the update.
  """
  return sum(n * _moved(module, c, i) for c, i, n in module.steps())


def loop_copies(module: Module) -> int:
  """The part of `traffic` that is copies of whole arrays inside loops."""
  return sum(
    n * _moved(module, c, i)
    for c, i, n in module.steps()
    if n > 1 and i.opcode in ("copy", "copy-start")
  )


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
  if instruction.opcode in _STILL or instruction.opcode.endswith(("-done", "-update")):
    return 0
  operands = [computation[o] for o in instruction.operands if o in computation]
  kind, arrays = instruction.opcode.removesuffix("-start"), instruction.arrays
  if body := module.computations.get(instruction.attribute(r"calls=%?([\w.-]+)")):
    read = sum(
      min(_read(body, index), sum(a.held for a in operand.arrays))
      for index, operand in enumerate(operands)
    )
    return read + _written(body, arrays)
  if kind in ("slice", "dynamic-slice"):
    result = arrays[-1] if kind == instruction.opcode else arrays[1]
    return result.held + (result.bytes if operands[0].arrays[0].space == 0 else 0)
  if kind == "dynamic-update-slice":
    update = operands[1].arrays[0]
    return update.held + (update.bytes if arrays[0].space == 0 else 0)
  if kind != instruction.opcode:  # the result of a start holds the operand too
    return sum(a.held for a in arrays)
  if 'custom_call_target="__cu' in instruction.attributes:  # what follows is working space
    arrays = arrays[:1]
  return sum(a.held for o in operands for a in o.arrays) + sum(a.held for a in arrays)


def _read(body: Computation, index: int) -> int:
  """Bytes that a fused computation reads of a parameter; the largest integer for all of it."""
  names = {
    i.name
    for i in body.values()
    if i.opcode == "parameter" and i.attributes.startswith(f"{index})")
  }
  total = 0
  for instruction in body.values():
    where = [k for k, operand in enumerate(instruction.operands) if operand in names]
    if where and instruction.opcode == "bitcast":
      names.add(instruction.name)
    elif where == [0] and instruction.opcode in ("slice", "dynamic-slice"):
      total += instruction.arrays[0].bytes
    elif where and not (where == [0] and instruction.opcode == "dynamic-update-slice"):
      return sys.maxsize
  return total


def _written(body: Computation, arrays: tuple[Array, ...]) -> int:
  """Bytes that a fused computation writes of its results."""
  (root,) = (i for i in body.values() if i.root)
  results = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
  total = 0
  for array, result in zip(arrays, results, strict=False):
    while result.opcode == "bitcast":
      result = body[result.operands[0]]  # noqa: PLW2901
    update = result.opcode == "dynamic-update-slice"
    part = body[result.operands[1]].arrays[0].bytes if update else array.bytes
    total += min(part, array.held)
  return total


# Communication


def collectives(module: Module, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
  """What a device sends in one run, by kind and mesh axes: `kind, axes, count, bytes`.

  Bytes are those of the ring algorithms: of n parts of an array, all-gather, reduce-scatter and
  all-to-all send n - 1, all-reduce twice as many. `between slices` are the transfers that leave a
  TPU slice; `mesh` is then that of one slice.
  """
  rows: dict[tuple[str, str], dict[str, Any]] = {}
  for kind, groups, times, size in _sent(module):
    axes = "data" if kind == BETWEEN else _axes(groups, mesh)
    row = rows.setdefault((kind, axes), {"kind": kind, "axes": axes, "count": 0, "bytes": 0})
    row["count"] += times
    row["bytes"] += round(size)
  return sorted(rows.values(), key=lambda row: -row["bytes"])


def sent(module: Module) -> tuple[float, float]:
  """Bytes that a device sends in one run: within its slice, and to other slices."""
  sizes = [(size, kind == BETWEEN) for kind, _, _, size in _sent(module)]
  return sum(s for s, between in sizes if not between), sum(s for s, between in sizes if between)


def _sent(module: Module) -> Iterable[tuple[str, list[list[int]], int, float]]:
  """Kind, groups, runs and bytes of every collective."""
  found: dict[tuple[str, str], tuple[str, list[list[int]], int, float]] = {}
  for kind, channel, instruction, times in _communication(module):
    groups = _groups(instruction.attributes)
    size = times * _whole(kind, instruction) * _share(kind, max(len(group) for group in groups))
    # One collective that computation is woven into appears several times, under one channel.
    if (kind, channel) not in found or size >= found[kind, channel][3]:
      found[kind, channel] = (kind, groups, times, size)
  return found.values()


def _communication(module: Module) -> Iterator[tuple[str, str, Instruction, int]]:
  """Kind, channel, instruction and runs of every collective."""
  for _, instruction, times in module.instructions():
    kind = instruction.opcode.removesuffix("-start")
    channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
    if kind in COLLECTIVES:
      yield kind, channel, instruction, times
    elif kind == "send" and "_xla_megascale" in instruction.attributes:
      yield BETWEEN, channel, instruction, times


def _whole(kind: str, instruction: Instruction) -> int:
  """Bytes of a collective's result; that of a start holds the operand too."""
  sizes = [a.bytes for a in instruction.arrays]
  started = instruction.opcode.endswith("-start") and kind != "all-reduce"
  return max(sizes) if started or kind == BETWEEN else sum(sizes)


def _share(kind: str, parts: int) -> float:
  """What a device sends, in units of the instruction's result."""
  match kind:
    case "all-reduce":
      return 2 * (parts - 1) / parts
    case "all-gather" | "all-to-all":
      return (parts - 1) / parts
    case "reduce-scatter":
      return parts - 1
  return 1


def _groups(attributes: str) -> list[list[int]]:
  """Which devices talk to which, in any of the forms that XLA prints."""
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
    return [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")]
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
    return [[int(n) for n in re.findall(r"\d+", g)] for g in listed[1].split("},")]
  iota = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
  if counted := re.search("replica_groups=" + iota, attributes):
    return _iota(*counted.groups()).tolist()
  named = re.search(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(" + iota + r"\))? \{(.*?)\}", attributes
  )
  if named is None:
    return [[0]]
  sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
  ids = np.arange(math.prod(sizes.values()))
  if named[2]:
    ids = _iota(*named.groups()[1:4])
  shape: list[int] = []
  kept: list[int] = []
  parts = {k: (int(a), int(b)) for k, a, b in re.findall(r"'(\w+)':\((\d+)\)(\d+)", named[5])}
  for name, size in sizes.items():  # part of an axis is written 'name':(what is before it)its size
    before, part = parts.get(name, (1, size))
    used = f"'{name}'" in named[5]
    kept += [len(shape) + 1] if used else []
    shape += [before, part, size // (before * part)]
  grid = np.moveaxis(ids.reshape(shape), kept, range(len(shape) - len(kept), len(shape)))
  return grid.reshape(-1, math.prod(shape[k] for k in kept)).tolist()


def _iota(shape: str, dims: str | None, order: str | None) -> np.ndarray:
  sizes, source = ([int(n) for n in (text or shape).split(",")] for text in (shape, dims))
  ids = np.arange(math.prod(sizes)).reshape(source)
  return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(sizes)


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> str:
  """The mesh axes along which the members of a group differ."""
  shape, differ = tuple(mesh.values()), set()
  for group in groups:
    for name, places in zip(mesh, np.unravel_index(group, shape), strict=True):
      if len(set(places.tolist())) > 1:
        differ.add(name)
  return " x ".join(name for name in mesh if name in differ) or "none"


def reshardings(
  module: Module, mesh: Mapping[str, int], at_least: int
) -> list[tuple[str, str, int]]:
  """Collectives that only move an array to another sharding: (operation, kind, bytes).

  Those are all-to-all and permutations that the program does not ask for by name, arrays gathered
  whole only to be sliced again, and arrays gathered along `data`, over which no rule shards
  anything that is needed whole. What comes from no operation of the model is the compiler's way
  of doing something else, such as a sum over slices.
  """
  asked = ("all_to_all", "ppermute", "pshuffle", "pbroadcast", "all_gather")
  found = {}
  for kind, channel, instruction, _ in _communication(module):
    axes = _axes(_groups(instruction.attributes), mesh)
    moved = kind in ("all-to-all", "collective-permute")
    moved |= kind == "all-gather" and ("data" in axes or _only_sliced(module, instruction))
    size, operation = _whole(kind, instruction), instruction.attribute(r'op_name=".*?([^/"]*)"')
    if moved and size >= at_least and instruction.label and not operation.startswith(asked):
      found[kind, channel] = (instruction.label, kind, size)
  return sorted(found.values(), key=lambda row: -row[2])


def _only_sliced(module: Module, gathered: Instruction) -> bool:
  """Whether at most half of an array is read again."""
  for name in module.control:
    computation, total = module.computations[name], 0
    if gathered.name not in computation:
      continue
    users = [i for i in computation.values() if gathered.name in i.operands]
    for user in users:
      body = module.computations.get(user.attribute(r"calls=%?([\w.-]+)"))
      if body is not None:
        total += _read(body, user.operands.index(gathered.name))
      elif user.opcode in ("slice", "dynamic-slice"):
        total += user.arrays[0].bytes
      else:
        return False
    return bool(users) and total <= gathered.arrays[0].bytes / 2
  return False


def buffers(module: Module) -> list[tuple[str, int]]:
  """The arrays that the program makes in main memory: (operation, bytes), of each the largest."""

  def source(computation: Computation, instruction: Instruction) -> str:
    made_of = [computation[o] for o in instruction.operands if o in computation]
    near = (i.label for i in (*made_of, *computation.values()) if i.label)
    return instruction.label or f"{instruction.opcode} near {next(near, instruction.name)}"

  return [
    (source(c, i), max((a.held for a in i.arrays), default=0))
    for c, i, _ in module.steps()
    if i.opcode not in _STILL and not i.opcode.endswith(("-done", "-update"))
  ]
