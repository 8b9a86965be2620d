"""Products of a dense layer whose weight, inputs and outputs are cut over a grid of ranks.

The matrices here have units as rows and samples, or steps of samples, as columns: Y = W X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.transfers import Handle, Message, RowExchange, Spread, Step
from psmpi.methods.tensor.weights import Weights
from psmpi.nn.layers.workspace import Workspace

# An array, and the message that fills it; a function that begins to fetch a panel by its number.
Panel = tuple[np.ndarray, Handle]
Begin = Callable[[int], Panel]


class Products(Protocol):
    """Y = W X and its adjoints on one rank of a grid."""

    def bind(self, w: np.ndarray) -> None:
        """Compute with this tile of the weight, (rows, columns), from now on."""

    def forward(self, x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> None:
        """Compute y (outputs, n) from x (inputs, n), both this rank's pieces; kept (any, n) is for `backward`."""

    def backward(
        self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, gw: np.ndarray | None, kept: np.ndarray
    ) -> None:
        """Fill dx with the gradient of x, and gw, before the pass is finished, with that of the rank's tile."""

    def messages(self, columns: int, wanted: bool) -> list[Message]:
        """Return the messages of a forward and a backward pass; wanted: whether the gradient of x is computed."""


class Gathered:
    """Products of X and W gathered along two axes, and summed along a third: 3-D parallelism on any grid.

    Bian, Xu, Wang and You, "Maximizing parallelism in distributed training for huge neural networks", arXiv 2105.14450,
    of which products with one or two axes are special cases. inputs, outputs: exchanges of the pieces of X along the
    axis that gathers them, and of Y along the axis that sums them; None if the rank has what it needs. number: of the
    tile among those of `weights`; ends: numbers of the last tile, and of the first tile whose inputs have a gradient.
    whole: whether X, or Y, is whole on each rank (1-D parallelism: Shoeybi et al., arXiv 1909.08053). keeps: whether
    gathered X are kept for backward.
    """

    def __init__(
        self,
        inputs: RowExchange | None,
        outputs: RowExchange | None,
        weights: Weights,
        number: int,
        ends: tuple[int, int],
        ops: NumpyOps,
        space: Workspace,
        *,
        whole: bool = False,
        keeps: bool = False,
    ):
        self.inputs, self.outputs, self.weights, self.number, self.ends = inputs, outputs, weights, number, ends
        self.ops, self.space, self.whole = ops, space, whole
        self.gathers = inputs is not None and not whole
        self.rows, self.columns = weights.shapes[number]
        self.keeps = keeps

    def bind(self, w: np.ndarray) -> None:
        self.weights.own[self.number] = w

    def _take(self, forward: bool) -> np.ndarray:
        """Return the weights, and begin to gather those of the next tile."""
        last, first = self.ends
        following = self.number + 1 if forward else self.number - 1
        lowest = 0 if forward else first
        return self.weights.take(self.number, following if lowest <= following <= last else -1)

    def _gather(self, x: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Return all rows of X that the product needs."""
        if not self.gathers:
            return x
        n = x.shape[1]
        whole = kept if len(kept) else self.space.take("gathered inputs", self.columns, n)
        assert self.inputs is not None
        self.inputs.forward(x, whole)
        return whole

    def forward(self, x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> None:
        whole, w = self._gather(x, kept), self._take(True)
        if self.outputs is None:
            self.ops.matmul(w, whole, y)
            return
        product = self.space.take("products", self.rows, x.shape[1])
        self.ops.matmul(w, whole, product)
        self._sum(self.outputs, product, y)

    def _sum(self, exchange: RowExchange, product: np.ndarray, into: np.ndarray) -> None:
        """Write this rank's piece of the sum of products over ranks, or with `whole` all of it, to `into`."""
        if not self.whole:
            exchange.backward(product, into)
            return
        n = product.shape[1]
        piece = exchange.group.reduce_scatter(product, [count * n for count in exchange.counts])
        exchange.forward(piece.reshape(-1, n), into)

    def backward(
        self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, gw: np.ndarray | None, kept: np.ndarray
    ) -> None:
        n = x.shape[1]
        whole = kept if len(kept) else self._gather(x, kept)
        gradient = dy
        if self.outputs is not None and not self.whole:
            gradient = self.space.take("gathered gradients", self.rows, n)
            self.outputs.forward(dy, gradient)
        if gw is not None:
            into = self.weights.gradient(self.number, gw)
            self.ops.matmul(gradient, whole.T, into)
            self.weights.send(self.number, into, gw)
        if dx is None:
            return
        w = self._take(False)
        if self.inputs is None:
            self.ops.matmul(w.T, gradient, dx)
            return
        product = self.space.take("products", self.columns, n)
        self.ops.matmul(w.T, gradient, product)
        self._sum(self.inputs, product, dx)

    def messages(self, columns: int, wanted: bool) -> list[Message]:
        step, messages = Step(columns), []
        exchange = self.weights.exchanges[self.number]
        out, back = exchange.messages(Step(self.columns)), exchange.messages(Step(self.columns), back=True)
        messages += out + back
        # With two arrays, backward still has the gathered weights of the last two tiles.
        if wanted and len(self.weights.rooms) == 2 and self.number < self.ends[0] - 1:
            messages += out
        if self.inputs is not None:
            gather, scatter = self.inputs.messages(step), self.inputs.messages(step, back=True)
            if self.gathers:
                messages += gather * (1 if self.keeps else 2)
            if wanted:
                messages += scatter + (gather if self.whole else [])
        if self.outputs is not None:
            messages += self.outputs.messages(step, back=True) + self.outputs.messages(step)
        return messages


class Panels:
    """Products of panels of X and W, broadcast along the rows and columns of a square of ranks: SUMMA.

    van de Geijn and Watts, "SUMMA: scalable universal matrix multiplication algorithm" (1997), with the adjoints of Xu
    et al., "An efficient 2D method for training super-large deep learning models", arXiv 2104.05343. inputs, weights:
    broadcasts of each panel of X (counts[k], n) along j and of W (rows, counts[k]) along i. reads_samples: whether
    X has all units. ahead: whether the next panels are broadcast, and the last products summed, while a product is
    computed.
    """

    def __init__(
        self,
        inputs: list[Spread],
        weights: list[Spread],
        counts: list[int],
        rows: int,
        ops: NumpyOps,
        space: Workspace,
        *,
        reads_samples: bool = False,
        ahead: bool = True,
    ):
        self.inputs, self.weights, self.counts, self.rows = inputs, weights, counts, rows
        self.ops, self.space, self.reads_samples, self.ahead = ops, space, reads_samples, ahead
        self.w: np.ndarray = ops.empty(0, space.dtype)
        self.starts = np.cumsum([0, *counts]).tolist()

    def bind(self, w: np.ndarray) -> None:
        self.w = w

    def _x(self, x: np.ndarray) -> Begin:
        """Return a function that begins to fetch a panel of X."""

        def begin(k: int) -> Panel:
            if self.reads_samples:
                return x[self.starts[k] : self.starts[k + 1]], Handle([])
            return self._panel(self.inputs[k], x, f"panel of inputs {k % 2}", (self.counts[k], x.shape[1]))

        return begin

    def _w(self, k: int) -> Panel:
        """Begin to fetch panel k of W."""
        return self._panel(self.weights[k], self.w, f"panel of weights {k % 2}", (self.rows, self.counts[k]))

    def _panel(self, spread: Spread, own: np.ndarray, room: str, shape: tuple[int, int]) -> Panel:
        """Return a panel, the rank's own or one that is received, and its message."""
        if spread.at_root:
            return own, spread.begin(own, None)
        panel = self.space.take(room, *shape)
        return panel, spread.begin(None, panel)

    def _each(self, *begins: Begin) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield the number and the panels of each product in turn."""
        count, coming = len(self.counts), [begin(0) for begin in begins]
        for k in range(count):
            for _, handle in coming:
                handle.finish()
            panels = [panel for panel, _ in coming]
            following = [begin(k + 1) for begin in begins] if self.ahead and k + 1 < count else []
            yield k, panels
            coming = following or [begin(k + 1) for begin in begins if k + 1 < count]

    def forward(self, x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> None:
        for k, (panel, w) in self._each(self._x(x), self._w):
            if k == 0:
                self.ops.matmul(w, panel, y)
            else:
                product = self.space.take("products", *y.shape)
                self.ops.matmul(w, panel, product)
                y += product

    def backward(
        self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, gw: np.ndarray | None, kept: np.ndarray
    ) -> None:
        if gw is not None:
            shapes = [(self.rows, count) for count in self.counts]
            self._sum(self._x(x), self.weights, gw, shapes, lambda panel, out: self.ops.matmul(dy, panel.T, out))
        if dx is not None:
            shapes = [(count, dy.shape[1]) for count in self.counts]
            self._sum(self._w, self.inputs, dx, shapes, lambda panel, out: self.ops.matmul(panel.T, dy, out))

    def _sum(
        self,
        begin: Begin,
        spreads: list[Spread],
        own: np.ndarray,
        shapes: list[tuple[int, int]],
        multiply: Callable[[np.ndarray, np.ndarray], None],
    ) -> None:
        """Sum the products of each panel, of `shapes`, over ranks, to the panel's rank; own: this rank's sum."""
        going = [Handle([]), Handle([])]
        for k, (panel,) in self._each(begin):
            at_root = spreads[k].at_root
            # The array may be written again only when its last message has been sent.
            going[k % 2].finish()
            product = own if at_root else self.space.take(f"sums {k % 2}", *shapes[k])
            multiply(panel, product)
            going[k % 2] = spreads[k].begin_back(None if at_root else product, product if at_root else None)
            if not self.ahead:
                going[k % 2].finish()
        for handle in going:
            handle.finish()

    def messages(self, columns: int, wanted: bool) -> list[Message]:
        step, messages = Step(columns), []
        for spread in self.weights:
            messages += spread.messages(step) * (2 if wanted else 1) + spread.messages(step, back=True)
        for spread in self.inputs:
            messages += [] if self.reads_samples else spread.messages(step) * 2
            messages += spread.messages(step, back=True) if wanted else []
        return messages
