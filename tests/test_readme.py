"""The README's results are those of `experiments/results`."""

import pathlib
import re

import pytest

from launch import runner
from launch.report import text, workdirs
from launch.report.__main__ import committed

README = pathlib.Path(__file__).parents[1] / "README.md"
EXPERIMENTS = README.parent / "experiments"
PAGES = (README, EXPERIMENTS / "results" / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_results_are_up_to_date(page):
  found = page.read_text("utf-8")
  every = [workdirs.read(path).results for path in committed()]
  name = page.relative_to(README.parent)
  assert text.readme(found, every) == found, f"run python -m launch.report --readme {name}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_changed_result_would_be_noticed(page):
  found = page.read_text("utf-8")
  every = [dict(workdirs.read(path).results) for path in committed()]
  every[0]["claims"] = [c | {"verdict": "refuted"} for c in every[0]["claims"]]
  renewed = text.readme(found, every)
  assert renewed != found
  assert text.readme(renewed, every) == renewed


@pytest.mark.parametrize("page", [*PAGES, EXPERIMENTS / "README.md"], ids=str)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
    assert (page.parent / target).exists(), target


def test_every_experiment_is_in_the_guide():
  guide = (EXPERIMENTS / "README.md").read_text("utf-8")
  assert not [name for name in runner.names() if f"`{name}`" not in guide]
