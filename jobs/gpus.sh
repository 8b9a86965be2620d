#!/bin/bash
# Train with 8 rank(s) on 2 node(s). Written by:
# psmpi submit --name gpus --nodes 2 --ranks 8 --gpus 4 --cores 4 --time 04:00:00 --activate .venv/bin/activate --mpi pmi2 --dry-run -- --backend cupy --colocate --dataset mnist --data-dir data --epochs 10 --placement owner
# Submit it by sbatch from a folder that all nodes see; further options of psmpi train may follow its name.
#SBATCH --job-name=gpus
#SBATCH --nodes=2
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=4
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
export SRUN_CPUS_PER_TASK=4
# Lustre and NFS do not always have file locks.
export HDF5_USE_FILE_LOCKING=BEST_EFFORT
# Each node compiles the kernels once, and keeps them on its own disk.
export CUPY_CACHE_DIR="${TMPDIR:-/tmp}/psmpi-cupy-$UID"
set -u

srun --kill-on-bad-exit=0 --wait=30 python -m psmpi.train \
    --backend cupy --colocate --dataset mnist --data-dir data --epochs 10 --placement owner --threads 4 \
    --out runs/gpus --resume auto "$@"
