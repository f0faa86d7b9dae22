#!/usr/bin/env bash
# Slices of TPUs on Google Kubernetes Engine, through xpk (pip install xpk): creates a cluster of
# slices, mounts a share in all its jobs, runs a command on all workers of a job, follows its log,
# and deletes the cluster. --dry_run prints every command instead of running it.
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/tpu/gke.sh COMMAND --cluster C --zone ZONE --project P [--dry_run] [...]

commands, in the order of use:
  create   --type v5litepod-16 [--slices 1] [--spot]   creates a cluster of so many slices
  mount    --share INSTANCE:/EXPORT [--at /mnt/lens]   mounts a Filestore instance in every later
                                                       job, for weights, data and runs
  run      --job J --type T [--slices 1] -- COMMAND    builds the image of this checkout, and starts
                                                       COMMAND in it on every worker
  log      --job J [--worker 0]                        follows the output of one worker
  stop     --job J                                     sends SIGTERM: the run saves and ends, in an
                                                       hour at most
  delete                                               deletes the cluster, with what still runs

example:
  C="--cluster lens --zone us-west4-a --project P"
  launch/tpu/gke.sh create $C --type v5litepod-16
  launch/tpu/gke.sh mount $C --share lens:/lens
  launch/tpu/gke.sh run $C --type v5litepod-16 --job one -- \
      python launch/train.py --config configs/lens_3b_refcoco.yaml \
      --model.checkpoint /mnt/lens/runs/lens_3b_stage1/final --data.data_dir /mnt/lens/data \
      --run_dir /mnt/lens/runs/lens_3b_refcoco
HELP
}

command=${1:-}
case $command in
  "" | -h | --help) usage && exit 0 ;;
esac
shift
cluster='' zone='' project='' type='' slices=1 job='' worker=0 share='' at=/mnt/lens rest=()
parse "cluster zone project type slices job worker share at" "$@"
need cluster zone project
where=(--cluster "$cluster" --zone "$zone" --project "$project")

case $command in
  create)
    need type
    price=--on-demand
    [[ $spot == false ]] || price=--spot
    run xpk cluster create "${where[@]}" --tpu-type "$type" --num-slices "$slices" "$price"
    ;;
  mount)
    need share
    [[ $share == ?*:/[!/]* ]] || fail "--share $share: INSTANCE:/EXPORT is needed, as lens:/lens"
    [[ $at == /* ]] || fail "--at $at: begins with /"
    run xpk storage attach "${share%%:*}" "${where[@]}" --type gcpfilestore --vol "${share#*:/}" \
      --mount-point "$at" --readonly false --auto-mount true
    ;;
  run)
    need job type
    ((${#rest[@]})) || fail "give the command after --"
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    printf -v line '%q ' "${rest[@]}"
    # xpk lays the directory over the base image, and the package is installed when a worker starts.
    # Kubernetes kills a worker when the grace period after SIGTERM ends; its default is 30 s.
    run xpk workload create "${where[@]}" --workload "$job" --tpu-type "$type" \
      --num-slices "$slices" --base-docker-image python:3.12 --script-dir "$root" \
      --termination-grace-period-seconds 3600 \
      --command "pip install --quiet --constraint constraints.txt --editable '.[tpu]' && exec $line"
    ;;
  log)
    need job
    selector="jobset.sigs.k8s.io/jobset-name=$job,batch.kubernetes.io/job-completion-index=$worker"
    run kubectl logs --follow --tail 100 --selector "$selector"
    ;;
  stop)
    need job
    run xpk workload delete "${where[@]}" --workload "$job"
    ;;
  delete)
    run xpk cluster delete "${where[@]}"
    ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
