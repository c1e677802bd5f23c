#!/usr/bin/env bash
# Trains on TPU node pools of a GKE cluster, through xpk: one slice or several, on demand or spot.
#
#   launch/gke_xpk.sh [--dry-run] COMMAND
#
# COMMAND: create | storage | run [flag of main ...] | status | logs | stop | delete. xpk adds this
# checkout to IMAGE and starts it on every host. After stop or a preemption, run continues from the
# last checkpoint.
set -euo pipefail

# ---- settings, to change here or in the environment ----
PROJECT="${PROJECT:-my-project}"
ZONE="${ZONE:-us-east5-b}"
CLUSTER="${CLUSTER:-dancegrpo}"
NAME="${NAME:-dancegrpo-run}"                # the name of the workload
ACCELERATOR="${ACCELERATOR:-v6e-8}"          # xpk's --tpu-type: type and size of one slice
SLICES="${SLICES:-1}"
SPOT="${SPOT:-true}"                         # false: on demand
STORAGE_SIZE="${STORAGE_SIZE:-1T}"           # the size of the Filestore volume of all hosts
MOUNT="${MOUNT:-/runs}"                      # the folder of this volume in the containers
IMAGE="${IMAGE:-python:3.12}"
# Seconds from SIGTERM to SIGKILL, in which an update and a save must be possible.
GRACE="${GRACE:-300}"
CONFIG="${CONFIG:-configs/emoji_clip.py}"
WORKDIR="${WORKDIR:-$MOUNT/$NAME}"
# ----------------------------------------------------

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

place=("--cluster=$CLUSTER" "--zone=$ZONE" "--project=$PROJECT")

create() {
  local capacity=--on-demand
  if [[ "$SPOT" == true ]]; then
    capacity=--spot
  fi
  call xpk cluster create "${place[@]}" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" "$capacity"
}

storage() {
  call xpk storage create "$CLUSTER-runs" "${place[@]}" --type=gcpfilestore --tier=BASIC_HDD \
    "--size=$STORAGE_SIZE" --vol=runs --access-mode=ReadWriteMany "--mount-point=$MOUNT" \
    --readonly=false --auto-mount=true
}

# With exec, python itself gets the SIGTERM that xpk's wrapper forwards.
run() {
  local main
  main="$(quoted python -m dancegrpo_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" \
    "${flags[@]}")"
  call xpk workload create "${place[@]}" "--workload=$NAME" "--tpu-type=$ACCELERATOR" \
    "--num-slices=$SLICES" "--base-docker-image=$IMAGE" --script-dir=. \
    "--termination-grace-period-seconds=$GRACE" \
    "--command=pip install --quiet -r requirements-tpu.txt && exec $main"
}

logs() {
  call gcloud container clusters get-credentials "$CLUSTER" "--region=${ZONE%-*}" \
    "--project=$PROJECT"
  call kubectl logs --follow --prefix --tail=100 --max-log-requests=256 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$NAME"
}

read_arguments "$@"
case "$command" in
  create) create ;;
  storage) storage ;;
  run) run ;;
  status) call xpk workload list "${place[@]}" ;;
  logs) logs ;;
  stop) call xpk workload delete "${place[@]}" "--workload=$NAME" ;;
  delete) call xpk cluster delete "${place[@]}" ;;
  *) mistake "command '$command': use create, storage, run, status, logs, stop or delete" ;;
esac
