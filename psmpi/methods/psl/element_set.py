"""The element functions of a worker: variables, gradient and value of each element on a minibatch.

An element f_ij is the sum of the loss terms of the pair (label i, other class j); it depends on the subnetworks of i
and j. All elements of a worker share the forward pass. Backward goes once through each class's subnetwork and sums the
samples' gradients with weights for each element: those of the samples with the element's label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from psmpi.backend import NumpyOps, RunCopies
from psmpi.layout import Layout, Runs
from psmpi.methods.psl.borrowed import Borrowed
from psmpi.nn.layers import SampleSums
from psmpi.nn.layers.chain import Tape
from psmpi.nn.losses import Loss
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.optim.curvature import curvature_ops


def elements_of(pairs: Iterable[tuple[int, int]], merged: bool) -> list[tuple[int, int]]:
    """Return the elements of pairs of classes, in order: `merged` (i, j) with i < j, else both (i, j) and (j, i)."""
    unordered = sorted((min(pair), max(pair)) for pair in pairs)
    return unordered if merged else [pair for i, j in unordered for pair in ((i, j), (j, i))]


def largest_element(layout: Layout) -> int:
    """Return the number of variables of the network's largest element."""
    return max(layout.part(pair).size for pair in combinations(range(layout.classes), 2))


@dataclass(frozen=True)
class Side:
    """One class's score in the loss of the elements that depend on it: `terms` weighted sums of samples' gradients.

    number: of the class among the worker's; slices: of the class's weights in the worker's part; other_classes:
    (terms,) numbers of the other classes. own_label_factors: (terms,) 0 or -1, the factors of the loss's derivatives
    with respect to the other score, over samples of this class. other_label_factors: (terms,) 0 or 1, the factors of
    the derivatives with respect to this score, over samples of the other class. sums: (terms, weights of the class);
    spread: adds these sums to the elements' gradients.
    """

    number: int
    slices: list[slice]
    model: Model
    borrowed: Borrowed
    other_classes: np.ndarray
    own_label_factors: np.ndarray
    other_label_factors: np.ndarray
    sums: np.ndarray
    spread: RunCopies


