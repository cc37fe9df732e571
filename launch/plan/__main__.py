"""What an update takes, compiled ahead of time for devices that are not here.

Topologies: v5e-N and v6e-N are N chips, v4-N and v5p-N are N TensorCores, two a chip; v5e-256x4 is
four slices; host-N are CPU devices; cuda-N are GPUs, lowered only. With
JAX_OPTIMIZATION_LEVEL=O0 a TPU's compiler takes a third of the time; memory comes out about the
same, bytes moved do not.
"""

import argparse
import ast
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from launch.errors import ConfigurationError
from launch.plan import Plan, cache_folder, stages


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 1 where a stage does not compile or fit, 2 for a mistake."""
  parser = argparse.ArgumentParser(
    prog="python -m launch.plan",
    description=__doc__,
    epilog="Overrides follow as for a run, such as --config.width=256.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("experiment", help="such as s5")
  parser.add_argument("--scale", default="paper", help="one of the experiment's")
  parser.add_argument("--topology", help="default: what the experiment names for the scale")
  parser.add_argument("--mesh", help="such as data=8,tensor=2; default: as named, else all on data")
  parser.add_argument("--study", help="default: the first of the scale that trains")
  parser.add_argument("--arm", help="default: the study's first")
  parser.add_argument("--seeds", type=int, help="how many, side by side; default: the study's")
  parser.add_argument("--json", action="store_true", help="print a list of plans, for machines")
  known, rest = parser.parse_known_args(argv)
  jax.config.update("jax_platforms", "cpu")  # plans need keys, from this machine, and no device
  chosen = {k: v for k, v in vars(known).items() if k not in ("experiment", "scale", "json")}
  try:
    plans = stages.plans(
      known.experiment, known.scale, **chosen, overrides=_overrides(rest), cache=cache_folder()
    )
  except ConfigurationError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if known.json:
    rows = [{"stage": stage} | dataclasses.asdict(made) for stage, made in plans.items()]
    print(json.dumps(rows, indent=1))
  else:
    width = None if sys.stdout.isatty() else 120
    if not plans:
      print(f"{known.experiment} {known.scale}: no stage of it has updates; nothing to plan")
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True, width=width)
    for stage, made in plans.items():
      show(console, f"{known.experiment} {known.scale} {stage}", made)
  return int(any(made.fits is False for made in plans.values()))


def _overrides(words: Sequence[str]) -> dict[str, Any]:
  """`--config.KEY=VALUE` as dotted keys and values."""
  found: dict[str, Any] = {}
  for word in words:
    key, equals, value = word.removeprefix("--config.").partition("=")
    if not word.startswith("--config.") or not equals:
      raise ConfigurationError(f"unknown argument {word!r}; overrides are --config.KEY=VALUE")
    try:
      found[key] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      found[key] = {"true": True, "false": False}.get(value, value)
  return found


def show(console: rich.console.Console, title: str, made: Plan) -> None:
  """Prints a plan as tables."""
  mesh = ", ".join(f"{axis}={size}" for axis, size in made.mesh.items()) or "no mesh"
  seeds = f"{made.seeds} seed{'s' if made.seeds > 1 else ''} of {made.parameters:,} parameters"
  console.print(f"{title}: {made.topology} ({made.chips} chips, {mesh}), {seeds}, {made.compiler}")
  if made.error is not None:
    console.print(f"does not compile: {made.error}")
  rows = {
    "arguments": _size(made.arguments),
    "temporaries": _size(made.temporaries),
    "total": _size(made.total),
    "HBM": _size(made.hbm),
    "FLOPs": _number(made.flops),
    "bytes moved": _size(made.bytes_moved),
    "loop iterations": _number(made.loop_iterations),
  }
  if made.total and made.hbm:
    rows["HBM"] += f", {made.total / made.hbm:.0%} used"
  rows |= {f"{name} time": _time(seconds) for name, seconds in made.times.items()}
  rows["step"] = f"at least {_time(made.step)}, by {made.bound}" if made.step else "unknown"
  console.print(_grid(["per chip", ""], rows.items()))
  if made.collectives:
    lines = [(r["kind"], r["axes"], str(r["count"]), _size(r["bytes"])) for r in made.collectives]
    console.print(_grid(["collective", "over", "count", "sent by a chip"], lines))
  largest = [(row["name"], _size(row["bytes"])) for row in made.largest]
  console.print(_grid(["largest buffers", ""], largest))
  for warning in made.warnings:
    console.print(f"warning: {warning}")
  if made.unknown:
    console.print(f"unknown for {made.topology}: {', '.join(made.unknown)}")
  verdict = {None: "whether it fits is unknown", True: "fits", False: "does not fit"}[made.fits]
  console.print(f"{verdict}\n")


def _grid(head: Sequence[str], rows: Any) -> rich.table.Table:
  grid = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for name in head:
    grid.add_column(name, overflow="fold")
  for row in rows:
    grid.add_row(*row)
  return grid


def _size(count: float | None) -> str:
  return "unknown" if count is None else _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _number(count: float | None) -> str:
  return "unknown" if count is None else f"{count:.4g}"


def _time(seconds: float | None) -> str:
  return "unknown" if seconds is None else _scaled(seconds * 1e6, 1000, ("us", "ms", "s"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
  power = min(int(math.log(max(value, 1), base)), len(units) - 1)
  return f"{value / base**power:.4g} {units[power]}"


if __name__ == "__main__":
  sys.exit(main())
