#!/usr/bin/env bash
# {{ run.experiment }} {{ run.scale }} on {{ run.topology.name }}: start | status | logs | stop | delete
# Every word may be said again: what is there is used, what runs is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

name={{ run.name | quote }}
image={{ image | quote }}
workdir={{ run.workdir | quote }}
kubectl=({{ kubectl | words }})
pods="jobset.sigs.k8s.io/jobset-name=$name"

kube() { "${kubectl[@]}" "$@"; }

state() { kube get jobset "$name" --ignore-not-found --output='jsonpath={.status.terminalState}'; }

start() {
  local now
  now=$(state)
  case $now in
    Completed)
      echo "$name: finished; ./pod.sh delete, to run it again"
      return
      ;;
    Failed) delete ;;
  esac
  if ! docker manifest inspect "$image" >/dev/null 2>&1; then
    docker build --platform=linux/amd64 --tag "$image" .
    docker push "$image"
  fi
  kube apply --filename=jobset.yaml
  echo "$name: submitted; it writes to $workdir"
}

status() {
  kube get jobset "$name" --ignore-not-found
  kube get pods --selector="$pods" --output=wide
}

logs() { # of every pod that is there, into logs/POD.log
  local found pod
  mkdir -p logs
  found=$(kube get pods --selector="$pods" --output=name)
  for pod in $found; do
    kube logs "$pod" >"logs/${pod#pod/}.log" || echo "$pod: no log yet" >&2
  done
  ls -l logs
}

stop() { # the run saves its state and its pods go; `start` goes on
  kube patch jobset "$name" --type=merge --patch='{"spec": {"suspend": true}}'
}

delete() {
  kube delete jobset "$name" --ignore-not-found
  echo "$name: gone; what it wrote stays in $workdir"
}

case ${1:-} in
  start | status | logs | stop | delete) "$1" ;;
  *)
    sed -n 2p "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
