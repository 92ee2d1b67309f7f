#!/usr/bin/env bash
#SBATCH --job-name=loram-publish
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# Make a release by its recipe on a SLURM cluster:  sbatch publish/slurm.sh RECIPE [options of `loram publish`]
#
#   sbatch --nodes=2 publish/slurm.sh publish/llama-2-70b.yaml --work-dir /shared/llama-2-70b   # with align.processes: 16
#
# The stages that need one machine run on the first node; align (and teach) run on all of them, one torchrun on each.
# --work-dir and the Hub's cache (HF_HOME) must lie where every node sees them. A job that was cut off by its time limit
# or by a failing node is queued again and goes on where it was.
set -euo pipefail

recipe=$1
shift
GPUS=${SLURM_GPUS_ON_NODE:?this runs inside of a SLURM job: sbatch publish/slurm.sh ...}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet

exec loram publish "$recipe" --launcher "srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
  torchrun --nnodes $SLURM_NNODES --nproc-per-node $GPUS \
  --rdzv-backend c10d --rdzv-endpoint $HEAD:$PORT --rdzv-id $SLURM_JOB_ID" "$@"
