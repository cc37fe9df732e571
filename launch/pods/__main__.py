"""`python -m launch.pods tpu-vm|gke|slurm EXPERIMENT --scale=... --bucket=gs://...`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from launch.errors import ConfigurationError
from launch.pods import gke, slurm, tpu_vm
from launch.pods.recipe import Recipe, execute, show
from launch.pods.settings import Run, check, git

PLATFORMS: dict[str, tuple[Any, Any, Sequence[str]]] = {
  "tpu-vm": (tpu_vm.TpuVm, tpu_vm.recipe, tpu_vm.KINDS),
  "gke": (gke.Gke, gke.recipe, gke.KINDS),
  "slurm": (slurm.Slurm, slurm.recipe, slurm.KINDS),
}


def parser() -> argparse.ArgumentParser:
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("experiment", help="such as s5")
  common.add_argument("--scale", default="paper", help="one of the experiment's")
  common.add_argument("--bucket", required=True, help="gs://... or s3://...; results and state")
  common.add_argument("--topology", help="default: what the experiment names for the scale")
  common.add_argument("--mesh", help="such as data=8,tensor=2; default: as named, else all on data")
  common.add_argument("--study", help="studies, comma-separated; default: all of the scale")
  common.add_argument("--name", help="of the pod; default: made from experiment, scale and study")
  common.add_argument("--env", action="append", default=[], help="NAME=VALUE, for the run; repeats")
  common.add_argument("--dry-run", action="store_true", help="print every file and command only")
  top = argparse.ArgumentParser(
    prog="python -m launch.pods",
    description="Puts an experiment on a pod. Flags of the experiment follow after --.",
  )
  platforms = top.add_subparsers(dest="platform", required=True)

  tpu = platforms.add_parser("tpu-vm", parents=[common], help="TPU VM slices, over ssh")
  tpu.add_argument("--zone", required=True)
  tpu.add_argument("--project", default="", help="default: gcloud's")
  tpu.add_argument("--software", default="", help="runtime version; default: JAX's for the chip")

  k8s = platforms.add_parser("gke", parents=[common], help="TPU slices on GKE, with JobSet")
  k8s.add_argument("--image", required=True, help="where the image goes, without a tag")
  k8s.add_argument("--chips_per_node", type=int, default=0, help="default: 4, or all of a smaller")
  k8s.add_argument("--context", default="", help="of kubectl; default: the current one")
  k8s.add_argument("--namespace", default="")

  for cloud in (tpu, k8s):
    cloud.add_argument("--spot", action="store_true", help="cheaper, and may be pre-empted")
    cloud.add_argument("--service_account", default="", help="that reads and writes the bucket")

  cluster = platforms.add_parser("slurm", parents=[common], help="GPUs under Slurm")
  cluster.add_argument("--gpus_per_node", type=int, default=8)
  cluster.add_argument("--time", default="24:00:00", help="of one turn; more follow by themselves")
  cluster.add_argument("--partition", default="")
  cluster.add_argument("--account", default="")
  cluster.add_argument("--cpus", type=int, default=0, help="of each task, which drives one GPU")
  cluster.add_argument("--image", default="", help="run in this container, by pyxis; without a tag")
  cluster.add_argument("--code", default="", help="for clones and environments; ~/roundup")
  return top


def prepare(words: Sequence[str]) -> tuple[Run, Recipe, bool]:
  """What a command line asks for, and whether only to print it.

  Raises:
    ConfigurationError: something asked for does not exist or does not fit together.
  """
  split = words.index("--") if "--" in words else len(words)
  given = vars(parser().parse_args(words[:split]))
  kind, recipe, kinds = PLATFORMS[given["platform"]]
  asked = ("scale", "bucket", "topology", "mesh", "study", "name")
  run = check(
    given["experiment"],
    **{key: given[key] for key in asked},
    kinds=kinds,
    arguments=words[split + 1 :],
    environment=given["env"],
    shared=kind is slurm.Slurm,
  )
  fields = {field.name for field in dataclasses.fields(kind)} - {"run"}
  pod = kind(run, **{key: given[key] for key in fields})
  return run, recipe(pod), given["dry_run"]


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 2 for a mistake, else that of the first command that fails."""
  words = list(sys.argv[1:] if argv is None else argv)
  try:
    run, recipe, dry = prepare(words)
    if git("status", "--porcelain", "--untracked-files=no"):
      print(f"note: uncommitted changes stay here; {run.commit[:12]} runs", file=sys.stderr)
  except ConfigurationError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if dry:
    print(show(recipe, run.folder))
    return 0
  return execute(recipe, run.folder)


if __name__ == "__main__":
  sys.exit(main())
