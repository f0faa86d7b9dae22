# shellcheck shell=bash
# shellcheck disable=SC2034  # spot and rest are read by the scripts that source this
# Functions that slice.sh and gke.sh share: they read options (--name value) and run commands, which
# --dry_run only prints.

dry_run=false
spot=false

fail() {
  echo "error: $*" >&2
  exit 2
}

# run COMMAND: prints a command in a form that can be pasted; runs it unless --dry_run was given.
run() {
  printf '%q ' "$@" && echo
  if [[ $dry_run == false ]]; then
    "$@"
  fi
}

# parse NAMES ARGS...: sets the variable of every --name in NAMES; arguments after -- go to `rest`.
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

# need NAME...: fails unless these options were given.
need() {
  local option
  for option in "$@"; do
    [[ -n ${!option:-} ]] || fail "give --$option"
  done
}
