"""Local losses, from which a block learns in place of synthetic gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.methods.dni.similarity import Similarity
from psmpi.nn.losses import Loss
from psmpi.nn.objective import Objective
from psmpi.training.auxiliary import Auxiliary

# Weight of the similarity loss in `predsim` (Nokland and Eidnes 2019).
SHARE = 0.99


class LocalLoss:
    """Loss of a block's outputs, computed by auxiliary networks that learn at the same time.

    scores: the local classifier; features: the network whose outputs the similarity loss compares, None without it.
    """

    def __init__(self, ops: NumpyOps, loss: Loss, scores: Auxiliary, features: Auxiliary | None, classes: int):
        self.ops, self.scores, self.features = ops, scores, features
        self.objective = Objective(loss, scores.model)
        if features is not None:
            self.similarity = Similarity(features.network.layers[-1].out_shape, classes)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.scores.reserve(batch)
        self.objective.reserve(self.scores.outputs, batch)
        size, dtype = self.scores.inputs * batch, self.scores.w.dtype
        self.dh = self.ops.empty(size, dtype)
        if self.features is not None:
            self.features.reserve(batch)
            self.feature_dh = self.ops.empty(size, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without those of the auxiliary networks."""
        return int(
            self.objective.nbytes + self.dh.nbytes + (self.feature_dh.nbytes if self.features is not None else 0)
        )

    def learn(self, h: np.ndarray, targets: np.ndarray, rate: Callable[[Auxiliary], float], done: int) -> np.ndarray:
        """Return the gradient (units, b) of the summed losses of outputs h (units, b); step the auxiliary networks.

        rate: each network's learning rate; done: their steps so far.
        """
        units, b = h.shape
        dh = self.dh[: units * b].reshape(units, b)
        self.objective.bring(targets)
        scores = self.scores.forward(h)
        factor = 1.0 if self.features is None else 1 - SHARE
        dx = dh.reshape(*self.scores.model.in_shape, b)
        self.objective.derive(self.scores.tape, scores, self.objective.targets(b), factor, dx=dx)
        self.scores.step(rate(self.scores), 1 / b, done)
        if self.features is not None:
            features = np.asarray(self.ops.host(self.features.forward(h)), np.float64)
            _, slope = self.similarity(features, targets, SHARE * b)
            feature_dh = self.feature_dh[: units * b].reshape(units, b)
            self.features.backward(self.ops.put(slope.astype(h.dtype)), feature_dh)
            self.features.step(rate(self.features), 1 / b, done)
            dh += feature_dh
        return dh
