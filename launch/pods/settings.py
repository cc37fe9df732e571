"""What a pod is to run, checked before anything is created or paid for."""

import dataclasses
import math
import pathlib
import re
import subprocess
from collections.abc import Sequence

from launch import config as configs
from launch import mesh as meshes
from launch import runner
from launch.errors import ConfigurationError, nearest
from launch.plan import stages, topologies
from launch.plan.topologies import Topology
from launch.storage import STORES

# From SIGTERM to SIGKILL, in seconds, wherever a platform lets us say. The run leaves by itself
# before that, saved or not.
GRACE_S = 180
LEAVE_S = 150
RESTARTS = 20  # after failures that are neither a stop nor a mistake in what was asked for
MISTAKE = 2  # the exit code of `experiments.NAME` for such a mistake: trying again cannot help
# Flags of a run that are set here.
OURS = ("scale", "study", "mesh", "workdir", "distributed", "grace")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # and room for suffixes within 63 characters


@dataclasses.dataclass(frozen=True)
class Run:
  """What runs, the same on every platform.

  Attributes:
    name: of the pod; lower case, as DNS has it.
    experiment: one of `experiments/`.
    scale: one of the experiment's.
    study: studies to run, comma-separated; empty for all.
    bucket: `gs://...`, `s3://...`, or where the platform shares a file system an absolute path.
    topology: chips.
    mesh: sizes of its axes; empty for all on data.
    arguments: further flags of the experiment.
    environment: variables of the run, (name, value).
    commit: what every worker checks out.
    repository: where it is read from, here.
    folder: where the pod's files go, here.
  """

  name: str
  experiment: str
  scale: str
  study: str
  bucket: str
  topology: Topology
  mesh: str
  arguments: tuple[str, ...]
  environment: tuple[tuple[str, str], ...]
  commit: str
  repository: pathlib.Path
  folder: pathlib.Path

  @property
  def workdir(self) -> str:
    """As `runs/EXPERIMENT/SCALE` on a laptop."""
    return f"{self.bucket}/{self.experiment}/{self.scale}"

  @property
  def command(self) -> tuple[str, ...]:
    """The laptop's command with the flags that a pod adds; its first word is `python`."""
    named = {"study": self.study, "mesh": self.mesh}
    flags = [f"--{flag}={value}" for flag, value in named.items() if value]
    start = ("python", "-m", f"{runner.PACKAGE}.{self.experiment}", f"--scale={self.scale}")
    ours = ("--distributed", f"--workdir={self.workdir}", f"--grace={LEAVE_S}")
    return (*start, *ours, *flags, *self.arguments)

  def extras(self, accelerator: str) -> str:
    """Optional dependencies to install: the accelerator's and the bucket's."""
    scheme = self.bucket.partition("://")[0]
    stores = [extra for known, (_, extra, _) in STORES.items() if known == scheme]
    return ",".join([accelerator, *stores])


