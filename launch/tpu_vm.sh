#!/usr/bin/env bash
# Trains on TPU VMs of a queued resource: one slice or several, on demand or spot.
#
#   launch/tpu_vm.sh [--dry-run] COMMAND
#
# COMMAND: create | status | setup | run [flag of main ...] | logs | stop | fetch | delete.
# WORKDIR is on the disk of the VM and is deleted with it, unless BUCKET or NFS is set. fetch copies
# it to runs/ here. After a preemption of a spot resource, delete it and create it again; after
# setup, run then continues from the last checkpoint of WORKDIR, which is in the bucket or on NFS.
set -euo pipefail

# ---- settings, to change here or in the environment ----
PROJECT="${PROJECT:-my-project}"
ZONE="${ZONE:-us-east5-b}"
NAME="${NAME:-dancegrpo}"                    # the name of the queued resource
ACCELERATOR="${ACCELERATOR:-v6e-8}"          # type and size of one slice
# The runtime of this type. v5p needs v2-alpha-tpuv5, and v5e needs v2-alpha-tpuv5-lite.
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"
SLICES="${SLICES:-1}"
SPOT="${SPOT:-false}"                        # true: cheaper, but may end at any time; needs a share
# gs://BUCKET/FOLDER, in which WORKDIR is then. Several hosts need it or NFS, and so does SPOT.
BUCKET="${BUCKET:-}"
# host:/share, which each host mounts as runs/.
NFS="${NFS:-}"
CONFIG="${CONFIG:-configs/emoji_clip.py}"
# A folder in the checkout on the hosts, or in the bucket. All hosts must see the same folder.
WORKDIR="${WORKDIR:-${BUCKET:-runs}/$NAME}"
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

# Copies the last commit to every host. uv installs Python, because that of the runtime images is
# too old for JAX.
setup() {
  call mkdir -p out
  call git archive --format=tar.gz "--output=$archive" HEAD
  queued scp "$archive" "$NAME:dancegrpo_jax.tar.gz" --node=all --worker=all
  local mount=""
  if [[ -n "$NFS" ]]; then
    mount=" && sudo apt-get install -y -q nfs-common && mkdir -p runs\
 && (mountpoint -q runs || sudo mount -t nfs $(quoted "$NFS") runs)\
 && (test -w runs || sudo chmod a+rwx runs)"
  fi
  local packages=(-r requirements-tpu.txt)
  if [[ "$WORKDIR" == gs://* ]]; then
    packages+=(-r requirements-gcs.txt)
  fi
  everywhere "mkdir -p dancegrpo_jax && tar -xzf dancegrpo_jax.tar.gz -C dancegrpo_jax\
 && cd dancegrpo_jax && python3 -m pip install --user --quiet uv\
 && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv\
 && python3 -m uv pip install --quiet --python .venv/bin/python ${packages[*]}$mount"
}

# Starts the run in the background on every host, so that a lost connection doesn't end it.
run() {
  local main
  main="$(quoted .venv/bin/python -m dancegrpo_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" \
    "${flags[@]}")"
  everywhere "set -e; cd dancegrpo_jax;\
 if [ -f run.pid ] && kill -0 \$(cat run.pid) 2> /dev/null; then\
 echo 'error: a run is going on; stop it first' >&2; exit 2; fi;\
 nohup $main > run.log 2>&1 < /dev/null & echo \$! > run.pid"
}

# Sends SIGTERM, on which the run saves its last complete iteration and ends.
stop() {
  everywhere "kill -TERM \$(cat dancegrpo_jax/run.pid)"
}

# Checks before anything is paid for that all hosts see the same files and don't lose them. A host
# has at most 8 chips.
require_share() {
  local remedy="set BUCKET=gs://BUCKET/FOLDER, or NFS=host:/share, which setup mounts as runs/"
  if [[ "$WORKDIR" == gs://* ]]; then
    return
  fi
  if [[ -z "$NFS" ]] && ((SLICES > 1 || ${ACCELERATOR##*-} > 8)); then
    mistake "SLICES = $SLICES, ACCELERATOR = $ACCELERATOR: several hosts must see the same WORKDIR;\
 $remedy"
  fi
  if [[ -z "$NFS" && "$SPOT" == true ]]; then
    mistake "SPOT = true: a preempted VM takes its disk with it, and the run;\
 $remedy, or SPOT=false"
  fi
}

# Copies the newest state of the run from the first host, because all hosts see the same files.
fetch() {
  call mkdir -p runs
  if [[ "$WORKDIR" == gs://* ]]; then
    call gcloud storage cp --recursive "$WORKDIR" runs/
    return
  fi
  queued scp --recurse "$NAME:dancegrpo_jax/$WORKDIR" runs/ --node=0 --worker=0
}

read_arguments "$@"
[[ "$ACCELERATOR" =~ ^[a-z0-9]+-[0-9]+$ ]] ||
  mistake "ACCELERATOR = $ACCELERATOR: must be type and size, for example v6e-8"
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
