"""Tools that look into checkpoints and change them, without MPI: `python -m psmpi.inspect COMMAND`."""
