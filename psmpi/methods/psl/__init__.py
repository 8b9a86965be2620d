"""The method `psl`: the partially-separable loss, its partitioned quasi-Newton steps, and their elements."""
