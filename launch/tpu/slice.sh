#!/usr/bin/env bash
# A slice of TPU VMs as a queued resource of Google Cloud: create it, bring the code, run the same
# command on all its workers, follow the log, delete it. Needs gcloud; --dry_run prints every
# command instead of running it.
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/tpu/slice.sh COMMAND --name NAME --zone ZONE [--project P] [--dry_run] [...]

commands, in the order of use:
  create   --type v5litepod-16 [--spot]    asks for the slice; it comes when there is room
  wait                                     returns when the slice is ready
  copy                                     this checkout (tracked files) to every worker, installed
  clone    --repository URL [--branch B]   or a clone of it, installed
  run      -- COMMAND                      starts COMMAND on every worker, detached, in the checkout
  log      [--worker 0]                    follows the output of the command
  stop                                     SIGTERM: the run saves, and ends
  delete                                   the slice and its request

example:
  launch/tpu/slice.sh create --name lens --zone us-west4-a --type v5litepod-16 --spot
  launch/tpu/slice.sh wait --name lens --zone us-west4-a
  launch/tpu/slice.sh copy --name lens --zone us-west4-a
  launch/tpu/slice.sh run --name lens --zone us-west4-a -- \
      .venv/bin/python launch/train.py --config configs/lens_3b_refcoco.yaml --run_dir gs://B/lens
  launch/tpu/slice.sh log --name lens --zone us-west4-a
  launch/tpu/slice.sh delete --name lens --zone us-west4-a
HELP
}

command=${1:-}
case $command in
  "" | -h | --help) usage && exit 0 ;;
esac
shift
name='' zone='' project='' type='' repository='' branch=main worker=0 rest=()
parse "name zone project type repository branch worker" "$@"
need name zone
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
tpu=(gcloud compute tpus)

# on WORKER COMMAND: COMMAND, in bash, on one worker or on all.
on() {
  run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" --worker "$1" --command "$2"
}

# The image that a type of slice boots.
runtime() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type $1: known are v5litepod-N, v5p-N (N counts cores, two a chip) and v6e-N" ;;
  esac
}

# Run on a worker beside the code. Images hold older Pythons: uv brings one.
install=$(
  cat <<'STEPS'
cd lens-jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu]"
STEPS
)

case $command in
  create)
    need type
    image=$(runtime "$type")
    options=(--node-id "$name" --accelerator-type "$type" --runtime-version "$image")
    [[ $spot == false ]] || options+=(--spot)
    run "${tpu[@]}" queued-resources create "$name" "${where[@]}" "${options[@]}"
    ;;
  wait)
    describe=("${tpu[@]}" queued-resources describe "$name" "${where[@]}" --format 'value(state.state)')
    if [[ $dry_run == true ]]; then
      run "${describe[@]}"
      exit 0
    fi
    while state=$("${describe[@]}"); [[ $state != ACTIVE ]]; do
      echo "$(date +%H:%M) $state"
      case $state in
        FAILED | SUSPENDED | SUSPENDING) fail "$name is $state: delete it and create it again" ;;
      esac
      sleep 60
    done
    echo "$name is ready"
    ;;
  copy)
    archive=$(mktemp -d)/lens-jax.tar.gz
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    run git -C "$root" archive --format tar.gz --prefix lens-jax/ --output "$archive" HEAD
    run "${tpu[@]}" tpu-vm scp "$archive" "$name:lens-jax.tar.gz" "${where[@]}" --worker all
    on all "tar xzf lens-jax.tar.gz; $install"
    ;;
  clone)
    need repository
    printf -v from '%q %q' "$branch" "$repository"
    on all "rm -rf lens-jax; git clone --quiet --depth 1 --branch $from lens-jax; $install"
    ;;
  run)
    ((${#rest[@]})) || fail "give the command after --"
    printf -v line '%q ' "${rest[@]}"
    # Every worker writes its own log; the shell returns at once, the command stays.
    on all "cd lens-jax; nohup setsid $line>run.log 2>&1 </dev/null & echo \$! >run.pid"
    ;;
  log)
    on "$worker" "tail -n 100 -F lens-jax/run.log"
    ;;
  stop)
    on all "kill -TERM \$(cat lens-jax/run.pid)"
    ;;
  delete)
    run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
    ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
