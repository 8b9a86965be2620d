"""The convex model that linearises only the network inside the loss, solved in blocks of weights, each on a core.

For an agent at weights w, with scores f of its samples, their derivatives J and the tracked gradient y, the model in
d = x - w is  c sum_m l(f_m + J_m d) + p d + tau/2 |d|^2 + r(w + d),  p such that its gradient at d = 0 is y
(Scardapane and Di Lorenzo, 2017, partial linearisation). All of it is float64 in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import sqrt

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.data import Resident
from psmpi.methods.next.convex import Terms
from psmpi.nn.losses import Loss
from psmpi.nn.model import Model

# Most parameters for which the derivatives of all scores are kept.
MOST = 10_000
# Tolerances of the inner problem on the gradient's norm over 1 + |y|, with the squared loss and with other losses; most
# iterations of an inner solution.
ENOUGH, ENOUGH_OTHERS, STEPS = 1e-11, 1e-8, 2000


class Jacobian:
    """Scores of samples and their derivatives: `scores` (classes, b), `rows` (classes * b, size) by class, then sample.

    Each row takes a forward and a backward pass of one sample: the network has no layers that couple samples.
    """

    def __init__(self, model: Model, samples: Resident, features: int):
        self.model, self.samples = model, samples
        self.x = model.ops.empty(features, model.dtype)
        self.dy = model.ops.zeros(model.size, model.dtype)
        self.rows, self.scores = np.empty((0, model.part.size)), np.empty((model.size, 0))

    def reserve(self, samples: int) -> None:
        """Make room for `samples` samples."""
        count = self.model.size
        if samples * count > len(self.rows):
            self.rows = np.empty((samples * count, self.model.part.size))

    def fill(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of some samples at the model's weights; both are valid until the next call."""
        model, count, b = self.model, self.model.size, len(ids)
        assert model.g is not None
        self.reserve(b)
        self.scores = np.empty((count, b))
        for k in range(b):
            inputs = self.samples.batch(ids[k : k + 1], self.x).inputs
            for j in range(count):
                # Backward overwrites dy and the tapes of some layers, so each row needs a forward pass.
                tape = model.forward(inputs)
                if j == 0:
                    self.scores[:, k] = model.ops.host(tape.scores)[:, 0]
                self.dy.fill(0)
                self.dy[j] = 1
                model.backward(tape, self.dy.reshape(count, 1))
                self.rows[j * b + k] = model.ops.host(model.g)
        return self.scores, self.rows[: count * b]


def damped_solve(rows: np.ndarray, curvature: float, damping: float, v: np.ndarray) -> np.ndarray:
    """Return (curvature J^T J + damping Id)^-1 v for J = rows (n, q), by a system of min(n, q) equations.

    (c J^T J + a Id)^-1 = (Id - J^T ((a/c) Id + J J^T)^-1 J) / a (Woodbury).
    """
    n, q = rows.shape
    if n < q:
        gram = rows @ rows.T
        gram.flat[:: n + 1] += damping / curvature
        return np.asarray((v - rows.T @ np.linalg.solve(gram, rows @ v)) / damping)
    gram = rows.T @ rows
    gram *= curvature
    gram.flat[:: q + 1] += damping
    return np.asarray(np.linalg.solve(gram, v))


class Inner:
    """Solver of the convex models of a rank's agents.

    loss: makes a float64 loss, one for each block; blocks: the number of blocks of weights, each of which is solved
    with the other weights fixed; cores: the number of threads at most.
    """

    def __init__(
        self, jacobian: Jacobian, loss: Callable[[], Loss], terms: Terms, tau: float, blocks: int, cores: int
    ):  # fmt: skip
        self.jacobian, self.terms, self.tau = jacobian, terms, tau
        size = jacobian.model.part.size
        edges = np.linspace(0, size, blocks + 1).round().astype(int).tolist()
        self.blocks = [slice(a, b) for a, b in pairwise(edges)]
        self.losses = [loss() for _ in self.blocks]
        self.pool = ThreadPoolExecutor(min(cores, blocks)) if min(cores, blocks) > 1 else None

    def solve(self, ids: np.ndarray, targets: np.ndarray, scale: float, w: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the minimum x (size,) of an agent's convex model at w (size,), the weights of the Jacobian's model.

        ids, targets: of the agent's samples, as the loss takes them; scale: the factor c of a sample's loss; y:
        (size,), the tracked gradient.
        """
        scores, rows = self.jacobian.fill(ids)

        def block(number: int) -> None:
            at, loss = self.blocks[number], self.losses[number]
            x[at] = self._block(loss, scores, rows[:, at], targets, scale, w[at], y[at])

        x = np.empty(w.size)
        for _ in (self.pool.map if self.pool is not None else map)(block, range(len(self.blocks))):
            pass
        return x

    def _block(
        self,
        loss: Loss,
        scores: np.ndarray,
        rows: np.ndarray,
        targets: np.ndarray,
        scale: float,
        w: np.ndarray,
        y: np.ndarray,
    ) -> np.ndarray:
        terms = self.terms
        l2 = terms.lam if terms.regularizer == "l2" else 0.0
        if loss.name == "squared" and terms.regularizer != "l1" and not terms.kind:
            return np.asarray(w - damped_solve(rows, 2 * scale, self.tau + 2 * l2, y + 2 * l2 * w))
        slopes = np.empty(scores.shape)

        def gradient(d: np.ndarray) -> np.ndarray:
            loss(scores + (rows @ d).reshape(scores.shape), targets, scale, slopes)
            return np.asarray(rows.T @ slopes.reshape(-1) + self.tau * d)

        pull = y - gradient(np.zeros(w.size))
        enough = (ENOUGH if loss.name == "squared" else ENOUGH_OTHERS) * (1 + norm(y))
        return accelerated(lambda x: gradient(x - w) + pull, terms, w, self.tau, enough)


def norm(x: np.ndarray) -> float:
    """Return the Euclidean norm."""
    return float(np.linalg.norm(x))


def accelerated(
    gradient: Callable[[np.ndarray], np.ndarray], terms: Terms, start: np.ndarray, length: float, enough: float
) -> np.ndarray:
    """Return the minimum of a smooth convex function plus a regularizer over a set, by accelerated proximal steps.

    FISTA (Beck and Teboulle, 2009) with a restart when momentum goes uphill (O'Donoghue and Candes, 2015). start: (n,).
    length: a lower bound of the gradient's Lipschitz constant, which is raised when a step shows that it is too low,
    and lowered a little after each other step. The iteration ends when a step times that constant is at most `enough`,
    or after STEPS.
    """
    ops, x, t, least = NumpyOps(), np.array(start, np.float64), 1.0, length
    z, at = x.copy(), None
    for _ in range(STEPS):
        slope: np.ndarray = gradient(z) if at is None else at
        at = None
        new: np.ndarray = z - slope / length
        terms.nearest(ops, new, length)
        step = new - z
        moved = norm(step)
        if moved * length <= enough:
            return new
        # For shorter steps, the difference of gradients is rounding error.
        if moved > 1e-7 * (1 + norm(z)):
            bend = float(step @ (gradient(new) - slope)) / moved**2
            if bend > length:
                length, at = max(2 * length, bend), slope
                continue
        length = max(least, 0.95 * length)
        if float(step @ (new - x)) < 0:
            t, z, x = 1.0, new, new.copy()
            continue
        after = (1 + sqrt(1 + 4 * t * t)) / 2
        z = new + (t - 1) / after * (new - x)
        x, t = new, after
    return x
