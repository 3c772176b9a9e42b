#!/usr/bin/env bash
# mpirun.sh FIRST_HOST PROCESSES [options of mpirun, such as --hostfile hosts] -- [...]:
# Open MPI only starts the processes; JAX communicates by itself. Arguments after -- go to
# train.py, which calls dj.initialize() first.
set -euo pipefail
host=$1 processes=$2
shift 2
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  options+=("$1")
  shift
done
mpirun -n "$processes" "${options[@]}" \
  -x JAX_COORDINATOR_ADDRESS="$host:${PORT:-12355}" \
  python train.py "${@:2}"
