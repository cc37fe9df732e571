#!/usr/bin/env bash
# One worker of {{ run.name }}: install | start | run | status | stop. `pod.sh` calls it on all.
set -euo pipefail
cd

name={{ run.name | quote }}
commit={{ run.commit | quote }}
extras={{ extras | quote }}
code=$HOME/roundup/$commit
bundle=$HOME/$commit.bundle
unit=roundup-$name
log=$HOME/roundup/$name.log
units=${UNITS:-/etc/systemd/system}

{% include "install.sh" %}

is() { systemctl show --property="$1" --value "$unit"; }

run() { # what the unit executes; the process takes this shell's place, so that it gets the signals
  cd "$code"
  export PYTHONUNBUFFERED=1
  {% for name, value in run.environment %}
  export {{ name }}={{ value | quote }}
  {% endfor %}
  exec .venv/bin/{{ run.command | words }}
}

# systemd starts the run once, again after a failure or a reboot, and stops it with SIGTERM.
start() {
  if [[ $(is ActiveState) =~ ^(active|activating|deactivating|reloading)$ ]]; then
    if ! systemctl cat "$unit" | grep -q "$commit"; then
      echo "$unit runs another commit: stop it first" >&2
      exit 1
    fi
    echo "$unit runs already"
    return
  fi
  mkdir -p "$HOME/roundup"
  sudo tee "$units/$unit.service" >/dev/null <<UNIT
[Unit]
Description=$name
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=1d
StartLimitBurst={{ restarts }}

[Service]
User=$(id -un)
ExecStart=/bin/bash $HOME/worker-$commit.sh run
Restart=on-failure
RestartSec=15
RestartPreventExitStatus={{ mistake }}
KillMode=mixed
TimeoutStopSec={{ grace_s }}
StandardOutput=append:$log
StandardError=append:$log

[Install]
WantedBy=multi-user.target
UNIT
  sudo systemctl daemon-reload
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
  sudo systemctl enable --quiet "$unit"
  sudo systemctl start "$unit"
}

status() {
  case $(is ActiveState) in
    active) echo "runs: $(tail -n 1 "$log")" ;;
    activating) echo 'starts again' ;;
    deactivating) echo 'stops' ;;
    inactive) echo 'ended well' ;;
    *) echo "failed, exit code $(is ExecMainStatus)" ;;
  esac
}

stop() { sudo systemctl disable --quiet --now "$unit"; }

"$1"
