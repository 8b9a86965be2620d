"""Networks as data, with layers, losses and initial weights, over slices of one flat vector."""
