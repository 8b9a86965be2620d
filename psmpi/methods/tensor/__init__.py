"""Tensor parallelism: every weight matrix, and what goes through it, cut into tiles on a grid of ranks."""
