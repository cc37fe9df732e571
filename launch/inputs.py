"""Input: deterministic batches of a source, for many seeds, sharded by process.

The order is a pure function of (seed, position): position p of seed s reads example
`shuffle(s, p // n)[p % n]` of the n there are. Hence one number, the next update, is the whole
state of the input pipeline, the same on every process, and a run resumes on another number of
processes with no example skipped or repeated. Threads and read-ahead are Grain's.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from launch.errors import ConfigurationError, nearest
from launch.task import Source, Task

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
  try:
    first = source[0]
  except (OSError, RuntimeError) as error:  # a shard that is missing or cut short
    raise ConfigurationError(f"{where}: the data cannot be read ({error})") from error
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


def load(task: Task, label: str) -> tuple[Source, dict[str, Source]]:
  """All data of a task, held against what it declares: for training, and for each evaluation."""
  train: Source = ()  # type: ignore[assignment]
  if task.steps:
    if task.data is None:
      raise ConfigurationError(f"{label}: steps = {task.steps} and no training data")
    train = task.data()
    check(train, task.example, label)
  measured = {name: evaluation.data() for name, evaluation in task.evaluate.items()}
  for name, source in measured.items():
    check(source, task.evaluate[name].example or task.example, f"{label} {name}")
  return train, measured


@dataclasses.dataclass(frozen=True)
class Batches:
  """Random access to training batches, those of one compiled call at a time.

  Item j holds what updates stops[j-1] to stops[j] - 1 read: fields (updates, S, rows, ...).

  Attributes:
    source: the examples.
    example: the fields to read and their dtypes.
    batch_size: rows of the global batch.
    seeds: one independent order a seed.
    rows: this process's part of the global batch, increasing.
    stops: the updates done after each call, increasing.
  """

  source: Source
  example: Mapping[str, jax.ShapeDtypeStruct]
  batch_size: int
  seeds: tuple[int, ...]
  rows: Sequence[int]
  stops: Sequence[int]

  @functools.cached_property
  def _order(self) -> Callable[[int, int], np.ndarray]:
    # Two epochs a seed: a batch may straddle the border.
    return functools.lru_cache(maxsize=2 * len(self.seeds))(self._shuffled)

  def __len__(self) -> int:
    return len(self.stops)

  def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
    # RandomState's streams are frozen: the same order on every platform and numpy version.
    random = np.random.RandomState(np.random.SeedSequence([seed, epoch]).generate_state(4))
    return random.permutation(len(self.source))

  def indices(self, first: int, last: int) -> np.ndarray:
    """Which examples updates `first` to `last` - 1 read, (updates, S, rows) int64."""
    positions = np.arange(first, last)[:, None] * self.batch_size + np.asarray(self.rows)
    epochs, places = np.divmod(positions, len(self.source))
    chosen = np.empty((len(self.seeds), *positions.shape), np.int64)
    for epoch in range(epochs[0, 0], epochs[-1, -1] + 1):
      inside = epochs == epoch
      for index, seed in enumerate(self.seeds):
        chosen[index, inside] = self._order(seed, epoch)[places[inside]]
    return chosen.swapaxes(0, 1)

  def __getitem__(self, call: int) -> Arrays:
    first = self.stops[call - 1] if call else 0
    indices = self.indices(first, self.stops[call])
    fields = gather(self.source, indices.reshape(-1))
    batch = {
      k: np.asarray(fields[k], spec.dtype).reshape(*indices.shape, *spec.shape)
      for k, spec in self.example.items()
    }
    return batch | {"mask": np.ones(indices.shape, np.float32)}


@functools.lru_cache(maxsize=16)
def local_rows(sharding: NamedSharding, batch_size: int, axis: int) -> tuple[int, ...]:
  """The rows of a global batch that this process's devices hold; `axis` is the batch axis.

  They need not be next to each other: where neighbouring devices are is the mesh's choice.
  """
  shape = [1] * axis + [batch_size]
  spec = tuple(sharding.spec)[: axis + 1]
  rows = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
  parts = (range(*index[axis].indices(batch_size)) for index in _addressable(rows, shape))
  return tuple(sorted(set().union(*parts)))


def _addressable(sharding: NamedSharding, shape: Sequence[int]):
  return sharding.addressable_devices_indices_map(tuple(shape)).values()


def iterate(batches: Batches, step: int, threads: int = 1) -> Iterator[Arrays]:
  """Reads on from update `step`, which must be 0 or one of the stops, in Grain's threads."""
  dataset = grain.MapDataset.source(batches)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, 2 * threads))
  iterator = iter(dataset.to_iter_dataset(options))
  iterator.set_state({"next_index": bisect.bisect_right(batches.stops, step)})
  return iterator


def evaluation_batches(
  source: Source,
  example: Mapping[str, jax.ShapeDtypeStruct],
  batch_size: int,
  rows: Sequence[int],
) -> Iterator[Arrays]:
  """Every example once, in order, fields (rows, ...); the last batch is filled up with mask 0."""
  n = len(source)
  for start in range(0, n, batch_size):
    indices = start + np.asarray(rows)
    fields = gather(source, np.minimum(indices, n - 1))
    batch = {k: np.asarray(fields[k], spec.dtype) for k, spec in example.items()}
    yield batch | {"mask": (indices < n).astype(np.float32)}


def to_devices(
  arrays: Arrays, shardings: Mapping[str, NamedSharding], batch_axis: int, batch_size: int
) -> Mapping[str, Any]:
  """Host arrays, of `local_rows`, to what a program with these input shardings takes."""
  if jax.process_count() == 1:
    return arrays  # the compiled call places them itself, faster than `jax.device_put`
  rows = np.asarray(local_rows(shardings["mask"], batch_size, batch_axis))

  def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    shape = (*array.shape[:batch_axis], batch_size, *array.shape[batch_axis + 1 :])

    def part(index: Any) -> np.ndarray:
      start, stop, _ = index[batch_axis].indices(batch_size)
      here = slice(*np.searchsorted(rows, (start, stop)))
      return array[(*index[:batch_axis], here, *index[batch_axis + 1 :])]

    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(array, shardings[name]) for name, array in arrays.items()}
