"""Processes: a run of several joins, agrees, notices a lost process, and leaves together.

Every process runs the same program and takes part in every compiled call. What is not a computation
goes through the key-value store of jax's coordination service, which lives in process 0: what one
process decides for all (`first`), the update to stop at (`poll`), and who is still there. The last
two are the business of a thread, so that they work while the main thread waits in a collective that
will never end.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed  # the client has no public name; orbax reads it there too

from launch.errors import ConfigurationError, TrainingError

BEAT_S = 2.0  # a sign of life this often
LOST_S = 30.0  # a process without one for so long is lost,
SUSPECT_S = 8.0  # or for so long where a collective has failed
HEARTBEAT_S = 50  # of jax itself, for the case that the thread cannot run
LINGER_S = 10.0  # how long process 0, which has the store, waits for the others to leave,
LAST_S = 1.0  # and then for their ends: jax aborts a process that loses the store
JOIN_S = 300  # how long processes wait for each other at the start
FOREVER_MS = 7 * 24 * 3600 * 1000  # who waits for a process that is lost is ended by the thread
AGAIN = "run the same command again to go on from the newest checkpoint"
# What a collective or a barrier says when a process is gone.
BROKEN = re.compile(r"gloo|nccl|connection|socket|unavailable|barrier|coordination|deadline", re.I)


def count() -> int:
  return _watch.count if _watch is not None else 1


def join(
  coordinator: str | None = None,
  process_id: int | None = None,
  process_count: int | None = None,
) -> None:
  """Joins the other processes; to be called before anything that asks jax for a device.

  Args:
    coordinator: HOST:PORT of process 0, where the coordination service will listen.
    process_id: of this process, from 0.
    process_count: of all processes. What is None is asked of the TPU pod, Slurm, Open MPI or
      Kubernetes job that this process is part of.

  Raises:
    ConfigurationError: something is wrong or unknown.
    TrainingError: the others cannot be reached.
  """
  global _watch  # noqa: PLW0603
  if coordinator is not None and not re.fullmatch(r"\S+:\d+", coordinator):
    raise ConfigurationError(f"--coordinator={coordinator}; accepted: HOST:PORT")
  if process_id is not None and process_count and not 0 <= process_id < process_count:
    raise ConfigurationError(f"--process_id={process_id}; accepted: 0 to {process_count - 1}")
  complete = None not in (coordinator, process_id, process_count)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Calls in flight at the same time could meet their collectives in another order elsewhere.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  # Ours hears Ctrl-C as well, has a deadline and does not take SIGTERM from Python.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator,
      process_count,
      process_id,
      cluster_detection_method="deactivate" if complete else None,
      initialization_timeout=JOIN_S,
      heartbeat_timeout_seconds=HEARTBEAT_S,
    )
  except (ValueError, RuntimeError) as error:
    why = str(error).splitlines()[0]
    if "be defined" in why:
      why = "no TPU pod, Slurm, MPI or Kubernetes job is recognised; give --coordinator=HOST:PORT"
      why += " --process_id=I --process_count=N"
      raise ConfigurationError(f"--distributed: {why}") from error
    # Others that are late may be there next time: not a mistake in what was asked for.
    raise TrainingError(f"--distributed: {why}") from error
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    _hush()
  _watch = _Watch()
  _watch.start()
  if _watch.index > 0:
    threading.Thread(target=_watch.hold, daemon=True).start()


def _hush() -> None:
  """Keeps gloo's greetings, which native code prints, off standard output."""
  sys.stdout.flush()
  sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 1)
  os.close(null)


def first(value: Any) -> Any:
  """What process 0 says (JSON): one decision for all, say about a file that is being written."""
  return value if _watch is None else _watch.first(value)


def ask(signal: int) -> None:
  """Asks all processes to stop together; `poll` tells when. May be called from any thread."""
  if _watch is not None:
    _watch.ask(signal)


def poll(signal: int | None) -> int | None:
  """The signal to stop for, now, at the same call on every process; None to go on.

  Processes may be some calls apart, as a collective of one call can run while another process is
  still in the call before. Hence they stop at the call after the furthest that any has made; while
  they find out which that is, none begins another.
  """
  if _watch is None:
    return signal
  if signal is not None:
    _watch.ask(signal)
  return _watch.poll()


