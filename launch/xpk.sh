#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, by xpk; see --help and README.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
xpk.sh ACTION --name N --cluster C --zone Z [flags] [-- ARGUMENTS]

Runs `python -m avjax.train ARGUMENTS` on TPU slices of a GKE cluster that xpk has made (xpk cluster create).

  create   submits the run; it is queued until there is capacity
  status   lists it
  logs     follows the log of one worker
  delete   ends it

  --name N       of the workload
  --cluster C    of xpk
  --zone Z       of the cluster, such as us-west4-a
  --project P    default that of gcloud's configuration
  --type T       such as v5litepod-16 (create)
  --slices K     number of slices of that type for one run; default 1 (create)
  --image I      container with avjax[tpu,gcs] (create)
  --restarts R   how often an interrupted run restarts, from its checkpoints; default 20 (create)
  --spot         slices that may be preempted at any time, if the cluster provisions them itself (create)
  --module M     instead of avjax.train (create)
  --worker W     of which worker; default 0 (logs)
  --slice K      of which slice; default 0 (logs)
  --dry_run      print the command and run nothing
  --help         print this
TEXT
}

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action='' name='' cluster='' zone='' project='' type='' slices=1 image='' restarts=20 spot='' module=avjax.train
worker=0 slice=0 dry_run=''
while (($#)); do
  case $1 in
    create | status | logs | delete)
      [[ ! $action ]] || fail "got $action and $1; expected one action"
      action=$1
      shift
      ;;
    --name | --cluster | --zone | --project | --type | --slices | --image | --restarts | --module | --worker | --slice)
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
[[ $action ]] || fail 'got no action; expected create, status, logs or delete'
[[ $name && $cluster && $zone ]] || fail "got --name '$name', --cluster '$cluster' and --zone '$zone'; expected all three"
location=(--cluster "$cluster" --zone "$zone" ${project:+--project "$project"})

case $action in
  create)
    [[ $type && $image ]] || fail "got --type '$type' and --image '$image'; expected both"
    (($#)) || fail "got no arguments for $module; expected them after --"
    # xpk runs the command in a shell, whose process gets the signal of an interruption; exec makes that the run.
    quoted=$(show exec python -m "$module" "$@")
    command=(xpk workload create "${location[@]}" --workload "$name" --tpu-type "$type" --num-slices "$slices")
    command+=(--docker-image "$image" --max-restarts "$restarts" ${spot:+--spot})
    command+=(--termination-grace-period-seconds 120 --command "$quoted")
    ;;
  status) command=(xpk workload list "${location[@]}" --filter-by-job "$name") ;;
  logs)
    labels=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=$slice
    command=(kubectl logs --follow --tail=100 "--selector=$labels,batch.kubernetes.io/job-completion-index=$worker")
    ;;
  delete) command=(xpk workload delete "${location[@]}" --workload "$name") ;;
esac
[[ $action == create ]] || (($# == 0)) || fail "got arguments for $module; expected them with create alone"

if [[ $dry_run ]]; then
  show "${command[@]}"
  exit 0
fi
type "${command[0]}" >/dev/null 2>&1 || fail "got no ${command[0]} in PATH; expected xpk (pip install xpk) and kubectl"
exec "${command[@]}"
