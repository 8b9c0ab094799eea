#!/usr/bin/env bash
# Every host of a TPU slice, through gcloud; tbjax is installed on all of them. The TPU's own metadata says who is who.
#
#   TPU=my-v5p-128 ZONE=us-east5-a MODEL=... DATA=gs-mounted/corpus ./tpu_pod.sh
#
# Several slices: one queued resource with --node-count, and the same command; dp then crosses from slice to slice.
set -euo pipefail

gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
    python -m tbjax train '$MODEL' --data '$DATA' \
        --mesh '${MESH:-auto}' --batch-size '${BATCH:-256}' --steps '${STEPS:-1000}' \
        --checkpoint-dir '${RUN:-run}' --save-every 100"