class ElementSet:
    """Ordered elements (i, j) and (j, i) of each of `pairs`, or with `merged` their sums {i, j}.

    classes: the worker's classes. The variables of an element are a row of `size` numbers, as many as the network's
    largest element has; rows of smaller elements end in zeros. Vectors, samples and the mask of `loss` are where `ops`
    computes.
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        classes: Sequence[int],
        pairs: Iterable[tuple[int, int]],
        dtype: np.dtype,
        ops: NumpyOps,
        loss: Loss,
        *,
        merged: bool = False,
    ):
        self.classes, self.ops, self.dtype = tuple(classes), ops, np.dtype(dtype)
        self.part = layout.part(self.classes)
        self.elements = elements_of(pairs, merged)
        ordered = elements_of(pairs, merged=False)
        variables = [layout.part(e) for e in self.elements]
        self.count = len(self.elements)
        # The same on every rank, as the rows of all ranks form one table.
        self.size = largest_element(layout)
        self.curvature = curvature_ops(ops)
        self.restriction = self.curvature.restriction([self._slices(v) for v in variables], self.size)
        at = {c: k for k, c in enumerate(self.classes)}
        mask = np.zeros((len(self.classes),) * 2, bool)
        for i, j in ordered:
            mask[at[i], at[j]] = True
        self.mask = ops.put(mask)
        self.whole = Model(network, layout, ops.zeros(self.part.size, self.dtype), None, ops, self.classes)
        self.objective = Objective(loss, self.whole)
        # One buffer for the sums of all classes, one class after the other.
        largest = max(layout.part((c,)).size for c in self.classes)
        self.sums = ops.empty((1 if merged else 2) * (len(self.classes) - 1) * largest, self.dtype)
        self.sides = [self._side(network, layout, c, at, ordered, merged) for c in self.classes]
        # A merged element has samples of both labels, another one of its first label.
        self.labels = np.array([[at[c] for c in (e[0], e[-1] if merged else e[0])] for e in self.elements], int)
        self.labels = self.labels.reshape(self.count, 2)
        record = self.objective.record
        self._only_losses, self._all_gradients = record(self._losses), record(self._gradients)
        self.capacity = 0
        self.reserve(1)

    def _side(
        self,
        network: Network,
        layout: Layout,
        c: int,
        at: dict[int, int],
        ordered: Sequence[tuple[int, int]],
        merged: bool,
    ) -> Side:
        runs = layout.part((c,))
        # Element, other class, factors: a merged element takes the terms of both labels at once.
        if merged:
            terms = [((min(c, j), max(c, j)), j, -1, 1) for i, j in ordered if i == c]
        else:
            terms = [(e, e[0] + e[1] - c, -(e[0] == c), e[1] == c) for e in ordered if c in e]
        table = []
        for k, (e, _, _, _) in enumerate(terms):
            variables, row = layout.part(e), self.elements.index(e) * self.size
            for run in runs.intervals:
                start = runs.local(*run).start
                table.append((k * runs.size + start, row + variables.local(*run).start, run[1] - run[0]))
        own = self.ops.zeros(runs.size, self.dtype)
        model = Model(network, layout, own, None, self.ops, (c,), space=self.whole.space)
        return Side(
            number=at[c],
            slices=[self.part.local(*run) for run in runs.intervals],
            model=model,
            borrowed=Borrowed(model, self.whole),
            other_classes=self.ops.put(np.array([at[other] for _, other, _, _ in terms], np.int64)),
            own_label_factors=self.ops.put(np.array([lost for _, _, lost, _ in terms], self.dtype)),
            other_label_factors=self.ops.put(np.array([won for _, _, _, won in terms], self.dtype)),
            sums=self.sums[: len(terms) * runs.size].reshape(-1, runs.size),
            spread=self.ops.run_copies(np.array(table, np.int64).reshape(-1, 3)),
        )

    def _slices(self, runs: Runs) -> list[tuple[int, int]]:
        """Return the slices of the part with these runs of the flat vector."""
        return [(s.start, s.stop) for s in (self.part.local(*run) for run in runs.intervals)]

    def make_vectors(self) -> np.ndarray:
        """Return zeros (elements, size)."""
        return self.ops.zeros(self.count * self.size, self.dtype).reshape(self.count, self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        models = [self.whole, *(side.model for side in self.sides)]
        held = sum(m.w.nbytes + m.activation_bytes + m.buffer_bytes for m in models)
        held += sum(side.borrowed.nbytes for side in self.sides)
        moves = self.restriction.nbytes + sum(side.spread.nbytes for side in self.sides)
        own = (self.mask, self.sums, self.labels, self.scores, self.weights, self.ones)
        return held + moves + self.objective.nbytes + sum(a.nbytes for a in own)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        count = len(self.classes)
        self.scores = self.ops.empty(count * batch, self.dtype)
        self.weights = self.ops.empty(2 * count * batch, self.dtype)
        # The derivative of a score with respect to itself, which backward overwrites.
        self.ones = self.ops.empty(batch, self.dtype)
        self.objective.reserve(count, batch)
        self.whole.reserve(batch)
        for side in self.sides:
            side.borrowed.reserve(batch)

    def restrict(self, vector: np.ndarray, out: np.ndarray) -> None:
        """Compute out (elements, size) = U_e vector for every element; the ends of smaller elements' rows stay."""
        self.restriction.restrict(vector, out)

    def accumulate(self, values: np.ndarray, out: np.ndarray) -> None:
        """Compute out (weights of the part,) = sum_e U_e^T values_e, values (elements, size)."""
        self.restriction.accumulate(values, out)

    def value(self, w: np.ndarray, x: np.ndarray, labels: np.ndarray, scale: float) -> float:
        """Return the scaled sum of the elements at the part's weights w, over the first b samples of x (features, any).

        labels: (b,), numbers among `classes`, in host memory. Raise FloatingPointError for a sum that is not finite.
        """
        if len(labels) == 0:
            return 0.0
        self._bring(w, labels, x.shape[1])
        self._only_losses(x, len(labels), scale)
        return self.objective.value()

    def gradients(self, w: np.ndarray, x: np.ndarray, labels: np.ndarray, scale: float, out: np.ndarray) -> float:
        """Return `value`; fill out (elements, size) with the gradient of each element, and zeros after it."""
        if len(labels) == 0:
            out.fill(0)
            return 0.0
        self._bring(w, labels, x.shape[1])
        self._all_gradients(x, out, len(labels), scale)
        return self.objective.value()

    def _bring(self, w: np.ndarray, labels: np.ndarray, batch: int) -> None:
        """Copy weights and labels to the arrays that recorded passes on `batch` samples read."""
        self.reserve(batch)
        self.objective.bring(labels)
        self.whole.w[...] = w

    def _losses(self, x: np.ndarray, b: int, scale: float, derivatives: bool = False) -> tuple[Tape, np.ndarray]:
        """Compute the losses of the first b samples of x; return the tape, and their derivatives (classes, b)."""
        tape = self.whole.forward(x)
        scores = tape.scores
        if b < x.shape[1]:
            first = self.scores[: len(scores) * b].reshape(len(scores), b)
            first[...] = scores[:, :b]
            scores = first
        derived = self.objective.losses(scores, self.objective.targets(b), scale, self.mask, derivatives)
        return tape, derived

    def _gradients(self, x: np.ndarray, out: np.ndarray, b: int, scale: float) -> None:
        """Fill `out` (elements, size) with the gradients over the first b samples of x."""
        batch = x.shape[1]
        out.fill(0)
        # The derivative of a pairwise loss with respect to another class's score comes from one term alone.
        (whole, grad), report = self._losses(x, b, scale, derivatives=True), self.objective.report.array
        for side in self.sides:
            terms, model, start = len(side.other_classes), side.model, 0
            for run in side.slices:
                stop = start + run.stop - run.start
                model.w[start:stop] = self.whole.w[run]
                start = stop
            tape = side.borrowed.tape(whole)
            weights = self.weights[: terms * batch].reshape(terms, batch)
            self.curvature.term_weights(
                grad,
                self.objective.targets(b),
                report,
                side.number,
                side.other_classes,
                side.own_label_factors,
                side.other_label_factors,
                weights,
            )
            ones = self.ones[:batch].reshape(1, batch)
            ones.fill(1)
            model.backward(tape, ones, sums=SampleSums(weights, side.sums))
            side.spread.add(side.sums, out)
        self.ops.unscale(out.reshape(-1), report, GRADIENT_LIMIT[self.dtype])

    def seen(self, labels: np.ndarray) -> np.ndarray:
        """Return (elements,) bool: whether the labels have one of the element's."""
        present = np.bincount(labels, minlength=len(self.classes)) > 0
        seen: np.ndarray = present[self.labels].any(axis=1)
        return seen
