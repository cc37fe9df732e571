"""The races' programs agree with each other; their times are nobody's business here."""

import functools
import itertools

import jax
import numpy as np
import pytest
import rich.console

from models.kernels import bench, peers, timing
from models.kernels.linear_scan import interface


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setattr(bench, "SCANS", {"real": ((2, 16, 4),), "complex": ((2, 9, 3),)})
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
  assert all(row["p10_ms"] <= row["ms"] <= row["p90_ms"] for row in found)
  with (console := rich.console.Console(width=200)).capture() as written:
    console.print(bench.table(found, {"bytes": 1e9, "float32": 1e9}))
  assert all(row["peer"] in written.get() for row in found)


def test_a_kernel_is_raced_by_its_name_and_against_the_default(monkeypatch):
  table = interface.IMPLEMENTATIONS
  row = table["xla"]
  elsewhere = row._replace(platforms=("tpu",), partitioned=False)
  added = {"kernel": row._replace(partitioned=False), "elsewhere": elsewhere}
  monkeypatch.setattr(interface, "IMPLEMENTATIONS", {**table, **added})
  found = list(itertools.islice(bench.scan_rows(repeats=1), 2))
  assert [row["case"] for row in found] == ["real scan: kernel"] * 2
  assert [row["peer"] for row in found] == ["default", "associative_scan"]
  assert all(row["error"] < 1e-4 for row in found)


def test_a_peer_that_does_not_run_is_left_out(capsys):
  def broken(x):
    raise OSError("no such device\nmore")

  calls = {"good": (timing.Host(np.negative), (1,)), "bad": (timing.Host(broken), (1,))}
  assert list(peers.usable(calls)) == ["good"]
  assert "bad is left out: no such device" in capsys.readouterr().out


def test_what_does_not_fit_is_left_out(monkeypatch, capsys):
  def full(case, shape, peer, *rest):
    if peer == "lax.scan":
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
    return {"peer": peer}

  monkeypatch.setattr(bench, "_row", full)
  found = [row["peer"] for row in bench.scan_rows(repeats=1)]
  assert "associative_scan" in found and "lax.scan" not in found
  words = " ".join(capsys.readouterr().out.split())
  assert "complex scan (2, 9, 3) against lax.scan is left out: RESOURCE_EXHAUSTED" in words


def test_libraries_agree():
  """PyTorch's contestants with those of JAX, and their gradients; and scipy's."""
  rng = np.random.default_rng(0)
  a, b = np.float32(rng.uniform(size=(2, 9, 3))), np.float32(rng.normal(size=(2, 9, 3)))
  k = np.float32(rng.normal(size=(3, 9)))
  loss = lambda f: lambda *x: (f(*x) ** 2).sum()  # noqa: E731
  for peer, ours, operands in (
    (peers.scans, peers.associative_scan, (a, b)),
    (functools.partial(peers.convs, gates=(a, a)), peers.fft_conv, (b, k, a, a)),
  ):
    for gradients in (False, True):
      for function, given in peer(*operands[:2], gradients=gradients).values():
        got = function.function(*given)
        if not gradients:
          np.testing.assert_allclose(peers.array(got), ours(*operands), rtol=1e-4, atol=1e-4)
          continue
        want = jax.grad(loss(ours), argnums=tuple(range(len(operands))))(*operands)
        for x, y in zip(map(peers.array, got[1:]), want, strict=True):
          same = x if x.shape == y.shape else x.swapaxes(1, 2)  # in the layout of the library
          np.testing.assert_allclose(same, y, rtol=1e-3, atol=1e-3)


def test_minimal_bytes():
  """An S5 layer reads its inputs and parameters and writes its outputs."""
  row = next(bench.rows((8,), 1))
  batch, length, width, states = row["shape"]
  numbers = 2 * batch * length * width + width + states + 2 * states + 4 * states * width
  assert row["bytes"] == 4 * numbers
  assert row["flops"] == 8 * batch * length * width * states
  assert np.isclose(row["ratio"], row["peer_ms"] / row["ms"])
