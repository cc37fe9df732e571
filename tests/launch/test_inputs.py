import collections
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import ConfigurationError, inputs
from launch import mesh as meshes

EXAMPLE = {"x": jax.ShapeDtypeStruct((2,), np.float32), "id": jax.ShapeDtypeStruct((), np.int32)}


class Numbers:
  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    return {"x": np.array([i, -i], np.float64), "id": i}


def batches(n=10, batch_size=4, seeds=(0, 1), rows=None, stops=range(1, 51)):
  return inputs.Batches(Numbers(n), EXAMPLE, batch_size, seeds, rows or range(batch_size), stops)


def test_an_epoch_is_every_example_once_for_every_seed():
  order = batches().indices(0, 5).swapaxes(0, 1).reshape(2, 20)  # two epochs of ten
  for seed_order in order:
    assert sorted(seed_order[:10]) == sorted(seed_order[10:]) == list(range(10))
  assert len({tuple(o) for o in order.reshape(4, 10)}) == 4  # all four orders differ


def test_the_order_is_pinned():
  """A change of platform, of numpy or of this code that moves an example fails here."""
  assert batches(n=10, seeds=(3,)).indices(0, 1).tolist() == [[PINNED]]


PINNED = [0, 6, 4, 2]


def test_a_batch_has_the_declared_fields():
  batch = batches(stops=(3, 5))[1]
  assert batch["x"].shape == (2, 2, 4, 2)  # updates, seeds, rows
  assert batch["x"].dtype == np.float32
  assert batch["id"].dtype == np.int32
  assert batch["mask"].tolist() == [[[1.0] * 4] * 2] * 2
  np.testing.assert_array_equal(batch["x"][..., 1], -batch["id"])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_global_batch_in_order(processes):
  part = 8 // processes
  parts = [batches(batch_size=8, rows=range(p * part, (p + 1) * part)) for p in range(processes)]
  for step in range(6):
    together = np.concatenate([p[step]["id"] for p in parts], axis=2)
    np.testing.assert_array_equal(together, batches(batch_size=8)[step]["id"])


def test_how_updates_are_grouped_into_calls_changes_no_example():
  one_by_one = np.concatenate([batches()[k]["id"] for k in range(7)])
  grouped = batches(stops=(3, 4, 7))
  np.testing.assert_array_equal(np.concatenate([grouped[j]["id"] for j in range(3)]), one_by_one)


def test_reading_on_from_a_position():
  whole = list(itertools.islice(inputs.iterate(batches(), 0), 10))
  rest = list(itertools.islice(inputs.iterate(batches(), 6, threads=3), 4))
  for a, b in zip(whole[6:], rest, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_evaluation_reads_every_example_once_and_masks_the_rest():
  seen = collections.Counter()
  for batch in inputs.evaluation_batches(Numbers(10), EXAMPLE, 4, range(4)):
    assert batch["x"].shape == (4, 2)
    seen.update(batch["id"][batch["mask"] == 1].tolist())
  assert seen == collections.Counter(range(10))


def test_fast_and_slow_sources_agree():
  class Fast(Numbers):
    def gather(self, indices):
      return {"x": np.stack([indices, -indices], -1), "id": indices}

  class Grain(Numbers):
    def __getitems__(self, indices):
      return [self[i] for i in indices]

  indices = np.array([3, 1, 3])
  for source in (Fast(10), Grain(10)):
    jax.tree.map(
      np.testing.assert_array_equal,
      inputs.gather(source, indices),
      inputs.gather(Numbers(10), indices),
    )


def test_data_that_is_not_as_declared_is_named():
  wrong = {"x": jax.ShapeDtypeStruct((3,), np.float32)}
  with pytest.raises(ConfigurationError, match=r"field 'x' is float64\[2\]; float32\[3\]"):
    inputs.check(Numbers(3), wrong, "here")
  with pytest.raises(ConfigurationError, match="no field 'y'"):
    inputs.check(Numbers(3), {"y": EXAMPLE["x"]}, "here")
  with pytest.raises(ConfigurationError, match="empty"):
    inputs.check(Numbers(0), EXAMPLE, "here")


def test_local_rows_cover_what_the_devices_hold():
  mesh = meshes.make({"data": 4, "tensor": 2})
  spec = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
  assert inputs.local_rows(spec, 16, 1) == tuple(range(16))
