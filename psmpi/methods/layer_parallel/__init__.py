"""The method `layer_parallel`: residual layers solved at once by multigrid reduction in layer time."""
