"""Independent subnet training: the method, and what deals out the network."""
