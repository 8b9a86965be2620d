"""Element-wise update rules, chunk by chunk, in the conventions of PyTorch.

Weight decay is an L2 penalty added to the gradient (g + weight_decay w), but in AdamW. Scalars are Python
floats, which take the dtype of the arrays: float32 shards are stepped in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.optim.base import CHUNK, AllSum, Closure, Optimizer, check_eps, check_settings


class FirstOrder(Optimizer):
    """Applies `update` to the chunks of a shard, with the L2 penalty in the gradient."""

    names: ClassVar[tuple[str, ...]] = ()
    # The operation that steps a whole shard in one pass, on backends that have it.
    operation: ClassVar[str] = ""
    # Whether weight decay goes through the gradient; else it shrinks the weights beside the step.
    coupled = True

    def __init__(self, n: int, dtype: DTypeLike, *, weight_decay: float = 0.0, ops: NumpyOps | None = None) -> None:
        check_settings(weight_decay=weight_decay)
        super().__init__(n, dtype, names=self.names, ops=ops)
        self.scratch = np.empty((2, min(n, CHUNK)), self.dtype)
        self.weight_decay = float(weight_decay)
        self.fused = self.ops.fused(self.operation)

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        self.check_shard(w, g)
        # A NumPy float64 would draw float32 chunks up to float64.
        lr = float(lr)
        if "t" in self.scalars:
            self.scalars["t"] += 1
        if self.fused is not None:
            self.at_once(self.fused, w, g, lr)
            return
        for at in self.chunks():
            size = at.stop - at.start
            a, b = self.scratch[0, :size], self.scratch[1, :size]
            w_at, g_at = w[at], g[at]
            if self.coupled and self.weight_decay:
                np.multiply(w_at, self.weight_decay, out=a)
                g_at += a
            elif self.weight_decay:
                w_at *= 1 - lr * self.weight_decay
            self.update(w_at, g_at, lr, [vector[at] for vector in self.vectors.values()], a, b)

    def at_once(self, fused: Callable[..., None], w: np.ndarray, g: np.ndarray, lr: float) -> None:
        """Step the whole shard by `fused`, the backend's `operation`."""
        raise NotImplementedError

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        """Step one chunk w (k,) in place along g (k,); `state` in the order of `names`; scratch a, b (k,)."""
        raise NotImplementedError


class SGD(FirstOrder):
    """w -= lr g."""

    settings = ("weight_decay",)
    operation = "sgd"

    def at_once(self, fused: Callable[..., None], w: np.ndarray, g: np.ndarray, lr: float) -> None:
        fused(w, g, lr, self.weight_decay)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        np.multiply(g, lr, out=a)
        w -= a


class Momentum(FirstOrder):
    """v = beta v + g; w -= lr v (Polyak 1964, in PyTorch's form: no dampening, lr outside v).

    UserError for beta outside [0, 1) or a negative weight_decay.
    """

    settings = ("beta", "weight_decay")
    names = ("v",)
    operation = "momentum"

    nesterov = False

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        ops: NumpyOps | None = None,
    ) -> None:
        check_settings(momentum=beta)
        super().__init__(n, dtype, weight_decay=weight_decay, ops=ops)
        self.beta = float(beta)

    def at_once(self, fused: Callable[..., None], w: np.ndarray, g: np.ndarray, lr: float) -> None:
        fused(w, g, self.vectors["v"], lr, self.beta, self.weight_decay, self.nesterov)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (v,) = state
        v *= self.beta
        v += g
        np.multiply(v, lr, out=a)
        w -= a


class Nesterov(Momentum):
    """v = beta v + g; w -= lr (g + beta v) (Nesterov 1983, as PyTorch's SGD with nesterov=True)."""

    nesterov = True

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (v,) = state
        v *= self.beta
        v += g
        np.multiply(v, self.beta, out=a)
        a += g
        a *= lr
        w -= a


