"""The partially-separable loss: the method, its partitioned quasi-Newton steps, and the elements of these."""
