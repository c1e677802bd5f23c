#!/usr/bin/env bash
# Trains on TPU VMs that a queued resource brings: one slice or several, on demand or spot.
#
#   launch/tpu_vm.sh [--dry-run] create | status | setup | run [flag of main ...] | logs | stop | delete
#
# A preempted spot resource is deleted and created anew; after setup, run goes on from the last checkpoint of WORKDIR.
set -euo pipefail

# ---- what to change, here or in the environment ----
PROJECT="${PROJECT:-my-project}"
ZONE="${ZONE:-us-east5-b}"
NAME="${NAME:-dancegrpo}"                    # of the queued resource
ACCELERATOR="${ACCELERATOR:-v6e-8}"          # type and size of one slice
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"        # goes with the type: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5e
SLICES="${SLICES:-1}"
SPOT="${SPOT:-true}"                         # false: on demand
NFS="${NFS:-}"                               # host:/share, mounted as runs/ on each host; needed where a run has several hosts
CONFIG="${CONFIG:-configs/emoji_clip.py}"
WORKDIR="${WORKDIR:-runs/$NAME}"             # inside the checkout on the hosts; all hosts must see the same folder
# ----------------------------------------------------

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

place=("--zone=$ZONE" "--project=$PROJECT")
archive=out/dancegrpo_jax.tar.gz

queued() {
  call gcloud compute tpus queued-resources "$@" "${place[@]}"
}

everywhere() {
  queued ssh "$NAME" --node=all --worker=all --command="$1"
}

create() {
  local words=(create "$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME")
  if ((SLICES > 1)); then
    words+=("--node-count=$SLICES" "--node-prefix=$NAME")
  else
    words+=("--node-id=$NAME")
  fi
  if [[ "$SPOT" == true ]]; then
    words+=(--spot)
  fi
  queued "${words[@]}"
}

# The last commit goes to every host. uv brings Python: that of the runtime images is older than what JAX needs.
setup() {
  call mkdir -p out
  call git archive --format=tar.gz "--output=$archive" HEAD
  queued scp "$archive" "$NAME:dancegrpo_jax.tar.gz" --node=all --worker=all
  local mount=""
  if [[ -n "$NFS" ]]; then
    mount=" && sudo apt-get install -y -q nfs-common && mkdir -p runs && (mountpoint -q runs || sudo mount -t nfs $(quoted "$NFS") runs)"
  fi
  everywhere "mkdir -p dancegrpo_jax && tar -xzf dancegrpo_jax.tar.gz -C dancegrpo_jax && cd dancegrpo_jax\
 && python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv\
 && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt$mount"
}

# In the background on every host, so that a lost connection costs nothing.
run() {
  local main
  main="$(quoted .venv/bin/python -m dancegrpo_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" "${flags[@]}")"
  everywhere "set -e; cd dancegrpo_jax; if [ -f run.pid ] && kill -0 \$(cat run.pid) 2> /dev/null; then\
 echo 'error: a run is going on; stop it first' >&2; exit 2; fi;\
 nohup $main > run.log 2>&1 < /dev/null & echo \$! > run.pid"
}

# SIGTERM: the run saves after its current iteration and ends.
stop() {
  everywhere "kill -TERM \$(cat dancegrpo_jax/run.pid)"
}

read_arguments "$@"
if ((SLICES > 1)) && [[ -z "$NFS" && "$command" =~ ^(setup|run)$ ]]; then
  mistake "SLICES = $SLICES: several hosts must see the same WORKDIR; set NFS=host:/share, which setup mounts as runs/"
fi
case "$command" in
  create) create ;;
  status) queued describe "$NAME" "--format=value(state.state)" ;;
  setup) setup ;;
  run) run ;;
  logs) queued ssh "$NAME" --node=0 --worker=0 --command="tail -n 100 -F dancegrpo_jax/run.log" ;;
  stop) stop ;;
  delete) queued delete "$NAME" --force ;;
  *) mistake "command '$command': use create, status, setup, run, logs, stop or delete" ;;
esac
