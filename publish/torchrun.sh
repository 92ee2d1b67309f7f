#!/usr/bin/env bash
# Align a release on several machines by hand: run this on each of them, with the same arguments.
#
#   NODES=2 NODE=0 HEAD=host-a publish/torchrun.sh PRUNED ALIGNED --settings align.yaml    # on host-a
#   NODES=2 NODE=1 HEAD=host-a publish/torchrun.sh PRUNED ALIGNED --settings align.yaml    # on the other
#
# PRUNED, ALIGNED and the run's folder must lie where every machine sees them. On one machine `loram publish` starts
# torchrun itself, and so does this script without NODES. GPUS=4 takes four of a machine's GPUs. Run it again after an
# interruption: it goes on from the last checkpoint, also on another number of machines.
set -euo pipefail

if [ "${NODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NODES" --node-rank "${NODE:?the number of this machine, from 0}"
    --master-addr "${HEAD:?the name of machine 0}" --master-port "${PORT:-29500}")
else
  where=(--standalone)
fi
exec torchrun "${where[@]}" --nproc-per-node "${GPUS:-gpu}" -m loram_hub align "$@"
