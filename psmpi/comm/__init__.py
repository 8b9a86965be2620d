"""MPI: starting, ending, control data, and transfers of vectors. Nothing here starts MPI when it is imported."""