def finish() -> None:
  """Waits until every process is here; after that one that goes is not missed."""
  if _watch is not None:
    _watch.meet("finished")
    _watch.over = True
    _watch.meet("over")  # everywhere, before anyone goes


def leave(text: str, status: int) -> None:
  """Prints one line and ends this process and, with it, the others. Does not return.

  No atexit handlers: jax's would wait for processes that are busy or gone.
  """
  if _watch is not None:
    who = _named(_watch.index, {"host": socket.gethostname(), "pid": os.getpid()})
    _watch.leave(text, status, f"{who} has left: {text}")
  _say(text)
  os._exit(status)


def fail(error: BaseException, text: str | None, status: int) -> None:
  """Ends all processes after an error in this one; does not return.

  Args:
    error: where it comes from the loss of another process, that process is named instead.
    text: the line that explains it, or None for an unexpected error, which gets its traceback.
    status: of this process.
  """
  if _watch is not None and BROKEN.search(_chain(error)):
    _watch.suspects = True
    time.sleep(SUSPECT_S + 5 * BEAT_S)  # within which the thread ends this process if one is lost
  if text is None:
    traceback.print_exception(error)
    text = f"error: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:300]}"
  leave(text, status)


def _chain(error: BaseException | None) -> str:
  """The messages of an error and of those that led to it."""
  texts = []
  while error is not None:
    texts.append(str(error))
    error = error.__cause__ or error.__context__
  return "\n".join(texts)


