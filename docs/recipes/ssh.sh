#!/usr/bin/env bash
# ssh.sh HOST...: starts one process per host with ssh, in the folder of the same name on
# each host. The first host is the coordinator. train.py calls dj.initialize() first. If
# one process fails, the script ends the others.
set -euo pipefail
hosts=("$@")
members=()
trap 'kill "${members[@]}" 2>/dev/null || true' EXIT
for i in "${!hosts[@]}"; do
  # -tt: the process ends with its connection.
  ssh -tt "${hosts[$i]}" "cd '$PWD' && \
    JAX_COORDINATOR_ADDRESS=${hosts[0]}:${PORT:-12355} \
    DECENTRAL_JAX_NUM_PROCESSES=${#hosts[@]} DECENTRAL_JAX_PROCESS_ID=$i \
    python train.py" &
  members+=($!)
done
for _ in "${members[@]}"; do
  wait -n
done
