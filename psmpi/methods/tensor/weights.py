"""Rows of weights that the ranks along an axis have, gathered one layer ahead, and their gradients on the way back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.transfers import Handle, RowExchange


class Weights:
    """The weights that products need, of tile after tile: (rows, columns) from (own rows, columns) of each rank.

    exchanges: of each tile; shapes: of what is gathered. keeps: whether gathered weights are kept from forward to
    backward, in an array for each tile; else two arrays take turns. ahead: whether those of the next tile are gathered
    while a product is made. Gradients go back in the same way, in two arrays of their own.
    """

    def __init__(
        self,
        exchanges: Sequence[RowExchange],
        shapes: Sequence[tuple[int, int]],
        ops: NumpyOps,
        dtype: np.dtype,
        keeps: bool,
        ahead: bool,
    ):
        self.exchanges, self.shapes, self.ahead = exchanges, shapes, ahead
        self.alone = all(exchange.group.size == 1 for exchange in exchanges)
        most = max(rows * columns for rows, columns in shapes)
        sizes = [rows * columns for rows, columns in shapes] if keeps else [most] * min(2, len(shapes))
        self.rooms = [ops.empty(size, dtype) for size in ([] if self.alone else sizes)]
        self.gradients = [ops.empty(most, dtype) for _ in range(0 if self.alone else min(2, len(shapes)))]
        # Of each tile its own rows, (own rows, columns), which their layers bind.
        self.own = [ops.empty(0, dtype)] * len(shapes)
        # Of each room the tile whose weights it has, or will have.
        self.held = [-1] * len(self.rooms)
        self.coming: Handle | None = None
        self.going: list[Handle | None] = [None] * len(self.gradients)

    @property
    def nbytes(self) -> int:
        return int(sum(array.nbytes for array in (*self.rooms, *self.gradients)))

    def begin(self) -> None:
        """A pass begins, and weights may have changed."""
        self.finish()
        self.held = [-1] * len(self.rooms)

    def take(self, k: int, following: int) -> np.ndarray:
        """The weights of tile k, (rows, columns); those of tile `following` are wanted next, -1: none."""
        if self.alone:
            return self.own[k]
        if not self._has(k):
            self._bring(k)
        self._arrive()
        if self.ahead and following >= 0 and not self._has(following):
            self._bring(following)
        return self._room(k)

    def _has(self, k: int) -> bool:
        return self.held[k % len(self.rooms)] == k

    def _room(self, k: int) -> np.ndarray:
        rows, columns = self.shapes[k]
        found: np.ndarray = self.rooms[k % len(self.rooms)][: rows * columns].reshape(rows, columns)
        return found

    def _bring(self, k: int) -> None:
        self._arrive()
        self.coming = self.exchanges[k].begin(self.own[k], self._room(k))
        self.held[k % len(self.rooms)] = k

    def _arrive(self) -> None:
        if self.coming is not None:
            self.coming.finish()
            self.coming = None

    def gradient(self, k: int, own: np.ndarray) -> np.ndarray:
        """Where the gradient of what tile k has gathered is to be put; `own` where that is the rank's own alone."""
        if self.alone:
            return own
        self._leave(k % len(self.gradients))
        rows, columns = self.shapes[k]
        found: np.ndarray = self.gradients[k % len(self.gradients)][: rows * columns].reshape(rows, columns)
        return found

    def send(self, k: int, gradient: np.ndarray, own: np.ndarray) -> None:
        """Begin to sum it over the ranks, into `own` (own rows, columns) of each."""
        if not self.alone:
            handle = self.exchanges[k].begin_back(gradient, own)
            if self.ahead:
                self.going[k % len(self.gradients)] = handle
            else:
                handle.finish()

    def _leave(self, at: int) -> None:
        handle = self.going[at]
        if handle is not None:
            handle.finish()
            self.going[at] = None

    def finish(self) -> None:
        """Wait until all gradients are there, and no weights are on their way."""
        self._arrive()
        for at in range(len(self.going)):
            self._leave(at)
