#!/usr/bin/env bash
# One host, or several, with torchrun. On several, run the same on each, with RANK_OF_NODE from 0 to NODES - 1.
#
#   MODEL=meta-llama/Llama-3.1-8B DATA=corpus/ ./torchrun.sh
#   MODEL=... DATA=... NODES=2 RANK_OF_NODE=0 FIRST=10.0.0.1 ./torchrun.sh     # and RANK_OF_NODE=1 on the other
set -euo pipefail

torchrun \
    --nnodes="${NODES:-1}" --node-rank="${RANK_OF_NODE:-0}" \
    --nproc-per-node="${PROCESSES:-8}" \
    --master-addr="${FIRST:-localhost}" --master-port="${PORT:-29500}" \
    -m tbjax train "$MODEL" --data "$DATA" \
    --mesh "${MESH:-auto}" --batch-size "${BATCH:-256}" --steps "${STEPS:-1000}" \
    --checkpoint-dir "${RUN:-run}" --save-every 100 "$@"
