#!/bin/bash
# Train on several nodes, one rank a core. Submit from a folder that all nodes see:  sbatch several_nodes.sh
# Lines marked CHANGE are the ones to look at; every option of psmpi.train may be added at the end.
#SBATCH --job-name=psmpi
#SBATCH --nodes=4                  # CHANGE
#SBATCH --ntasks-per-node=8        # CHANGE: nodes x ranks a node: 1 or more masters + workers
#SBATCH --cpus-per-task=1          # CHANGE: cores a rank
#SBATCH --time=04:00:00            # CHANGE
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

source "$HOME/psmpi/.venv/bin/activate"   # CHANGE: the environment where psmpi is installed, seen by all nodes
# module load openmpi                     # CHANGE: the site's MPI, where mpi4py was built against it

# The launcher must speak to the MPI that mpi4py loads: `srun --mpi=list` shows what there is.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmi2}"   # CHANGE: pmi2 for MPICH, pmix for Open MPI
# srun does not take --cpus-per-task over from the batch script.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Checkpoints on Lustre and NFS: locks are not always there.
export HDF5_USE_FILE_LOCKING=BEST_EFFORT

# Between nodes the network counts: with `owner` only the shared weights and the scores travel in a step.
srun --kill-on-bad-exit=1 python -m psmpi.train \
    --dataset mnist --data-dir "$HOME/data" --epochs 10 --placement owner \
    --threads "${SLURM_CPUS_PER_TASK:-1}" \
    --out "runs/$SLURM_JOB_ID" --resume auto "$@"   # CHANGE: data set and where it is, model, run directory
