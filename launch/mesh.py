"""The mesh: named axes, logical axis rules, and the shardings that follow from them.

Models name the axes of their parameters (`nn.with_logical_partitioning`); a rule maps each name to
mesh axes. The same model therefore runs on one CPU and on a pod, by naming another mesh.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch.errors import ConfigurationError, nearest

AXES = ("data", "fsdp", "tensor", "sequence")

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# Batch over data and fsdp; parameters over fsdp along the residual width and over tensor along the
# inner widths; time over sequence. The first rule whose mesh axis is still free wins.
RULES: Rules = (
  ("batch", ("data", "fsdp")),
  ("length", "sequence"),
  ("vocab", "tensor"),
  ("state", "tensor"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("embed", "fsdp"),
  ("layers", None),
  ("seed", None),
)

# For several models that share nothing (`launch.independent`): the data axis holds the models.
MODEL_RULES: Rules = (("models", "data"), ("batch", "fsdp"), *RULES)


def parse(text: str) -> dict[str, int]:
  """Reads `data=4,fsdp=2` into sizes; the empty string means every device on `data`."""
  sizes: dict[str, int] = {}
  for part in filter(None, text.split(",")):
    name, equals, size = part.partition("=")
    if name not in AXES:
      raise ConfigurationError(f"--mesh: unknown axis {name!r}{nearest(name, AXES)}")
    if not equals or not size.isdigit() or int(size) < 1:
      raise ConfigurationError(f"--mesh: {part!r} is not of the form {name}=N with N >= 1")
    sizes[name] = int(size)
  return sizes


def make(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices with the axes of `AXES`, of Auto type (GSPMD).

  Axes that are not named have size 1, except `data`, which takes the devices that are left.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(sizes or {})
  rest = math.prod(size for name, size in sizes.items() if name != "data")
  sizes.setdefault("data", max(len(devices) // rest, 1))
  shape = tuple(sizes.get(name, 1) for name in AXES)
  if math.prod(shape) != len(devices):
    named = ",".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size > 1)
    raise ConfigurationError(
      f"--mesh={named or 'data=1'} takes {math.prod(shape)} devices; {len(devices)} are there"
    )
  on_tpu = devices[0].platform == "tpu"  # a GPU's "slice" is its host, which a mesh need not heed
  slices = len({getattr(device, "slice_index", None) for device in devices}) if on_tpu else 1
  if shape[0] % slices:
    raise ConfigurationError(
      f"--mesh: data={shape[0]} does not divide among {slices} slices; a multiple of {slices} does"
    )
  # Slices lie along data, the axis that exchanges least. (`jax.make_mesh` takes one slice only, and
  # of a three-dimensional torus only axes that a mesh axis fills.)
  if slices > 1:
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(
      within, between, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Makes mesh and rules current, so that `nn.with_logical_constraint` takes effect in models."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def _fitting(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Drops the mesh axes that do not divide their dimension: that dimension stays whole."""
  fitted = []
  for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    fitted.append(axes if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
  return PartitionSpec(*fitted)


def unboxed(variables: Any) -> Any:
  """Flax variables without the boxes that carry the logical axis names."""
  boxed = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  return jax.tree.map(
    lambda x: x.unbox(apply_constraint=False) if boxed(x) else x, variables, is_leaf=boxed
  )


def variables_shardings(boxed: Any, mesh: Mesh, rules: Rules, leading: int = 0) -> Any:
  """Shardings of abstract flax variables that still carry their logical axis names.

  Args:
    boxed: `jax.eval_shape` of a model's `init`, with flax's partitioning boxes.
    mesh: where they go.
    rules: logical axis name -> mesh axis.
    leading: unsharded axes in front that the names do not count (the seeds).

  Returns: a tree of `NamedSharding`, of the structure of the unboxed variables.
  """
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
  shapes = unboxed(boxed)

  def place(shape: Any, spec: PartitionSpec | None) -> NamedSharding:
    full = PartitionSpec(*(None,) * leading, *(spec or ()))
    return NamedSharding(mesh, _fitting(full, shape.shape, mesh))

  return jax.tree.map(place, shapes, specs)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
  """Shardings of an optimizer state: a leaf that mirrors a parameter lies where it lies.

  A leaf mirrors a parameter when its path ends in the parameter's path and the shapes agree (Adam's
  moments, averages of the parameters, ...). Everything else is replicated.
  """
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  homes = {
    path: (leaf.shape, sharding)
    for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True)
  }

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    for start in range(len(path)):
      shape, sharding = homes.get(path[start:], (None, None))
      if sharding is not None and shape == leaf.shape:
        return sharding
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh, rules: Rules, axes: Sequence[str | None], leading: int):
  """Sharding of a batch field with logical `axes`, behind `leading` unsharded axes."""
  spec = nn.logical_to_mesh_axes(tuple(axes), rules) or ()
  return NamedSharding(mesh, PartitionSpec(*(None,) * leading, *spec))


def ways(mesh: Mesh, rules: Rules, axis: str) -> tuple[int, str]:
  """Into how many parts the mesh cuts a logical axis, and by which mesh axes (for messages)."""
  spec = next(iter(nn.logical_to_mesh_axes((axis,), rules) or (None,)))
  names = () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)
  by = " x ".join(f"{n}={mesh.shape[n]}" for n in names)
  return math.prod(mesh.shape[n] for n in names), by
