"""`python -m experiments.NAME`: flags, one-line errors, exit codes."""

import os
import pathlib
import signal
import sys
from collections.abc import Sequence

import jax
import rich.console
from absl import app, flags, logging
from ml_collections import config_flags

from launch import config as configs
from launch import processes, runner
from launch.errors import ConfigurationError, TrainingError, nearest
from launch.interruption import GRACE_S, Stopped
from launch.profiling import parse_trace

FLAGS = flags.FLAGS
# The variables that a starter sets instead of the flags, so that one command serves all processes.
VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "process_id": "JAX_PROCESS_ID",
  "process_count": "JAX_NUM_PROCESSES",
}
COMMAND = "ROUNDUP_COMMAND"  # the starter's own command, for the record


def main(name: str) -> None:
  """Runs the experiment of module `name` when it is the program: `main(__name__)` at its end."""
  if name != "__main__":
    return
  module = sys.modules[name]
  scale = _early("scale", "laptop")
  known = ", ".join(s.name + (" (optional)" if s.optional else "") for s in module.STUDIES)
  flags.DEFINE_string("scale", "laptop", f"One of: {', '.join(module.SCALES)}.")
  flags.DEFINE_list("study", None, f"Studies to run: {known}. Default: all but the optional.")
  flags.DEFINE_list("arm", None, "Arms to run, of the studies chosen. Default: all.")
  flags.DEFINE_string(
    "seeds", None, "A number of seeds, or the seeds (0,1,2). Default: the study's."
  )
  flags.DEFINE_string("workdir", None, "Where everything goes. Default: runs/EXPERIMENT/SCALE.")
  flags.DEFINE_string(
    "mesh", "", "Sizes of mesh axes, such as data=4,fsdp=2. Default: all on data."
  )
  flags.DEFINE_string("profile", None, "Updates of each stage to trace, STEP:COUNT.")
  flags.DEFINE_float(
    "grace", GRACE_S, "Seconds after SIGTERM at which it leaves, even if it could not save."
  )
  flags.DEFINE_bool("distributed", False, "Join the processes of a pod or cluster first.")
  with _one_line():
    for key, define, meaning in (
      ("coordinator", flags.DEFINE_string, "HOST:PORT of process 0"),
      ("process_id", flags.DEFINE_integer, "This process, from 0"),
      ("process_count", flags.DEFINE_integer, "All of them"),
    ):
      text = f"{meaning}; or ${VARIABLES[key]}, or as the pod or cluster says."
      define(key, os.environ.get(VARIABLES[key]), text)
    if scale not in module.SCALES:
      raise ConfigurationError(f"--scale: unknown scale {scale!r}{nearest(scale, module.SCALES)}")
    config = module.get_config(scale)
    _check_keys(config)
  config_flags.DEFINE_config_dict("config", config, "Overrides, such as --config.optimizer.lr=0.01")
  # --help shows the flags of the program's own module only.
  for flag in FLAGS.flags_by_module_dict()[__name__] + [FLAGS["config"]]:
    FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(lambda argv: _run(module, argv), flags_parser=_parse)


def _early(flag: str, default: str) -> str:
  """The value of a flag that decides which other flags there are."""
  for index, argument in enumerate(sys.argv):
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == flag:
      return value if equals else (sys.argv[index + 1] if index + 1 < len(sys.argv) else default)
  return default


class _one_line:
  """Shows what a person can mend as one line and exits with 2, or 1 for a run gone wrong."""

  def __enter__(self) -> None: ...

  def __exit__(self, kind, error, trace) -> None:
    text, status = _explained(error)
    saved = isinstance(error, Stopped) and error.step is not None  # so have all processes
    if error is None or saved:
      processes.finish()
    if isinstance(error, Stopped):  # at once: a reading thread may be stuck
      processes.leave(str(text), status)
    if processes.count() > 1 and error is not None:
      processes.fail(error, text, status)
    if text is not None:
      print(text, file=sys.stderr)
      sys.exit(status)


def _explained(error: BaseException | None) -> tuple[str | None, int]:
  """The line that explains an error, if one does, and the exit code."""
  if isinstance(error, ConfigurationError | FileNotFoundError | flags.Error):
    return f"error: {error}", 2
  if isinstance(error, TrainingError | OSError):
    return f"error: {error}", 1
  if isinstance(error, Stopped):
    return str(error), 128 + error.signal
  if isinstance(error, KeyboardInterrupt):
    return "interrupted; run the same command again to go on", 128 + signal.SIGINT
  return None, 1


def _check_keys(config) -> None:
  known = configs.flat(config)
  for argument in sys.argv[1:]:
    key = argument.lstrip("-").partition("=")[0]
    if argument.startswith("-") and key.startswith("config."):
      configs.check_key(key.removeprefix("config."), known, "flag")


def _parse(argv: Sequence[str]) -> list[str]:
  with _one_line():
    rest = FLAGS(list(argv))
    if len(rest) > 1:
      raise ConfigurationError(f"unexpected argument {rest[1]!r}; flags start with --")
    return rest


def _run(module, argv: Sequence[str]) -> None:
  del argv
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.FATAL)  # what goes wrong is said by us, in one line
  use_compilation_cache()
  with _one_line():
    if FLAGS.distributed:
      processes.join(**{flag: FLAGS[flag].value for flag in VARIABLES})
    elif alone := [flag for flag in VARIABLES if FLAGS[flag].present]:
      raise ConfigurationError(f"--{alone[0]} goes with --distributed")
    runner.run(
      module,
      scale=FLAGS.scale,
      study=FLAGS.study,
      arm=FLAGS.arm,
      seeds=_seeds(FLAGS.seeds),
      overrides=config_flags.get_override_values(FLAGS["config"]),
      workdir=FLAGS.workdir,
      mesh=FLAGS.mesh,
      console=rich.console.Console(quiet=jax.process_index() > 0),
      profile=None if FLAGS.profile is None else parse_trace(FLAGS.profile),
      grace_s=FLAGS.grace,
      command=os.environ.get(COMMAND) or runner.command_line(runner.slug_of(module)),
    )


def _seeds(text: str | None) -> int | list[int] | None:
  if text is None:
    return None
  parts = text.split(",")
  if not all(p.strip().isdigit() for p in parts):
    raise ConfigurationError(f"--seeds={text}; a number such as 3, or seeds such as 0,1,2")
  return int(text) if len(parts) == 1 else [int(p) for p in parts]


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache directory, unless jax is told otherwise."""
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "roundup" / "xla"))
