#!/bin/bash
# Train on GPUs of several nodes, one rank a GPU. Submit from a folder that all nodes see:  sbatch gpus.sh
# Lines marked CHANGE are the ones to look at; every option of psmpi.train may be added at the end.
#SBATCH --job-name=psmpi
#SBATCH --nodes=2                  # CHANGE
#SBATCH --ntasks-per-node=4        # CHANGE: as many as GPUs a node; more ranks share them in turn
#SBATCH --gpus-per-node=4          # CHANGE
#SBATCH --cpus-per-task=4          # CHANGE: cores a rank
#SBATCH --time=04:00:00            # CHANGE
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

source "$HOME/psmpi/.venv/bin/activate"   # CHANGE: where psmpi and a CuPy for the driver's CUDA are installed
# module load openmpi                     # CHANGE: the site's MPI, where mpi4py was built against it

# The launcher must speak to the MPI that mpi4py loads: `srun --mpi=list` shows what there is.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmi2}"   # CHANGE: pmi2 for MPICH, pmix for Open MPI
# srun does not take --cpus-per-task over from the batch script.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Kernels are compiled once a node and kept here: a disk of the node's own, or many ranks wait for one file system.
export CUPY_CACHE_DIR="${TMPDIR:-/tmp}/psmpi-cupy-$USER"   # CHANGE where TMPDIR is shared
# Checkpoints on Lustre and NFS: locks are not always there.
export HDF5_USE_FILE_LOCKING=BEST_EFFORT

# Add --gpu-aware where the MPI was built for this CUDA, --nccl where CuPy has NCCL: psmpi says where they do not work.
srun --kill-on-bad-exit=1 python -m psmpi.train --backend cupy --colocate \
    --dataset mnist --data-dir "$HOME/data" --epochs 10 --placement owner \
    --threads "${SLURM_CPUS_PER_TASK:-1}" \
    --out "runs/$SLURM_JOB_ID" --resume auto "$@"   # CHANGE: data set and where it is, model, run directory
