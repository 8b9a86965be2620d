"""How alike a block makes samples of one class: the similarity loss of Nokland and Eidnes (2019), on the host."""

from __future__ import annotations

import numpy as np

# Below this a vector has no direction.
LEAST = 1e-8


class Similarity:
    """mean (S(x) - S(y))^2 over pairs of samples, S their cosines after each sample's mean is taken off.

    x: features of samples, of images the standard deviation of each channel; y: the classes' one-hot vectors (Nokland
    and Eidnes, "Training neural networks with local error signals", 2019, equation 1). shape: of a sample's features.
    """

    def __init__(self, shape: tuple[int, ...], classes: int):
        self.shape, self.classes = shape, classes

    def __call__(self, x: np.ndarray, labels: np.ndarray, factor: float) -> tuple[float, np.ndarray]:
        """`factor` times the loss of features x (features, b) float64, and its gradient of that shape."""
        b = x.shape[1]
        if len(self.shape) == 3:
            pixels = x.reshape(self.shape[0], -1, b)
            away = pixels - pixels.mean(axis=1, keepdims=True)
            count = max(1, pixels.shape[1] - 1)
            features = np.sqrt((away * away).sum(axis=1) / count)
        else:
            features = x
        centred = features - features.mean(axis=0)
        norms = np.sqrt((centred * centred).sum(axis=0)) + LEAST
        unit = centred / norms
        # Of two samples of one class 1, of others that of one-hot vectors without their mean.
        apart = -1 / (self.classes - 1) if self.classes > 1 else 1.0
        wanted = np.where(labels[:, None] == labels, 1.0, apart)
        differ = unit.T @ unit - wanted
        slope = 4 * factor / b**2 * (unit @ differ)
        # Through the norms, whose least part does not count; sums of centred vectors have no mean.
        slope -= unit * (unit * slope).sum(axis=0) * (norms / (norms - LEAST + (norms == LEAST)))
        slope /= norms
        if len(self.shape) == 3:
            safe = np.where(features > 0, features, 1.0)
            slope = (away * (slope / (count * safe))[:, None]).reshape(x.shape)
        return float(factor * (differ * differ).mean()), slope
