"""A TPU VM slice, or several: a queued resource, ssh to all workers, a systemd unit on each."""

import dataclasses

from launch.errors import ConfigurationError
from launch.plan.topologies import DEEP, FLAT, Topology
from launch.pods.recipe import Recipe, render, starting
from launch.pods.settings import GRACE_S, MISTAKE, RESTARTS, Run

KINDS = tuple(FLAT | DEEP)
# Cloud TPU documentation, "TPU software versions": for JAX.
SOFTWARE = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True)
class TpuVm:
  """Settings of the platform.

  Attributes:
    run: what runs.
    zone: of the slice.
    project: default: gcloud's.
    software: runtime version; default: that of `SOFTWARE`.
    spot: cheaper, and may be pre-empted.
    service_account: that reads and writes the bucket; default: the project's own.
  """

  run: Run
  zone: str
  project: str = ""
  software: str = ""
  spot: bool = False
  service_account: str = ""


def check_product(topology: Topology) -> None:
  """Slices are sold from one chip (v5e, v6e: then from four) or from one host of four."""
  chips = topology.chips // topology.slices
  if chips == 2 or (topology.kind in DEEP and chips < 4):
    least = "1, 4, 8 .. chips" if topology.kind in FLAT else "8, 16, 32 .. TensorCores"
    raise ConfigurationError(
      f"--topology={topology.name}; accepted here: {topology.kind}-N of {least}"
    )


def accelerator_type(topology: Topology) -> str:
  """The cloud's name of one slice: `v5litepod-16`, `v5p-32`, which counts TensorCores."""
  kind = {"v5e": "v5litepod"}.get(topology.kind, topology.kind)
  return f"{kind}-{topology.chips // topology.slices * (2 if topology.kind in DEEP else 1)}"


def recipe(pod: TpuVm) -> Recipe:
  """The scripts `pod.sh`, here, and `worker-COMMIT.sh`, on every worker.

  Raises:
    ConfigurationError: there is no slice of this size.
  """
  run, topology = pod.run, pod.run.topology
  check_product(topology)
  several = topology.slices > 1
  slices = [f"{run.name}-{i}" for i in range(topology.slices)] if several else [run.name]
  nodes = ("--node-count", topology.slices) if several else ("--node-id", run.name)
  create = [
    f"--accelerator-type={accelerator_type(topology)}",
    f"--runtime-version={pod.software or SOFTWARE[topology.kind]}",
    f"{nodes[0]}={nodes[1]}",
    *(["--spot"] if pod.spot else []),
    *([f"--service-account={pod.service_account}"] if pod.service_account else []),
  ]
  place = [f"--zone={pod.zone}", *([f"--project={pod.project}"] if pod.project else [])]
  limits = {"grace_s": GRACE_S, "mistake": MISTAKE, "restarts": RESTARTS}
  return Recipe(
    files={
      "pod.sh": render("tpu_vm.sh", run=run, slices=slices, place=place, create=create),
      f"worker-{run.commit}.sh": render("worker.sh", run=run, extras=run.extras("tpu"), **limits),
    },
    commands=starting(run),
  )
