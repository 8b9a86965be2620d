"""The convex model that linearises the network alone, inside the loss; solved in blocks of weights, a core each.

Of an agent at weights w, with scores f of its samples, their derivatives J and the tracked gradient y, the model in
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

# Parameters above which no derivatives of all scores are kept.
MOST = 10_000
# The norm of a gradient, over 1 + |y|, at which the inner problem counts as solved, with the squared loss and with
# others; iterations after which an inner solution is taken as it is.
ENOUGH, ENOUGH_OTHERS, STEPS = 1e-11, 1e-8, 2000


class Jacobian:
    """Scores of samples and their derivatives: `scores` (classes, b), `rows` (classes * b, size) by class, then sample.

    A forward and a backward pass a row, each of one sample: the network has no layers that couple samples.
    """

    def __init__(self, model: Model, samples: Resident, features: int):
        self.model, self.samples = model, samples
        self.x = model.ops.empty(features, model.dtype)
        self.dy = model.ops.zeros(model.size, model.dtype)
        self.rows, self.scores = np.empty((0, model.part.size)), np.empty((model.size, 0))

    def reserve(self, samples: int) -> None:
        """Make room for so many samples."""
        count = self.model.size
        if samples * count > len(self.rows):
            self.rows = np.empty((samples * count, self.model.part.size))

    def fill(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of some samples at the model's weights, until the next call."""
        model, count, b = self.model, self.model.size, len(ids)
        assert model.g is not None
        self.reserve(b)
        self.scores = np.empty((count, b))
        for k in range(b):
            inputs = self.samples.batch(ids[k : k + 1], self.x).inputs
            for j in range(count):
                # A backward pass uses up what some layers keep of a forward pass, and its dy.
                tape = model.forward(inputs)
                if j == 0:
                    self.scores[:, k] = model.ops.host(tape.scores)[:, 0]
                self.dy.fill(0)
                self.dy[j] = 1
                model.backward(tape, self.dy.reshape(count, 1))
                self.rows[j * b + k] = model.ops.host(model.g)
        return self.scores, self.rows[: count * b]


def damped_solve(rows: np.ndarray, curvature: float, damping: float, v: np.ndarray) -> np.ndarray:
    """(curvature J^T J + damping Id)^-1 v for J = rows (n, q), by a system of q or of n equations, the fewer.

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
    """Solves the convex models of a rank's agents.

    loss: makes one, of float64, for each core; blocks: how many blocks of weights are solved apart, the others staying
    where they are, on so many cores.
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
        """The minimum x (size,) of an agent's convex model at w (size,), which the Jacobian's model has for weights.

        ids, targets: of its samples, as the loss takes them; scale: the factor c of a sample's loss; y: the tracked
        gradient.
        """
        scores, rows = self.jacobian.fill(ids)

        def block(number: int) -> None:
            at, loss = self.blocks[number], self.losses[number]
            found[at] = self._block(loss, scores, rows[:, at], targets, scale, w[at], y[at])

        found = np.empty(w.size)
        for _ in (self.pool.map if self.pool is not None else map)(block, range(len(self.blocks))):
            pass
        return found

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
    """The Euclidean norm."""
    return float(np.linalg.norm(x))


def accelerated(
    gradient: Callable[[np.ndarray], np.ndarray], terms: Terms, start: np.ndarray, length: float, enough: float
) -> np.ndarray:
    """The minimum of a smooth convex function plus a regularizer over a set, by accelerated proximal steps.

    FISTA (Beck and Teboulle, 2009) with a restart where momentum goes uphill (O'Donoghue and Candes, 2015). length: a
    lower bound of the gradient's Lipschitz constant, which is raised where a step shows it to be too low, and lowered a
    little after each other step. Ends where a step times that constant is below `enough`, or after STEPS.
    """
    ops, x, t, least = NumpyOps(), np.array(start, np.float64), 1.0, length
    z, at = x.copy(), None
    for _ in range(STEPS):
        slope: np.ndarray = gradient(z) if at is None else at
        at = None
        new: np.ndarray = z - slope / length
        terms.nearest(ops, new, length)
        step = new - z
        gone = norm(step)
        if gone * length <= enough:
            return new
        # Below, differences of gradients are rounding.
        if gone > 1e-7 * (1 + norm(z)):
            bend = float(step @ (gradient(new) - slope)) / gone**2
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
