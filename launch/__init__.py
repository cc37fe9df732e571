"""The engine: experiments are written against these names and run by `main` or `run`."""

from launch.errors import ConfigurationError, TrainingError
from launch.finished import Finished, load
from launch.lab import Lab
from launch.loop import Fitted
from launch.main import main
from launch.plan import libtpu
from launch.report import table
from launch.runner import run
from launch.study import Claim, Study, judge
from launch.task import Evaluation, State, Task, independent, supervised

__all__ = [
  "Claim",
  "ConfigurationError",
  "Evaluation",
  "Finished",
  "Fitted",
  "Lab",
  "State",
  "Study",
  "Task",
  "TrainingError",
  "independent",
  "judge",
  "load",
  "main",
  "run",
  "supervised",
  "table",
]

libtpu.leave_alone()
