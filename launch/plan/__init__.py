"""Plans: a stage's update compiled ahead of time for devices that are not here.

A plan knows what the compiler knows: memory, arithmetic, traffic, communication. The step time is
a roofline: no step is shorter than its largest term, and the latency of loops, of small transfers
and of the input comes on top. Evaluations are not planned.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from launch import mesh as meshes
from launch.metrics import write_json
from launch.plan import hlo, libtpu, topologies
from launch.program import Program
from launch.task import Task

MB = 1_000_000  # replicated parameters and reshardings below this are not worth a warning
NAMED = 5  # buffers


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one update of a stage takes, per chip; None where it cannot be known.

  Attributes:
    topology: its name, as given.
    chips: of all slices.
    mesh: the sizes of the mesh axes above 1.
    seeds: trained side by side.
    parameters: trained, of one seed.
    compiler: what compiled it.
    fits: whether the program compiles and has room.
    error: why it does not compile, in the compiler's words.
    arguments: bytes of the state and the batches of one dispatch.
    temporaries: bytes of everything else at the peak, code included.
    total: bytes of both.
    hbm: bytes that a program can have.
    flops: floating point operations, loops as often as they run.
    bytes_moved: read from and written to HBM, loops as often as they run.
    bytes_accessed: the compiler's own count, with traffic within the chip, of loops one iteration.
    loop_iterations: iterations of loops, one after another.
    collectives: `kind, axes, count, bytes`; bytes are what a chip sends.
    times: seconds that `compute`, `memory`, `interconnect` and `network` take at their peaks.
    step: seconds, the largest of `times`.
    bound: which one that is.
    largest: the largest buffers, `name, bytes`.
    warnings: what deserves a look.
    unknown: what this plan says nothing about.
  """

  topology: str
  chips: int
  mesh: Mapping[str, int]
  seeds: int
  parameters: int
  compiler: str
  fits: bool | None = None
  error: str | None = None
  arguments: int | None = None
  temporaries: int | None = None
  total: int | None = None
  hbm: int | None = None
  flops: float | None = None
  bytes_moved: float | None = None
  bytes_accessed: float | None = None
  loop_iterations: int | None = None
  collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  times: Mapping[str, float] = dataclasses.field(default_factory=dict)
  step: float | None = None
  bound: str | None = None
  largest: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  warnings: list[str] = dataclasses.field(default_factory=list)
  unknown: list[str] = dataclasses.field(default_factory=list)


def cache_folder() -> pathlib.Path:
  """Where plans are kept for the user."""
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
  return home / "roundup" / "plans"


def plan(
  task: Task,
  topology: str,
  sizes: Mapping[str, int] | None = None,
  seeds: tuple[int, ...] = (0,),
  cache: pathlib.Path | None = None,
) -> Plan:
  """Compiles one update of `task` for `topology`, without data and without the devices.

  Args:
    task: the stage.
    topology: such as `v5e-16`; see `launch.plan.topologies`.
    sizes: of the mesh axes; default: all chips on `data`.
    seeds: trained side by side.
    cache: a folder of plans made earlier, by the content of the lowered program and the compiler.

  Raises:
    ConfigurationError: there is no such topology, libtpu is missing, or the mesh does not fit the
      chips or the batch.
  """
  where = topologies.parse(topology)
  side_by_side = seeds if task.map_seeds else seeds[:1]
  program = Program(task, meshes.make(sizes, where.devices()), side_by_side)
  lowered = _lower(program, where)
  compiler = f"libtpu {libtpu.version()}"
  if not where.shape:
    compiler = f"jaxlib {importlib.metadata.version('jaxlib')}"
  path = None
  if cache is not None:
    path = cache / f"{_fingerprint(lowered.as_text(), compiler, where.name, program)}.json"
    if path.exists():
      return Plan(**json.loads(path.read_text()))
  known = Plan(
    topology=topology,
    chips=where.chips,
    mesh={k: v for k, v in program.mesh.shape.items() if v > 1},
    seeds=len(program.seeds),
    parameters=program.parameters,
    compiler=compiler,
    warnings=_replicated(program),
  )
  if where.kind == "cuda":
    made = _lowered_only(program, known)
  else:
    made = _compiled(program, lowered, where, known)
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(made))
  return made


def _lower(program: Program, where: topologies.Topology) -> Any:
  state = program.abstract_state  # before the mesh is current: its keys are made on this machine
  with program.context():
    traced = program.update.trace(state, program.abstract_batches(1))
    return traced.lower(lowering_platforms=("cuda",) if where.kind == "cuda" else None)


