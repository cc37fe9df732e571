"""What a run costs: compile time, time a step against the hardware, waiting for data, traces."""

import collections
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from launch import storage
from launch.errors import ConfigurationError
from launch.program import Program

WAITING = 0.05  # a larger share of the time spent waiting for data is warned about
WARN_S = 5.0  # once this much time has been seen

Say = Callable[[str], None]


class Compiler:
  """Compiles a program's updates, each number of them once, and says how long it took."""

  def __init__(self, program: Program, label: str, say: Say) -> None:
    self.program, self.label, self.say = program, label, say
    self.compiled: dict[int, jax.stages.Compiled] = {}
    self.least: tuple[float, float] | None = None  # of a step: seconds by roofline, at peak FLOP/s

  def __call__(self, updates: int) -> jax.stages.Compiled:
    if updates not in self.compiled:
      began, hits = time.perf_counter(), CACHE["hits"]
      compiled = self.program.compile_update(updates)
      seconds = time.perf_counter() - began
      if not self.compiled:
        cached = ", from the cache" if CACHE["hits"] > hits else ""
        self.say(f"{self.label}: compiled in {seconds:.1f} s{cached}")
        self.least = _least(compiled, updates, self.program.mesh.devices.flat[0].device_kind)
      self.compiled[updates] = compiled
    return self.compiled[updates]


def _least(
  compiled: jax.stages.Compiled, updates: int, device_kind: str
) -> tuple[float, float] | None:
  if device_kind == "cpu":  # no data sheet to hold it against
    return None
  from launch.plan.roofline import roofline  # the plans need the runner, which needs this module

  found = roofline(compiled, device_kind)
  return None if found is None else (found.step / updates, found.mfu(updates))


CACHE: collections.Counter[str] = collections.Counter()  # hits of the persistent cache


def _count(event: str, **_: Any) -> None:
  if event == "/jax/compilation_cache/cache_hits":
    CACHE["hits"] += 1


jax.monitoring.register_event_listener(_count)


class Clock:
  """Time of the updates alone, without compilation, evaluations and checkpoints, and how much of it
  the device had nothing to do for want of data."""

  def __init__(self, label: str, say: Say) -> None:
    self.label, self.say = label, say
    self.warm = self.warned = False
    self.busy = self.waiting = self.all_busy = self.all_waiting = 0.0
    self.steps = 0

  def start(self) -> None:
    self.began, self.waits = time.perf_counter(), 0.0

  def waited(self, newest: Any) -> None:
    """The batch is there; `newest` is what the last call returned, or None."""
    if newest is not None and all(leaf.is_ready() for leaf in jax.tree.leaves(newest)):
      self.waits = time.perf_counter() - self.began

  def stop(self, steps: int) -> None:
    if self.warm:  # the first call is slower
      self.busy += time.perf_counter() - self.began
      self.waiting += self.waits
      self.steps += steps
    self.warm = True

  def metrics(self, compiler: Compiler, step: int) -> dict[str, list[float]]:
    """Since the last record: seconds a step, the share of waiting for data and, where the device's
    peak is known, the share of its FLOP/s (MFU) and of the roofline's speed."""
    if not self.steps:
      return {}
    seconds = self.busy / self.steps
    found = {"perf/step_s": seconds, "perf/waiting": self.waiting / self.busy}
    if compiler.least is not None:
      roofline_s, peak_s = compiler.least
      found |= {"perf/roofline": roofline_s / seconds, "perf/mfu": peak_s / seconds}
    self.all_busy += self.busy
    self.all_waiting += self.waiting
    self.busy = self.waiting = 0.0
    self.steps = 0
    lost = self.all_waiting / self.all_busy
    if lost > WAITING and self.all_busy > WARN_S and not self.warned:
      self.warned = True
      self.say(
        f"{self.label}: the device waits for data {lost:.0%} of the time (up to step {step});"
        " do less in the source, or more at once in its `gather`"
      )
    return {name: [value] for name, value in found.items()}


class Trace:
  """A profile of some updates of a stage, for Perfetto and XProf."""

  def __init__(self, asked: tuple[int, int] | None, directory: pathlib.Path) -> None:
    self.first, self.count = asked or (-1, 0)
    self.mirror = storage.Mirror(directory)
    self.state = "wanted" if self.count else "done"

  def begin(self, step: int) -> None:
    if self.state == "wanted" and step >= self.first and jax.process_index() == 0:
      self.first, self.state = step, "tracing"
      jax.profiler.start_trace(self.mirror.local, create_perfetto_trace=True)

  def end(self, step: int, result: Any) -> str | None:
    """Ends the trace when it is long enough; where it is, for the display."""
    if self.state != "tracing" or step < self.first + self.count:
      return None
    jax.block_until_ready(result)
    jax.profiler.stop_trace()
    self.state = "done"
    found = self.mirror.local.rglob("perfetto_trace.json.gz")
    newest = max(found, key=storage.modified).relative_to(self.mirror.local)
    self.mirror.upload()
    file = self.mirror.folder / newest
    return f"traced steps {self.first + 1} to {step}: {file} (https://ui.perfetto.dev, or XProf)"


def parse_trace(text: str) -> tuple[int, int]:
  """Reads `STEP:COUNT`."""
  parts = text.split(":")
  if len(parts) != 2 or not all(p.isdigit() for p in parts) or int(parts[1]) < 1:
    raise ConfigurationError(f"--profile={text}; STEP:COUNT such as 100:5 is accepted")
  return int(parts[0]), int(parts[1])
