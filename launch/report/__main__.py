"""`python -m launch.report DIR...`: workdirs, or files of results, as one page or as a table."""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Sequence

from launch import runner, storage
from launch.errors import ConfigurationError
from launch.report import page, text, workdirs


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m launch.report", description=__doc__)
  parser.add_argument("paths", nargs="*", metavar="DIR", help=workdirs.EXPECTED)
  parser.add_argument("--out", help="The page. Default: report.html in the first DIR.")
  parser.add_argument(
    "--markdown", action="store_true", help="Print tables, in place of the page unless --out asks."
  )
  parser.add_argument(
    "--readme", help="Renew the results in this file, from experiments/results unless DIRs say."
  )
  arguments = parser.parse_args(argv)
  try:
    paths = [storage.path(path) for path in arguments.paths]
    if arguments.readme:
      paths = paths or committed()
    if not paths:
      raise ConfigurationError(f"no DIR is named: expected {workdirs.EXPECTED}")
    runs = [workdirs.read(path) for path in paths]
    if arguments.readme:
      file = pathlib.Path(arguments.readme)
      renewed = text.readme(file.read_text("utf-8"), [run.results for run in runs])
      file.write_text(renewed, "utf-8")
      return 0
    if arguments.markdown:
      print(markdown(runs))
    if arguments.out or not arguments.markdown:
      folder = paths[0] if paths[0].is_dir() else paths[0].parent
      out = storage.path(arguments.out) if arguments.out else folder / "report.html"
      out.write_text(page.page(runs), "utf-8")
      print(f"report: {out}", file=sys.stderr)
  except (ConfigurationError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def committed() -> list[pathlib.Path]:
  """The committed results."""
  package = importlib.import_module(runner.PACKAGE)
  return sorted(pathlib.Path(package.__path__[0]).glob("results/*.json"))


def markdown(runs: Sequence[workdirs.Run]) -> str:
  """The claims and the arms of runs, as markdown tables."""
  parts = []
  for run in runs:
    results = run.results
    parts.append(f"### {results['experiment']} {results['scale']}")
    if results["claims"]:
      parts.append(text.markdown_table(text.claim_rows(results["claims"])))
    for study in run.studies:
      shown = text.drawn(study, text.measured(text.arms_of(study, results)))
      rows = text.arm_rows(study, results, shown, run.notes(study))
      parts.append(f"#### {study.name}\n\n{text.markdown_table(rows)}")
  return "\n\n".join(parts)


if __name__ == "__main__":
  sys.exit(main())
