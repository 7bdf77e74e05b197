#!/usr/bin/env bash
# What the roads without Kubernetes run on every host: installs, and keeps the training command alive as a service of
# systemd, which starts it anew after a crash or a reboot. In the folder of the repository it keeps train.log (appended
# to, and copied to the bucket every minute), train.command and train.logs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=0.13.9 # version

usage="usage: host.sh install | start LOGS COMMAND... | stop | status | log | number"

install() {
  curl -LsSf "https://astral.sh/uv/$uv/install.sh" | sh
  # uv brings the Python that the system image may lack; the lock says which versions, after every restart the same.
  ~/.local/bin/uv venv --quiet --allow-existing --python=3.12 .venv
  ~/.local/bin/uv pip sync --quiet --python=.venv --require-hashes launch/lock.txt
}

# Exit status 2 is a mistake that no restart mends. Ten failures in two hours are no bad luck.
unit() {
  cat <<UNIT
[Unit]
Description=NaViL training
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=7200
StartLimitBurst=10

[Service]
User=$(id -un)
WorkingDirectory=$PWD
Environment=PATH=$PATH
LimitMEMLOCK=infinity
LimitNOFILE=1048576
TasksMax=infinity
ExecStart=/bin/bash $PWD/launch/host.sh serve
ExecStopPost=-/bin/bash $PWD/launch/host.sh upload
StandardOutput=append:$PWD/train.log
StandardError=append:$PWD/train.log
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=300

[Install]
WantedBy=multi-user.target
UNIT
}

# start LOGS COMMAND...: LOGS is the folder of the bucket that the log is copied to.
start() {
  if systemctl is-active --quiet navil; then
    echo "error: a command is still running, stop it first" >&2
    exit 2
  fi
  echo "$1/$(hostname)-$(date -u +%Y%m%dT%H%M%SZ).log" >train.logs
  shift
  printf '%s\0' "$@" >train.command
  unit | sudo tee /etc/systemd/system/navil.service >/dev/null
  sudo systemctl daemon-reload
  sudo systemctl reset-failed navil 2>/dev/null || true
  sudo systemctl enable --quiet --now navil
}

# The service itself.
serve() {
  local words
  mapfile -d '' -t words <train.command
  join
  (while sleep 60 && kill -0 $$; do upload; done) </dev/null >/dev/null 2>&1 &
  export PATH=$PWD/.venv/bin:$PATH
  exec "${words[@]}"
}

attribute() {
  curl -sf --max-time 10 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# An instance group tells its hosts of one another, but not in the words that JAX looks for.
join() {
  local endpoints first commas
  if attribute agent-worker-number >/dev/null || ! endpoints=$(attribute worker-network-endpoints); then
    return
  fi
  first=${endpoints%%,*}
  commas=${endpoints//[^,]/}
  [[ -n $commas ]] || return 0
  export JAX_COORDINATOR_ADDRESS=${first##*:}:8476
  export JAX_NUM_PROCESSES=$((${#commas} + 1))
  JAX_PROCESS_ID=$(attribute worker-id)
  export JAX_PROCESS_ID
}

upload() {
  gcloud storage cp --quiet train.log "$(<train.logs)" >/dev/null 2>&1 || true
}

case ${1:-} in
  install) install ;;
  start) start "${@:2}" ;;
  serve) serve ;;
  upload) upload ;;
  # Upon SIGTERM training saves a checkpoint; after TimeoutStopSec it is killed.
  stop)
    sudo systemctl disable --quiet --now navil
    tail -n 1 train.log
    ;;
  status)
    systemctl is-active navil || true
    tail -n 1 train.log
    ;;
  number) attribute worker-id || echo 0 ;;
  log) exec tail -n 100 -F train.log ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