def _say(text: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # a closed pipe is no reason to stay
    sys.stdout.flush()
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar has hidden it
    print(f"{show_cursor}{text}", file=sys.stderr, flush=True)


class _Watch(threading.Thread):
  """Watches the other processes, and agrees with them on the call to stop at.

  Keys: `beat/I` a sign of life, `left/I` why a process has left, `all/end` why all must leave,
  `all/stop` the signal asked for, `at/I` how far a process is, `all/target` the call to stop at.
  """

  def __init__(self) -> None:
    super().__init__(name="watch", daemon=True)
    state = distributed.global_state
    self.client: Any = state.client
    self.index, self.count = state.process_id, state.num_processes
    self.coordinator = str(state.coordinator_address)
    self.suspects = False  # a collective of this process has failed
    self.over = False
    self.lost = 0  # processes that will not tell that they leave
    self.calls = 0  # of first
    self.leaving = threading.Lock()
    self.wake = threading.Event()
    self.asked: int | None = None
    self.gate = threading.Lock()  # held while the processes find out where to stop
    self.polls = 0
    self.target: int | None = None
    self.waiting = False  # for the target

  # The main thread's

  def first(self, value: Any) -> Any:
    self.calls += 1
    key = f"roundup/first/{self.calls}"
    if self.index == 0:
      self.client.key_value_set(key, json.dumps(value))
      return value
    return json.loads(self.client.blocking_key_value_get(key, FOREVER_MS))

  def meet(self, where: str) -> None:
    self.client.wait_at_barrier(f"roundup/{where}", FOREVER_MS)

  def ask(self, signal: int) -> None:
    self.asked = self.asked or signal
    self.wake.set()

  def poll(self) -> int | None:
    with self.gate:
      self.polls += 1
      return self.asked if self.target is not None and self.polls >= self.target else None

  # The thread's

  def run(self) -> None:
    # Of every process: its last sign of life, and when.
    seen: dict[int, tuple[Any, float]] = {
      i: ({"host": "unknown", "pid": "unknown", "beat": 0}, time.monotonic())
      for i in range(self.count)
    }
    sign: dict[str, Any] = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "beat": 0,
      "suspects": False,
    }
    try:
      while not self.over:
        sign |= {"beat": sign["beat"] + 1, "suspects": self.suspects}
        self._set(f"beat/{self.index}", sign)
        if self.index == 0:
          self._look(seen)
        told = self._all("all")
        if "end" in told and not self.over:
          self.leave(told["end"]["text"], told["end"]["status"])
        self._settle(told)
        self.wake.wait(0.05 if self.waiting else BEAT_S)
        self.wake.clear()
    except Exception:
      self._without_coordinator()

  def hold(self) -> None:
    """Keeps a connection to the coordination service: its end tells at once that process 0 is gone.

    jax's own client aborts this process some milliseconds later, with a page of text. The service
    hangs up on who says nothing for a minute, so only one that cannot be reached again is gone.
    """
    host, _, port = self.coordinator.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)))
    family, peer = connection.family, connection.getpeername()
    while True:
      with connection, contextlib.suppress(OSError):
        while connection.recv(4096):
          pass
      connection = socket.socket(family)
      try:
        connection.connect(peer)
      except ConnectionRefusedError:
        self._without_coordinator()
        return
      except OSError:  # the network: the heartbeats decide
        time.sleep(BEAT_S)

  def _without_coordinator(self) -> None:
    if self.over:
      return
    self.leaving.acquire()
    _say(f"error: process 0 ({self.coordinator}), which coordinates the others, was lost; {AGAIN}")
    os._exit(1)

  def _look(self, seen: dict[int, tuple[Any, float]]) -> None:
    """Process 0 looks for a process that has left or is lost, and tells all."""
    now, beats = time.monotonic(), self._all("beat")
    for process, sign in beats.items():
      if seen[int(process)][0]["beat"] != sign["beat"]:
        seen[int(process)] = sign, now
    left = self._all("left")
    if self.over:
      return
    for process, why in left.items():
      who = _named(int(process), seen[int(process)][0])
      self.leave(f"{who} has left: {why['text']}", why["status"])
    patience = SUSPECT_S if any(sign["suspects"] for sign in beats.values()) else LOST_S
    quietest = min(seen, key=lambda i: seen[i][1])
    silent = now - seen[quietest][1]
    if silent > patience:
      who = _named(quietest, seen[quietest][0])
      self.lost = 1
      self.leave(f"error: {who} was lost: no sign of life for {silent:.0f} s; {AGAIN}", 1)

  def _settle(self, told: dict[str, Any]) -> None:
    """One step towards a common call to stop at."""
    if self.asked and "stop" not in told:
      with contextlib.suppress(Exception):  # another was faster: there is one signal for all
        self._set("all/stop", self.asked, overwrite=False)
      self.wake.set()
    if "stop" in told and self.target is None and not self.waiting:
      self.gate.acquire()
      self.asked, self.waiting = told["stop"], True
      self._set(f"at/{self.index}", self.polls)
    if self.index == 0 and self.waiting and "target" not in told:
      reached = self._all("at")
      if len(reached) == self.count:
        self._set("all/target", max(reached.values()) + 1)
    if self.waiting and "target" in told:
      self.target, self.waiting = told["target"], False
      self.gate.release()

  def leave(self, text: str, status: int, told: str | None = None) -> None:
    """Ends this process; `told` is what process 0 tells the others in place of `text`."""
    self.leaving.acquire()  # for good: one thread speaks, the others wait for the end
    _say(text)
    with contextlib.suppress(Exception):  # the store may be gone
      if self.index == 0:
        self._set("all/end", {"text": told or text, "status": status})
      self._set(f"left/{self.index}", {"text": text, "status": status})
      until = time.monotonic() + LINGER_S
      while self.index == 0 and len(self._all("left")) + self.lost < self.count:
        if time.monotonic() > until:
          break
        time.sleep(0.1)
      time.sleep(LAST_S if self.index == 0 else 0)
    os._exit(status)

  def _set(self, key: str, value: Any, overwrite: bool = True) -> None:
    self.client.key_value_set(f"roundup/{key}", json.dumps(value), allow_overwrite=overwrite)

  def _all(self, folder: str) -> dict[str, Any]:
    pairs = self.client.key_value_dir_get(f"roundup/{folder}/")
    return {key.rpartition("/")[2]: json.loads(value) for key, value in pairs}


def _named(process: int, sign: dict[str, Any]) -> str:
  return f"process {process} ({sign['host']}, pid {sign['pid']})"


_watch: _Watch | None = None
