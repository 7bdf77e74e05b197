# shellcheck shell=bash disable=SC2034 # some variables are used by one launcher only
# What the launchers share: arguments, settings, dry runs, names of slices. It is sourced by them.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
settings=$root/launch/settings.sh
dry_run=false
action=''
command=()

fail() {
  echo "error: $1; see ${0##*/} --help" >&2
  exit 2
}

# Splits [--dry-run] [--settings FILE] ACTION [-- COMMAND...] into variables.
parse_arguments() {
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit
        ;;
      --dry-run) dry_run=true ;;
      --settings)
        (($# > 1)) || fail "--settings needs a file"
        settings=$2
        shift
        ;;
      --)
        shift
        command=("$@")
        return
        ;;
      -*) fail "unknown argument $1" ;;
      *)
        [[ -z $action ]] || fail "two actions given, $action and $1 (a command to run comes after --)"
        action=$1
        ;;
    esac
    shift
  done
}

# Reads the settings file. Arguments: variables that must be set there; all that are not are named at once.
read_settings() {
  local name missing=()
  [[ -f $settings ]] || fail "$settings: no such file, copy launch/settings.example.sh there and fill it in"
  # shellcheck source=launch/settings.example.sh
  source "$settings"
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || fail "$settings: not set: ${missing[*]}"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "$settings: SLICES=$SLICES is not a number from 1"
  [[ -z ${BUCKET:-} || $BUCKET == gs://* ]] || fail "$settings: BUCKET=$BUCKET does not start with gs://"
  case $CAPACITY in
    spot | on-demand | reserved) ;;
    *) fail "$settings: CAPACITY=$CAPACITY is none of spot, on-demand, reserved" ;;
  esac
  read_topology
}

# TOPOLOGY -> accelerator (Google Cloud's name), shape in chips, hosts per slice, label on GKE, system image of TPU VMs.
read_topology() {
  local generation=${TOPOLOGY%-*} size=${TOPOLOGY##*-} cores=1 chips
  local flat=([4]=2x2 [8]=2x4 [16]=4x4 [32]=4x8 [64]=8x8 [128]=8x16 [256]=16x16)
  local cubes=([4]=2x2x1 [8]=2x2x2 [16]=2x2x4 [32]=2x4x4 [64]=4x4x4 [128]=4x4x8 [256]=4x8x8 [512]=8x8x8
    [1024]=8x8x16 [2048]=8x16x16 [4096]=16x16x16)
  [[ $size =~ ^[1-9][0-9]*$ ]] || fail "$settings: TOPOLOGY=$TOPOLOGY is no name of a slice, such as v5p-128"
  [[ $generation == v5e ]] && generation=v5litepod
  accelerator=$generation-$size
  case $generation in
    v4) cores=2 label=tpu-v4-podslice image_version=tpu-ubuntu2204-base ;;
    v5litepod) label=tpu-v5-lite-podslice image_version=v2-alpha-tpuv5-lite ;;
    v5p) cores=2 label=tpu-v5p-slice image_version=v2-alpha-tpuv5 ;;
    v6e) label=tpu-v6e-slice image_version=v2-alpha-tpuv6e ;;
    tpu7x) cores=2 label=tpu7x image_version='' ;;
    *) fail "$settings: TOPOLOGY=$TOPOLOGY: there are v4-N, v5e-N, v5p-N, v6e-N and tpu7x-N" ;;
  esac
  chips=$((size / cores))
  ((cores == 1)) && shape=${flat[chips]:-} || shape=${cubes[chips]:-}
  [[ -n $shape ]] || fail "$settings: TOPOLOGY=$TOPOLOGY: no slice of $chips chips is known here"
  hosts=$((chips / 4))
}

# The run's folder, unless the command names one.
add_workdir() {
  ((${#command[@]})) || fail "the command is missing (after --)"
  [[ "${command[*]}" == *--config.workdir* ]] || command+=("--config.workdir=$BUCKET/$NAME")
}

# Prints a command so that a shell can read it back.
show() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./~-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

run() {
  show "$@"
  "$dry_run" || "$@"
}
