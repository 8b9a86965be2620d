"""Steps of optimizers on a GPU, one kernel each. All vectors are (n,) of one dtype."""

from __future__ import annotations

from math import inf, log
from typing import Any

from psmpi.backend.gpu.device import Device


class DeviceSteps(Device):
    """Steps of optimizers by the kernels of cuda/optim.cu, in place.

    In the formulas d = g + l2 w is the gradient with the L2 penalty, and keep is the factor of decoupled weight decay.
    """

    def sgd(self, w: Any, g: Any, rate: float, l2: float) -> None:
        """w -= rate d."""
        self.spread("sgd", w.dtype, w.size, w.size, w, g, rate, l2)

    def momentum(self, w: Any, g: Any, v: Any, rate: float, beta: float, l2: float, nesterov: bool) -> None:
        """v = beta v + d, w -= rate v, or with nesterov w -= rate (d + beta v)."""
        self.spread("momentum", w.dtype, w.size, w.size, w, g, v, rate, beta, l2, int(nesterov))

    def rmsprop(self, w: Any, g: Any, v: Any, rate: float, alpha: float, eps: float, l2: float) -> None:
        """v = alpha v + (1 - alpha) d^2, w -= rate d / (sqrt(v) + eps)."""
        self.spread("rmsprop", w.dtype, w.size, w.size, w, g, v, rate, alpha, eps, l2)

    def lion(self, w: Any, g: Any, m: Any, rate: float, beta1: float, beta2: float, l2: float, keep: float) -> None:
        """w = keep w - rate sign(beta1 m + (1 - beta1) d), then m = beta2 m + (1 - beta2) d."""
        self.spread("lion", w.dtype, w.size, w.size, w, g, m, rate, beta1, beta2, l2, keep)

    def adam(
        self, w: Any, g: Any, m: Any, v: Any, rate: float, root: float, beta1: float, beta2: float, eps: float,
        l2: float, keep: float,
    ) -> None:  # fmt: skip
        """m = beta1 m + (1 - beta1) d, v = beta2 v + (1 - beta2) d^2, w = keep w - rate m / (root sqrt(v) + eps)."""
        self.spread("adam", w.dtype, w.size, w.size, w, g, m, v, rate, root, beta1, beta2, eps, l2, keep)

    def counted_adam(
        self, w: Any, g: Any, m: Any, v: Any, t: Any, rate: float, beta1: float, beta2: float, eps: float, l2: float,
        keep: float,
    ) -> None:  # fmt: skip
        """Adam with a step count t (n,) for each weight, which grows by 1.

        w = keep w - rate m' / (sqrt(v') + eps) with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t).
        """
        logs = [log(beta) if beta else -inf for beta in (beta1, beta2)]
        self.spread("counted_adam", w.dtype, w.size, w.size, w, g, m, v, t, rate, *logs, beta1, beta2, eps, l2, keep)
