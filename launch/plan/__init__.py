"""Plans: a stage's update compiled ahead of time for devices that are not here.

A plan knows what the compiler knows: memory, arithmetic, traffic, communication. The step time is
a roofline: no step is shorter than its largest term, and the latency of loops, of small transfers
and of the input comes on top. Evaluations are not planned.
"""

import collections
import contextlib
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

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from launch import mesh as meshes
from launch.metrics import write_json
from launch.plan import hlo, libtpu, roofline, topologies
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
    content: a digest of all that it depends on.
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
  content: str = ""


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
  cached_only: bool = False,
) -> Plan:
  """Compiles one update of `task` for `topology`, without data and without the devices.

  Args:
    task: the stage.
    topology: such as `v5e-16`; see `launch.plan.topologies`.
    sizes: of the mesh axes; default: all chips on `data`.
    seeds: trained side by side.
    cache: a folder of plans made earlier, by content.
    cached_only: whether to lower the program and to compile nothing.

  Raises:
    ConfigurationError: there is no such topology, libtpu is missing, or the mesh does not fit the
      chips or the batch.
    LookupError: the plan is not in the cache, and `cached_only`.
  """
  where = topologies.parse(topology)
  side_by_side = seeds if task.map_seeds else seeds[:1]
  program = Program(task, meshes.make(sizes, where.devices()), side_by_side)
  compiler = f"libtpu {libtpu.version()}"
  if not where.shape:
    compiler = f"jaxlib {importlib.metadata.version('jaxlib')}"
  known = Plan(
    topology=topology,
    chips=where.chips,
    mesh={k: v for k, v in program.mesh.shape.items() if v > 1},
    seeds=len(program.seeds),
    parameters=program.parameters,
    compiler=compiler,
    warnings=_replicated(program),
  )
  try:
    lowered = _lower(program, where)
  except NotImplementedError as error:
    if "not found for platform" not in str(error):  # a mistake of the model, then
      raise
    return _refused(program, where, known, str(error))
  known = dataclasses.replace(known, content=_content(lowered.as_text(), program, known))
  path = None if cache is None else cache / f"{known.content}.json"
  if path is not None and path.exists():
    return Plan(**json.loads(path.read_text()))
  if cached_only:
    raise LookupError(f"no plan of this content in {cache}")
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


