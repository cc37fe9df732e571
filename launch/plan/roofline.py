"""Rooflines: no program runs faster than its largest term at the peaks of a chip's data sheet.

Importing this starts nothing and needs no libtpu.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from launch.plan import hlo

GB, GiB, Gbit = 1e9, 2.0**30, 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one chip; None where none is published.

  Attributes:
    hbm: bytes that a program can have, as libtpu 0.0.42 states when a program asks for more.
    bandwidth: of HBM, bytes/s.
    flops: bfloat16 peak without sparsity, FLOP/s.
    links: of the interconnect between chips, all links in one direction, bytes/s.
    network: of the network between slices, a chip's part, bytes/s.
  """

  hbm: float | None = None
  bandwidth: float | None = None
  flops: float | None = None
  links: float | None = None
  network: float | None = None


# TPUs: the Cloud TPU documentation's page on each chip, where bidirectional bandwidths are twice
# what is here; v4's links from arXiv:2304.01433, table 4 (recalled). Network of v5e and v6e: a
# pod's, by its 256 chips. GPUs: NVIDIA's data sheets of the A100, H100 and H200 (recalled), which
# halve with sparsity left out and with one direction of NVLink.
CHIPS = {
  "v4": Chip(30.75 * GiB, 1200 * GB, 275e12, 6 * 50 * GB),
  "v5e": Chip(15.75 * GiB, 819 * GB, 197e12, 1600 * Gbit, 6400 * Gbit / 256),
  "v5p": Chip(95.74 * GiB, 2765 * GB, 459e12, 4800 * Gbit, 50 * Gbit),
  "v6e": Chip(31.25 * GiB, 1640 * GB, 918e12, 400 * GB, 25600 * Gbit / 256),
  "a100-40": Chip(None, 1555 * GB, 312e12, 300 * GB),
  "a100-80-pcie": Chip(None, 1935 * GB, 312e12, 300 * GB),
  "a100-80-sxm": Chip(None, 2039 * GB, 312e12, 300 * GB),
  "h100-pcie": Chip(None, 2000 * GB, 1513e12 / 2, 300 * GB),
  "h100-nvl": Chip(None, 3900 * GB, 1671e12 / 2, 300 * GB),
  "h100-sxm": Chip(None, 3350 * GB, 1979e12 / 2, 450 * GB),
  "h200-sxm": Chip(None, 4800 * GB, 1979e12 / 2, 450 * GB),
  "host": Chip(),
  "cuda": Chip(),
}
# `jax.Device.device_kind` -> chip.
KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA A100-PCIE-40GB": "a100-40",
  "NVIDIA A100-SXM4-40GB": "a100-40",
  "NVIDIA A100 80GB PCIe": "a100-80-pcie",
  "NVIDIA A100-SXM4-80GB": "a100-80-sxm",
  "NVIDIA H100 PCIe": "h100-pcie",
  "NVIDIA H100 NVL": "h100-nvl",
  "NVIDIA H100 80GB HBM3": "h100-sxm",
  "NVIDIA H200": "h200-sxm",
}


class Roofline(NamedTuple):
  """What one run of a program takes on one device, at the least.

  flops: floating point operations, loops as often as they run.
  bytes: read from and written to the device's memory, loops as often as they run.
  seconds: what `compute`, `memory`, `interconnect` and `network` take at their peaks, those that
    are used and whose peak is known.
  unknown: the terms that are used and whose peak is not known.
  peak: the device's bfloat16 FLOP/s; nan where unknown.
  """

  flops: float
  bytes: float
  seconds: Mapping[str, float]
  unknown: tuple[str, ...]
  peak: float

  @property
  def bound(self) -> str | None:
    """The largest term; None where no peak is known."""
    return max(self.seconds, key=lambda k: self.seconds[k]) if self.seconds else None

  @property
  def step(self) -> float:
    """Seconds of the largest term; 0 where no peak is known."""
    return max(self.seconds.values(), default=0.0)

  def mfu(self, seconds: float) -> float:
    """The share of the bfloat16 peak that a run of so many seconds makes use of."""
    return self.flops / (self.peak * seconds)


def roofline(compiled: jax.stages.Compiled, device_kind: str) -> Roofline | None:
  """The roofline of a compiled program on a device such as `jax.devices()[0].device_kind`.

  Reads the program's text: a second for a large one. Of a GPU's interconnect it knows NVLink alone.
  None for a kind of device without published peaks here, such as a CPU.
  """
  if device_kind not in KINDS:
    return None
  text, costs = compiled.as_text(), compiled.cost_analysis()
  assert text is not None and costs is not None  # both are there for what a device runs
  return of_module(hlo.parse(text), costs["flops"], CHIPS[KINDS[device_kind]])


def of_module(module: hlo.Module, counted_flops: float, chip: Chip) -> Roofline:
  """As `roofline`, from a program's text and the compiler's own count of FLOPs."""
  flops, moved = hlo.flops(module, counted_flops), hlo.traffic(module)
  stayed, left = hlo.sent(module)
  terms = {
    "compute": (flops, chip.flops),
    "memory": (moved, chip.bandwidth),
    "interconnect": (stayed, chip.links),
    "network": (left, chip.network),
  }
  times = {name: amount / peak for name, (amount, peak) in terms.items() if peak and amount}
  unknown = tuple(name for name, (amount, peak) in terms.items() if amount and not peak)
  return Roofline(flops, moved, times, unknown, chip.flops or math.nan)
