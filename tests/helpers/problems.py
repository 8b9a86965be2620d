"""Random weights and samples for a network, and models on them."""

from psmpi.testing.layers import make_model, random_problem

__all__ = ["make_model", "random_problem"]
