"""What a platform makes of its settings, and the one place that writes files and runs commands."""

import dataclasses
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from launch.pods.settings import Run

TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
)
TEMPLATES.filters["quote"] = lambda value: shlex.quote(str(value))
TEMPLATES.filters["words"] = shlex.join


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Files, by name within the pod's folder, and the commands that start it, run from here."""

  files: Mapping[str, str]
  commands: Sequence[Sequence[str]]


def render(template: str, **values: Any) -> str:
  """Fills in one of `templates/`."""
  return TEMPLATES.get_template(template).render(**values)


def starting(run: Run) -> list[list[str]]:
  """The commands of every platform: the committed code into one file, then `pod.sh start`."""
  bundle = str(run.folder.absolute() / f"{run.commit}.bundle")  # git -C changes folder
  return [
    ["git", "-C", str(run.repository), "bundle", "create", "--quiet", bundle, "HEAD"],
    ["bash", str(run.folder / "pod.sh"), "start"],
  ]


def show(recipe: Recipe, folder: pathlib.Path) -> str:
  """Everything that `execute` would write and run."""
  files = [f"# {folder / name}\n{text.rstrip()}\n" for name, text in recipe.files.items()]
  commands = [shlex.join(command) for command in recipe.commands]
  return "\n".join([*files, "# commands", *commands])


def execute(recipe: Recipe, folder: pathlib.Path) -> int:
  """Writes the files and runs the commands in turn; returns the first exit code that is not 0."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in recipe.files.items():
    (folder / name).write_text(text)
    if name.endswith(".sh"):
      (folder / name).chmod(0o755)
  for command in recipe.commands:
    print(shlex.join(command), file=sys.stderr, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
      return code
  return 0
