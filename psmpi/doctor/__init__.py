"""What psmpi finds where it is to run: software, machine, folders, MPI, and what is between its ranks."""
