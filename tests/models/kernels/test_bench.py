"""The races' programs agree with each other; their times are nobody's business here."""

import itertools

import numpy as np
import pytest
import rich.console

from models.kernels import bench


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setattr(bench, "SCANS", {"real": (2, 17, 4), "complex": (2, 9, 3)})
  monkeypatch.setattr(bench, "CONVS", ((2, 16, 3),))
  monkeypatch.setattr(bench, "accelerated", lambda: False)


@pytest.mark.parametrize("group", ["scans", "s5", "convs"])
def test_contestants_agree(group):
  rows = {
    "scans": bench.scan_rows,
    "s5": lambda repeats: itertools.islice(bench.rows((8,), repeats), 2),
    "convs": bench.conv_rows,
  }[group]
  found = list(rows(repeats=1))
  assert {row["peer"] for row in found} >= {
    "scans": {"associative_scan", "lax.scan", "scipy lfilter"},
    "s5": {"authors' form"},
    "convs": {"jnp.fft", "scipy.fft"},
  }[group]
  assert all(row["error"] < 1e-4 for row in found)
  with (console := rich.console.Console(width=200)).capture() as written:
    console.print(bench.table(found, {"bytes": 1e9, "float32": 1e9}))
  assert all(row["peer"] in written.get() for row in found)


def test_minimal_bytes():
  """An S5 layer reads its inputs and parameters and writes its outputs."""
  row = next(bench.rows((8,), 1))
  batch, length, width, states = row["shape"]
  numbers = 2 * batch * length * width + width + states + 2 * states + 4 * states * width
  assert row["bytes"] == 4 * numbers
  assert row["flops"] == 8 * batch * length * width * states
  assert np.isclose(row["ratio"], row["peer_ms"] / row["ms"])
