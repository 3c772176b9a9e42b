#!/usr/bin/env bash
# sbatch slurm.sh: one process a GPU. train.py calls dj.initialize() first, which finds
# the other processes in SLURM's environment.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00

# A process that fails ends the job, which is queued again and goes on from the latest
# checkpoint.
#SBATCH --requeue
set -euo pipefail
srun --kill-on-bad-exit=1 python train.py "$@"
