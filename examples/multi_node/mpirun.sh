#!/usr/bin/env bash
# The hosts of a file, eight processes on each, with Open MPI:  MODEL=... DATA=... HOSTS=hosts ./mpirun.sh
set -euo pipefail

# Open MPI 5 does not tell its processes where the first of them runs.
first=$(awk '!/^#/ && NF { print $1; exit }' "$HOSTS")
hosts=$(awk '!/^#/ && NF' "$HOSTS" | wc -l)

mpirun \
    -np $((hosts * ${PROCESSES:-8})) --hostfile "$HOSTS" --map-by "ppr:${PROCESSES:-8}:node" ${MPI_OPTIONS:-} \
    -x JAX_COORDINATOR_ADDRESS="$first:${PORT:-8476}" \
    python -m tbjax train "$MODEL" --data "$DATA" \
    --mesh "${MESH:-auto}" --batch-size "${BATCH:-256}" --steps "${STEPS:-1000}" \
    --checkpoint-dir "${RUN:-run}" --save-every 100 "$@"
