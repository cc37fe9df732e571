"""Live progress: a bar on a terminal, plain lines in a log."""

import time

import rich.console
import rich.progress


class Progress:
  """Shows one stage at a time: arm, seeds, step, loss, rate and time left."""

  def __init__(self, console: rich.console.Console, every_s: float = 10.0) -> None:
    self.console = console
    self.every_s = every_s
    self.bar: rich.progress.Progress | None = None

  def start(self, label: str, step: int, steps: int) -> None:
    self.label, self.steps = label, steps
    self.first, self.began = step, time.monotonic()
    self.shown = self.began
    if self.console.is_terminal:
      self.bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.completed:>5.0f}/{task.total:.0f}  {task.fields[note]}"),
        console=self.console,
        transient=True,
      )
      self.bar.start()
      self.row = self.bar.add_task(label, total=steps, completed=step, note="compiling")
    else:
      self.console.print(f"{label}  {step}/{steps}  compiling", highlight=False)

  def update(self, step: int, loss: float) -> None:
    """`loss` is the mean over seeds of the newest updates."""
    now = time.monotonic()
    if self.first == step:
      return
    rate = (step - self.first) / (now - self.began)
    note = f"loss {loss:.4g}  {rate:.3g} steps/s  {_span((self.steps - step) / rate)} left"
    if self.bar is not None:
      self.bar.update(self.row, completed=step, note=note)
    elif now - self.shown >= self.every_s:
      self.shown = now
      self.console.print(f"{self.label}  {step}/{self.steps}  {note}", highlight=False)

  def restart_clock(self, step: int) -> None:
    """Leaves what came before (compilation) out of the rate."""
    self.first, self.began = step, time.monotonic()

  def finish(self) -> None:
    if self.bar is not None:
      self.bar.stop()
      self.bar = None


def _span(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
