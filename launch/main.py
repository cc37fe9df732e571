"""`python -m experiments.NAME`: flags, one-line errors, exit codes."""

import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import rich.console
from absl import app, flags, logging
from ml_collections import config_flags

from launch import config as configs
from launch import runner
from launch.errors import ConfigurationError, TrainingError, nearest
from launch.interruption import Stopped

FLAGS = flags.FLAGS


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
  flags.DEFINE_bool("distributed", False, "Join the processes of a pod or cluster first.")
  with _one_line():
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
    if isinstance(error, ConfigurationError | TrainingError | FileNotFoundError | flags.Error):
      print(f"error: {error}", file=sys.stderr)
      sys.exit(1 if isinstance(error, TrainingError) else 2)
    if isinstance(error, Stopped):
      print(error, file=sys.stderr)
      sys.exit(128 + error.signal)


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
    logging.set_verbosity(logging.WARNING)  # checkpoints log every file they touch
  use_compilation_cache()
  with _one_line():
    if FLAGS.distributed:
      jax.distributed.initialize()
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
      command=runner.command_line(runner.slug_of(module)),
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
