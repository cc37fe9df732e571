"""GPUs under Slurm: a batch job, in a virtual environment or in a container (pyxis and enroot)."""

import dataclasses
import shlex

from launch.errors import ConfigurationError
from launch.pods.recipe import Recipe, render, starting
from launch.pods.settings import GRACE_S, MISTAKE, RESTARTS, Run

KINDS = ("cuda",)


@dataclasses.dataclass(frozen=True)
class Slurm:
  """Settings of the platform.

  Attributes:
    run: what runs; its folder and `code` must be on a file system that all nodes share.
    gpus_per_node: of the nodes, all of which are used.
    time: limit of one turn, as Slurm writes it; the job asks for another when it is up.
    partition: default: the cluster's.
    account: default: yours.
    cpus: of each task; default: the cluster's.
    image: a container image that holds the code, without a tag: the tag is the commit. Default:
      none, but a virtual environment.
    code: where clones and their virtual environments go; default: `~/roundup`.
  """

  run: Run
  gpus_per_node: int = 8
  time: str = "24:00:00"
  partition: str = ""
  account: str = ""
  cpus: int = 0
  image: str = ""
  code: str = ""


def recipe(pod: Slurm) -> Recipe:
  """`pod.sh`, the batch script `job.sbatch`, and a Dockerfile where there is an image.

  jax's detection of Slurm takes one task for one GPU and gives task i of a node the node's GPU i,
  so that every task must see all GPUs of its node: hence no --gpus-per-task.

  Raises:
    ConfigurationError: the GPUs do not fill whole nodes.
  """
  run = pod.run
  per_node = min(pod.gpus_per_node, run.topology.chips)
  if per_node < 1 or run.topology.chips % per_node:
    raise ConfigurationError(
      f"--gpus_per_node={pod.gpus_per_node}: {run.topology.name} does not fill whole nodes"
    )
  given = {"partition": pod.partition, "account": pod.account, "cpus-per-task": pod.cpus}
  options = {
    "job-name": run.name,
    "nodes": run.topology.chips // per_node,
    "ntasks-per-node": per_node,
    "gpus-per-node": per_node,
    "time": pod.time,
    **{name: value for name, value in given.items() if value},
    "signal": f"B:TERM@{GRACE_S}",
    "output": "logs/%j.log",
    "open-mode": "append",
  }
  srun = ["--gpu-bind=none", "--open-mode=append"]
  program = shlex.join(run.command)
  if pod.image:
    srun += [f"--container-image={pod.image}:{run.commit}", "--container-workdir=/opt/roundup"]
    if run.bucket.startswith("/"):
      srun.append(f"--container-mounts={run.bucket}:{run.bucket}")
  else:
    program = f".venv/bin/{program}"
  code = shlex.quote(pod.code) if pod.code else '"$HOME"/roundup'
  extras = run.extras("cuda")
  text = {"run": run, "image": pod.image, "code": code, "extras": extras}
  job = {"cpus": pod.cpus, "grace_s": GRACE_S, "mistake": MISTAKE, "restarts": RESTARTS}
  lines = [f"--{name}={value}" for name, value in options.items()]
  files = {
    "pod.sh": render("slurm.sh", **text),
    "job.sbatch": render(
      "job.sbatch", **text, **job, options=[*lines, "--requeue"], srun=srun, program=program
    ),
  }
  if pod.image:
    files["Dockerfile"] = render("Dockerfile", run=run, accelerator="cuda", extras=extras)
  return Recipe(files=files, commands=starting(run))
