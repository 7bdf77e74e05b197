#!/usr/bin/env bash
# Trains on TPU VMs, on one or several slices that come from Google Cloud's queue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [--dry-run] [--settings FILE] ACTION [-- COMMAND...]

  create             asks for the slices; a request waits until there are some
  wait               until the slices are there
  setup              copies this repository to all hosts and installs it there
  run -- COMMAND     starts the command on all hosts, in the background; it gets --config.workdir=$BUCKET/$NAME
  up -- COMMAND      all of these, from wherever it stands; also after slices were taken away
  logs               follows the log of the first host
  status             the request's state, and what every host does
  stop               training saves a checkpoint and stops, on all hosts
  delete             gives the slices back; they cost money until then

  --dry-run          prints the commands and runs none
  --settings FILE    in the place of launch/settings.sh (see launch/settings.example.sh)

Example:
  launch/tpu_vm.sh up -- python -m navil_jax.train --config configs/my_recipe.py
  launch/tpu_vm.sh logs
TEXT
}

poll_seconds=${NAVIL_POLL_SECONDS:-30}
tpu=(gcloud compute tpus queued-resources)

state() {
  "${tpu[@]}" describe "$NAME" "${place[@]}" '--format=value(state.state)' 2>/dev/null || true
}

on_hosts() {
  run "${tpu[@]}" ssh "$NAME" "${place[@]}" --node=all --worker=all "--command=$1"
}

create() {
  local options=("--accelerator-type=$accelerator" "--runtime-version=${RUNTIME_VERSION:-$image_version}")
  if ((SLICES == 1)); then
    options+=("--node-id=$NAME")
  else
    options+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  [[ $CAPACITY == on-demand ]] || options+=("--$CAPACITY")
  run "${tpu[@]}" create "$NAME" "${place[@]}" "${options[@]}"
}

wait_until_active() {
  local now before=''
  show "${tpu[@]}" describe "$NAME" "${place[@]}" '--format=value(state.state)'
  "$dry_run" && return
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || echo "$(date +%T) ${now:-no such request}"
    case $now in
      '' | FAILED | SUSPENDED | SUSPENDING | DELETING) fail "$NAME will not become active; delete and create it anew" ;;
    esac
    before=$now
    sleep "$poll_seconds"
  done
  echo "$(date +%T) ACTIVE"
}

setup() {
  local packed install
  packed=${TMPDIR:-/tmp}/$NAME-code.tar.gz
  run tar -czf "$packed" -C "$root" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
  run "${tpu[@]}" scp "$packed" "$NAME:code.tar.gz" "${place[@]}" --node=all --worker=all
  install='mkdir -p navil_jax && tar -xzf code.tar.gz -C navil_jax && cd navil_jax'
  # uv brings the Python that the system image may lack.
  install+=' && curl -LsSf https://astral.sh/uv/install.sh | sh'
  install+=' && ~/.local/bin/uv venv --quiet --allow-existing --python=3.11 .venv'
  install+=' && ~/.local/bin/uv pip install --quiet --python=.venv -r requirements.txt -r requirements-tpu.txt'
  on_hosts "$install"
}

start() {
  local start
  # shellcheck disable=SC2016 # the host fills in $(...)
  start='cd navil_jax || exit; if [ -f train.pid ] && kill -0 $(cat train.pid) 2>/dev/null; then'
  start+=' echo "error: a command is still running, stop it first" >&2; exit 1; fi;'
  start+=" PATH=\$PWD/.venv/bin:\$PATH nohup $(show "${command[@]}") >train.log 2>&1 </dev/null & echo \$! >train.pid"
  on_hosts "$start"
}

up() {
  local now=''
  "$dry_run" || now=$(state)
  case $now in
    '') create ;;
    FAILED | SUSPENDED)
      run "${tpu[@]}" delete "$NAME" "${place[@]}" --force --quiet
      create
      ;;
  esac
  wait_until_active
  setup
  start
}

parse_arguments "$@"
case $action in
  '') fail "no action given" ;;
  create | wait | setup | run | up | logs | status | stop | delete) ;;
  *) fail "unknown action $action" ;;
esac
read_settings PROJECT ZONE BUCKET NAME TOPOLOGY SLICES CAPACITY
[[ -n ${RUNTIME_VERSION:-$image_version} ]] || fail "$settings: TOPOLOGY=$TOPOLOGY is on GKE alone, use launch/gke.sh"
place=("--project=$PROJECT" "--zone=$ZONE")
case $action in
  create) create ;;
  wait) wait_until_active ;;
  setup) setup ;;
  run)
    add_workdir
    start
    ;;
  up)
    add_workdir
    up
    ;;
  logs)
    run "${tpu[@]}" ssh "$NAME" "${place[@]}" --node=0 --worker=0 '--command=tail -n 100 -F navil_jax/train.log'
    ;;
  status)
    run "${tpu[@]}" describe "$NAME" "${place[@]}" '--format=value(state.state)'
    # shellcheck disable=SC2016 # the host fills in $(...)
    on_hosts 'cd navil_jax && { kill -0 $(cat train.pid) 2>/dev/null && echo runs || echo ended; }; tail -n 1 train.log'
    ;;
  stop)
    # shellcheck disable=SC2016 # the host fills in $(...)
    on_hosts 'cd navil_jax && pid=$(cat train.pid) && kill $pid && while kill -0 $pid 2>/dev/null; do sleep 1; done'
    ;;
  delete) run "${tpu[@]}" delete "$NAME" "${place[@]}" --force ;;
esac
