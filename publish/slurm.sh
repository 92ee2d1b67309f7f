#!/usr/bin/env bash
#SBATCH --job-name=loram-publish
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Make a release by its recipe on a SLURM cluster:  sbatch publish/slurm.sh RECIPE [options of `loram publish`]
#
#   sbatch --nodes=2 publish/slurm.sh publish/llama-2-70b.yaml --work-dir /shared/llama-2-70b   # with align.processes: 16
#
# The stages that need one machine run on the first node; align (and teach) run on all of them, one torchrun on each.
# --work-dir and the Hub's cache (HF_HOME) must lie where every node sees them. A job that loses a node or is preempted is
# queued again by SLURM (--requeue); one that reaches its time limit is not, so five minutes before that SLURM sends a
# signal here (--signal), on which it is ended and queued again. Either way it goes on where it was.
set -euo pipefail

recipe=$1
shift
GPUS=${SLURM_GPUS_ON_NODE:?this runs inside of a SLURM job: sbatch publish/slurm.sh ...}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
# Since SLURM 22.05 srun does not take --cpus-per-task over from sbatch: every step would have one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

queue_again() {
  echo "The time limit is near: job $SLURM_JOB_ID is queued again and goes on where it was." >&2
  kill -TERM "$publish" 2>/dev/null || true
  wait "$publish" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

loram publish "$recipe" --launcher "srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
  torchrun --nnodes $SLURM_NNODES --nproc-per-node $GPUS \
  --rdzv-backend c10d --rdzv-endpoint $HEAD:$PORT --rdzv-id $SLURM_JOB_ID" "$@" &
publish=$! # in the background, since bash takes a signal only between commands and in wait
trap queue_again USR1
wait "$publish"
