"""Topologies by name.

`v5e-16`, `v6e-256`: that many chips. `v4-32`, `v5p-32`: half as many, 16 chips. These are the
cloud's own names, which count TensorCores where a chip has two. `v5e-256x4`: four slices of 256.
`host-8`: CPU devices of this machine. `cuda-8`: GPUs, lowered only.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from launch.errors import ConfigurationError
from launch.plan import libtpu

FLAT = {"v5e": 256, "v6e": 256}  # a two-dimensional torus of up to so many chips
DEEP = {"v4": 4096, "v5p": 4096}  # a three-dimensional one; two TensorCores a chip


@dataclasses.dataclass(frozen=True)
class Topology:
  name: str
  kind: str  # of `roofline.CHIPS`
  chips: int  # of all slices
  slices: int = 1

  @property
  def shape(self) -> str:
    """Chips of a slice along each axis of its torus, as in `4x4`; empty without one."""
    if self.kind not in FLAT and self.kind not in DEEP:
      return ""
    sides = [1] * (2 if self.kind in FLAT else 3)
    while math.prod(sides) < self.chips // self.slices:
      # 2x2x1, then 2x2x2, 2x2x4, 2x4x4 ...; a torus of one host is flat.
      flat = len(sides) == 3 and math.prod(sides) < 4
      sides[sides.index(1) if flat else -1 - sides[::-1].index(min(sides))] *= 2
    return "x".join(map(str, sides))

  def devices(self) -> Sequence[Any]:
    """One device a chip, in a form that programs are compiled for but cannot run on.

    Raises:
      ConfigurationError: they cannot be had on this machine.
    """
    if not self.shape:
      return _host_devices(self)
    options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
    if self.kind in DEEP:
      options["chip_config_name"] = "megacore"  # one device a chip, as the runtime has it
    if self.chips // self.slices < 4:
      bounds = [int(side) for side in self.shape.split("x")]
      options["chips_per_host_bounds"] = (*bounds, 1, 1)[:3]
    return libtpu.devices(f"{self.kind}:{self.shape}", **options)


def parse(name: str) -> Topology:
  """Reads a name such as `v5e-16`.

  Raises:
    ConfigurationError: there is no such topology; says what there is.
  """
  found = re.fullmatch(r"(\w+)-(\d+)(?:x(\d+))?", name)
  kind, size, slices = (found[1], int(found[2]), int(found[3] or 1)) if found else ("", 0, 1)
  if kind in ("host", "cuda") and size > 0 and slices == 1:
    return Topology(name, kind, size)
  cores = 2 if kind in DEEP else 1
  most = (FLAT | DEEP).get(kind, 0)
  if cores <= size <= most * cores and size & (size - 1) == 0 and slices > 0:
    return Topology(name, kind, size // cores * slices, slices)
  raise ConfigurationError(
    f"--topology={name}; accepted: "
    + ", ".join(f"{k}-N with N = 1, 2, 4 .. {n}" for k, n in FLAT.items())
    + "".join(f", {k}-N with N = 2, 4, 8 .. {2 * n} TensorCores" for k, n in DEEP.items())
    + ", each with xS for S slices; host-N, cuda-N"
  )


def _host_devices(topology: Topology) -> Sequence[Any]:
  # As many as asked for, unless there is a number already or devices have been used.
  if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", topology.chips)
  devices = jax.devices("cpu")
  if len(devices) < topology.chips:
    raise ConfigurationError(
      f"--topology={topology.name}: this process has {len(devices)} CPU devices already"
    )
  return devices[: topology.chips]
