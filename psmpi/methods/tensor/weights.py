"""Weights gathered along an axis of the grid, one layer ahead, and reduce-scatters of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.transfers import Handle, RowExchange


class Weights:
    """The gathered weights of each tile: (rows, columns), from (own rows, columns) of each rank.

    exchanges: one for each tile; shapes: of the gathered weights. keeps: whether gathered weights are kept from forward
    to backward, in an array for each tile; else two arrays take turns. ahead: whether the weights of the next tile are
    gathered while a product is computed. Gradients are summed in the same way, in two other arrays.
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
        self.one_rank = all(exchange.group.size == 1 for exchange in exchanges)
        most = max(rows * columns for rows, columns in shapes)
        sizes = [rows * columns for rows, columns in shapes] if keeps else [most] * min(2, len(shapes))
        self.rooms = [ops.empty(size, dtype) for size in ([] if self.one_rank else sizes)]
        self.gradients = [ops.empty(most, dtype) for _ in range(0 if self.one_rank else min(2, len(shapes)))]
        # This rank's rows of each tile, (own rows, columns), which the layers bind.
        self.own = [ops.empty(0, dtype)] * len(shapes)
        # The tile whose weights are in each room, or on their way there; -1: none.
        self.loaded = [-1] * len(self.rooms)
        self.arriving: Handle | None = None
        self.sums: list[Handle | None] = [None] * len(self.gradients)

    @property
    def nbytes(self) -> int:
        return int(sum(array.nbytes for array in (*self.rooms, *self.gradients)))

    def begin(self) -> None:
        """Begin a pass: gathered weights are out of date."""
        self.finish()
        self.loaded = [-1] * len(self.rooms)

    def take(self, k: int, following: int) -> np.ndarray:
        """Return the weights (rows, columns) of tile k. following: the tile whose weights are used next, -1: none."""
        if self.one_rank:
            return self.own[k]
        if not self._has(k):
            self._bring(k)
        self._arrive()
        if self.ahead and following >= 0 and not self._has(following):
            self._bring(following)
        return self._room(k)

    def _has(self, k: int) -> bool:
        return self.loaded[k % len(self.rooms)] == k

    def _room(self, k: int) -> np.ndarray:
        rows, columns = self.shapes[k]
        room: np.ndarray = self.rooms[k % len(self.rooms)][: rows * columns].reshape(rows, columns)
        return room

    def _bring(self, k: int) -> None:
        self._arrive()
        self.arriving = self.exchanges[k].begin(self.own[k], self._room(k))
        self.loaded[k % len(self.rooms)] = k

    def _arrive(self) -> None:
        if self.arriving is not None:
            self.arriving.finish()
            self.arriving = None

    def gradient(self, k: int, own: np.ndarray) -> np.ndarray:
        """Return the array for the gradient of tile k's gathered weights; `own` if the rank has all rows."""
        if self.one_rank:
            return own
        self._leave(k % len(self.gradients))
        rows, columns = self.shapes[k]
        gradient: np.ndarray = self.gradients[k % len(self.gradients)][: rows * columns].reshape(rows, columns)
        return gradient

    def send(self, k: int, gradient: np.ndarray, own: np.ndarray) -> None:
        """Begin to sum the gradient of tile k over ranks, into `own` (own rows, columns) of each rank."""
        if not self.one_rank:
            handle = self.exchanges[k].begin_back(gradient, own)
            if self.ahead:
                self.sums[k % len(self.gradients)] = handle
            else:
                handle.finish()

    def _leave(self, at: int) -> None:
        handle = self.sums[at]
        if handle is not None:
            handle.finish()
            self.sums[at] = None

    def finish(self) -> None:
        """Wait until all gradients are summed, and no weights are on their way."""
        self._arrive()
        for at in range(len(self.sums)):
            self._leave(at)
