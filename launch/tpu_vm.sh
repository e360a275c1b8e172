#!/usr/bin/env bash
# A run on Cloud TPU VMs; see --help and README.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
tpu_vm.sh ACTION --name N --zone Z [flags] [-- ARGUMENTS]

Runs `python -m avjax.train ARGUMENTS` on all workers of a Cloud TPU, which is requested as a queued resource.

  create   requests the TPU and waits until it is ACTIVE; uses an existing one of that name, and requests again one that
           was SUSPENDED (preempted) or has FAILED
  setup    installs avjax on all workers, from this checkout or from --wheel
  run      starts the run on all workers, in the background, unless one is running
  logs     follows the log of one worker
  status   prints the state of the TPU, and of the run on each worker
  resume   create, setup and run: after a preemption, the same command continues from the checkpoints in its --workdir,
           which must outlive the TPU, such as gs://bucket/run
  delete   gives the TPU back

  --name N       of the queued resource
  --zone Z       such as us-west4-a
  --project P    default that of gcloud's configuration
  --type T       such as v5litepod-16 (create, resume)
  --slices K     number of TPUs of that type for one run (create, resume); default 1
  --version V    software of the VMs; default the one for T: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e or
                 tpu-ubuntu2204-base (create, resume)
  --spot         cheaper, but may be preempted at any time (create, resume)
  --poll S       seconds between two checks of the state; default 30 (create, resume)
  --wheel FILE   of avjax; default one built from this checkout (setup, resume)
  --extras LIST  of avjax to install; default tpu,gcs (setup, resume)
  --python V     version of Python on the VMs; default 3.12 (setup, resume)
  --module M     instead of avjax.train (run, resume)
  --worker W     of which worker; default 0 (logs)
  --node K       of which slice; default 0 (logs)
  --dry_run      print the commands, one a line, and run nothing; assumes the states that lead to most commands
  --help         print this
TEXT
}

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

say() { [[ $dry_run ]] || echo "tpu_vm.sh: $*" >&2; }

action='' name='' zone='' project='' type='' slices=1 version='' spot='' poll=30 wheel='' extras=tpu,gcs python=3.12
module=avjax.train worker=0 node=0 dry_run=''
while (($#)); do
  case $1 in
    create | setup | run | logs | status | resume | delete)
      [[ ! $action ]] || fail "got $action and $1; expected one action"
      action=$1
      shift
      ;;
    --name | --zone | --project | --type | --slices | --version | --poll | --wheel | --extras | --python | --module | \
      --worker | --node)
      (($# > 1)) || fail "got $1 without a value; expected $1 VALUE"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot | --dry_run)
      printf -v "${1#--}" %s yes
      shift
      ;;
    --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    *) fail "got '$1'; expected an action, flags, then -- and the arguments of $module" ;;
  esac
done
arguments=("$@")
[[ $action ]] || fail 'got no action; expected create, setup, run, logs, status, resume or delete'
[[ $name && $zone ]] || fail "got --name '$name' and --zone '$zone'; expected both"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is '$slices'; expected a whole number above 0"
case $action in
  create | resume) [[ $type ]] || fail "got no --type; expected one, such as --type v5litepod-16" ;;
