#!/usr/bin/env bash
# {{ run.experiment }} {{ run.scale }} on {{ run.topology.name }}: start | status | logs | stop | delete
# Every word may be said again: what is there is used, what runs is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

name={{ run.name | quote }}
workdir={{ run.workdir | quote }}
{% if not image %}
commit={{ run.commit | quote }}
extras={{ extras | quote }}
code={{ code }}/$commit
bundle=$PWD/$commit.bundle

{% include "install.sh" %}
{% endif %}

ours() { squeue --me --noheader --name="$name" --format="${1:-%i}"; }

start() {
  local there
  there=$(ours)
  if [ -n "$there" ]; then
    echo "$name: job $there is there already"
    return
  fi
  {% if not image %}
  install
  {% endif %}
  rm -f stopped failures
  mkdir -p logs # before the job, which opens its log there
  sbatch job.sbatch
  echo "$name: submitted; it writes to $workdir"
}

status() { ours '%i %T %M %D nodes %R'; }

logs() { # all tasks write to logs/ as they go
  tail -n 3 logs/*.log
}

stop() { # the run saves its state and its job ends; `start` goes on
  local there
  touch stopped # tells the job not to ask for another turn
  there=$(ours)
  for job in $there; do
    scancel --batch --signal=TERM "$job" || scancel "$job"
  done
}

delete() {
  touch stopped
  scancel --me --name="$name"
  echo "$name: gone; what it wrote stays in $workdir"
}

case ${1:-} in
  start | status | logs | stop | delete) "$1" ;;
  *)
    sed -n 2p "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
