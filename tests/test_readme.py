"""The README's results are those of `experiments/results`."""

import pathlib
import re

from launch.report import text, workdirs
from launch.report.__main__ import committed

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_results_are_up_to_date():
  found = README.read_text("utf-8")
  every = [workdirs.read(path).results for path in committed()]
  assert text.readme(found, every) == found, "run python -m launch.report --readme README.md"


def test_a_changed_result_would_be_noticed():
  found = README.read_text("utf-8")
  every = [dict(workdirs.read(path).results) for path in committed()]
  every[0]["claims"] = [c | {"verdict": "refuted"} for c in every[0]["claims"]]
  renewed = text.readme(found, every)
  assert renewed != found
  assert text.readme(renewed, every) == renewed


def test_links_lead_somewhere():
  for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text("utf-8")):
    assert (README.parent / target).exists(), target
