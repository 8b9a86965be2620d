"""The method `bptt`: truncated back-propagation through time, with synthetic gradients of the future."""
