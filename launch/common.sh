# shellcheck shell=bash
# What the launchers share; they source it from beside themselves.

fail() {
  echo "error: $*; see $0 --help" >&2
  exit 2
}

# One line that a shell reads as these words.
show() {
  local word words=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}
