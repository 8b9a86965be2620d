"""Report on the system that psmpi runs on: software, machine, folders, MPI, ranks."""
