"""Hogwild: updates of shared weights that nobody waits for."""
