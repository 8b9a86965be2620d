#!/bin/bash
# Train with 2 rank(s) on 1 node(s), 6 settings one by one. Written by:
# psmpi submit --name array --ranks 2 --grid jobs/grid.toml --activate .venv/bin/activate --mpi pmi2 --dry-run -- --dataset digits --epochs 30 --batch-size 20
# Submit it by sbatch from a folder that all nodes see; further options of psmpi train may follow its name.
#SBATCH --job-name=array
#SBATCH --nodes=1
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --array=0-5
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%A_%a.out
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

# Run directory and options of each job of the array.
tasks=(
    'lr=0.01,seed=0 --lr 0.01 --seed 0'
    'lr=0.01,seed=1 --lr 0.01 --seed 1'
    'lr=0.01,seed=2 --lr 0.01 --seed 2'
    'lr=0.003,seed=0 --lr 0.003 --seed 0'
    'lr=0.003,seed=1 --lr 0.003 --seed 1'
    'lr=0.003,seed=2 --lr 0.003 --seed 2'
)
read -ra task <<< "${tasks[SLURM_ARRAY_TASK_ID]}"

srun --kill-on-bad-exit=0 --wait=30 python -m psmpi.train \
    --dataset digits --epochs 30 --batch-size 20 --threads 1 --out "runs/array/${task[0]}" --resume auto \
    "${task[@]:1}" "$@"
