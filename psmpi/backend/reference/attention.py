"""Attention of heads (Vaswani et al. 2017), as products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt

import numpy as np

from psmpi.backend.reference.products import Products

# take(name, *shape): a scratch array of this shape in the dtype of the computation, valid until the next call with the
# same name.
Take = Callable[..., np.ndarray]


class Attention(Products):
    """Multi-head attention. Samples become the first axis; each head's queries, keys and values are (size, steps)."""

    def attention(
        self, x: np.ndarray, heads: int, causal: bool, lengths: np.ndarray | None, y: np.ndarray, take: Take
    ) -> None:
        """y (units, steps, b) = values weighted by softmax(queries^T keys / sqrt(size)), for each head.

        x: (3 units, steps, b), for each head the rows of queries, then keys, then values; size: units / heads. causal:
        a step attends to itself and earlier steps only. lengths: (b,) int32, steps attend only to those before the end
        of their sample; None: to all. take: allocates scratch.
        """
        batch, turned, out = x.shape[2], self._turned(take, "x", x), take("attention y", *_first(y))
        for some, p in self._probabilities(take, turned, heads, causal, lengths):
            _, _, values = self._heads(turned[some], heads)
            self.matmul(values, p.transpose(0, 2, 1), out[some].reshape(values.shape))
        self.turn(out.reshape(batch, -1), y.reshape(-1, batch))

    def attention_back(
        self,
        x: np.ndarray,
        heads: int,
        causal: bool,
        lengths: np.ndarray | None,
        dy: np.ndarray,
        dx: np.ndarray,
        take: Take,
    ) -> None:
        """The adjoint of `attention`: dx (3 units, steps, b) from dy (units, steps, b).

        The probabilities are computed again.
        """
        batch, turned, dout = x.shape[2], self._turned(take, "x", x), self._turned(take, "y", dy)
        dturned = take("attention dx", *_first(x))
        for some, p in self._probabilities(take, turned, heads, causal, lengths):
            queries, keys, values = self._heads(turned[some], heads)
            dqueries, dkeys, dvalues = self._heads(dturned[some], heads)
            d, dp = dout[some].reshape(values.shape), take("attention dp", *p.shape)
            self.matmul(d, p, dvalues)
            self.matmul(d.transpose(0, 2, 1), values, dp)
            self.softmax_back(p, 1 / sqrt(values.shape[1]), dp)
            self.matmul(keys, dp.transpose(0, 2, 1), dqueries)
            self.matmul(queries, dp, dkeys)
        self.turn(dturned.reshape(batch, -1), dx.reshape(-1, batch))

    def turn(self, values: np.ndarray, out: np.ndarray) -> None:
        """out (columns, rows) = the transpose of values (rows, columns)."""
        out[...] = values.T

    def softmax(self, s: np.ndarray, scale: float, causal: bool, heads: int, lengths: np.ndarray | None) -> None:
        """s (samples heads, steps, steps) becomes softmax(scale s) of each row, in place.

        A row attends to all steps; if `causal`, to steps up to its own; with lengths (samples,) int32, to steps before
        the end of its sample. The probabilities of other steps are 0.
        """
        steps, off = np.arange(s.shape[2]), np.zeros((1, *s.shape[1:]), bool)
        if causal:
            off |= steps > steps[:, None]
        if lengths is not None:
            off = off | (steps >= np.repeat(lengths, heads)[:, None, None])
        s *= scale
        np.copyto(s, -np.inf, where=off)
        s -= s.max(axis=2, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=2, keepdims=True)

    def softmax_back(self, p: np.ndarray, scale: float, dp: np.ndarray) -> None:
        """dp (n, steps, steps), the gradient of p = softmax(scale s), becomes the gradient of s, in place."""
        dp -= np.einsum("nij,nij->ni", p, dp)[:, :, None]
        dp *= p
        dp *= scale

    def _probabilities(
        self, take: Take, turned: np.ndarray, heads: int, causal: bool, lengths: np.ndarray | None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Iterate over slices of samples with their probabilities (samples heads, steps, steps)."""
        batch, _, steps = turned.shape
        each = max(1, self.chunk // (heads * steps**2))
        for first in range(0, batch, each):
            some = slice(first, min(first + each, batch))
            queries, keys, values = self._heads(turned[some], heads)
            p = take("attention p", len(queries), steps, steps)
            self.matmul(queries.transpose(0, 2, 1), keys, p)
            own = None if lengths is None else lengths[some]
            self.softmax(p, 1 / sqrt(values.shape[1]), causal, heads, own)
            yield some, p

    @staticmethod
    def _heads(turned: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of the queries, keys and values (samples heads, size, steps) in samples (n, 3 units, steps)."""
        apart = turned.reshape(len(turned) * heads, 3, -1, turned.shape[2])
        return apart[:, 0], apart[:, 1], apart[:, 2]

    def _turned(self, take: Take, name: str, values: np.ndarray) -> np.ndarray:
        """Return values (rows, steps, b) transposed to (b, rows, steps), in scratch."""
        batch = values.shape[2]
        made = take(f"attention {name}", *_first(values))
        self.turn(values.reshape(-1, batch), made.reshape(batch, -1))
        return made


def _first(x: np.ndarray) -> tuple[int, int, int]:
    """The shape (b, rows, steps) of x (rows, steps, b) after samples have become the first axis."""
    return x.shape[2], x.shape[0], x.shape[1]
