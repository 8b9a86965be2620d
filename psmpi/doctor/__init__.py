"""A report on the place where psmpi is to run: software, machine, folders, MPI, ranks."""
