#!/usr/bin/env bash
# A slice of TPU VMs as a queued resource of Google Cloud: creates it, copies the code, mounts a
# share, runs the same command on all its workers, follows the log, stops, deletes. It needs gcloud;
# --dry_run prints every command instead of running it.
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/tpu/slice.sh COMMAND --name NAME --zone ZONE [--project P] [--dry_run] [...]

commands, in the order of use:
  create   --type v5litepod-16 [--spot]    asks for the slice; it comes when there is room
  wait                                     returns when the slice is ready
  copy                                     copies this checkout to every worker and installs it:
                                           tracked files with your edits (git add new files)
  clone    --repository URL [--branch B]   or replaces what is there by a clone, and installs it
  mount    --share SERVER:/EXPORT          mounts an NFS share (Filestore) on every worker, for
           [--at /mnt/lens]                weights, data and runs
  run      -- COMMAND                      starts COMMAND on every worker, detached, in the
                                           checkout; its output is appended to run.log
  log      [--worker 0]                    follows run.log of one worker, or of all (--worker all),
                                           each line with its worker's name before it
  stop                                     sends SIGTERM; returns when the run has saved and ended
  delete                                   deletes the slice and its request, with what still runs

example:
  A="--name lens --zone us-west4-a"
  launch/tpu/slice.sh create $A --type v5litepod-16 --spot
  launch/tpu/slice.sh wait $A
  launch/tpu/slice.sh copy $A
  launch/tpu/slice.sh mount $A --share 10.1.2.2:/lens
  launch/tpu/slice.sh run $A -- .venv/bin/python launch/train.py --config configs/lens_3b_refcoco.yaml \
      --model.checkpoint /mnt/lens/runs/lens_3b_stage1/final --data.data_dir /mnt/lens/data \
      --run_dir /mnt/lens/runs/lens_3b_refcoco
  launch/tpu/slice.sh log $A
  launch/tpu/slice.sh stop $A
and when that has returned:
  launch/tpu/slice.sh delete $A
HELP
}

command=${1:-}
case $command in
  "" | -h | --help) usage && exit 0 ;;
esac
shift
name='' zone='' project='' type='' repository='' branch=main worker=0
share='' at=/mnt/lens rest=()
parse "name zone project type repository branch worker share at" "$@"
need name zone
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
tpu=(gcloud compute tpus)

# on WORKER COMMAND: runs COMMAND in bash on one worker, or on all.
on() {
  run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" --worker "$1" --command "$2"
}

# runtime TYPE: prints the name of the image that a slice of this type boots.
runtime() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type $1: known are v5litepod-N, v5p-N (N counts cores, two a chip) and v6e-N" ;;
  esac
}

# Runs on a worker after the archive of the checkout has arrived. It first removes the files of the
# copy before, so that no deleted file stays, and keeps everything else (.venv, run.log, runs/).
unpack=$(
  cat <<'STEPS'
set -e
mkdir -p lens-jax
touch lens-jax/.copied
xargs -d "\n" rm -f <lens-jax/.copied
tar xzf lens-jax.tar.gz
tar tzf lens-jax.tar.gz | grep -v "/$" >lens-jax/.copied
STEPS
)

# Runs on a worker after `at` and `share` have been set: mounts the share unless it is mounted.
attach=$(
  cat <<'STEPS'
set -e
if ! command -v mount.nfs >/dev/null; then
  sudo apt-get update -qq
  sudo apt-get install -qq -y nfs-common
fi
sudo mkdir -p "$at"
mounted=$(findmnt --noheadings --output SOURCE --mountpoint "$at" || true)
if [ -z "$mounted" ]; then
  sudo mount -t nfs "$share" "$at"
elif [ "$mounted" != "$share" ]; then
  echo "$(hostname): $at is $mounted already" >&2
  exit 1
fi
sudo chmod 1777 "$at"
test -w "$at"
echo "$(hostname): $share is at $at, for $(id -un), user $(id -u)"
STEPS
)

# Runs on a worker: stops the command that `run` started, and returns when it has ended.
finish=$(
  cat <<'STEPS'
cd lens-jax || exit 1
pid=$(cat run.pid) || exit 1
if kill -TERM "$pid" 2>/dev/null; then
  while sleep 1; grep -q "^State:.[^Z]" "/proc/$pid/status" 2>/dev/null; do
    [ $((waited++ % 30)) -gt 0 ] || echo "$(hostname): still running: $(tail -n 1 run.log)"
  done
fi
echo "$(hostname): has ended: $(tail -n 1 run.log)"
STEPS
)

# Runs on a worker beside the code. The images hold older Pythons, so uv installs one.
install=$(
  cat <<'STEPS'
cd lens-jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt \
  --editable ".[tpu]"
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
    while true; do
      state=$("${describe[@]}") || fail "the state of $name cannot be read, as said above"
      [[ $state != ACTIVE ]] || break
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
    # A commit of the tracked files as they are now, on no branch; empty where nothing was edited.
    edited=''
    [[ $dry_run == true ]] || edited=$(git -C "$root" stash create)
    run git -C "$root" archive --format tar.gz --prefix lens-jax/ --output "$archive" \
      "${edited:-HEAD}"
    run "${tpu[@]}" tpu-vm scp "$archive" "$name:lens-jax.tar.gz" "${where[@]}" --worker all
    on all "$unpack"$'\n'"$install"
    ;;
  clone)
    need repository
    printf -v from '%q %q' "$branch" "$repository"
    on all "rm -rf lens-jax; git clone --quiet --depth 1 --branch $from lens-jax; $install"
    ;;
  mount)
    need share
    [[ $share == ?*:/* && $share != *://* ]] ||
      fail "--share $share: SERVER:/EXPORT is needed, as 10.1.2.2:/lens"
    [[ $at == /* ]] || fail "--at $at: begins with /"
    printf -v given 'share=%q at=%q' "$share" "$at"
    on all "$given"$'\n'"$attach"
    ;;
  run)
    ((${#rest[@]})) || fail "give the command after --"
    printf -v line '%q ' "${rest[@]}"
    # Every worker writes its own log. The shell returns at once, and the command runs on. The log
    # keeps the output of earlier commands, because it may say why one of them died.
    printf -v title '%q' "${line% }"
    busy="kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null"
    refuse="{ echo \$(hostname): another command is running, stop it first >&2; exit 1; }"
    start="nohup setsid $line>>run.log 2>&1 </dev/null & echo \$! >run.pid"
    head="echo == \$(date +%F\ %T) $title >>run.log"
    on all "cd lens-jax || exit; $busy && $refuse; $head; $start"
    ;;
  log)
    follow="tail -n 100 -F lens-jax/run.log"
    [[ $worker =~ ^[0-9]+$ ]] || follow+=" | sed -u \"s/^/\$(hostname): /\""
    on "$worker" "$follow"
    ;;
  stop)
    on all "$finish"
    [[ $dry_run == true ]] || echo "the command has ended on all workers"
    ;;
  delete)
    run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
    ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
