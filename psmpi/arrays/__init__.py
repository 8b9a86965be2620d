"""Training and predicting on arrays, from Python: `psmpi.fit` and `psmpi.load`."""
