"""The cores against the usual ways of writing them, timed in turns in one run.

    python -m models.kernels.bench
    python -m models.kernels.bench --groups=mixers --lengths=256,1024 --repeats=9 --json=bench.json

Groups, `--groups`:

* s5: the S5 layer's peer is the form of its authors: complex elements (L, P) materialised for
  `lax.associative_scan`, vmapped over the batch. Both discretise by zero-order hold inside the
  timed function, and both are differentiated with respect to inputs and all parameters.
* scans: peers of the bare scan are `lax.associative_scan` and `lax.scan`, which move time to the
  front and back.
* mixers: one SGConv layer, whose kernel is made anew in every call, against an S4D layer, which
  materialises its kernel likewise, and a causal attention layer of the same width.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich
from absl import app, flags
from jax import lax
from rich.table import Table

from models.attention import Attention
from models.kernels import linear_scan, s5_apply, timing
from models.long_conv import SGConv
from models.ssm import S4D

WIDTH, STATES = 128, 64
S5_LENGTHS = (256, 1024, 4096, 16384)
SCANS = {"real": (8, 2048, 256), "complex": (32, 1024, 64)}
MIXER_LENGTHS = (256, 512, 1024, 2048, 4096)
GROUPS = ("s5", "scans", "mixers")


def rows(lengths: Sequence[int] = S5_LENGTHS, repeats: int = 15) -> Iterator[dict[str, Any]]:
  """One row for each S5 length, forward and with gradients.

  The batch is such that a step is about as large at every length: 8, 4, 2, 1 at the default ones.

  Returns: rows with `case`, `shape`, `peer`, `ms`, `peer_ms` (medians), `ratio` (peer over ours),
    `temp_mb`, `peer_temp_mb` (peak temporaries of the compiled program), `error` (of
    the output's real part or of the loss, relative to its largest value).
  """
  for length in lengths:
    operands = _s5_operands(max(1, round(8 * (256 / length) ** 0.5)), length)
    shape = (*operands[0].shape, STATES)
    for case, wrap in (("s5 forward", lambda f: f), ("s5 forward+backward", _gradients)):
      yield _row(
        case, shape, "authors' form", wrap(_s5), wrap(_s5_authors), operands, operands, repeats
      )


def scan_rows(repeats: int = 15) -> Iterator[dict[str, Any]]:
  """As `rows`, for the bare scan with a decay for each step."""
  peers = {"associative_scan": _associative_scan, "lax.scan": _sequential_scan}
  for kind, shape in SCANS.items():
    operands = _scan_operands(kind, shape)
    for case, wrap in ((f"{kind} scan", lambda f: f), (f"{kind} scan, gradients", _gradients)):
      for name, peer in peers.items():
        yield _row(case, shape, name, wrap(_scan), wrap(peer), *operands, repeats)


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
    for case, wrap in (("forward", lambda f: f), ("forward+backward", _gradients)):
      ours = _layer(SGConv(kernel_dim=8, max_length=length), u_BLH, wrap)
      for name, (peer, calls) in peers.items():
        theirs = _layer(peer, u_BLH, wrap)
        yield _compared(f"SGConv {case}", u_BLH.shape, name, ours, theirs, calls)


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
  case: str,
  shape: tuple[int, ...],
  peer: str,
  ours: Callable[..., Any],
  theirs: Callable[..., Any],
  our_operands: tuple[Any, ...],
  their_operands: tuple[Any, ...],
  repeats: int,
) -> dict[str, Any]:
  contestants = (ours, our_operands), (theirs, their_operands)
  row = _compared(case, shape, peer, *contestants, repeats)
  got, want = (jax.tree.leaves(jax.jit(f)(*operands))[0] for f, operands in contestants)
  return row | {"error": float(jnp.abs(got.real - want.real).max() / jnp.abs(want.real).max())}


def _compared(
  case: str,
  shape: tuple[int, ...],
  peer: str,
  ours: tuple[Callable[..., Any], tuple[Any, ...]],
  theirs: tuple[Callable[..., Any], tuple[Any, ...]],
  repeats: int,
) -> dict[str, Any]:
  """A row without `error`. Contestants are (function, operands).

  Only two at a time: what follows a much larger program finds cold caches.
  """
  found = timing.race({"ours": ours, "peer": theirs}, repeats)
  ms, peer_ms = (1e3 * float(np.median(result["seconds"])) for result in found.values())
  temp, peer_temp = (result["temporaries"] / 1e6 for result in found.values())
  return {
    "case": case,
    "shape": list(shape),
    "peer": peer,
    "ms": ms,
    "peer_ms": peer_ms,
    "ratio": peer_ms / ms,
    "temp_mb": temp,
    "peer_temp_mb": peer_temp,
  }


def table(found: Sequence[dict[str, Any]]) -> Table:
  """The rows for a terminal."""
  view = Table(title=f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  for name in ("case", "shape", "peer", "ms", "peer ms", "ratio", "temp MB", "peer temp MB"):
    view.add_column(name, justify="left" if name in {"case", "shape", "peer"} else "right")
  for row in found:
    view.add_row(
      row["case"],
      "x".join(map(str, row["shape"])),
      row["peer"],
      *(f"{row[key]:.2f}" for key in ("ms", "peer_ms")),
      f"{row['ratio']:.1f}x",
      *(f"{row[key]:.1f}" for key in ("temp_mb", "peer_temp_mb")),
    )
  return view


def main(argv: Sequence[str]) -> None:
  """Measures, prints the table, and writes the rows where `--json` says."""
  del argv
  lengths: dict[str, Any] = {"lengths": [int(n) for n in _LENGTHS.value]} if _LENGTHS.value else {}
  groups: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "s5": functools.partial(rows, **lengths),
    "scans": scan_rows,
    "mixers": functools.partial(mixer_rows, **lengths),
  }
  found = [row for name in _GROUPS.value for row in groups[name](repeats=_REPEATS.value)]
  rich.print(table(found))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  # Here, so that importing the functions defines no flags.
  _GROUPS = flags.DEFINE_multi_enum("groups", GROUPS, GROUPS, "What to time; may be repeated.")
  _LENGTHS = flags.DEFINE_list("lengths", None, "Sequence lengths of s5 and mixers.")
  _REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each program.", lower_bound=1)
  _JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
  app.run(main)
