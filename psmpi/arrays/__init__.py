"""Training and prediction on arrays, from Python: `psmpi.fit` and `psmpi.load`."""
