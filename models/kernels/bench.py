"""The cores against the usual ways of writing them, timed in turns in one run.

    python -m models.kernels.bench
    python -m models.kernels.bench --groups=mixers --lengths=256,1024 --repeats=9 --json=bench.json

Groups, `--groups`:

* scans: `lax.associative_scan` and `lax.scan`, which move time to the front and back; for a
  constant decay also `scipy.signal.lfilter` on the host, channel by channel, forward only.
* s5: the form of its authors: complex elements (L, P) materialised for `lax.associative_scan`,
  vmapped over the batch. Both discretise by zero-order hold inside the timed function, and both are
  differentiated with respect to inputs and all parameters.
* convs: `jnp.fft`, one jit of transform, product and inverse; forward on the host also `scipy.fft`
  and, where it is installed, `torch.fft`.
* mixers: one SGConv layer, whose kernel is made anew in every call, against an S4D layer, which
  materialises its kernel likewise, and a causal attention layer of the same width.

Of each call: median time; GB/s of its minimal bytes, every operand read and every result written
once, and their share of what a copy of a large array reaches in this run; FLOP/s where products
dominate, and their share of what a square matrix product reaches in this run; seconds of compiling;
bytes of temporaries. Peers that are not installed are left out.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich
import scipy
from absl import app, flags
from jax import lax
from rich.table import Table

from models.attention import Attention
from models.kernels import linear_scan, long_conv, s5_apply, timing
from models.long_conv import SGConv
from models.ssm import S4D

WIDTH, STATES = 128, 64
S5_LENGTHS = (256, 1024, 4096, 16384)
SCANS = {"real": (8, 2048, 256), "complex": (32, 1024, 64)}
ON_ACCELERATORS = {"real": (8, 4096, 1024), "complex": (8, 4096, 1024)}
CONVS = ((4, 2048, 64), (2, 16384, 32))  # (B, L, H)
CONVS_ON_ACCELERATORS = tuple((64, length, 768) for length in (1024, 2048, 4096, 8192))
MIXER_LENGTHS = (256, 512, 1024, 2048, 4096)
GROUPS = ("scans", "s5", "convs", "mixers")

Ours = tuple[Callable[..., Any], tuple[Any, ...]]
Call = Ours | tuple[timing.Host, tuple[Any, ...]]


def accelerated() -> bool:
  """Whether the shapes are those for an accelerator."""
  return jax.default_backend() != "cpu"


def peaks(repeats: int = 9) -> dict[str, float]:
  """What the device reaches here: bytes a second of a copy, FLOP/s of products by dtype.

  The array copied, 256 MiB or on a CPU 64, is larger than any cache.
  """
  size, n = (2**26, 8192) if accelerated() else (2**24, 2048)
  x, w = jnp.zeros(size, jnp.float32), jnp.ones((n, n), jnp.float32)
  calls: dict[str, Call] = {
    "bytes": (lambda x: x + 1, (x,)),
    "float32": (lambda w: w @ w, (w,)),
    "bfloat16": (lambda w: w @ w, (w.astype(jnp.bfloat16),)),
  }
  work = {"bytes": 2 * x.nbytes, "float32": 2 * n**3, "bfloat16": 2 * n**3}
  found = timing.race(calls, repeats)
  return {name: work[name] / float(np.median(found[name]["seconds"])) for name in calls}


def rows(lengths: Sequence[int] = S5_LENGTHS, repeats: int = 15) -> Iterator[dict[str, Any]]:
  """One row for each S5 length, forward and with gradients.

  The batch is such that a step is about as large at every length: 8, 4, 2, 1 at the default ones.

  Returns: rows with `case`, `shape`, `peer`; `ms`, `peer_ms` (medians), `ratio` (peer over ours);
    `bytes` (minimal), `flops` (or None); `compile_s`, `peer_compile_s`, `temp_mb`, `peer_temp_mb`
    (peak temporaries of the compiled program; None on the host); `error` (of the output's real
    part or of the loss, relative to its largest value).
  """
  for length in lengths:
    operands = _s5_operands(max(1, round(8 * (256 / length) ** 0.5)), length)
    shape = (*operands[0].shape, STATES)
    products = 8 * math.prod(shape)  # two of (H, P) in, two out, 2 FLOP each
    for case, wrap, times in (("", lambda f: f, 1), (", gradients", _gradients, 3)):
      calls = (wrap(_s5), operands), (wrap(_s5_authors), operands)
      yield _row(f"s5{case}", shape, "authors' form", *calls, repeats, flops=times * products)


def scan_rows(repeats: int = 15) -> Iterator[dict[str, Any]]:
  """As `rows`, for the bare scan, with a decay for each step and with a constant one."""
  peers = {"associative_scan": _associative_scan, "lax.scan": _sequential_scan}
  shapes = ON_ACCELERATORS if accelerated() else SCANS
  for kind, shape in shapes.items():
    ours, theirs = _scan_operands(kind, shape)
    for case, wrap in ((f"{kind} scan", lambda f: f), (f"{kind} scan, gradients", _gradients)):
      for name, peer in peers.items():
        yield _row(case, shape, name, (wrap(_scan), ours), (wrap(peer), theirs), repeats)
  (a_BLN, b_BLN), _ = _scan_operands("real", shapes["real"])
  a_N = a_BLN[0, 0]
  decay = np.asarray(a_N, np.float64), np.asarray(b_BLN, np.float64)
  calls: tuple[Ours, Call] = (_scan, (a_N, b_BLN)), (timing.Host(_lfilter), decay)
  yield _row("real scan, constant", b_BLN.shape, "scipy lfilter", *calls, repeats)


def conv_rows(repeats: int = 15) -> Iterator[dict[str, Any]]:
  """As `rows`, for causal convolutions as long as the sequence."""
  for shape in CONVS_ON_ACCELERATORS if accelerated() else CONVS:
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if accelerated() else jnp.float32
    u = jnp.asarray(rng.normal(size=shape), dtype)
    k = jnp.asarray(rng.normal(size=(shape[2], shape[1])) / shape[1] ** 0.5, jnp.float32)
    for case, wrap in (("conv", lambda f: f), ("conv, gradients", _gradients)):
      calls = (wrap(long_conv), (u, k)), (wrap(_fft_conv), (u, k))
      yield _row(case, shape, "jnp.fft", *calls, repeats)
    arrays = np.array(u, np.float32), np.array(k)
    for name, peer in _host_convs(arrays).items():
      yield _row("conv", shape, name, (long_conv, (u, k)), peer, repeats)


def mixer_rows(
  lengths: Sequence[int] = MIXER_LENGTHS, repeats: int = 15, batch: int = 4, features: int = 64
) -> Iterator[dict[str, Any]]:
  """Rows as those of `rows`, without `error`: the layers compute different things.

  Attention is called less often as L grows, but at least three times; at L = 4096 its gradient has
  4 GB of temporaries on CPU.
  """
  for length in lengths:
    u_BLH = jax.random.normal(jax.random.key(0), (batch, length, features))
    peers = {
      "S4D": (S4D(state=64), repeats),
      "attention": (Attention(heads=4, causal=True), max(3, repeats * 256 // length)),
    }
    for case, wrap in (("", lambda f: f), (", gradients", _gradients)):
      ours = _layer(SGConv(kernel_dim=8, max_length=length), u_BLH, wrap)
      for name, (peer, calls) in peers.items():
        theirs = _layer(peer, u_BLH, wrap)
        yield _compared(f"SGConv{case}", u_BLH.shape, name, ours, theirs, calls)


def _layer(
  layer: nn.Module, u_BLH: jax.Array, wrap: Callable[..., Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """`wrap` of the layer as a function of parameters and input, and these."""
  variables = nn.meta.unbox(layer.init(jax.random.key(1), u_BLH))
  params = variables.pop("params")
  return wrap(lambda p, u: layer.apply({**variables, "params": p}, u)), (params, u_BLH)


def _s5(u, lam, B, C, D, log_step):
  """The layer on pairs; `lam` and the matrices have a leading axis of (re, im)."""
  step = jnp.exp(log_step)
  lam = lax.complex(lam[0], lam[1])
  a = jnp.exp(lam * step)
  scale = (a - 1) / lam
  operands = (a.real, a.imag), (B[0], B[1]), (2 * C[0], 2 * C[1])
  return s5_apply(u, *operands, D, scale=(scale.real, scale.imag))[0]


def _s5_authors(u, lam, B, C, D, log_step):
  """Every operand complex, every element of the scan materialised."""
  lam, B, C = (lax.complex(x[0], x[1]) for x in (lam, B, C))
  a = jnp.exp(lam * jnp.exp(log_step))
  B = ((a - 1) / lam)[:, None] * B

  def one(u_LH):
    decays = a * jnp.ones((u_LH.shape[0], a.shape[0]))
    drive = jax.vmap(lambda u_H: B @ u_H)(u_LH)
    _, x_LP = lax.associative_scan(_combine, (decays, drive))
    return jax.vmap(lambda x_P: 2 * (C @ x_P).real)(x_LP) + jax.vmap(lambda u_H: D * u_H)(u_LH)

  return jax.vmap(one)(u)


def _combine(first, second):
  return second[0] * first[0], second[0] * first[1] + second[1]


def _scan(a, b):
  return linear_scan(a, b)[0]


def _associative_scan(a, b):
  return lax.associative_scan(_combine, (a, b), axis=1)[1]


def _sequential_scan(a, b):
  def step(h, element):
    h = element[0] * h + element[1]
    return h, h

  a, b = a.swapaxes(0, 1), b.swapaxes(0, 1)
  return lax.scan(step, jnp.zeros_like(b[0]), (a, b))[1].swapaxes(0, 1)


def _lfilter(a_N, b_BLN):
  channels = [
    scipy.signal.lfilter([1.0], [1.0, -a], b_BLN[..., n], axis=1) for n, a in enumerate(a_N)
  ]
  return np.stack(channels, axis=-1)


def _fft_conv(u_BLH, k_HT):
  length = u_BLH.shape[1]
  spectrum = jnp.fft.rfft(k_HT.T, 2 * length, axis=0)
  signal = jnp.fft.rfft(u_BLH.astype(jnp.float32), 2 * length, axis=1)
  return jnp.fft.irfft(signal * spectrum, axis=1)[:, :length].astype(u_BLH.dtype)


def _host_convs(arrays: tuple[np.ndarray, ...]) -> dict[str, Call]:
  """By other libraries on the host, in the layout (B, H, L) that suits them."""
  u_BHL, k_HT = np.ascontiguousarray(arrays[0].swapaxes(1, 2)), arrays[1]
  length = u_BHL.shape[-1]

  def by(fft, u_BHL, k_HT):
    product = fft.rfft(u_BHL, 2 * length) * fft.rfft(k_HT, 2 * length)
    return fft.irfft(product, 2 * length)[..., :length].swapaxes(1, 2)

  peers: dict[str, Call] = {
    "scipy.fft": (timing.Host(functools.partial(by, scipy.fft)), (u_BHL, k_HT))
  }
  if importlib.util.find_spec("torch") is not None:
    import torch

    given = torch.from_numpy(u_BHL), torch.from_numpy(k_HT)
    peers["torch.fft"] = timing.Host(functools.partial(by, torch.fft)), given
  return peers


def _gradients(function: Callable[..., Any]) -> Callable[..., Any]:
  def loss(operands):
    outputs = jax.tree.leaves(function(*operands))
    return sum(jnp.sum(jnp.square(y.real) + jnp.square(y.imag)) for y in outputs)

  return lambda *operands: jax.value_and_grad(loss)(operands)


def _s5_operands(batch: int, length: int) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(0)
  lam = np.stack([np.full(STATES, -0.5), np.pi * np.arange(STATES)])
  operands = (
    rng.normal(size=(batch, length, WIDTH)),
    lam,
    rng.normal(size=(2, STATES, WIDTH)) / WIDTH**0.5,
    rng.normal(size=(2, WIDTH, STATES)) / STATES**0.5,
    rng.normal(size=WIDTH),
    rng.uniform(np.log(1e-3), np.log(1e-1), STATES),
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in operands)


def _scan_operands(kind: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
  """(a, b) in our form and in that of the peers: complex ones as pairs and native."""
  rng = np.random.default_rng(0)
  size, angle = rng.uniform(0.8, 1, shape), rng.uniform(-3, 3, shape)
  if kind == "real":
    a, b = jnp.float32(size), jnp.float32(rng.normal(size=shape))
    return (a, b), (a, b)
  a, b = (
    jnp.complex64(size * np.exp(1j * angle)),
    jnp.complex64(rng.normal(size=(*shape, 2)) @ [1, 1j]),
  )
  return ((a.real, a.imag), (b.real, b.imag)), (a, b)


def _row(
  case: str, shape: tuple[int, ...], peer: str, ours: Ours, theirs: Call, repeats: int,
  flops: int | None = None,
) -> dict[str, Any]:  # fmt: skip
  row = _compared(case, shape, peer, ours, theirs, repeats, flops)
  got, want = (
    np.asarray(jax.tree.leaves(f.function(*x) if isinstance(f, timing.Host) else jax.jit(f)(*x))[0])
    for f, x in (ours, theirs)
  )
  got, want = np.asarray(got.real, np.float32), np.asarray(want.real, np.float32)
  return row | {"error": float(np.abs(got - want).max() / np.abs(want).max())}


def _compared(
  case: str, shape: tuple[int, ...], peer: str, ours: Ours, theirs: Call, repeats: int,
  flops: int | None = None,
) -> dict[str, Any]:  # fmt: skip
  """A row without `error`.

  Only two at a time: what follows a much larger program finds cold caches.
  """
  found = timing.race({"": ours, "peer_": theirs}, repeats)
  function, operands = ours
  moved = jax.tree.leaves((operands, jax.eval_shape(function, *operands)))
  row: dict[str, Any] = {"case": case, "shape": list(shape), "peer": peer, "flops": flops}
  row["bytes"] = sum(x.size * x.dtype.itemsize for x in moved)
  for who, result in found.items():
    temporaries = result["temporaries"]
    row[f"{who}ms"] = 1e3 * float(np.median(result["seconds"]))
    row[f"{who}temp_mb"] = None if temporaries is None else temporaries / 1e6
    row[f"{who}compile_s"] = result["compile_s"]
  return row | {"ratio": row["peer_ms"] / row["ms"]}


def table(found: Sequence[dict[str, Any]], peaks: dict[str, float] | None = None) -> Table:
  """The rows for a terminal; with `peaks` also the shares of what the device reaches."""
  view = Table(title=f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  names = ["case", "shape", "peer", "ms", "peer ms", "ratio", "compile s", "peer's"]
  names += ["temp MB", "peer's", *(("GB/s", "of a copy", "of a matmul") if peaks else ())]
  for name in names:
    view.add_column(name, justify="left" if name in {"case", "shape", "peer"} else "right")
  for row in found:
    shares = []
    if peaks:
      rate, flops = row["bytes"] / row["ms"] * 1e3, row["flops"]
      shares = [f"{rate / 1e9:.1f}", f"{rate / peaks['bytes']:.0%}"]
      shares.append("" if flops is None else f"{flops / row['ms'] * 1e3 / peaks['float32']:.0%}")
    numbers = (row[f"{who}{key}"] for key in ("compile_s", "temp_mb") for who in ("", "peer_"))
    view.add_row(
      row["case"],
      "x".join(map(str, row["shape"])),
      row["peer"],
      *(f"{row[key]:.2f}" for key in ("ms", "peer_ms")),
      f"{row['ratio']:.1f}x",
      *("" if number is None else f"{number:.1f}" for number in numbers),
      *shares,
    )
  return view


def main(argv: Sequence[str]) -> None:
  """Measures, prints the table, and writes the rows where `--json` says."""
  del argv
  lengths: dict[str, Any] = {"lengths": [int(n) for n in _LENGTHS.value]} if _LENGTHS.value else {}
  groups: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "scans": scan_rows,
    "s5": functools.partial(rows, **lengths),
    "convs": conv_rows,
    "mixers": functools.partial(mixer_rows, **lengths),
  }
  reached = peaks()
  found = [row for name in _GROUPS.value for row in groups[name](repeats=_REPEATS.value)]
  rich.print(table(found, reached))
  rich.print(
    f"a copy: {reached['bytes'] / 1e9:.1f} GB/s; products: {reached['float32'] / 1e12:.2f} TFLOP/s"
    f" in float32, {reached['bfloat16'] / 1e12:.2f} in bfloat16"
  )
  if _JSON.value:
    device = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "reached": reached}
    pathlib.Path(_JSON.value).write_text(json.dumps(device | {"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
  # Here, so that importing the functions defines no flags.
  _GROUPS = flags.DEFINE_multi_enum("groups", GROUPS, GROUPS, "What to time; may be repeated.")
  _LENGTHS = flags.DEFINE_list("lengths", None, "Sequence lengths of s5 and mixers.")
  _REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each program.", lower_bound=1)
  _JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
  app.run(main)
