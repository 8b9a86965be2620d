"""The gradient of the future: M predicts it from the states at a window's end, and learns from the next window."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, sqrt

import numpy as np

from psmpi.nn.layers.recurrent import RecurrentPart
from psmpi.training.auxiliary import Auxiliary

# What is kept of a mean of squares from window to window.
KEPT = 0.99


def carries(parts: list[RecurrentPart], b: int, states: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, array (rows, b)) of what each layer carries, one below the other: its states, or the gradient of these."""
    at = 0
    for part in parts:
        rows = part.recurrence.carried * part.units
        yield slice(at, at + rows), (part.state if states else part.carry)[: rows * b].reshape(rows, b)
        at += rows


class Future:
    """M on a rank: from the states (states, b) of all recurrent layers to the gradient of these.

    M's outputs are gradients of the sum of the minibatch's losses over their `unit`, about their root mean square:
    steps of an optimizer such as Adam are as long whatever the size of gradients, which is 0.01 and less, and would
    leave noise many times as large. error: (2,), sums of |predicted - returned|^2 and |returned|^2 since it was set to
    0.
    """

    # The mean square of returned gradients, over about the last 100 windows; 0: none has come back yet.
    square = 0.0

    def __init__(self, one: Auxiliary, parts: list[RecurrentPart]):
        self.one, self.parts, self.ops = one, parts, one.ops
        self.error = np.zeros(2)
        self.room = self.ops.empty(0, one.w.dtype)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.one.reserve(batch)
        self.room = self.ops.empty(self.one.inputs * batch, self.one.w.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all but M's weights, gradient and optimizer's vectors."""
        return self.one.nbytes + int(self.room.nbytes)

    def predict(self, b: int, factor: float, goes_on: np.ndarray | None) -> None:
        """Put `factor` times the prediction for the states at a window's end where backward takes their gradient from.

        goes_on: (b,) 1 of sequences that have steps behind the window, 0 of others, which have no future; None: all 1.
        """
        x = self.one.x(b)
        for rows, state in carries(self.parts, b, states=True):
            x[rows] = state
        found = self.one.forward(x)
        for rows, carry in carries(self.parts, b, states=False):
            carry[...] = found[rows]
            self.ops.scale(carry, factor * self.unit)
            if goes_on is not None:
                carry *= goes_on

    @property
    def unit(self) -> float:
        """The unit of M's outputs."""
        return sqrt(self.square)

    def note(self, square: float) -> None:
        """Take the mean square of gradients that came back, of all ranks' samples, into account."""
        if isfinite(square):
            self.square = KEPT * self.square + (1 - KEPT) * square if self.square else square

    def fit(self, b: int, count: float, goes_on: np.ndarray | None) -> float:
        """Fill M's gradient with half that of |predicted - returned|^2 over samples, in M's units, if these are known.

        Predicted: of the states that `remember` was called for last; returned: `count` times what backward has left
        of the window behind them. goes_on: as in `predict`, of the window before. Returns |returned|^2.
        """
        size = self.one.inputs * b
        misfit = self.ops.scratch("misfit", size, self.room.dtype)[:size]
        differ = misfit.reshape(-1, b)
        for rows, carry in carries(self.parts, b, states=False):
            differ[rows] = carry
        returned = count**2 * self.ops.squared_norm(misfit)
        if self.square:
            found = self.one.forward(self.room[:size].reshape(-1, b))
            self.ops.combine(misfit, (-count / self.unit, misfit), (1.0, found.reshape(-1)))
            if goes_on is not None:
                differ *= goes_on
            self.error += (self.square * self.ops.squared_norm(misfit), returned)
            self.one.backward(differ)
        return returned

    def remember(self, b: int) -> None:
        """Keep the states at a window's end."""
        kept = self.room[: self.one.inputs * b].reshape(-1, b)
        for rows, state in carries(self.parts, b, states=True):
            kept[rows] = state
