"""Networks as data, their layers, losses and initial weights, over slices of one flat vector."""