def _content(text: str, program: Program, known: Plan) -> str:
  """Of everything that a plan depends on, this package's own code included.

  Names of operations apart: a module with another name is the same program.
  """
  code = [p.read_text() for p in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
  flags = [f for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") for f in os.environ.get(k, "").split()]
  parts = [
    *(text, known, program.mesh.shape, program.task.steps_per_dispatch, list(_leaves(program))),
    *(jax.__version__, jax.config.jax_optimization_level),  # type: ignore[attr-defined]
    *(flag for flag in flags if "host_platform_device_count" not in flag),
    *code,
  ]
  return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def _compiled(program: Program, lowered: Any, where: topologies.Topology, known: Plan) -> Plan:
  try:
    compiled, said = _compile(lowered)
  except jax.errors.JaxRuntimeError as error:
    return _refused(program, where, known, str(error), lowered)
  module = hlo.parse(compiled.as_text())
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  chip = roofline.CHIPS[where.kind]
  # The batches of the updates that a dispatch holds beyond the one that is compiled.
  waiting = (program.task.steps_per_dispatch - 1) * _held(program.abstract_batches(1))
  arguments = memory.argument_size_in_bytes + waiting
  # A TPU's compiler admits programs by their peak; what it calls temporaries may be far more.
  used = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
  if not where.shape:
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = used + waiting
  slice_mesh = dict(program.mesh.shape) | {"data": program.mesh.shape["data"] // where.slices}
  roof = roofline.of_module(module, costs["flops"], chip)
  return dataclasses.replace(
    known,
    fits=None if chip.hbm is None else total <= chip.hbm,
    arguments=arguments,
    temporaries=total - arguments,
    total=total,
    hbm=None if chip.hbm is None else int(chip.hbm),
    flops=roof.flops,
    bytes_moved=roof.bytes,
    bytes_accessed=costs["bytes accessed"],
    loop_iterations=hlo.iterations(module),
    collectives=hlo.collectives(module, slice_mesh),
    times=roof.seconds,
    step=roof.step or None,
    bound=roof.bound,
    largest=_largest(program, module),
    warnings=known.warnings
    + _rematerialised(said)
    + _resharded(module, slice_mesh)
    + _copied(module, roof.bytes),
    unknown=[f"{name} time" for name in roof.unknown],
  )


def _compile(lowered: Any, **options: Any) -> tuple[Any, list[str]]:
  """The compiled program, and what the compiler said of it on stderr.

  Past jax's cache, which keeps programs for absent devices and cannot read them back.
  """
  key = "jax_persistent_cache_min_compile_time_secs"
  old = getattr(jax.config, key)
  jax.config.update(key, math.inf)
  try:
    with libtpu.heard() as lines:
      compiled = lowered.compile(compiler_options=options)
    return compiled, lines
  finally:
    jax.config.update(key, old)


def _refused(
  program: Program, where: topologies.Topology, known: Plan, error: str, lowered: Any = None
) -> Plan:
  """The plan of what does not compile; out of memory, with the buffers that it would have."""
  chip = roofline.CHIPS[where.kind]
  known = dataclasses.replace(
    known,
    fits=False,
    error=error.splitlines()[0],
    arguments=_held((program.abstract_state, program.abstract_batches(1))),
    hbm=None if chip.hbm is None else int(chip.hbm),
    largest=_largest(program),
  )
  if "RESOURCE_EXHAUSTED" not in error or not where.shape:
    return known
  compiled, warnings = _regardless(lowered), known.warnings
  roomy = dataclasses.replace(where, kind="v5p")
  if compiled is None and where.kind != roomy.kind:
    other = Program(program.task, meshes.make(program.mesh.shape, roomy.devices()), program.seeds)
    compiled = _regardless(_lower(other, roomy))
    warnings = [*warnings, f"sizes are those on {roomy.kind}, where there is more room"]
  if compiled is None:
    return known
  memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
  return dataclasses.replace(
    known,
    temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
    total=memory.peak_memory_in_bytes,
    largest=_largest(program, module),
    warnings=warnings,
  )


def _regardless(lowered: Any) -> Any:
  """Compiles for less memory than it takes; None where a buffer is larger than all of it."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    return _compile(lowered, xla_tpu_no_crash_on_oom=True)[0]
  return None


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
  """The largest buffers; those of all layers as one."""
  rows = [(name, _held(leaf)) for name, leaf in _leaves(program)]
  rows += hlo.buffers(module) if module is not None else []
  alike: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
  for name, size in sorted(rows, key=lambda row: -row[1]):
    alike[re.sub(r"\d+", "N", name), size].append(name)
  return [
    {"name": names[0] if len(names) == 1 else f"{name} ({len(names)} alike)", "bytes": size}
    for (name, size), names in list(alike.items())[:NAMED]
  ]


def _replicated(program: Program) -> list[str]:
  """A line for every large parameter that lies whole along an fsdp or tensor axis."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  boxed = nn.get_partition_spec(jax.eval_shape(program.task.init, key)["params"])
  names = jax.tree.leaves(boxed, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
  paths = jax.tree_util.tree_leaves_with_path(program.abstract_state.params)
  found = []
  for (path, leaf), spec in zip(paths, names, strict=True):
    shape = leaf.shape[1:]  # behind the seeds
    logical = (*(spec or ()), *(None,) * len(shape))[: len(shape)]
    size, used = math.prod(shape) * leaf.dtype.itemsize, str(leaf.sharding.spec)
    whole = {
      f"{axis}={ways}": _why(axis, dict(zip(logical, shape, strict=True)), program.task.rules)
      for axis, ways in program.mesh.shape.items()
      if axis in ("fsdp", "tensor") and ways > 1 and f"'{axis}'" not in used
    }
    if size > MB and whole:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      axes, over = ", ".join(map(str, logical)), " and ".join(whole)
      why = "; ".join(dict.fromkeys(whole.values()))
      found.append(f"params/{name} ({axes}), {size / MB:.1f} MB, is replicated over {over}: {why}")
  return found


def _why(axis: str, sizes: Mapping[str | None, int], rules: meshes.Rules) -> str:
  """Why no rule shards an array with these logical axes over a mesh axis."""
  over = lambda axes: (axes,) if isinstance(axes, str) else axes or ()  # noqa: E731
  fitting = [name for name, axes in rules if axis in over(axes) and name != "batch"]
  for name in fitting:
    if name in sizes:
      return f"{name} = {sizes[name]} does not divide"
  return f"none of its axes is {' or '.join(fitting) or 'one that a rule shards over it'}"


def _rematerialised(lines: list[str]) -> list[str]:
  """A line for every array that the compiler says it gathers whole to shard it anew."""
  pattern = r"Involuntary full rematerialization\. (.*?)\. As the last resort"
  said = [m[1] for m in map(re.compile(pattern).search, lines) if m]
  alike = collections.Counter(re.sub(r"(?<=[%._])\d+\b", "N", text) for text in said)
  return [f"involuntary full rematerialization, {n} x: {text}" for text, n in alike.items()]


def _copied(module: hlo.Module, moved: float) -> list[str]:
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
