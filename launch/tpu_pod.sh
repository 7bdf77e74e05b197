#!/usr/bin/env bash
# Trains on a TPU pod slice: creates it or takes the one there is, installs the code on every host, starts the command.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh [--dry-run] --name NAME --zone ZONE --accelerator-type TYPE --version VERSION -- COMMAND...

Creates the TPU slice NAME (or takes the one of that name), copies this repository to all of its hosts, installs the
requirements with jax[tpu] there, and starts COMMAND on each host, in the background, with its output in a log. Then
tells how to follow it, stop it, and delete the slice. Run it again to send changed code or go on after a stop.

  --name NAME               of the slice, as you like
  --zone ZONE               such as us-west4-a
  --accelerator-type TYPE   such as v5litepod-16 (16 chips, 4 hosts)
  --version VERSION         of the TPU's system image, such as v2-alpha-tpuv5-lite
  --dry-run                 print the commands and run none
  -- COMMAND...             runs in the repository's folder; "python" is the one with the requirements

The slice uses the project of `gcloud config`, and costs money until it is deleted. All hosts need the same folder as
config.workdir, for checkpoints are written by all of them: mount a bucket or a file share on each of them first.

Example:
  launch/tpu_pod.sh --name navil --zone us-west4-a --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite -- \
    python -m navil_jax.train --config configs/demo.py --config.workdir=/mnt/bucket/demo
TEXT
}

fail() {
  echo "error: $1; see launch/tpu_pod.sh --help" >&2
  exit 2
}

dry_run=false name='' zone='' type='' version=''
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit
      ;;
    --dry-run) dry_run=true ;;
    --) shift && break ;;
    --name | --zone | --accelerator-type | --version)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --accelerator-type) type=$2 ;;
        *) version=$2 ;;
      esac
      shift
      ;;
    *) fail "unknown argument $1" ;;
  esac
  shift
done
[[ -n $name ]] || fail "--name is missing"
[[ -n $zone ]] || fail "--zone is missing"
[[ -n $type ]] || fail "--accelerator-type is missing"
[[ -n $version ]] || fail "--version is missing"
(($#)) || fail "the command is missing (after --)"

tpu=(gcloud compute tpus tpu-vm)

# Prints a command so that a shell can read it back.
show() {
  printf '%q ' "$@"
  echo
}

run() {
  show "$@"
  "$dry_run" || "$@"
}

on_hosts() {
  run "${tpu[@]}" ssh "$name" "--zone=$zone" "--worker=all" "--command=$1"
}

if "$dry_run" || ! "${tpu[@]}" describe "$name" "--zone=$zone" >/dev/null 2>&1; then
  run "${tpu[@]}" create "$name" "--zone=$zone" "--accelerator-type=$type" "--version=$version"
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
packed=$(mktemp -d)
trap 'rm -r "$packed"' EXIT
run tar -czf "$packed/navil_jax.tar.gz" -C "$root" --exclude=./.git --exclude=./.venv --exclude=./runs \
  --exclude=__pycache__ .
run "${tpu[@]}" scp "$packed/navil_jax.tar.gz" "$name:" "--zone=$zone" "--worker=all"
on_hosts 'mkdir -p navil_jax && tar -xzf navil_jax.tar.gz -C navil_jax'
# uv brings the Python that the image may lack.
install='curl -LsSf https://astral.sh/uv/install.sh | sh && cd navil_jax'
install+=' && ~/.local/bin/uv venv --quiet --allow-existing --python=3.11 .venv'
install+=' && ~/.local/bin/uv pip install --quiet --python=.venv -r requirements.txt "jax[tpu]"'
on_hosts "$install"

# shellcheck disable=SC2016 # the host fills in $(...)
start='cd navil_jax || exit; if [ -f train.pid ] && kill -0 $(cat train.pid) 2>/dev/null; then'
start+=' echo "error: a command is still running, stop it first" >&2; exit 1; fi;'
start+=" PATH=\$PWD/.venv/bin:\$PATH nohup $(printf '%q ' "$@")>train.log 2>&1 </dev/null & echo \$! >train.pid"
on_hosts "$start"

at=("$name" "--zone=$zone")
echo
echo "Follow:  $(show "${tpu[@]}" ssh "${at[@]}" --worker=0 --command='tail -n 100 -f navil_jax/train.log')"
# shellcheck disable=SC2016 # the host fills in $(...)
echo "Stop:    $(show "${tpu[@]}" ssh "${at[@]}" --worker=all --command='kill $(cat navil_jax/train.pid)')"
echo "Delete:  $(show "${tpu[@]}" delete "${at[@]}")"