def check(
  experiment: str,
  *,
  scale: str,
  bucket: str,
  kinds: Sequence[str],
  topology: str | None = None,
  mesh: str | None = None,
  study: str | None = None,
  name: str | None = None,
  arguments: Sequence[str] = (),
  environment: Sequence[str] = (),
  shared: bool = False,
  folder: pathlib.Path | None = None,
) -> Run:
  """Builds a `Run`, or says in one line what is wrong.

  Args:
    experiment: its name.
    scale: one of its scales.
    bucket: where everything goes.
    kinds: of `topologies.CHIPS`, what the platform has.
    topology: such as `v5e-16`; default: what the experiment names for the scale.
    mesh: such as `data=8,tensor=2`; default: what is named with the topology, else all on data.
    study: studies, comma-separated; default: all of the scale.
    name: of the pod; default: made from experiment, scale and study.
    arguments: further flags of the experiment.
    environment: `NAME=VALUE`, variables of the run.
    shared: an absolute path will do for a bucket.
    folder: where the pod's files go; default: `runs/pods/NAME`.

  Raises:
    ConfigurationError: something does not exist or does not fit together.
  """
  module = runner.find(experiment)
  if scale not in module.SCALES:
    raise ConfigurationError(f"--scale={scale}: unknown scale{nearest(scale, module.SCALES)}")
  here = [s.name for s in module.STUDIES if s.at(scale)]
  for wanted in filter(None, (study or "").split(",")):
    if wanted not in here:
      raise ConfigurationError(f"--study={wanted}: not at scale {scale!r}{nearest(wanted, here)}")
  bucket = bucket.rstrip("/")
  if not re.fullmatch(r"(gs|s3)://[a-z0-9][-._a-z0-9]+(/[^\s/]+)*", bucket) and not (
    shared and bucket.startswith("/")
  ):
    also = ", or a folder that all nodes share, /PATH" if shared else ""
    raise ConfigurationError(
      f"--bucket={bucket}; accepted: gs://BUCKET or s3://BUCKET, with or without a /PATH{also}"
    )
  named = stages.named(module, scale)
  if named is not None and named[0].partition("-")[0] not in kinds:
    named = None
  if topology is None and named is None:
    raise ConfigurationError(
      f"{experiment} names no topology for scale {scale!r} here; give --topology={kinds[0]}-N"
    )
  if named is not None and topology in (None, named[0]):
    topology, mesh = named[0], named[1] if mesh is None else mesh
  chips = topologies.parse(topology or "")
  if chips.kind not in kinds:
    raise ConfigurationError(f"--topology={topology}; accepted here: {', '.join(kinds)}")
  check_mesh(mesh or "", chips)
  check_arguments(arguments, configs.flat(module.get_config(scale)))
  name = name or re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, (experiment, scale, study))))
  if not NAME.fullmatch(name):
    raise ConfigurationError(
      f"--name={name}; accepted: at most 40 of a-z, 0-9 and -, from a letter to no -"
    )
  return Run(
    name=name,
    experiment=experiment,
    scale=scale,
    study=study or "",
    bucket=bucket,
    topology=chips,
    mesh=mesh or "",
    arguments=tuple(arguments),
    environment=tuple(variable(word) for word in environment),
    commit=git("rev-parse", "HEAD"),
    repository=repository(),
    folder=folder or pathlib.Path("runs", "pods", name),
  )


def check_mesh(mesh: str, topology: Topology) -> None:
  """The mesh's sizes must multiply to the chips there are."""
  sizes = meshes.parse(mesh)
  product = math.prod(sizes.values())
  fits = topology.chips == product if "data" in sizes else topology.chips % product == 0
  if not fits:
    raise ConfigurationError(
      f"--mesh={mesh} takes {product} chips; {topology.name} has {topology.chips}"
    )


def check_arguments(arguments: Sequence[str], known: Sequence[str] | dict) -> None:
  """Further flags: none that is set here, no unknown key of the configuration."""
  for word in arguments:
    flag = word.removeprefix("--").partition("=")[0]
    if not word.startswith("--") or "=" not in word:
      raise ConfigurationError(f"{word!r} after --; accepted: --FLAG=VALUE of the experiment")
    if flag in OURS:
      raise ConfigurationError(f"{word!r} after --: say it before the --, where it is checked")
    if flag.startswith("config."):
      configs.check_key(flag.removeprefix("config."), known, "flag")


def variable(word: str) -> tuple[str, str]:
  """Reads `NAME=VALUE`."""
  found = re.fullmatch(r"([A-Za-z_]\w*)=([^\n\"\\]*)", word)
  if not found:
    raise ConfigurationError(f"--env={word}; accepted: NAME=VALUE")
  return found[1], found[2]


def repository() -> pathlib.Path:
  return pathlib.Path(__file__).resolve().parents[2]


def git(*arguments: str) -> str:
  """Asks git about this code.

  Raises:
    ConfigurationError: it does not lie in a repository.
  """
  try:
    done = subprocess.run(
      ["git", "-C", str(repository()), *arguments], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError) as error:
    raise ConfigurationError(
      f"{repository()} is no git repository: a pod runs a commit of a clone"
    ) from error
  return done.stdout.strip()
