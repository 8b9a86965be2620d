"""Element-wise update rules. Weight decay is an L2 penalty added to the gradient, but in AdamW."""

from __future__ import annotations

from math import sqrt

import numpy as np

from psmpi.optim.base import AllSum, Closure, Hyper, Optimizer


class FirstOrder(Optimizer):
    """Applies `update` chunk by chunk, with the L2 penalty in the gradient."""

    names: tuple[str, ...] = ()
    coupled = True

    def __init__(self, n: int, dtype: np.dtype, hyper: Hyper):
        super().__init__(n, dtype, hyper, self.names)

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        self.begin()
        decay = self.hyper.weight_decay
        for at in self.chunks():
            a, b = (row[: at.stop - at.start] for row in self.scratch)
            if decay and self.coupled:
                np.multiply(w[at], decay, out=a)
                g[at] += a
            self.update(w[at], g[at], lr, [v[at] for v in self.vectors.values()], a, b)

    def begin(self) -> None:
        """Called once a step, before the chunks."""

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        """Step one chunk in place; `a` and `b` are scratch of its size."""
        raise NotImplementedError


class SGD(FirstOrder):
    """w -= lr g."""

    def update(self, w, g, lr, state, a, b):
        np.multiply(g, lr, out=a)
        w -= a


class Momentum(FirstOrder):
    """v = momentum v + g; w -= lr v (Polyak 1964, in the form of Sutskever et al. 2013 without dampening)."""

    names = ("v",)

    def update(self, w, g, lr, state, a, b):
        (v,) = state
        v *= self.hyper.momentum
        v += g
        np.multiply(v, lr, out=a)
        w -= a


class Nesterov(FirstOrder):
    """v = momentum v + g; w -= lr (g + momentum v) (Nesterov 1983, in the form of Sutskever et al. 2013)."""

    names = ("v",)

    def update(self, w, g, lr, state, a, b):
        (v,) = state
        v *= self.hyper.momentum
        v += g
        np.multiply(v, self.hyper.momentum, out=a)
        a += g
        a *= lr
        w -= a


class Adam(FirstOrder):
    """Kingma and Ba 2015, Algorithm 1: bias-corrected moments, eps outside the root."""

    names = ("m", "v")

    def __init__(self, n: int, dtype: np.dtype, hyper: Hyper):
        super().__init__(n, dtype, hyper)
        self.scalars["t"] = 0

    def begin(self) -> None:
        self.scalars["t"] += 1

    def update(self, w, g, lr, state, a, b):
        m, v = state
        h, t = self.hyper, self.scalars["t"]
        np.subtract(g, m, out=a)
        a *= 1 - h.beta1
        m += a
        v *= h.beta2
        np.multiply(g, g, out=a)
        a *= 1 - h.beta2
        v += a
        np.sqrt(v, out=a)
        a *= 1 / sqrt(1 - h.beta2**t)
        a += h.eps
        np.divide(m, a, out=b)
        b *= lr / (1 - h.beta1**t)
        w -= b


class AdamW(Adam):
    """Adam with decoupled weight decay: w -= lr decay w beside the step (Loshchilov and Hutter 2019)."""

    coupled = False

    def update(self, w, g, lr, state, a, b):
        if self.hyper.weight_decay:
            w *= 1 - lr * self.hyper.weight_decay
        super().update(w, g, lr, state, a, b)


class RMSprop(FirstOrder):
    """v = alpha v + (1 - alpha) g^2; w -= lr g / (sqrt(v) + eps) (Tieleman and Hinton 2012)."""

    names = ("v",)

    def update(self, w, g, lr, state, a, b):
        (v,) = state
        v *= self.hyper.alpha
        np.multiply(g, g, out=a)
        a *= 1 - self.hyper.alpha
        v += a
        np.sqrt(v, out=a)
        a += self.hyper.eps
        np.divide(g, a, out=b)
        b *= lr
        w -= b
