"""The notebook: its source runs, and its outputs are those of its source.

python tests/experiments/test_tour.py     # executes it and renews the outputs
"""

import base64
import hashlib
import os
import pathlib
import re
import tempfile

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOUR = ROOT / "experiments" / "tour.ipynb"


def source(notebook) -> str:
  """What identifies the code that was executed."""
  cells = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
  return hashlib.sha256(cells.encode()).hexdigest()


def execute(directory) -> nbformat.NotebookNode:
  """The notebook with fresh outputs; an error in a cell is raised."""
  notebook = nbformat.read(TOUR, as_version=4)
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  client = nbclient.NotebookClient(
    notebook,
    timeout=300,
    record_timing=False,
    resources={"metadata": {"path": str(directory)}},
  )
  client.execute(env=environment)
  return notebook


def pictures(notebook) -> list[bytes]:
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
  return [
    base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", ())
  ]


@pytest.mark.slow
def test_it_runs(tmp_path):
  notebook = execute(tmp_path)
  assert len(pictures(notebook)) == 3
  assert (tmp_path / "runs/tour/verdict.json").exists()


def test_its_outputs_are_those_of_its_source():
  notebook = nbformat.read(TOUR, as_version=4)
  assert notebook.metadata["executed"] == source(notebook), "run tests/experiments/test_tour.py"
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_its_outputs_are_small_and_say_nothing_of_a_machine():
  notebook = nbformat.read(TOUR, as_version=4)
  assert len(pictures(notebook)) == 3
  assert all(len(picture) < 60_000 for picture in pictures(notebook))
  text = re.sub(r'"image/png": "[^"]*"', "", TOUR.read_text())
  assert not re.search(r"/(home|tmp|root|Users|usr|work)/", text)
  assert len(text) < 40_000


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as directory:
    executed = execute(directory)
  executed.metadata["executed"] = source(executed)
  executed.metadata["language_info"] = {"name": "python"}
  nbformat.write(executed, TOUR)
