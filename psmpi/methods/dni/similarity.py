"""The similarity loss of Nokland and Eidnes (2019), on the host."""

from __future__ import annotations

import numpy as np

# Addend to norms, which keeps a vector of zeros from a division by 0.
LEAST = 1e-8


class Similarity:
    """The loss mean (S(x) - S(y))^2 over pairs of samples, S the cosines of their vectors, each less its own mean.

    x: features of samples, for images the standard deviation of each channel; y: one-hot vectors of the classes
    (Nokland and Eidnes, "Training neural networks with local error signals", 2019, equation 1). shape: of features.
    """

    def __init__(self, shape: tuple[int, ...], classes: int):
        self.shape, self.classes = shape, classes

    def __call__(self, x: np.ndarray, labels: np.ndarray, factor: float) -> tuple[float, np.ndarray]:
        """Return `factor` times the loss of features x (features, b) float64, and its gradient, of the shape of x.

        labels: (b,) integers.
        """
        b = x.shape[1]
        if len(self.shape) == 3:
            pixels = x.reshape(self.shape[0], -1, b)
            deviations = pixels - pixels.mean(axis=1, keepdims=True)
            count = max(1, pixels.shape[1] - 1)
            features = np.sqrt((deviations * deviations).sum(axis=1) / count)
        else:
            features = x
        centred = features - features.mean(axis=0)
        norms = np.sqrt((centred * centred).sum(axis=0)) + LEAST
        unit = centred / norms
        # S(y) is 1 for two samples of one class; for others it is the cosine of two centred one-hot vectors.
        between = -1 / (self.classes - 1) if self.classes > 1 else 1.0
        target = np.where(labels[:, None] == labels, 1.0, between)
        differ = unit.T @ unit - target
        slope = 4 * factor / b**2 * (unit @ differ)
        # Derivative of the norms, in which LEAST is a constant. The slope is a sum of centred vectors: its mean is 0,
        # and the derivative of the centring leaves it as it is.
        slope -= unit * (unit * slope).sum(axis=0) * (norms / (norms - LEAST + (norms == LEAST)))
        slope /= norms
        if len(self.shape) == 3:
            safe = np.where(features > 0, features, 1.0)
            slope = (deviations * (slope / (count * safe))[:, None]).reshape(x.shape)
        return float(factor * (differ * differ).mean()), slope
