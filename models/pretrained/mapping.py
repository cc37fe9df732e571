"""Checkpoint tensors to parameters and back by a map of names that is data."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import einops
import jax
import numpy as np

from models.pretrained import formats


class Row(NamedTuple):
  """One kind of tensor.

  Attributes:
    ours: path of a parameter, "layer_{layer}/mlp/up/kernel", for every layer there is; layers that
      are stacked under "layer" are found too. "params/" may be left out. Several paths for a fused
      tensor: it is their concatenation along the last axis.
    theirs: the tensor's name, with {layer} if `ours` has it.
    pattern: einops' for theirs to ours, "o i -> i o"; empty for no change.
    sizes: of axes that the pattern splits, in either direction.
  """

  ours: str | tuple[str, ...]
  theirs: str
  pattern: str = ""
  sizes: Mapping[str, int] = {}


class Names(NamedTuple):
  """A map between a family's checkpoints and our parameters.

  Attributes:
    rows: what is what.
    aliases: (regular expression, replacement), done to a checkpoint's names before all else: for
      layouts that differ in names alone.
    ignore: regular expressions, of whole names of tensors that are nobody's parameter.
  """

  rows: tuple[Row, ...]
  aliases: tuple[tuple[str, str], ...] = ()
  ignore: tuple[str, ...] = ()


class _Use(NamedTuple):
  """One tensor of a checkpoint, and the parameters it is; of a stack, the `layer`."""

  theirs: str
  row: Row
  ours: tuple[str, ...]
  layer: int | None


def load(
  checkpoint: str | os.PathLike | Mapping[str, Any],
  names: Names,
  abstract: Any,
  shardings: Any = None,
) -> Any:
  """Variables of a model from a checkpoint.

  Parameters are made one at a time, and of each only what this process's devices hold, so that
  neither the file nor the model needs to fit the memory of one process. (A quantised GGUF tensor is
  dequantised whole.) Numbers are cast to the dtypes of `abstract`.

  Args:
    checkpoint: a path, see `formats.read`, or tensors by name, which have a `shape` and can be made
      numpy arrays.
    names: the family's map.
    abstract: variables or parameters with a shape and dtype at each leaf, as of `jax.eval_shape`.
    shardings: a tree of shardings like `abstract`, or one for all; the default device if None.

  Returns: a tree like `abstract` of arrays.

  Raises:
    ValueError: tensors are missing, extra or of another shape, or the map has no row for a
      parameter: all are counted, and the first few named. See also `formats.read`.
  """
  tensors = checkpoint if isinstance(checkpoint, Mapping) else formats.read(checkpoint)
  given = {_rename(name, names.aliases): name for name in tensors}
  tensors = {ours: tensors[theirs] for ours, theirs in given.items()}
  leaves, treedef = _flatten(abstract)
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  uses = list(_uses(names, shapes))
  wrong = _unmapped(uses, shapes) | _unfit(tensors, given, names, shapes, uses)
  _raise("checkpoint" if isinstance(checkpoint, Mapping) else checkpoint, wrong)
  if shardings is None or isinstance(shardings, jax.sharding.Sharding):
    shardings = [shardings] * len(leaves)
  else:
    shardings = jax.tree.leaves(shardings)
  sources: dict[str, list[_Use]] = {path: [] for path in leaves}
  for use in uses:
    for path in use.ours:
      sources[path].append(use)

  def values(path: str) -> Iterator[tuple[int | None, np.ndarray]]:
    for theirs, row, ours, layer in sources[path]:
      value = np.asarray(tensors[theirs])
      value = einops.rearrange(value, row.pattern, **row.sizes) if row.pattern else value
      if len(ours) > 1:
        ends = np.cumsum([shapes[part][-1] for part in ours])
        value = np.split(value, ends[:-1], axis=-1)[ours.index(path)]
      yield layer, value

  pairs = zip(leaves.items(), shardings, strict=True)
  arrays = [_array(leaf, values(path), sharding) for (path, leaf), sharding in pairs]
  return jax.tree.unflatten(treedef, arrays)


def save(
  tree: Any,
  names: Names,
  path: str | os.PathLike,
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes variables or parameters as a checkpoint, the inverse of `load`.

  Tensors are made and written one by one; their dtypes are the tree's.

  Args:
    tree: of arrays that this process can read.
    names: the family's map.
    path, metadata: see `formats.write`; for a GGUF file, metadata as of `formats.gguf`.

  Raises: ValueError where the map has no row for a parameter.
  """
  leaves, _ = _flatten(tree)
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  uses = list(_uses(names, shapes))
  _raise("tree", _unmapped(uses, shapes))
  specs = {
    use.theirs: jax.ShapeDtypeStruct(_their_shape(use, shapes), leaves[use.ours[0]].dtype)
    for use in uses
  }

  def values() -> Iterator[np.ndarray]:
    for use in uses:
      parts = [leaves[path] if use.layer is None else leaves[path][use.layer] for path in use.ours]
      yield _inverse(use.row, np.concatenate(parts, -1) if len(parts) > 1 else np.asarray(parts[0]))

  formats.write(path, specs, values(), metadata)


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
  """Leaves by path, without "params/" and boxes of axis names, and the tree's structure."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  keys = ([str(key.key) for key in path if hasattr(key, "key")] for path, _ in leaves)
  paths = ["/".join(path).removeprefix("params/") for path in keys]
  return dict(zip(paths, (leaf for _, leaf in leaves), strict=True)), treedef


def _rename(name: str, aliases: Iterable[tuple[str, str]]) -> str:
  for pattern, replacement in aliases:
    name = re.sub(pattern, replacement, name)
  return name


def _uses(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Use]:
  """What each of the rows is in a tree with these shapes."""
  for row in names.rows:
    ours = (row.ours,) if isinstance(row.ours, str) else row.ours
    stacks = tuple(path.replace("layer_{layer}", "layer") for path in ours)
    stacked = stacks != ours and stacks[0] in shapes
    for layer in range(shapes[stacks[0]][0]) if stacked else itertools.count():
      paths = stacks if stacked else tuple(path.format(layer=layer) for path in ours)
      if not all(path in shapes for path in paths):
        break
      yield _Use(row.theirs.format(layer=layer), row, paths, layer if stacked else None)
      if stacks == ours:
        break


def _inverse(row: Row, value: np.ndarray) -> np.ndarray:
  theirs, _, ours = row.pattern.partition("->")
  return einops.rearrange(value, f"{ours}->{theirs}", **row.sizes) if row.pattern else value


def _their_shape(use: _Use, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
  parts = [shapes[path] if use.layer is None else shapes[path][1:] for path in use.ours]
  shape = parts[0] if len(parts) == 1 else (*parts[0][:-1], sum(part[-1] for part in parts))
  try:
    return _inverse(use.row, np.broadcast_to(np.int8(0), shape)).shape  # of one number in memory
  except einops.EinopsError:
    fields = f"{use.row.pattern!r} with {dict(use.row.sizes)}"
    raise ValueError(f"{', '.join(use.ours)}: {shape} does not fit the map's {fields}") from None


def _unmapped(uses: list[_Use], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
  mapped = {path for use in uses for path in use.ours}
  return {"without a row in the map": sorted(shapes.keys() - mapped)}


def _unfit(
  tensors: Mapping[str, Any],
  given: Mapping[str, str],
  names: Names,
  shapes: Mapping[str, tuple[int, ...]],
  uses: list[_Use],
) -> dict[str, list[str]]:
  """What is wrong with the tensors, whose names in the checkpoint are `given`."""
  wanted = {use.theirs: _their_shape(use, shapes) for use in uses}
  ignored = re.compile("|".join(names.ignore) or "(?!)")
  found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  return {
    "missing": [name for name in wanted if name not in found],
    "extra": [given[n] for n in found if n not in wanted and not ignored.fullmatch(n)],
    "mis-shaped": [
      f"{given[name]} {found[name]}, wanted {shape}"
      for name, shape in wanted.items()
      if found.get(name, shape) != shape
    ],
  }


def _raise(what: Any, wrong: Mapping[str, list[str]]) -> None:
  """ValueError that counts what is wrong, by kind, and names the first of each."""
  parts = [
    f"{len(found)} {kind}: {', '.join(found[:4])}{', ..' * (len(found) > 4)}"
    for kind, found in wrong.items()
    if found
  ]
  if parts:
    raise ValueError(f"{what} does not fit the model; {'; '.join(parts)}")


def _array(leaf: Any, values: Iterable[tuple[int | None, np.ndarray]], sharding: Any) -> jax.Array:
  """A parameter of its values, or (layer, value) for each of a stack, each of them used once."""
  shape = tuple(leaf.shape)

  def bounds(index: Any) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))

  if sharding is None:
    indices: Iterable[Any] = [(slice(None),) * len(shape)]
  else:
    indices = sharding.addressable_devices_indices_map(shape).values()
  pieces = {
    key: np.empty([stop - start for start, stop in key], leaf.dtype) for key in map(bounds, indices)
  }
  for layer, value in values:
    for key, piece in pieces.items():
      inner = tuple(slice(*pair) for pair in (key if layer is None else key[1:]))
      if layer is None:
        piece[...] = value[inner]
      elif key[0][0] <= layer < key[0][1]:
        piece[layer - key[0][0]] = value[inner]
  if sharding is None:
    return jax.numpy.asarray(next(iter(pieces.values())))
  return jax.make_array_from_callback(shape, sharding, lambda index: pieces[bounds(index)])
