#!/usr/bin/env bash
# {{ run.experiment }} {{ run.scale }} on {{ run.topology.name }}: start | keep | status | logs | stop | delete
# Every word may be said again: what is there is used, what runs is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

name={{ run.name | quote }}
commit={{ run.commit | quote }}
workdir={{ run.workdir | quote }}
slices=({{ slices | words }})
place=({{ place | words }})
create=({{ create | words }})
poll_s=${POLL_S:-20}

tpus() { gcloud compute tpus "$@" "${place[@]}"; }

everywhere() { # COMMAND, on all workers of all slices
  for slice in "${slices[@]}"; do
    tpus tpu-vm ssh "$slice" --worker=all --command="$1"
  done
}

state() { # of the queued resource: ABSENT, ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...
  local found
  if found=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); then
    echo "${found##*$'\n'}"
  elif [[ $found == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$found" >&2
    return 1
  fi
}

acquire() {
  local now last=
  while true; do
    now=$(state)
    [ "$now" = "$last" ] || echo "$name: $now"
    last=$now
    case $now in
      ACTIVE) return ;;
      ABSENT) tpus queued-resources create "$name" "${create[@]}" ;;
      SUSPENDED) tpus queued-resources delete "$name" --force --quiet ;; # was pre-empted
      FAILED)
        tpus queued-resources describe "$name" >&2
        return 1
        ;;
    esac
    sleep "$poll_s"
  done
}

start() {
  acquire
  for slice in "${slices[@]}"; do
    tpus tpu-vm scp "$commit.bundle" "worker-$commit.sh" "$slice": --worker=all
  done
  everywhere "bash worker-$commit.sh install" # everywhere, before the first process waits for all
  everywhere "bash worker-$commit.sh start"
  echo "$name: runs; it writes to $workdir"
}

keep() { # start, and again after every pre-emption, until the run ends
  local told
  while true; do
    start
    while told=$(tpus tpu-vm ssh "${slices[0]}" --worker=0 --command="bash worker-$commit.sh status"); do
      case $told in
        *'ended well'*)
          echo "$name: $told"
          return
          ;;
        *failed*)
          echo "$name: $told; see ./pod.sh logs" >&2
          return 1
          ;;
      esac
      sleep "$poll_s"
    done
    echo "$name: no answer; looking for the slice"
    sleep "$poll_s"
  done
}

status() {
  local now
  now=$(state)
  echo "$name: $now"
  [ "$now" != ACTIVE ] || everywhere "bash worker-$commit.sh status"
}

logs() { # of every worker, into logs/SLICE/WORKER.log
  for slice in "${slices[@]}"; do
    mkdir -p "logs/$slice"
    tpus tpu-vm ssh "$slice" --worker=all --command="cat roundup/$name.log" \
      --output-directory="logs/$slice"
  done
  ls -l logs/*/*.log
}

stop() { # the run saves its state; the slice stays, and costs, until `delete`
  everywhere "bash worker-$commit.sh stop"
}

delete() {
  local now
  now=$(state)
  if [ "$now" != ABSENT ]; then
    tpus queued-resources delete "$name" --force --quiet
  fi
  echo "$name: gone; what it wrote stays in $workdir"
}

case ${1:-} in
  start | keep | status | logs | stop | delete) "$1" ;;
  *)
    sed -n 2p "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
