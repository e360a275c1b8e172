# shellcheck shell=bash
# Common functions of the launchers, which source this file.

fail() {
  echo "error: $*; see $0 --help" >&2
  exit 2
}

# Prints the arguments as one line, quoted for a shell.
show() {
  local word words=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}