esac
case $action in
  run | resume) ((${#arguments[@]})) || fail "got no arguments for $module; expected them after --" ;;
  *) ((${#arguments[@]} == 0)) || fail "got arguments for $module; expected them with run and resume alone" ;;
esac
[[ $dry_run ]] || type gcloud >/dev/null 2>&1 || fail 'got no gcloud in PATH; expected the Google Cloud CLI, logged in'

location=("--zone=$zone" ${project:+"--project=$project"})
queued=(gcloud compute tpus queued-resources)

do_it() { if [[ $dry_run ]]; then show "$@"; else "$@"; fi; }

# Runs a command line in the home folder of every worker.
everywhere() {
  do_it "${queued[@]}" ssh "$name" "${location[@]}" --node=all --worker=all --command="$1"
}

# ---- The TPU ----------------------------------------------------------------------------------------------------------

# Sets `state` to the state of the queued resource, NONE if there is none. In a dry run it is $1.
look() {
  local command=("${queued[@]}" describe "$name" "${location[@]}" "--format=value(state.state)") complaint message
  if [[ $dry_run ]]; then
    show "${command[@]}"
    state=$1
    return
  fi
  complaint=$(mktemp)
  state=$("${command[@]}" 2>"$complaint") || state=''
  message=$(<"$complaint")
  rm "$complaint"
  [[ $state || $message == *NOT_FOUND* ]] || fail "gcloud does not report the state of $name: $message"
  state=${state:-NONE}
}

create() {
  look SUSPENDED
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    say "$name is $state"
    sleep "$poll"
    look NONE
  done
  if [[ $state == SUSPENDED || $state == FAILED ]]; then
    say "$name is $state: requesting it again"
    delete
    state=NONE
  fi
  [[ $state != NONE ]] || ask
  look ACTIVE
  while [[ $state != ACTIVE ]]; do
    case $state in
      NONE | FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "$name is $state and was to become ACTIVE; the reason: ${queued[*]} describe $name ${location[*]}"
        ;;
    esac
    say "$name is $state"
    sleep "$poll"
    look ACTIVE
  done
  say "$name is ACTIVE"
}

ask() {
  local nodes=("--node-id=$name")
  ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
  do_it "${queued[@]}" create "$name" "${location[@]}" "${nodes[@]}" "--accelerator-type=$type" \
    "--runtime-version=${version:-$(version_for)}" ${spot:+--spot}
}

version_for() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

delete() { do_it "${queued[@]}" delete "$name" "${location[@]}" --force --quiet; }

# ---- The run ----------------------------------------------------------------------------------------------------------

setup() {
  local root release package=$wheel commands
  root=$(dirname "$0")/..
  if [[ ! $package ]]; then
    release=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
    do_it "${AVJAX_PYTHON:-python}" -m pip wheel --quiet --no-deps "--wheel-dir=$root/dist" "$root"
    package=$root/dist/avjax-$release-py3-none-any.whl
  fi
  do_it "${queued[@]}" scp "$package" "$name:" "${location[@]}" --node=all --worker=all
  # uv installs the Python version that the VMs lack.
  commands=(
    "python3 -m pip install --quiet --user uv"
    "python3 -m uv venv --quiet --allow-existing --python $(show "$python") avjax_venv"
    "python3 -m uv pip install --quiet --python avjax_venv $(show "./$(basename "$package")[$extras]")"
  )
  everywhere "${commands[0]} && ${commands[1]} && ${commands[2]}"
}

# shellcheck disable=SC2016  # for the shell of the worker
running='test -f avjax_run/pid && kill -0 "$(cat avjax_run/pid)" 2>/dev/null'

run() {
  local quoted
  # AVJAX_DETECT: JAX finds the other workers in the metadata of Cloud TPU.
  quoted=$(show env AVJAX_DETECT=1 ../avjax_venv/bin/python -m "$module" "${arguments[@]}")
  everywhere "if $running; then echo 'the run is going on'; else mkdir -p avjax_run && cd avjax_run && \
{ nohup $quoted >>log 2>&1 </dev/null & echo \$! >pid; }; fi"
}

logs() {
  do_it "${queued[@]}" ssh "$name" "${location[@]}" "--node=$node" "--worker=$worker" \
    --command='tail -n 100 -F avjax_run/log'
}

status() {
  look ACTIVE
  [[ $dry_run ]] || echo "$name: $state"
  [[ $state == ACTIVE ]] || return 0
  everywhere "if $running; then echo running; else echo 'not running'; fi; tail -n 1 avjax_run/log"
}

resume() {
  create
  setup
  run
}

"$action"
