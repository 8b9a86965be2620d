"""Tools that show and change checkpoints, without MPI: `python -m psmpi.inspect COMMAND`."""
