"""Signals: SIGTERM and Ctrl-C ask the run to save its state and stop."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from launch import processes

GRACE_S = 25.0  # Kubernetes kills 30 s after SIGTERM
PROMPT_S = 2.0  # what Python gets to raise an exception in, before the process leaves at once


class Stopped(BaseException):
  """A signal asked the run to stop and it has saved its state, or has none to save.

  Like KeyboardInterrupt it may be raised anywhere, and is no error that someone would handle.
  """

  def __init__(self, label: str, step: int | None, signal: int) -> None:
    done = "stopped, with nothing to save" if step is None else f"stopped and saved at step {step}"
    super().__init__(f"{label}: {done}; run the same command again to go on")
    self.step, self.signal = step, signal


class Interruption:
  """Turns SIGTERM and Ctrl-C into a request that the loop reads between updates.

  SIGTERM has a deadline, as its sender will not wait: after `grace_s` the process leaves by itself
  and says what was kept. Where no update would be lost, a signal is obeyed at once.
  """

  def __init__(self, grace_s: float = GRACE_S) -> None:
    self.signal: int | None = None
    self.grace_s = grace_s
    self.label = "run"
    self.kept: Callable[[], str] = lambda: "no checkpoint yet"
    self.unsaved = False  # there are updates that no checkpoint holds
    self.over = False

  def poll(self) -> int | None:
    """The signal to save and stop for; called after every update, the same one everywhere."""
    self.unsaved = True
    return processes.poll(self.signal)

  @contextlib.contextmanager
  def training(self, label: str, kept: Callable[[], str]) -> Iterator[None]:
    """Inside, what `poll` has been called for must be saved; `kept` names the last checkpoint."""
    self.label, self.kept = label, kept
    yield
    self.unsaved = False

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Hears the signals of the process; in other threads than the main one it does nothing.

    Raises, inside:
      Stopped: SIGTERM, when nothing is unsaved.
      KeyboardInterrupt: Ctrl-C, when nothing is unsaved, or the second one.
    """
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    # Python's handlers wait for native code, such as a compilation, to return. A byte on this pair
    # does not, so a thread hears of the signal at any time.
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    threading.Thread(target=self._attend, args=(hears,), daemon=True).start()
    descriptor = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      self.over = True
      for number, handler in handlers.items():
        signal.signal(number, handler)
      signal.set_wakeup_fd(descriptor)
      tells.close()

  def _handle(self, number: int, frame: Any) -> None:
    """In the main thread, between two steps of Python."""
    if number == signal.SIGINT and (self.signal is not None or not self.unsaved):
      raise KeyboardInterrupt
    self.signal = number
    if not self.unsaved:
      raise Stopped(self.label, None, number)

  def _attend(self, hears: socket.socket) -> None:
    """In a thread of its own."""
    with hears:
      while heard := hears.recv(1):
        if self.unsaved and heard[0] in (signal.SIGTERM, signal.SIGINT):
          processes.ask(heard[0])
        if heard[0] == signal.SIGTERM:
          threading.Thread(target=self._expire, daemon=True).start()

  def _expire(self) -> None:
    """Leaves when SIGTERM is not obeyed in time: from here, as the main thread is busy."""
    heard = time.monotonic()
    while not self.over:
      waited = time.monotonic() - heard
      if waited > PROMPT_S and not self.unsaved:
        processes.leave(str(Stopped(self.label, None, signal.SIGTERM)), 128 + signal.SIGTERM)
      if waited > self.grace_s:
        processes.leave(
          f"{self.label}: not saved {self.grace_s:g} s after SIGTERM ({self.kept()}); left, as it"
          " would be killed; run the same command again to go on from there",
          128 + signal.SIGTERM,
        )
      time.sleep(0.1)
