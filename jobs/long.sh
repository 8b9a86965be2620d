#!/bin/bash
# Train with 11 rank(s) on 1 node(s), beyond the time limit. Written by:
# psmpi submit --name long --ranks 11 --time 00:30:00 --requeue --activate .venv/bin/activate --mpi pmi2 --dry-run -- --dataset mnist --data-dir data --epochs 1000
# Submit it by sbatch from a folder that all nodes see; further options of psmpi train may follow its name.
#SBATCH --job-name=long
#SBATCH --nodes=1
#SBATCH --ntasks=11
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -eo pipefail

# shellcheck source=/dev/null
source .venv/bin/activate
# srun must use the interface of this Python's MPI: srun --mpi=list lists the interfaces.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmi2}"
# srun does not inherit --cpus-per-task from a batch script.
export SRUN_CPUS_PER_TASK=1
# Lustre and NFS do not always have file locks.
export HDF5_USE_FILE_LOCKING=BEST_EFFORT
set -u

status=0
srun --kill-on-bad-exit=0 --wait=30 python -m psmpi.train \
    --dataset mnist --data-dir data --epochs 1000 --threads 1 --out runs/long --resume auto "$@" || status=$?
# 85: stopped by a signal, and saved.
if [ "$status" = 85 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 1000 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
