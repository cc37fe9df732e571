"""What a run tells a person: a table and verdicts on the terminal, plots, a page to send on.

`python -m launch.report DIR...` makes one HTML page of any number of workdirs.
"""

from launch.report.plots import plot_study
from launch.report.text import COLOURS, found, show, spread, table

__all__ = ["COLOURS", "found", "plot_study", "show", "spread", "table"]