class Adam(FirstOrder):
    """m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w -= lr m' / (sqrt(v') + eps).

    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t), t = 1, 2, ... the number of the step (Kingma and Ba 2015,
    Algorithm 1). UserError for beta1 or beta2 outside [0, 1), eps not above 0 in `dtype`, negative
    weight_decay.
    """

    settings = ("beta1", "beta2", "eps", "weight_decay")
    names: ClassVar[tuple[str, ...]] = ("m", "v")
    operation = "adam"

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ops: NumpyOps | None = None,
    ) -> None:
        check_settings(beta1=beta1, beta2=beta2)
        super().__init__(n, dtype, weight_decay=weight_decay, ops=ops)
        check_eps(eps, self.dtype)
        self.beta1, self.beta2, self.eps = float(beta1), float(beta2), float(eps)
        self.scalars["t"] = 0

    def at_once(self, fused: Callable[..., None], w: np.ndarray, g: np.ndarray, lr: float) -> None:
        t = self.scalars["t"]
        l2, keep = self._decay(lr)
        rate, root = lr / (1 - self.beta1**t), 1 / sqrt(1 - self.beta2**t)
        m, v = self.vectors.values()
        fused(w, g, m, v, rate, root, self.beta1, self.beta2, self.eps, l2, keep)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        m, v = state
        t = self.scalars["t"]
        self._move(m, v, g, a)
        np.sqrt(v, out=a)
        a *= 1 / sqrt(1 - self.beta2**t)
        a += self.eps
        np.divide(m, a, out=b)
        b *= lr / (1 - self.beta1**t)
        w -= b

    def _decay(self, lr: float) -> tuple[float, float]:
        """The factors of the weights in the gradient, and beside the step."""
        return (self.weight_decay, 1.0) if self.coupled else (0.0, 1 - lr * self.weight_decay)

    def _move(self, m: np.ndarray, v: np.ndarray, g: np.ndarray, a: np.ndarray) -> None:
        """Move the moments towards g and g^2; a is scratch."""
        # m + (1 - beta1) (g - m), one multiplication fewer than the formula.
        np.subtract(g, m, out=a)
        a *= 1 - self.beta1
        m += a
        v *= self.beta2
        np.multiply(g, g, out=a)
        a *= 1 - self.beta2
        v += a


class AdamW(Adam):
    """Adam, with the weights shrunk by 1 - lr weight_decay beside the step (Loshchilov and Hutter 2019,
    Algorithm 2).

    The decay is multiplied by lr, as in PyTorch.
    """

    coupled = False


class CountedAdam(Adam):
    """Adam, with the number of its steps kept for each weight: for weights that are not all stepped together.

    vectors: "t", the counts, beside m and v; there is no scalar.
    """

    names = ("m", "v", "t")
    operation = "counted_adam"

    def __init__(self, n: int, dtype: DTypeLike, **settings: Any) -> None:
        super().__init__(n, dtype, **settings)
        del self.scalars["t"]
        self.logs = [log(beta) if beta else -inf for beta in (self.beta1, self.beta2)]

    def at_once(self, fused: Callable[..., None], w: np.ndarray, g: np.ndarray, lr: float) -> None:
        l2, keep = self._decay(lr)
        m, v, t = self.vectors.values()
        fused(w, g, m, v, t, lr, self.beta1, self.beta2, self.eps, l2, keep)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        m, v, t = state
        t += 1
        self._move(m, v, g, a)
        # -(1 - beta^t) for both moments: the signs are taken back below.
        np.multiply(t, self.logs[0], out=a)
        np.expm1(a, out=a)
        np.divide(m, a, out=b)
        np.multiply(t, self.logs[1], out=a)
        np.expm1(a, out=a)
        np.divide(v, a, out=a)
        np.negative(a, out=a)
        np.sqrt(a, out=a)
        a += self.eps
        b /= a
        b *= lr
        w += b


class CountedAdamW(CountedAdam):
    """AdamW with per-weight step counts."""

    coupled = False


class RMSprop(FirstOrder):
    """v = alpha v + (1 - alpha) g^2; w -= lr g / (sqrt(v) + eps) (Tieleman and Hinton 2012, in PyTorch's
    form).

    UserError for alpha outside [0, 1), eps not above 0 in `dtype`, negative weight_decay.
    """

    settings = ("alpha", "eps", "weight_decay")
    names = ("v",)
    operation = "rmsprop"

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ops: NumpyOps | None = None,
    ) -> None:
        check_settings(alpha=alpha)
        super().__init__(n, dtype, weight_decay=weight_decay, ops=ops)
        check_eps(eps, self.dtype)
        self.alpha, self.eps = float(alpha), float(eps)

    def at_once(self, fused: Callable[..., None], w: np.ndarray, g: np.ndarray, lr: float) -> None:
        fused(w, g, self.vectors["v"], lr, self.alpha, self.eps, self.weight_decay)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (v,) = state
        v *= self.alpha
        np.multiply(g, g, out=a)
        a *= 1 - self.alpha
        v += a
        np.sqrt(v, out=a)
        a += self.eps
        np.divide(g, a, out=b)
        b *= lr
        w -= b
