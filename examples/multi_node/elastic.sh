#!/usr/bin/env bash
# From one to four hosts, which may come and go: run the same on each, at any time. The host of STORE keeps the list of
# the others and must stay; the run's folder must be one that all see.
#
#   MODEL=... DATA=... RUN=/shared/run STORE=10.0.0.1:29400 ./elastic.sh
#
# A step is over BATCH sequences whatever is there, so choose a number that 1, 2, 3 and 4 hosts can share: of each, a
# device takes DEVICE_BATCH at once, and the rest in turn. --mesh plan asks the planner anew after every change.
set -euo pipefail

# Sharing one, agents of torch 2.13 do not find each other again when their ranks have changed.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun \
    --nnodes=1:4 --nproc-per-node="${PROCESSES:-8}" --max-restarts=100 \
    --rdzv-backend=c10d --rdzv-endpoint="$STORE" --rdzv-id="${ID:-run}" \
    -m tbjax train "$MODEL" --data "$DATA" \
    --mesh "${MESH:-plan}" --batch-size "${BATCH:-384}" --device-batch "${DEVICE_BATCH:-4}" --steps "${STEPS:-1000}" \
    --checkpoint-dir "$RUN" --save-every 50 \
    --step-timeout 300 --heartbeat-timeout 60 "$@"
