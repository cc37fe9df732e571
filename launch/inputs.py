"""Input: deterministic batches of a source, for many seeds, sharded by process.

The order is a pure function of (seed, position): position p of seed s reads example
`shuffle(s, p // n)[p % n]` of the n there are. Hence one number, the next update, is the whole
state of the input pipeline, the same on every process, and a run resumes on another number of
processes with no example skipped or repeated. Threads and read-ahead are Grain's.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from launch.errors import ConfigurationError, nearest
from launch.task import Source

Arrays = dict[str, np.ndarray]


def gather(source: Source, indices: np.ndarray) -> Arrays:
  """Examples at `indices`, stacked."""
  if hasattr(source, "gather"):
    return source.gather(indices)
  if hasattr(source, "__getitems__"):
    examples = source.__getitems__([int(i) for i in indices])
  else:
    examples = [source[int(i)] for i in indices]
  return {k: np.stack([np.asarray(e[k]) for e in examples]) for k in examples[0]}


def check(source: Source, example: Mapping[str, jax.ShapeDtypeStruct], where: str) -> None:
  """Holds the first example against the declared shapes and dtypes."""
  if not len(source):
    raise ConfigurationError(f"{where}: the data is empty")
  first = source[0]
  for name, spec in example.items():
    if name not in first:
      raise ConfigurationError(f"{where}: examples have no field {name!r}{nearest(name, first)}")
    array = np.asarray(first[name])
    kinds = np.result_type(array.dtype).kind, np.dtype(spec.dtype).kind
    if array.shape != spec.shape or kinds[0] != kinds[1]:
      raise ConfigurationError(
        f"{where}: field {name!r} is {array.dtype}{list(array.shape)}; "
        f"{spec.dtype}{list(spec.shape)} is declared"
      )


@dataclasses.dataclass(frozen=True)
class Batches:
  """Random access to training batches: item k holds what update k reads, fields (S, rows, ...).

  Attributes:
    source: the examples.
    example: the fields to read and their dtypes.
    batch_size: rows of the global batch.
    seeds: one independent order a seed.
    rows: this process's part of the global batch.
    steps: updates in all.
  """

  source: Source
  example: Mapping[str, jax.ShapeDtypeStruct]
  batch_size: int
  seeds: tuple[int, ...]
  rows: range
  steps: int
  _order: Any = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    # Two epochs a seed: a batch may straddle the border.
    cached = functools.lru_cache(maxsize=2 * len(self.seeds))(self._shuffled)
    object.__setattr__(self, "_order", cached)

  def __len__(self) -> int:
    return self.steps

  def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
    # RandomState's streams are frozen: the same order on every platform and numpy version.
    random = np.random.RandomState(np.random.SeedSequence([seed, epoch]).generate_state(4))
    return random.permutation(len(self.source))

  def indices(self, step: int) -> np.ndarray:
    """Which examples update `step` reads, (S, rows) int64."""
    start = step * self.batch_size
    positions = np.arange(start + self.rows.start, start + self.rows.stop)
    epochs, places = np.divmod(positions, len(self.source))
    chosen = np.empty((len(self.seeds), len(positions)), np.int64)
    for epoch in np.unique(epochs):
      inside = epochs == epoch
      for row, seed in enumerate(self.seeds):
        chosen[row, inside] = self._order(seed, int(epoch))[places[inside]]
    return chosen

  def __getitem__(self, step: int) -> Arrays:
    indices = self.indices(int(step))
    fields = gather(self.source, indices.reshape(-1))
    batch = {
      k: np.asarray(fields[k], spec.dtype).reshape(*indices.shape, *spec.shape)
      for k, spec in self.example.items()
    }
    return batch | {"mask": np.ones(indices.shape, np.float32)}


def local_rows(sharding: NamedSharding, batch_size: int, axis: int) -> range:
  """The rows of a global batch that this process's devices hold; `axis` is the batch axis."""
  shape = [1] * axis + [batch_size]
  spec = tuple(sharding.spec)[: axis + 1]
  rows = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
  parts = {index[axis].indices(batch_size)[:2] for index in _addressable(rows, shape)}
  start, stop = min(p[0] for p in parts), max(p[1] for p in parts)
  return range(start, stop)


def _addressable(sharding: NamedSharding, shape: Sequence[int]):
  return sharding.addressable_devices_indices_map(tuple(shape)).values()


def iterate(batches: Batches, start: int, threads: int = 1) -> Iterator[Arrays]:
  """Reads batches from update `start` on, ahead of need, in Grain's threads."""
  dataset = grain.MapDataset.source(batches)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, 2 * threads))
  iterator = iter(dataset.to_iter_dataset(options))
  iterator.set_state({"next_index": start})
  return iterator


def evaluation_batches(
  source: Source, example: Mapping[str, jax.ShapeDtypeStruct], batch_size: int, rows: range
) -> Iterator[Arrays]:
  """Every example once, in order, fields (rows, ...); the last batch is filled up with mask 0."""
  n = len(source)
  for start in range(0, n, batch_size):
    indices = np.arange(start + rows.start, start + rows.stop)
    fields = gather(source, np.minimum(indices, n - 1))
    batch = {k: np.asarray(fields[k], spec.dtype) for k, spec in example.items()}
    yield batch | {"mask": (indices < n).astype(np.float32)}


def to_devices(arrays: Any, shardings: Any, batch_axis: int, batch_size: int) -> Any:
  """Host arrays of this process to global arrays on the mesh."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, shardings)

  def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    shape = (*array.shape[:batch_axis], batch_size, *array.shape[batch_axis + 1 :])
    return jax.make_array_from_process_local_data(sharding, array, shape)

  return jax.tree.map(place, arrays, shardings)
