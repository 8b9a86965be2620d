#!/bin/bash
# Train with 11 rank(s) on 1 node(s). Written by:
# psmpi submit --name one_node --ranks 11 --activate .venv/bin/activate --mpi pmi2 --dry-run -- --dataset digits --epochs 30 --batch-size 20 --lr 0.01
# Submit it by sbatch from a folder that all nodes see; further options of psmpi train may follow its name.
#SBATCH --job-name=one_node
#SBATCH --nodes=1
#SBATCH --ntasks=11
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
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

srun --kill-on-bad-exit=0 --wait=30 python -m psmpi.train \
    --dataset digits --epochs 30 --batch-size 20 --lr 0.01 --threads 1 --out runs/one_node --resume auto \
    "$@"
