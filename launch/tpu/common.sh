# shellcheck shell=bash
# shellcheck disable=SC2034  # spot and rest are read by the scripts that source this
# What slice.sh and gke.sh share: options as --name value, and commands that --dry_run only prints.

dry_run=false
spot=false

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints a command as it could be pasted, then runs it, unless --dry_run was given.
run() {
  printf '%q ' "$@" && echo
  if [[ $dry_run == false ]]; then
    "$@"
  fi
}

# parse NAMES ARGS...: sets the variable of every --name in NAMES; what follows -- goes to `rest`.
parse() {
  local known=" $1 " option
  shift
  rest=()
  while (($#)); do
    case $1 in
      --)
        shift
        rest=("$@")
        return
        ;;
      --dry_run) dry_run=true ;;
      --spot) spot=true ;;
      --*)
        option=${1#--}
        [[ $known == *" $option "* ]] || fail "unknown option $1"
        (($# > 1)) || fail "$1 needs a value"
        printf -v "$option" '%s' "$2"
        shift
        ;;
      *) fail "unexpected $1; the command to run comes after --" ;;
    esac
    shift
  done
}

# need NAME...: these options must have been given.
need() {
  local option
  for option in "$@"; do
    [[ -n ${!option:-} ]] || fail "give --$option"
  done
}
