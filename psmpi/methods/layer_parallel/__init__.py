"""Layer-parallel training: residual layers solved at once by multigrid reduction in layer time."""
