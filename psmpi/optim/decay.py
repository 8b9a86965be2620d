"""Weight decay: coupled (through the gradient) or decoupled (directly on the weights)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WeightDecay(ABC):
    """Decay of the weights towards 0 with strength `factor` >= 0."""

    factor: float

    @abstractmethod
    def apply(self, w: np.ndarray, g: np.ndarray, lr: float, scratch: np.ndarray) -> None:
        """Apply the decay to a chunk of the gradient g (k,) or of the weights w (k,), in place, before the step."""

    @abstractmethod
    def factors(self, lr: float) -> tuple[float, float]:
        """Return the factors (l2, keep) of a fused step, which steps keep w along the gradient g + l2 w."""


class Coupled(WeightDecay):
    """L2 penalty factor / 2 ||w||^2 on the loss: g += factor w."""

    def apply(self, w: np.ndarray, g: np.ndarray, lr: float, scratch: np.ndarray) -> None:
        np.multiply(w, self.factor, out=scratch)
        g += scratch

    def factors(self, lr: float) -> tuple[float, float]:
        return self.factor, 1.0


class Decoupled(WeightDecay):
    """Decoupled weight decay: w *= 1 - lr factor (Loshchilov and Hutter 2019, times lr as in PyTorch)."""

    def apply(self, w: np.ndarray, g: np.ndarray, lr: float, scratch: np.ndarray) -> None:
        w *= 1 - lr * self.factor

    def factors(self, lr: float) -> tuple[float, float]:
        return 0.0, 1 - lr * self.factor
