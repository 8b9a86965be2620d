#!/bin/bash
# Train on one node, one rank a core. Submit from a folder of your own:  sbatch one_node.sh
# Lines marked CHANGE are the ones to look at; every option of psmpi.train may be added at the end.
#SBATCH --job-name=psmpi
#SBATCH --nodes=1
#SBATCH --ntasks=11                # CHANGE: 1 master + workers; 10 workers hold one class each of 10
#SBATCH --cpus-per-task=1          # CHANGE: cores a rank (psmpi.train --threads uses them)
#SBATCH --time=01:00:00            # CHANGE
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

source "$HOME/psmpi/.venv/bin/activate"   # CHANGE: the environment where psmpi is installed
# module load openmpi                     # CHANGE: the site's MPI, where mpi4py was built against it

# The launcher must speak to the MPI that mpi4py loads: `srun --mpi=list` shows what there is.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmi2}"   # CHANGE: pmi2 for MPICH, pmix for Open MPI
# srun does not take --cpus-per-task over from the batch script.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Checkpoints on Lustre and NFS: locks are not always there.
export HDF5_USE_FILE_LOCKING=BEST_EFFORT

srun --kill-on-bad-exit=1 python -m psmpi.train \
    --dataset digits --epochs 30 --batch-size 20 --lr 0.01 \
    --threads "${SLURM_CPUS_PER_TASK:-1}" \
    --out "runs/$SLURM_JOB_ID" --resume auto "$@"   # CHANGE: data set, model, placement, run directory
