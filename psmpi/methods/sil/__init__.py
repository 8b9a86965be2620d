"""Synthetic intermediate labels: the method, its plan, its parts, their labels and their costs."""
