"""Parts that training methods share: context, state, base classes, workers, tests and the loop."""
