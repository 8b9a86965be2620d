"""Training methods, one file each, or a folder where one needs more. None imports another; see `psmpi.registry`."""
