"""The method `next`: in-network training of agents on a graph, each with its own samples."""
