"""`python -m launch.list`: the experiments, their claims and their last verdicts."""

import datetime
import json
import pathlib
import sys
from typing import Any

import rich.console

from launch import report, runner


def last_verdicts(name: str) -> tuple[pathlib.Path, dict[str, Any]] | None:
  """The newest verdict file of an experiment: committed results, or a run in `runs/` here."""
  folder = pathlib.Path(runner.find(name).__file__ or "").parent / "results"
  paths = [*folder.glob(f"{name}.json"), *pathlib.Path("runs").glob(f"{name}/**/verdict.json")]
  if not paths:
    return None
  newest = max(paths, key=lambda path: path.stat().st_mtime)
  return newest, json.loads(newest.read_text())


def title(name: str) -> str:
  """The first line of the experiment's docstring."""
  return (runner.find(name).__doc__ or "").partition("\n")[0]


def main() -> None:
  console = rich.console.Console()
  for name in sys.argv[1:] or runner.names():
    module = runner.find(name)
    console.print(f"[bold]{name}[/]  {title(name)}", highlight=False)
    console.print(f"  scales: {', '.join(module.SCALES)}", highlight=False)
    found = last_verdicts(name)
    judged: dict[tuple[str, str], dict[str, Any]] = {}
    if found is not None:
      judged = {(c["study"], c["name"]): c for c in found[1]["claims"]}
    for study in module.STUDIES:
      where = "" if study.at("laptop") else f"  [{', '.join(study.scales)}]"
      arms = ", ".join(study.arms)
      console.print(f"  {study.name}{where}: {arms}", highlight=False, markup=False)
      for claim in study.claims:
        result = judged.get((study.name, claim.name))
        verdict = result["verdict"] if result else "not run"
        colour = report.COLOURS.get(verdict, "dim")
        console.print(f"    [{colour}]{verdict:>9}[/]  {claim.name}", highlight=False)
        if result:
          console.print(f"               {report.found(result)}", highlight=False)
    if found is not None:
      day = datetime.date.fromtimestamp(found[0].stat().st_mtime)
      console.print(f"  last verdicts: {found[0]} ({day})", highlight=False, soft_wrap=True)


if __name__ == "__main__":
  main()
