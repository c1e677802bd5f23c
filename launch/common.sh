# shellcheck shell=bash
# Functions of the launch scripts, which source this file.

dry_run=false

# Runs a command, or prints it so that it can be pasted into a shell.
call() {
  if "$dry_run"; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# A mistake of the user: one line, exit code 2.
mistake() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Prints its arguments as one line for another shell, in which spaces and quotes are escaped.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Reads [--dry-run] COMMAND [flag of main ...] into dry_run, command and flags.
read_arguments() {
  if [[ "${1:-}" == --dry-run ]]; then
    dry_run=true
    shift
  fi
  command="${1:-}"
  flags=("${@:2}")
  [[ "${flags[*]}" != *--dry-run* ]] ||
    mistake "--dry-run comes before the command: $0 --dry-run $command"
  [[ "$command" == run || ${#flags[@]} -eq 0 ]] ||
    mistake "only run takes flags of main, $command takes none: ${flags[*]}"
}
