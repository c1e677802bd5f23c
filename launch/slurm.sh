#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster. Run it on a login node, in a checkout that all nodes see.
#
#   launch/slurm.sh [--dry-run] setup | run [flag of main ...] | status | logs | stop | delete
#
# After stop, the time limit or a preemption, run continues from the last checkpoint of WORKDIR.
set -euo pipefail

# ---- settings, to change here or in the environment ----
NAME="${NAME:-dancegrpo}"                    # the name of the job; its log is NAME.log
NODES="${NODES:-1}"
GPUS="${GPUS:-8}"                            # GPUs of a node, with one process each
CPUS="${CPUS:-8}"                            # CPUs of a process
TIME="${TIME:-24:00:00}"
# Seconds from SIGTERM to the time limit, in which an update and a save must be possible.
GRACE="${GRACE:-300}"
PARTITION="${PARTITION:-}"                   # "": the cluster's default
ACCOUNT="${ACCOUNT:-}"                       # "": yours
CONFIG="${CONFIG:-configs/emoji_clip.py}"
WORKDIR="${WORKDIR:-runs/$NAME}"             # all nodes must see the same folder
# ----------------------------------------------------

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

setup() {
  call python3 -m venv .venv
  call .venv/bin/pip install --quiet -r requirements-gpu.txt
}

# Every process sees all GPUs of its node and uses the one with its local number, as JAX expects
# under Slurm. Only the processes get SIGTERM (no B: in --signal), so that the job's shell waits for
# them.
run() {
  local main words=(sbatch "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS")
  words+=("--gpus-per-node=$GPUS" "--cpus-per-task=$CPUS" "--time=$TIME" "--signal=TERM@$GRACE")
  words+=("--output=$NAME.log" --open-mode=append)
  if [[ -n "$PARTITION" ]]; then
    words+=("--partition=$PARTITION")
  fi
  if [[ -n "$ACCOUNT" ]]; then
    words+=("--account=$ACCOUNT")
  fi
  main="$(quoted .venv/bin/python -m dancegrpo_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" \
    "${flags[@]}")"
  call "${words[@]}" "--wrap=srun --kill-on-bad-exit=1 --cpus-per-task=$CPUS $main"
}

read_arguments "$@"
case "$command" in
  setup) setup ;;
  run) run ;;
  status) call squeue --me "--name=$NAME" ;;
  logs) call tail -n 100 -F "$NAME.log" ;;
  stop) call scancel "--name=$NAME" --signal=TERM ;; # the run saves its last complete iteration
  delete) call scancel "--name=$NAME" ;;
  *) mistake "command '$command': use setup, run, status, logs, stop or delete" ;;
esac
