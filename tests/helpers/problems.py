"""Random weights and samples of a network, and models over them."""

from psmpi.testing.layers import make_model, random_problem

__all__ = ["make_model", "random_problem"]
