"""In-network training: agents on a graph, each with its own samples: the graph, the samples, the rules, the method."""
