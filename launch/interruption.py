"""Signals: SIGTERM and Ctrl-C ask the run to save its state and stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(Exception):
  """A signal asked the run to stop and it has saved its state."""

  def __init__(self, label: str, step: int, signal: int) -> None:
    super().__init__(
      f"{label}: stopped and saved at step {step}; run the same command again to go on"
    )
    self.signal = signal


class Interruption:
  """Turns SIGTERM and Ctrl-C into a flag that the loop reads between updates."""

  def __init__(self) -> None:
    self.signal: int | None = None

  def __call__(self, number: int, frame: Any) -> None:
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt  # a second Ctrl-C does not wait
    self.signal = number

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    before = {s: signal.signal(s, self) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
