"""Synthetic gradients of the future: a network M predicts the gradient of a window's last states."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, sqrt

import numpy as np

from psmpi.nn.layers.recurrent import RecurrentPart
from psmpi.training.auxiliary import Auxiliary

# Decay of the running mean of squares, a window.
KEPT = 0.99


def carries(parts: list[RecurrentPart], b: int, states: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, array (rows, b)) of each recurrent layer: its states, or the gradient of its states.

    rows: the layer's slice of all states (states, b), in which the layers are one below the other.
    """
    at = 0
    for part in parts:
        rows = part.recurrence.carried * part.units
        yield slice(at, at + rows), (part.state if states else part.carry)[: rows * b].reshape(rows, b)
        at += rows


class Future:
    """The network M on a rank: maps the states (states, b) of all recurrent layers to the gradient of these states.

    M's outputs are gradients of the sum of the minibatch's losses, divided by `unit`, their root mean square. Gradients
    are often 0.01 or less, and the step length of an optimizer such as Adam does not depend on their size: without the
    unit, its steps would leave noise many times as large as the gradients. error: (2,) float64, sums of
    |predicted - returned|^2 and |returned|^2 since the caller last set it to 0.
    """

    # Running mean square of returned gradients over about the last 100 windows; 0 before the first one returns.
    square = 0.0

    def __init__(self, network: Auxiliary, parts: list[RecurrentPart]):
        self.network, self.parts, self.ops = network, parts, network.ops
        self.error = np.zeros(2)
        self.room = self.ops.empty(0, network.w.dtype)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.network.reserve(batch)
        self.room = self.ops.empty(self.network.inputs * batch, self.network.w.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all but M's weights, gradient and optimizer's vectors."""
        return self.network.nbytes + int(self.room.nbytes)

    def predict(self, b: int, factor: float, goes_on: np.ndarray | None) -> None:
        """Write `factor` times the predicted gradient of the states at a window's end to the layers' carries.

        Backward starts from these carries. goes_on: (b,), 1 for a sequence with steps after the window, 0 for others,
        whose future gradient is 0; None: all 1.
        """
        x = self.network.x(b)
        for rows, state in carries(self.parts, b, states=True):
            x[rows] = state
        gradient = self.network.forward(x)
        for rows, carry in carries(self.parts, b, states=False):
            carry[...] = gradient[rows]
            self.ops.scale(carry, factor * self.unit)
            if goes_on is not None:
                carry *= goes_on

    @property
    def unit(self) -> float:
        """The unit of M's outputs: the root mean square of returned gradients."""
        return sqrt(self.square)

    def note(self, square: float) -> None:
        """Update the running mean with `square`, the mean square of returned gradients over all ranks' samples."""
        if isfinite(square):
            self.square = KEPT * self.square + (1 - KEPT) * square if self.square else square

    def fit(self, b: int, count: float, goes_on: np.ndarray | None) -> float:
        """Fill M's gradient with half that of |predicted - returned|^2, in M's units; return |returned|^2.

        M predicts from the states of the last call of `remember`. returned: `count` times the gradient that backward
        through the next window left in the layers' carries. goes_on: as in `predict`, for the window before. While the
        unit is 0, M's gradient stays as it is.
        """
        size = self.network.inputs * b
        misfit = self.ops.scratch("misfit", size, self.room.dtype)[:size]
        differ = misfit.reshape(-1, b)
        for rows, carry in carries(self.parts, b, states=False):
            differ[rows] = carry
        returned = count**2 * self.ops.squared_norm(misfit)
        if self.square:
            predicted = self.network.forward(self.room[:size].reshape(-1, b))
            self.ops.combine(misfit, (-count / self.unit, misfit), (1.0, predicted.reshape(-1)))
            if goes_on is not None:
                differ *= goes_on
            self.error += (self.square * self.ops.squared_norm(misfit), returned)
            self.network.backward(differ)
        return returned

    def remember(self, b: int) -> None:
        """Keep the states at a window's end, for the next `fit`."""
        kept = self.room[: self.network.inputs * b].reshape(-1, b)
        for rows, state in carries(self.parts, b, states=True):
            kept[rows] = state
