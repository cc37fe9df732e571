"""Domains side by side: whose windows a column has, and what splitting keeps."""

import numpy as np
import pytest

from experiments.datasets import domains, sources, text

NAMES, LENGTH = ("reference", "c", "licences"), 64


@pytest.fixture(scope="module")
def both():
  return domains.side_by_side(NAMES, "test", LENGTH)


def rows(field):
  return sorted(map(bytes, field.reshape(-1, LENGTH)))


def test_a_column_is_a_domain_evenly_read(both):
  alone = [text.windows(name, "test", LENGTH).fields for name in NAMES]
  size = min(len(fields["inputs"]) for fields in alone)
  for field, values in both.fields.items():
    assert values.shape == (size, len(NAMES), LENGTH) and values.dtype == np.int32
    for column, fields in enumerate(alone):
      places = [int(i * (len(fields[field]) - 1) / (size - 1)) for i in range(size)]
      np.testing.assert_array_equal(values[:, column], fields[field][places])
  few = domains.side_by_side(NAMES, "test", LENGTH, 5).fields["inputs"]
  np.testing.assert_array_equal(few[[0, -1]], both.fields["inputs"][[0, -1]])
  assert len(few) == 5
  assert len(domains.side_by_side(NAMES, "test", LENGTH, 10**6)) == size


def test_parts_are_all_there_is_once(both):
  parts = domains.parts(both, (0.25, 0.5, 0.25))
  assert [len(p) for p in parts] == pytest.approx([len(both) * s for s in (0.25, 0.5, 0.25)], abs=1)
  together = np.concatenate([p.fields["inputs"] for p in parts])
  for column in range(len(NAMES)):
    assert rows(together[:, column]) == rows(both.fields["inputs"][:, column])
  again = domains.parts(both, (0.25, 0.75))
  np.testing.assert_array_equal(again[0].fields["targets"], parts[0].fields["targets"])


def test_a_random_split_keeps_windows_and_mixes_domains(both):
  mixed = domains.random_split(both).fields
  assert mixed["inputs"].shape == both.fields["inputs"].shape
  assert rows(mixed["inputs"]) == rows(both.fields["inputs"])
  np.testing.assert_array_equal(mixed["inputs"][..., 1:], mixed["targets"][..., :-1])
  own = {bytes(row) for row in both.fields["inputs"][:, 0]}
  share = np.mean([[bytes(row) in own for row in rows] for rows in mixed["inputs"]], axis=0)
  np.testing.assert_allclose(share, 1 / len(NAMES), atol=0.1)


def test_what_no_package_has():
  with pytest.raises(sources.DatasetNotFound, match="domains=news, tweets: in no package"):
    domains.side_by_side(("c", "news", "tweets"), "train", LENGTH)
