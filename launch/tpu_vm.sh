#!/usr/bin/env bash
# Trains on TPU VMs that a queued resource brings: one slice or several, on demand or spot.
#
#   launch/tpu_vm.sh [--dry-run] create | status | setup | run [flag of main ...] | logs | stop | fetch | delete
#
# WORKDIR lies on the VM's own disk, and goes with it, unless NFS is set. fetch copies it to runs/ here. A preempted spot resource
# is deleted and created anew; after setup, run goes on from the last checkpoint of WORKDIR, which is on NFS.
set -euo pipefail

# ---- what to change, here or in the environment ----
PROJECT="${PROJECT:-my-project}"
ZONE="${ZONE:-us-east5-b}"
NAME="${NAME:-dancegrpo}"                    # of the queued resource
ACCELERATOR="${ACCELERATOR:-v6e-8}"          # type and size of one slice
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"        # goes with the type: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5e
SLICES="${SLICES:-1}"
SPOT="${SPOT:-false}"                        # true: cheaper, and taken away at any time; needs NFS
NFS="${NFS:-}"                               # host:/share, mounted as runs/ on each host; needed by several hosts and by SPOT
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
    mount=" && sudo apt-get install -y -q nfs-common && mkdir -p runs\
 && (mountpoint -q runs || sudo mount -t nfs $(quoted "$NFS") runs) && (test -w runs || sudo chmod a+rwx runs)"
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

# SIGTERM: the run ends with its last whole iteration saved.
stop() {
  everywhere "kill -TERM \$(cat dancegrpo_jax/run.pid)"
}

# Hosts that can't see each other's files, or lose them: found before anything is paid for. A host has at most 8 chips.
require_share() {
  local remedy="set NFS=host:/share, which setup mounts as runs/"
  if [[ -z "$NFS" ]] && ((SLICES > 1 || ${ACCELERATOR##*-} > 8)); then
    mistake "SLICES = $SLICES, ACCELERATOR = $ACCELERATOR: several hosts must see the same WORKDIR; $remedy"
  fi
  if [[ -z "$NFS" && "$SPOT" == true ]]; then
    mistake "SPOT = true: a preempted VM takes its disk with it, and the run; $remedy, or SPOT=false"
  fi
}

# The newest state of the run, from the first host: all of them see the same.
fetch() {
  call mkdir -p runs
  queued scp --recurse "$NAME:dancegrpo_jax/$WORKDIR" runs/ --node=0 --worker=0
}

read_arguments "$@"
[[ "$ACCELERATOR" =~ ^[a-z0-9]+-[0-9]+$ ]] || mistake "ACCELERATOR = $ACCELERATOR: must be type and size, as v6e-8"
[[ ! "$command" =~ ^(create|setup|run)$ ]] || require_share
case "$command" in
  create) create ;;
  status) queued describe "$NAME" "--format=value(state.state)" ;;
  setup) setup ;;
  run) run ;;
  logs) queued ssh "$NAME" --node=0 --worker=0 --command="tail -n 100 -F dancegrpo_jax/run.log" ;;
  stop) stop ;;
  fetch) fetch ;;
  delete) queued delete "$NAME" --force ;;
  *) mistake "command '$command': use create, status, setup, run, logs, stop, fetch or delete" ;;
esac
