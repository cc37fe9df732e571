"""TPU slices on GKE: a JobSet whose jobs are slices and whose pods are the slices' hosts."""

import dataclasses
import math
from typing import Any

import yaml

from launch.errors import ConfigurationError
from launch.plan.topologies import Topology
from launch.pods import tpu_vm
from launch.pods.recipe import Recipe, render, starting
from launch.pods.settings import GRACE_S, MISTAKE, RESTARTS, Run

KINDS = tpu_vm.KINDS
# GKE documentation, "Plan TPUs in GKE": the node label cloud.google.com/gke-tpu-accelerator.
ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
}
PORTS = {"tpu": 8471, "multislice": 8080, "jax": 8482}


@dataclasses.dataclass(frozen=True)
class Gke:
  """Settings of the platform.

  Attributes:
    run: what runs.
    image: where the container image goes, without a tag: it is tagged with the commit.
    chips_per_node: default: 4, or the slice's if it has fewer.
    context: of kubectl; default: the current one.
    namespace: default: the context's.
    spot: nodes that are cheaper and may be pre-empted.
    service_account: Kubernetes' own, bound to one that reads and writes the bucket.
  """

  run: Run
  image: str
  chips_per_node: int = 0
  context: str = ""
  namespace: str = ""
  spot: bool = False
  service_account: str = ""

  @property
  def tagged(self) -> str:
    return f"{self.image}:{self.run.commit}"


def nodes(topology: Topology, chips_per_node: int) -> tuple[int, int]:
  """Nodes of one slice and chips of a node.

  Raises:
    ConfigurationError: the slice does not divide so, or cannot be one of several.
  """
  tpu_vm.check_product(topology)
  chips = topology.chips // topology.slices
  per_node = chips_per_node or min(chips, 4)
  if per_node not in (1, 4, 8) or per_node not in (4, chips) or chips % per_node:
    raise ConfigurationError(
      f"--chips_per_node={per_node}; accepted for {topology.name}: 4, or all of a slice's {chips} "
      "if they are 1, 4 or 8"
    )
  if topology.slices > 1 and chips == per_node:
    raise ConfigurationError(f"--topology={topology.name}: several slices need two hosts each")
  return chips // per_node, per_node


def jobset(pod: Gke) -> dict[str, Any]:
  """The manifest. The JobSet controller makes the headless service; GKE sets the variables by which
  jax finds its processes (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, MEGASCALE_*)."""
  run, topology = pod.run, pod.run.topology
  hosts, chips = nodes(topology, pod.chips_per_node)
  container: dict[str, Any] = {
    "name": "run",
    "image": pod.tagged,
    "command": list(run.command),
    "env": [{"name": name, "value": value} for name, value in run.environment],
    "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
    "resources": {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")},
  }
  selector = {
    "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.kind],
    "cloud.google.com/gke-tpu-topology": topology.shape,
  }
  host: dict[str, Any] = {
    "restartPolicy": "Never",  # a pod alone cannot rejoin: the JobSet starts all again
    "terminationGracePeriodSeconds": GRACE_S,
    "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if pod.spot else {}),
    "containers": [container],
  }
  if pod.service_account:
    host["serviceAccountName"] = pod.service_account
  if topology.slices > 1:  # GKE documentation, "Deploy TPU Multislices in GKE"
    host |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    container["securityContext"] = {"privileged": True}
  job = {
    "parallelism": hosts,
    "completions": hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {"containerName": "run", "operator": "In", "values": [MISTAKE]},
        }
      ]
    },
    "template": {"metadata": {"labels": {"app": "roundup"}}, "spec": host},
  }
  refused = {
    "name": "refused",
    "action": "FailJobSet",
    "onJobFailureReasons": ["PodFailurePolicy"],
  }
  annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": run.name, "labels": {"app": "roundup"}, "annotations": annotations},
    "spec": {
      "suspend": False,
      "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
      "failurePolicy": {
        "maxRestarts": RESTARTS,
        "rules": [refused],
      },
      "replicatedJobs": [
        {"name": "slice", "replicas": topology.slices, "template": {"spec": job}},
      ],
    },
  }


def recipe(pod: Gke) -> Recipe:
  """The manifest, the image and `pod.sh`.

  Raises:
    ConfigurationError: the slice does not divide into nodes.
  """
  run = pod.run
  asked = {"context": pod.context, "namespace": pod.namespace}
  kubectl = ["kubectl", *(f"--{name}={value}" for name, value in asked.items() if value)]
  image = {"run": run, "accelerator": "tpu", "extras": run.extras("tpu")}
  return Recipe(
    files={
      "pod.sh": render("gke.sh", run=run, image=pod.tagged, kubectl=kubectl),
      "Dockerfile": render("Dockerfile", **image),
      "jobset.yaml": yaml.safe_dump(jobset(pod), sort_keys=False, width=math.inf),
    },
    commands=starting(run),
  )
