"""MPI: starting, ending, and the collectives that a step needs. Nothing here starts MPI when it is imported."""