def _fingerprint(text: str, compiler: str, topology: str, program: Program) -> str:
  """Of everything that a plan depends on, this package's own code included."""
  code = [p.read_text() for p in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
  level = jax.config.jax_optimization_level  # type: ignore[attr-defined]
  parts = [text, compiler, topology, jax.__version__, level, *code]
  parts += [str(program.mesh.shape), str(program.task.steps_per_dispatch)]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compiled(program: Program, lowered: Any, where: topologies.Topology, known: Plan) -> Plan:
  try:
    compiled = _compile(lowered)
  except jax.errors.JaxRuntimeError as error:
    return _refused(program, where, known, str(error))
  module = hlo.parse(compiled.as_text())
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  chip = topologies.CHIPS[where.kind]
  # The batches of the updates that a dispatch holds beyond the one that is compiled.
  waiting = (program.task.steps_per_dispatch - 1) * _held(program.abstract_batches(1))
  arguments = memory.argument_size_in_bytes + waiting
  # A TPU's compiler admits programs by their peak; what it calls temporaries may be far more.
  used = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
  if not where.shape:
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
  total, flops = used + waiting, costs["flops"] + hlo.repeated_flops(module)
  slice_mesh = dict(program.mesh.shape) | {"data": program.mesh.shape["data"] // where.slices}
  collectives = hlo.collectives(module, slice_mesh)
  moved = hlo.traffic(module)
  left = sum(row["bytes"] for row in collectives if row["kind"] == hlo.BETWEEN)
  stayed = sum(row["bytes"] for row in collectives) - left
  terms = {
    "compute": (flops, chip.flops),
    "memory": (moved, chip.bandwidth),
    "interconnect": (stayed, chip.links),
    "network": (left, chip.network),
  }
  times = {k: amount / peak for k, (amount, peak) in terms.items() if peak and amount}
  bound = max(times, key=lambda k: times[k]) if times else None
  return dataclasses.replace(
    known,
    fits=None if chip.hbm is None else total <= chip.hbm,
    arguments=arguments,
    temporaries=total - arguments,
    total=total,
    hbm=None if chip.hbm is None else int(chip.hbm),
    flops=flops,
    bytes_moved=moved,
    bytes_accessed=costs["bytes accessed"],
    loop_iterations=hlo.iterations(module),
    collectives=collectives,
    times=times,
    step=times[bound] if bound else None,
    bound=bound,
    largest=_largest(program, module),
    warnings=known.warnings + _resharded(module, slice_mesh) + _copied(module, moved),
    unknown=[f"{k} time" for k, (amount, peak) in terms.items() if amount and not peak],
  )


def _compile(lowered: Any) -> Any:
  """Compiles, past jax's cache: it keeps programs for absent devices and cannot read them back."""
  key = "jax_persistent_cache_min_compile_time_secs"
  old = getattr(jax.config, key)
  jax.config.update(key, math.inf)
  try:
    return lowered.compile()
  finally:
    jax.config.update(key, old)


def _refused(program: Program, where: topologies.Topology, known: Plan, error: str) -> Plan:
  """The plan of what does not compile; out of memory, with the buffers of a roomier chip."""
  chip = topologies.CHIPS[where.kind]
  hbm = None if chip.hbm is None else int(chip.hbm)
  known = dataclasses.replace(
    known,
    fits=False,
    error=error.splitlines()[0],
    arguments=_held((program.abstract_state, program.abstract_batches(1))),
    hbm=hbm,
    largest=_largest(program),
  )
  if "RESOURCE_EXHAUSTED" not in error or where.kind == "v5p":
    return known
  roomy = dataclasses.replace(where, kind="v5p")
  other = Program(program.task, meshes.make(program.mesh.shape, roomy.devices()), program.seeds)
  try:
    compiled = _compile(_lower(other, roomy))
  except jax.errors.JaxRuntimeError:
    return known
  memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
  return dataclasses.replace(
    known,
    temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
    total=memory.peak_memory_in_bytes,
    largest=_largest(program, module),
    warnings=[*known.warnings, f"sizes are those on {roomy.kind}, where there is room"],
  )


def _lowered_only(program: Program, known: Plan) -> Plan:
  held = _held((program.abstract_state, program.abstract_batches(program.task.steps_per_dispatch)))
  return dataclasses.replace(
    known,
    arguments=held,
    largest=_largest(program),
    unknown=["temporaries", "whether it fits", "FLOPs", "bytes moved", "collectives", "step time"],
  )


def _leaves(program: Program) -> Iterator[tuple[str, Any]]:
  trees = {"state": program.abstract_state, "batch": program.abstract_batches(1)}
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _held(tree: Any) -> int:
  """Bytes of a chip's part of abstract arrays."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _largest(program: Program, module: hlo.Module | None = None) -> list[dict[str, Any]]:
  rows = [(name, _held(leaf)) for name, leaf in _leaves(program)]
  rows += hlo.largest(module, NAMED) if module is not None else []
  top = sorted(rows, key=lambda row: -row[1])[:NAMED]
  return [{"name": name, "bytes": size} for name, size in top]


def _replicated(program: Program) -> list[str]:
  """A line for every large parameter that lies whole along an fsdp or tensor axis."""
  found = []
  for name, leaf in _leaves(program):
    size = leaf.size * leaf.dtype.itemsize // len(program.seeds)
    used = str(leaf.sharding.spec)
    whole = [
      f"{axis}={ways}"
      for axis, ways in program.mesh.shape.items()
      if axis in ("fsdp", "tensor") and ways > 1 and f"'{axis}'" not in used
    ]
    if name.startswith("state/params/") and size > MB and whole:
      short, over = name.removeprefix("state/"), " and ".join(whole)
      found.append(f"{short}, {size / MB:.1f} MB, is replicated over {over}")
  return found


def _copied(module: hlo.Module, moved: int) -> list[str]:
  share = hlo.loop_copies(module) / max(moved, 1)
  return [f"copies of whole arrays inside loops are {share:.0%} of the bytes moved"] * (share > 0.1)


def _resharded(module: hlo.Module, mesh: Mapping[str, int]) -> list[str]:
  """A line for every large array that is moved to another sharding; those of all layers as one."""
  alike: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
  for name, kind, size in hlo.reshardings(module, mesh, at_least=MB):
    alike[re.sub(r"\d+", "N", name), kind].append(size)
  return [
    f"{name} is resharded by {kind}, {len(sizes)} x {max(sizes) / MB:.1f} MB"
    for (name, kind), sizes in alike.items()
  ]
