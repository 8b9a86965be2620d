"""The gradient of the future: M predicts it from the states at a window's end, and learns from the next window."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psmpi.nn.layers.recurrent import RecurrentPart
from psmpi.training.auxiliary import Auxiliary


def carries(parts: list[RecurrentPart], b: int, states: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, array (rows, b)) of what each layer carries, one below the other: its states, or the gradient of these."""
    at = 0
    for part in parts:
        rows = part.recurrence.carried * part.units
        yield slice(at, at + rows), (part.state if states else part.carry)[: rows * b].reshape(rows, b)
        at += rows


class Future:
    """M on a rank: from the states (states, b) of all recurrent layers to the gradient of these.

    Gradients are those of the sum of the minibatch's losses, whose size depends on no minibatch's: a mean's are small,
    and an optimizer such as Adam leaves noise as large. error: (2,), sums of |predicted - returned|^2 and |returned|^2
    since it was set to 0.
    """

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
            self.ops.scale(carry, factor)
            if goes_on is not None:
                carry *= goes_on

    def fit(self, b: int, count: float, goes_on: np.ndarray | None) -> None:
        """Fill M's gradient with half that of |predicted - returned|^2 summed over samples.

        Predicted: of the states that `remember` was called for last; returned: `count` times what backward has left
        of the window behind them. goes_on: as in `predict`, of the window before.
        """
        size = self.one.inputs * b
        found = self.one.forward(self.room[:size].reshape(-1, b))
        misfit = self.ops.scratch("misfit", size, found.dtype)[:size]
        differ = misfit.reshape(-1, b)
        for rows, carry in carries(self.parts, b, states=False):
            differ[rows] = carry
        returned = count**2 * self.ops.squared_norm(misfit)
        self.ops.combine(misfit, (-count, misfit), (1.0, found.reshape(-1)))
        if goes_on is not None:
            differ *= goes_on
        self.error += (self.ops.squared_norm(misfit), returned)
        self.one.backward(differ)

    def remember(self, b: int) -> None:
        """Keep the states at a window's end."""
        kept = self.room[: self.one.inputs * b].reshape(-1, b)
        for rows, state in carries(self.parts, b, states=True):
            kept[rows] = state
