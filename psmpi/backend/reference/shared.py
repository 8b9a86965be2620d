"""Steps of stochastic gradient descent on weights that other processes may update at the same time (Hogwild)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from psmpi.backend.reference.arrays import Arrays

# Numbers of the losses of one score, and of the kinds of locks, in the C kernels.
SLOPES = {"logistic": 0, "hinge": 1, "squared": 2}
LOCKS = {"none": 0, "ticket": 1, "mutex": 2}


class Rows(NamedTuple):
    """Samples in compressed sparse rows: sample s has the entries starts[s] to starts[s + 1] - 1.

    starts: (samples + 1,) int64; columns: (entries,) int32; values: (entries,); targets: (samples,), -1 and 1 for two
    classes; often: (features,), the factor of a column's penalty in the loss of each sample that has the column
    (samples / samples with the column). values, targets and often have the dtype of the weights.
    """

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    targets: np.ndarray
    often: np.ndarray


class Room(NamedTuple):
    """Scratch of `sparse_blocks`.

    own, base: (features,) of the weights' dtype; mark: (features,) uint8, all 0; touched: (features + 1,) int32.
    """

    own: np.ndarray
    base: np.ndarray
    mark: np.ndarray
    touched: np.ndarray

    @classmethod
    def of(cls, features: int, dtype: np.dtype) -> Room:
        """Allocate the scratch for this number of features."""
        own, base = np.zeros((2, features), dtype)
        return cls(own, base, np.zeros(features, np.uint8), np.zeros(features + 1, np.int32))


class Pairs(NamedTuple):
    """Samples that are pairs of different tokens: tokens (samples, 2) int32.

    targets: (samples,); often: (tokens,), as in `Rows` with tokens for columns.
    """

    tokens: np.ndarray
    targets: np.ndarray
    often: np.ndarray


class Descent(NamedTuple):
    """Settings of the steps.

    lr: learning rate. penalty: factor of the L2 penalty, whose step never changes the sign of a weight. clip: largest
    norm of the gradient of a sample's loss, 0: no limit. loss: a key of SLOPES. scale: factor of the loss in
    `sparse_steps`.
    """

    lr: float
    penalty: float = 0.0
    clip: float = 0.0
    loss: str = "logistic"
    scale: float = 1.0


class SharedUpdates(Arrays):
    """Updates of weights in memory that processes may share.

    atomics: whether this backend can add atomically. NumPy cannot, and ignores the argument `atomic`.
    """

    atomics = False

    def add_shared(self, w: np.ndarray, g: np.ndarray, factor: float, atomic: bool) -> None:
        """w (n,) += factor g where g (n,) is not 0; other elements of w are not written."""
        (at,) = np.nonzero(g)
        w[at] += g[at] * g.dtype.type(factor)

    def sparse_steps(
        self, order: np.ndarray, rows: Rows, w: np.ndarray, bias: np.ndarray | None, how: Descent, atomic: bool
    ) -> float:
        """Take a gradient step of a linear model for each of the samples `order` (n,) int64, in this order.

        The loss of a sample is the loss of its score plus how.penalty / 2 times the sum of often w^2 over its columns.
        w: (features,); bias: (1,) or None; both of one dtype. Returns the sum of the losses without the penalty.
        """
        total, kind = 0.0, w.dtype.type
        for sample in order.tolist():
            at = slice(rows.starts[sample], rows.starts[sample + 1])
            columns, x = rows.columns[at], rows.values[at]
            score = np.dot(x, w[columns]) + (0 if bias is None else bias[0])
            loss, d = _slope(how.loss, float(score), float(rows.targets[sample]))
            total, d = total + how.scale * loss, how.scale * d
            length = abs(d) * float(np.sqrt(np.square(x, dtype=np.float64).sum() + (bias is not None)))
            if 0 < how.clip < length:
                d *= how.clip / length
            step, shrink = kind(-how.lr * d), kind(how.lr * how.penalty)
            w[columns] = w[columns] * np.maximum(1 - shrink * rows.often[columns], 0) + step * x
            if bias is not None:
                bias[0] = bias[0] * max(1 - shrink, kind(0)) + step
        return total

    def sparse_blocks(
        self, order: np.ndarray, rows: Rows, w: np.ndarray, bias: np.ndarray | None, how: Descent, atomic: bool,
        block: int, room: Room,
    ) -> float:  # fmt: skip
        """Take `sparse_steps` on a copy of the weights, and add its changes to w after each `block` samples."""
        total = 0.0
        for at in range(0, len(order), block):
            own, own_bias = w.copy(), None if bias is None else bias.copy()
            before, bias_before = own.copy(), None if own_bias is None else own_bias.copy()
            total += self.sparse_steps(order[at : at + block], rows, own, own_bias, how, False)
            self.add_shared(w, own - before, 1.0, atomic)
            if bias is not None and own_bias is not None and bias_before is not None:
                bias += own_bias - bias_before
        return total

    def factor_steps(self, order: np.ndarray, pairs: Pairs, w: np.ndarray, how: Descent, atomic: bool) -> float:
        """Take a gradient step of a matrix factorization for each of the pairs `order` (n,) int64, in this order.

        A step changes the two columns of w (units, tokens) of the pair's tokens. The loss of a pair is (scalar product
        of the columns - target)^2 plus how.penalty / 2 times often |column|^2 of both columns. Returns the sum of the
        losses without the penalty.
        """
        total, kind = 0.0, w.dtype.type
        for sample in order.tolist():
            tokens = pairs.tokens[sample]
            a, b = (w[:, token].astype(np.float64) for token in tokens)
            loss, d = _slope("squared", float(a @ b), float(pairs.targets[sample]))
            total += loss
            length = abs(d) * float(np.sqrt(a @ a + b @ b))
            if 0 < how.clip < length:
                d *= how.clip / length
            step, keep = kind(-how.lr * d), np.maximum(1 - kind(how.lr * how.penalty) * pairs.often[tokens], 0)
            w[:, tokens] = w[:, tokens] * keep + step * w[:, tokens[::-1]]
        return total

    def count_rows(self, order: np.ndarray, rows: Rows, counts: np.ndarray, atomic: bool) -> None:
        """counts (features,) int64 += 1 for each entry of the samples `order`, written as `sparse_steps` writes w."""
        for sample in order.tolist():
            counts[rows.columns[rows.starts[sample] : rows.starts[sample + 1]]] += 1

    def deal_components(
        self, order: np.ndarray, starts: np.ndarray, columns: np.ndarray, workers: int, seen: np.ndarray
    ) -> tuple[np.ndarray, int, int]:
        """Assign samples `order` (n,) to workers so that no two workers share a column (CYCLADES, Pan et al. 2016).

        The components are those of the graph that joins samples with a common column. In the order of their first
        samples, each goes to the first worker with the smallest load (entries plus samples). Returns the worker of each
        sample (n,) int32, the number of components, and the number of samples of the largest. seen: (features,) int32
        scratch, all -1 before and after.
        """
        rows = [columns[starts[sample] : starts[sample + 1]].tolist() for sample in order.tolist()]
        parent = list(range(len(rows)))
        first: dict[int, int] = {}
        for s, row in enumerate(rows):
            for column in row:
                a, b = _root(parent, first.setdefault(column, s)), _root(parent, s)
                parent[max(a, b)] = min(a, b)
        roots = [_root(parent, s) for s in range(len(rows))]
        load, owner = [0] * workers, np.empty(len(rows), np.int32)
        for root in dict.fromkeys(roots):
            members = [s for s, of in enumerate(roots) if of == root]
            to = load.index(min(load))
            load[to] += sum(len(rows[s]) + 1 for s in members)
            owner[members] = to
        return owner, len(set(roots)), max((roots.count(root) for root in set(roots)), default=0)


def _root(parent: Sequence[int], s: int) -> int:
    while parent[s] != s:
        s = parent[s]
    return s


def _slope(loss: str, score: float, target: float) -> tuple[float, float]:
    """Return the loss of a score with a target, and its derivative with respect to the score."""
    z = target * score
    if loss == "logistic":
        return float(np.logaddexp(0, -z)), float(-target * np.exp(-np.logaddexp(0, z)))
    if loss == "hinge":
        return (float(np.maximum(0.0, 1 - z)), -target) if not z >= 1 else (0.0, 0.0)
    return (score - target) ** 2, 2 * (score - target)
