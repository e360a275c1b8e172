#!/usr/bin/env bash
# Several processes of one run on this machine; see --help and README.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
local.sh --processes N [flags] -- ARGUMENTS

Runs `python -m avjax.train ARGUMENTS` as N processes of one run on this machine. Lines of process i begin with [i].

  --processes N            number of processes
  --devices_per_process D  CPU: number of fake devices each; with --gpus: number of GPUs each (default 1)
  --gpus                   process i gets GPUs i*D … i*D+D-1, of $CUDA_VISIBLE_DEVICES where that is set; else CPU
  --port P                 of process 0, on which the others find it; default a free one
  --grace SECONDS          after one process has failed, until the others are ended, and again until they are killed
                           (default 30)
  --module M               instead of avjax.train
  --dry_run                print the commands, one a line, and run nothing
  --help                   print this

$AVJAX_PYTHON is the interpreter, default python. SIGINT and SIGTERM are forwarded to all processes, and the
script waits for them. The exit status is that of process 0, or if that is 0, of a process that has failed.
TEXT
}

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]] || fail "--$2 is '$1'; expected a whole number, such as $3"; }

processes='' devices_per_process='' gpus='' port='' grace=30 module=avjax.train dry_run=''
while (($#)); do
  case $1 in
    --processes | --devices_per_process | --port | --grace | --module)
      (($# > 1)) || fail "got $1 without a value; expected $1 VALUE"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --gpus | --dry_run)
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
    *) fail "got '$1'; expected flags, then -- and the arguments of $module" ;;
  esac
done
(($#)) || fail "got no arguments for $module; expected them after --, such as -- --config configs/etg_mafw.py"
[[ $processes ]] || fail 'got no --processes; expected --processes N'
is_number "$processes" processes 2
is_number "${devices_per_process:-1}" devices_per_process 4
is_number "$grace" grace 30
is_number "${port:-0}" port 12345
((processes > 0)) || fail '--processes is 0; expected 1 or more'
((${devices_per_process:-1} > 0)) || fail '--devices_per_process is 0; expected 1 or more'

free_port() {
  local candidate
  for _ in {1..100}; do
    candidate=$((20000 + RANDOM % 10000))
    # Nothing listens on it: it is free.
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail 'found no free port between 20000 and 29999; expected --port P with one that is free'
}
[[ $port ]] || port=$(free_port)

# Puts the command of process $1 into the array `command`.
command_of() {
  local each=${devices_per_process:-1} visible=()
  command=(env "AVJAX_COORDINATOR=127.0.0.1:$port" "AVJAX_PROCESSES=$processes" "AVJAX_PROCESS=$1")
  if [[ $gpus ]]; then
    if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
      IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    else
      mapfile -t visible < <(seq 0 $((processes * each - 1)))
    fi
    ((processes * each <= ${#visible[@]})) ||
      fail "$processes processes of $each GPUs, and CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES; expected enough of them"
    visible=("${visible[@]:$(($1 * each)):each}")
    # JAX_LOCAL_DEVICE_IDS indexes these: JAX must use all of them.
    command+=("CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${visible[*]}")" "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((each - 1)))")
  else
    command+=(JAX_PLATFORMS=cpu)
    [[ ! $devices_per_process ]] ||
      command+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$each")
  fi
  command+=("${AVJAX_PYTHON:-python}" -m "$module" "${arguments[@]}")
}

arguments=("$@")
if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    show "${command[@]}"
  done
  exit 0
fi
type "${AVJAX_PYTHON:-python}" >/dev/null 2>&1 ||
  fail "got no interpreter '${AVJAX_PYTHON:-python}'; expected one with avjax, by AVJAX_PYTHON or an active environment"

# ---- Processes --------------------------------------------------------------------------------------------------------

pids=() # of the running processes, by their number; each leads a process group of its own
statuses=()
prefixers=()
exec {messages}>&2

say() { echo "local.sh: $*" >&"$messages"; }

prefix() {
  # Keeps running to print the last messages of an interrupted process.
  trap '' INT TERM HUP
  local line
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

start() {
  local out
  command_of "$1"
  exec {out}> >(prefix "$1")
  prefixers+=("$!")
  "${command[@]}" >&"$out" 2>&1 {out}>&- </dev/null &
  pids[$1]=$!
  exec {out}>&-
}

tell() {
  local pid
  for pid in "${pids[@]}"; do kill -s "$1" -- "$pid" 2>/dev/null || true; done
}

# Kills what a process has started too, such as data workers.
kill_groups() {
  local pid
  for pid; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
}

# shellcheck disable=SC2329  # called by traps
forward() {
  stopping=yes
  say "forwarding SIG$1 to all processes"
  tell "$1"
}

# Ends the processes if this script was killed and cannot do so: its end of the pipe then closes without a message.
guard() {
  trap '' INT TERM HUP
  ! read -r || return 0
  tell TERM
  sleep "$grace"
  kill_groups "${pids[@]}"
}

collect() {
  local i
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    statuses[i]=0
    wait "${pids[i]}" || statuses[i]=$?
    kill_groups "${pids[i]}"
    unset "pids[i]"
    ((statuses[i] == 0)) || [[ $first_failed ]] || note_failure "$i"
  done
}

note_failure() {
  first_failed=$1 deadline=$((SECONDS + grace))
  say "process $1 ended with status ${statuses[$1]}${pids[*]:+; the others have $grace s to end}"
}

# shellcheck disable=SC2329  # called by a trap
finish() {
  kill_groups "${pids[@]}"
  [[ ! $lifeline ]] || echo over >&"$lifeline"
}

# Terminates the remaining processes at the deadline, and kills them at the next one.
hasten() {
  [[ $deadline ]] && ((SECONDS >= deadline)) || return 0
  say "ending process ${!pids[*]}"
  if [[ $ending ]]; then kill_groups "${pids[@]}"; else tell TERM; fi
  ending=yes deadline=$((SECONDS + grace))
}

set -m # each process leads a group, and does not ignore SIGINT as background processes of scripts otherwise do
stopping='' first_failed='' deadline='' ending='' lifeline=''
trap 'forward INT' INT
trap 'forward TERM' TERM
trap finish EXIT
for ((i = 0; i < processes && ! ${#stopping}; i++)); do start "$i"; done
exec {lifeline}> >(guard)
while ((${#pids[@]})); do
  sleep 0.2 || true
  collect
  ((${#pids[@]} == 0)) || hasten
done 2>/dev/null # hides the shell's own messages about ended jobs
wait "${prefixers[@]}" || true
status=${statuses[0]:-130}
((status)) || status=${statuses[${first_failed:-0}]}
exit "$status"
