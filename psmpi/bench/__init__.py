"""Measurements: `python -m psmpi.bench WHAT`."""
