"""Training of partitioned neural networks over MPI: the loss is a sum of element losses, each rank computes its own."""

__version__ = "0.1.0"
