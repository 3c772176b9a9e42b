#!/usr/bin/env bash
# sbatch slurm.sh: starts one process per GPU. train.py calls dj.initialize() first, which
# finds the other processes through SLURM's environment variables.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00

# If a process fails, the job ends, returns to the queue, and continues from the latest
# checkpoint.
#SBATCH --requeue
set -euo pipefail
srun --kill-on-bad-exit=1 python train.py "$@"
