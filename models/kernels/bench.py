"""The cores against the usual ways of writing them, timed in turns in one run.

    python -m models.kernels.bench
    python -m models.kernels.bench --groups=mixers --lengths=256,1024 --repeats=9 --json=bench.json

Groups, `--groups`, with their peers, see `peers.py`:

* scans: `lax.associative_scan` and `lax.scan`, which move time to the front and back; of real ones
  PyTorch's loop or accelerated-scan, flash-linear-attention's HGRN and mamba's scan with one state;
  for a constant decay `scipy.signal.lfilter` on the host.
* s5: the form of its authors. Both discretise by zero-order hold inside the timed function, and
  both are differentiated with respect to inputs and all parameters.
* convs, also gated: `jnp.fft`; `scipy.fft`, `torch.fft`, flash-fft-conv.
* gated: RG-LRU against that of recurrentgemma.
* mixers: one SGConv layer, whose kernel is made anew in every call, against an S4D layer, which
  materialises its kernel likewise, and a causal attention layer of the same width.

What is timed is what runs by default on one device, or each kernel that can run there by its name,
to which the default is a peer. Peers that are not installed are left out.

Of each call: median time; GB/s of its minimal bytes, every operand read and every result written
once, and their share of what copies of a large array reach in this run; FLOP/s where products
dominate, and their share of what a square matrix product reaches in this run; seconds of compiling;
bytes of temporaries. `--json` has the times' tenth and ninetieth percentiles too.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.console
from absl import app, flags
from jax import lax
from rich.table import Table

from models.attention import Attention
from models.kernels import linear_scan, long_conv, peers, s5_apply, timing
from models.kernels.linear_scan import interface as scan_interface
from models.kernels.long_conv import interface as conv_interface
from models.kernels.peers import Call
from models.kernels.s5 import interface as s5_interface
from models.long_conv import SGConv
from models.recurrent import RGLRU
from models.ssm import S4D

WIDTH, STATES = 128, 64
S5_LENGTHS = (256, 2048, 16384)
S5_ON_ACCELERATORS = ((128, 64), (512, 256), (1024, 512))  # (H, P)
SCANS = {"real": ((8, 2048, 256),), "complex": ((32, 1024, 64),)}  # (B, L, N)
SCANS_ON_ACCELERATORS = {
  "real": (*((8, 4096, 1024), (8, 16384, 256), (64, 1024, 128), (1, 131072, 512), (1, 16384, 64)),),
  "complex": ((8, 4096, 1024), (64, 1024, 128)),
}
CONVS = ((4, 2048, 64), (2, 16384, 32))  # (B, L, H)
CONVS_ON_ACCELERATORS = (
  *((64, 2**n, 768) for n in range(9, 16)),
  (1, 2**20, 256),
)
GATED, GATED_ON_ACCELERATORS = (8, 2048, 256), (8, 4096, 1024)  # (B, L, H)
MIXER_LENGTHS = (256, 512, 1024, 2048, 4096)
GROUPS = ("scans", "s5", "convs", "gated", "mixers")
LONGEST_LOOP = 20_000  # steps that are a launch each
PASSES = 16  # of a copy

Ours = tuple[Callable[..., Any], tuple[Any, ...]]


def accelerated() -> bool:
  """Whether the shapes are those for an accelerator."""
  return jax.default_backend() != "cpu"


def peaks(repeats: int = 9) -> dict[str, float]:
  """What the device reaches here: bytes a second of a copy, FLOP/s of products by dtype.

  The array copied, 256 MiB or on a CPU 64, is larger than any cache. It is read and written often
  in one call: of a single pass a CPU spends most of the time on pages that are new to it.
  """
  size, n = (2**26, 8192) if accelerated() else (2**24, 2048)
  x, w = jnp.zeros(size, jnp.float32), jnp.ones((n, n), jnp.float32)
  calls: dict[str, Call] = {
    "bytes": (lambda x: lax.fori_loop(0, PASSES, lambda _, x: x + 1, x), (x,)),
    "float32": (lambda w: w @ w, (w,)),
    "bfloat16": (lambda w: w @ w, (w.astype(jnp.bfloat16),)),
  }
  # One more pass copies the operand, which may not be overwritten.
  work = {"bytes": 2 * (PASSES + 1) * x.nbytes, "float32": 2 * n**3, "bfloat16": 2 * n**3}
  found = timing.race(calls, repeats)
  return {name: work[name] / float(np.median(found[name]["seconds"])) for name in calls}


def rows(lengths: Sequence[int] | None = None, repeats: int = 15) -> Iterator[dict[str, Any]]:
  """Rows for each S5 length, or on an accelerator width, forward and with gradients.

  The batch is 8, or less for more than 2048 steps: 16384 in all.

  Returns: rows with `case`, `shape`, `peer`; `ms`, `peer_ms` (medians), `ratio` (peer over ours);
    `bytes` (minimal), `flops` (or None); `compile_s`, `peer_compile_s`, `temp_mb`, `peer_temp_mb`
    (peak temporaries of the compiled program; None on the host); `error` (of the output's real
    part or of the loss, relative to its largest value).
  """
  if accelerated():
    sizes = [(8, n, *size) for size in S5_ON_ACCELERATORS for n in lengths or (4096,)]
  else:
    some = lengths or S5_LENGTHS
    sizes = [(max(1, min(8, 16384 // n)), n, WIDTH, STATES) for n in some]
  table = s5_interface.IMPLEMENTATIONS
  for shape in sizes:
    operands = _s5_operands(*shape)
    products = 8 * math.prod(shape)  # two of (H, P) in, two out, 2 FLOP each
    for case, wrap, times in (("s5", _plain, 1), ("s5, gradients", _gradients, 3)):
      found = {"authors' form": (wrap(peers.authors_s5), operands)}
      yield from _against(
        case, shape, s5_layer, table, operands, found, repeats, wrap, times * products
      )


def scan_rows(repeats: int = 15) -> Iterator[dict[str, Any]]:
  """As `rows`, for the bare scan, with a decay for each step and with a constant one."""
  shapes = SCANS_ON_ACCELERATORS if accelerated() else SCANS
  table = scan_interface.IMPLEMENTATIONS
  for kind, shape in ((kind, shape) for kind, some in shapes.items() for shape in some):
    ours, theirs = _scan_operands(kind, shape)
    for case, wrap in ((f"{kind} scan", _plain), (f"{kind} scan, gradients", _gradients)):
      found: dict[str, Call] = {"associative_scan": (wrap(peers.associative_scan), theirs)}
      if shape[1] <= LONGEST_LOOP:
        found["lax.scan"] = wrap(peers.sequential_scan), theirs
      if kind == "real":
        arrays = np.asarray(ours[0]), np.asarray(ours[1])
        found |= peers.usable(peers.scans(*arrays, gradients=wrap is _gradients))
      yield from _against(case, shape, _scan, table, ours, found, repeats, wrap)
  (a_BLN, b_BLN), _ = _scan_operands("real", shapes["real"][0])
  found = peers.constant_scans(np.asarray(a_BLN[0, 0]), np.asarray(b_BLN))
  operands = a_BLN[0, 0], b_BLN
  yield from _against("constant scan", b_BLN.shape, _scan, table, operands, found, repeats)


def conv_rows(repeats: int = 15) -> Iterator[dict[str, Any]]:
  """As `rows`, for causal convolutions as long as the sequence."""
  table = conv_interface.IMPLEMENTATIONS
  for shape in CONVS_ON_ACCELERATORS if accelerated() else CONVS:
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if accelerated() else jnp.float32
    u, pre, post = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    k = jnp.asarray(rng.normal(size=(shape[2], shape[1])) / shape[1] ** 0.5, jnp.float32)
    for name, gates in (("conv", ()), ("gated conv", (pre, post))):
      operands = u, k, *gates
      arrays = [np.array(x, np.float32) for x in operands]
      for case, wrap in ((name, _plain), (f"{name}, gradients", _gradients)):
        found: dict[str, Call] = {"jnp.fft": (wrap(peers.fft_conv), operands)}
        some = peers.convs(arrays[0], arrays[1], tuple(arrays[2:]), wrap is _gradients)
        found |= peers.usable(some)
        yield from _against(case, shape, _conv, table, operands, found, repeats, wrap)


def gated_rows(repeats: int = 15) -> Iterator[dict[str, Any]]:
  """As `rows`, for RG-LRU; none where recurrentgemma is not installed."""
  shape = GATED_ON_ACCELERATORS if accelerated() else GATED
  u_BLH = jax.random.normal(jax.random.key(0), shape)
  params = nn.meta.unbox(RGLRU(blocks=4).init(jax.random.key(1), u_BLH))["params"]
  table = scan_interface.IMPLEMENTATIONS
  for case, wrap in (("RG-LRU", _plain), ("RG-LRU, gradients", _gradients)):
    found = peers.usable(peers.gated(params, u_BLH, wrap))
    yield from _against(case, shape, _rg_lru, table, (params, u_BLH), found, repeats, wrap)


def mixer_rows(
  lengths: Sequence[int] = MIXER_LENGTHS, repeats: int = 15, batch: int = 4, features: int = 64
) -> Iterator[dict[str, Any]]:
  """Rows as those of `rows`, without `error`: the layers compute different things.

  Attention is called less often as L grows, but at least three times; at L = 4096 its gradient has
  4 GB of temporaries on CPU.
  """
  for length in lengths:
    u_BLH = jax.random.normal(jax.random.key(0), (batch, length, features))
    others = {
      "S4D": (S4D(state=64), repeats),
      "attention": (Attention(heads=4, causal=True), max(3, repeats * 256 // length)),
    }
    for case, wrap in (("", _plain), (", gradients", _gradients)):
      ours = _layer(SGConv(kernel_dim=8, max_length=length), u_BLH, wrap)
      for name, (peer, calls) in others.items():
        theirs = _layer(peer, u_BLH, wrap)
        yield _compared(f"SGConv{case}", u_BLH.shape, name, ours, theirs, calls)


def _layer(
  layer: nn.Module, u_BLH: jax.Array, wrap: Callable[..., Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """`wrap` of the layer as a function of parameters and input, and these."""
  variables = nn.meta.unbox(layer.init(jax.random.key(1), u_BLH))
  params = variables.pop("params")
  return wrap(lambda p, u: layer.apply({**variables, "params": p}, u)), (params, u_BLH)


def s5_layer(u, lam, B, C, D, log_step, *, implementation=None):
  """The layer on pairs; `lam` and the matrices have a leading axis of (re, im)."""
  step = jnp.exp(log_step)
  lam = lax.complex(lam[0], lam[1])
  a = jnp.exp(lam * step)
  scale = (a - 1) / lam
  operands = (a.real, a.imag), (B[0], B[1]), (2 * C[0], 2 * C[1])
  kinds = {"scale": (scale.real, scale.imag), "implementation": implementation}
  return s5_apply(u, *operands, D, **kinds)[0]


def _scan(a, b, *, implementation=None):
  return linear_scan(a, b, implementation=implementation)[0]


def _conv(u, k, pre=None, post=None, *, implementation=None):
  return long_conv(u, k, gates=(pre, post), implementation=implementation)


def _rg_lru(params, u, *, implementation=None):
  return RGLRU(blocks=4, implementation=implementation).apply({"params": params}, u)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
  return function


def _gradients(function: Callable[..., Any]) -> Callable[..., Any]:
  def loss(operands):
    outputs = jax.tree.leaves(function(*operands))
    return sum(jnp.sum(jnp.square(y.real) + jnp.square(y.imag)) for y in outputs)

  return lambda *operands: jax.value_and_grad(loss)(operands)


def _s5_operands(batch: int, length: int, width: int, states: int) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(0)
  operands = (
    np.stack([np.full(states, -0.5), np.pi * np.arange(states)]),
    rng.normal(size=(2, states, width)) / width**0.5,
    rng.normal(size=(2, width, states)) / states**0.5,
    rng.normal(size=width),
    rng.uniform(np.log(1e-3), np.log(1e-1), states),
  )
  u = jnp.asarray(
    rng.normal(size=(batch, length, width)), jnp.bfloat16 if accelerated() else jnp.float32
  )
  return u, *(jnp.asarray(x, jnp.float32) for x in operands)


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


def kernels(
  function: Callable[..., Any], table: Mapping[str, Any], operands: tuple[Any, ...]
) -> list[str]:
  """The Pallas kernels of a table that can run the operands on this device."""
  found = []
  for name in (name for name, row in table.items() if not row.partitioned):
    try:
      jax.eval_shape(functools.partial(function, implementation=name), *operands)
      found.append(name)
    except ValueError:  # not here, or not these
      pass
  return found


def _against(
  case: str, shape: tuple[int, ...], function: Callable[..., Any], table: Mapping[str, Any],
  operands: tuple[Any, ...], found: Mapping[str, Call], repeats: int,
  wrap: Callable[..., Any] = _plain, flops: int | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """A row for each peer: of each kernel, or else of what runs by default.

  What does not fit into memory is left out, and named.
  """
  default = wrap(function), operands
  races = [(case, default, peer, theirs) for peer, theirs in found.items()]
  if names := kernels(function, table, operands):
    others = {"default": default, **found}
    ours = {n: (wrap(functools.partial(function, implementation=n)), operands) for n in names}
    races = [(f"{case}: {n}", ours[n], peer, others[peer]) for n in names for peer in others]
  for label, one, peer, other in races:
    try:
      yield _row(label, shape, peer, one, other, repeats, flops)
    except jax.errors.JaxRuntimeError as error:
      rich.print(f"{label} {shape} against {peer} is left out: {str(error).splitlines()[0]}")


def _row(
  case: str, shape: tuple[int, ...], peer: str, ours: Ours, theirs: Call, repeats: int,
  flops: int | None = None,
) -> dict[str, Any]:  # fmt: skip
  row = _compared(case, shape, peer, ours, theirs, repeats, flops)
  got, want = (
    peers.array(
      jax.tree.leaves(f.function(*x) if isinstance(f, timing.Host) else jax.jit(f)(*x))[0]
    )
    for f, x in (ours, theirs)
  )
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
  row["dtype"] = str(jax.tree.leaves(operands)[0].dtype)
  for who, result in found.items():
    temporaries = result["temporaries"]
    for name, share in (("ms", 50), ("p10_ms", 10), ("p90_ms", 90)):
      row[f"{who}{name}"] = 1e3 * float(np.percentile(result["seconds"], share))
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
      shares.append("" if flops is None else f"{flops / row['ms'] * 1e3 / peaks[row['dtype']]:.0%}")
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
    "gated": gated_rows,
    "mixers": functools.partial(mixer_rows, **lengths),
  }
  reached = peaks()
  found = [row for name in _GROUPS.value for row in groups[name](repeats=_REPEATS.value)]
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=170)  # in a file nothing is cut off
  console.print(table(found, reached))
  console.print(
    f"a copy: {reached['bytes'] / 1e9:.1f} GB/s; products: {reached['float32'] / 1e12:.2f} TFLOP/s"
    f" in float32, {reached['bfloat16'] / 1e12:.2f} in bfloat16"
  )
  if _JSON.value:
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--json")]
    device = {
      "command": " ".join(["python -m models.kernels.bench", *given]),
      "jax": jax.__version__,
      "device": jax.devices()[0].device_kind,
      "reached": reached,
    }
    pathlib.Path(_JSON.value).write_text(json.dumps(device | {"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
  # Here, so that importing the functions defines no flags.
  _GROUPS = flags.DEFINE_multi_enum("groups", GROUPS, GROUPS, "What to time; may be repeated.")
  _LENGTHS = flags.DEFINE_list("lengths", None, "Sequence lengths of s5 and mixers.")
  _REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each program.", lower_bound=1)
  _JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
  app.run(main)
