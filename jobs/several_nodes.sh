#!/bin/bash
# Train with 32 rank(s) on 4 node(s). Written by:
# psmpi submit --name several_nodes --nodes 4 --ranks 32 --time 04:00:00 --activate .venv/bin/activate --mpi pmi2 --dry-run -- --dataset mnist --data-dir data --epochs 10 --placement owner
# Submit it by sbatch from a folder that all nodes see; further options of psmpi train may follow its name.
#SBATCH --job-name=several_nodes
#SBATCH --nodes=4
#SBATCH --ntasks=32
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
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
    --dataset mnist --data-dir data --epochs 10 --placement owner --threads 1 --out runs/several_nodes \
    --resume auto "$@"
