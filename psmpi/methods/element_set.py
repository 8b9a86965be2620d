"""The element functions of a worker one by one: their variables, their gradients and their values on a minibatch.

An element f_ij is the sum of the loss terms of the pair (label i, other class j); it sees the subnetworks of i and j.
All elements of a worker share the forward pass, and one backward pass a class that keeps the samples apart: an
element's gradient is a weighted sum of these over the samples of its label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.nn.losses import Loss, excess, give_back
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.partition import Layout


class ElementSet:
    """Ordered elements (i, j) and (j, i) of each of `pairs`, or with `merged` their sums {i, j}.

    classes: the worker's classes; arrays of elements are (len(elements), size), `size` being the number of variables of
    the largest one: smaller ones are filled up with zeros. index (elements, size): an element's variables as positions
    in the worker's part, its own size where there is none.
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        classes: Sequence[int],
        pairs: Iterable[tuple[int, int]],
        dtype: np.dtype,
        ops: NumpyOps,
        *,
        merged: bool = False,
    ):
        self.classes, self.ops, self.dtype = tuple(classes), ops, np.dtype(dtype)
        self.part = layout.part(self.classes)
        unordered = sorted(tuple(sorted(pair)) for pair in pairs)
        ordered = [pair for i, j in unordered for pair in ((i, j), (j, i))]
        self.elements: list[tuple[int, ...]] = list(unordered) if merged else list(ordered)
        number = {e: k for k, e in enumerate(self.elements)}
        # Where each class's part lies in the worker's.
        self.inside = []
        for c in self.classes:
            slices = [self.part.local(a, b) for a, b in layout.part((c,)).intervals]
            self.inside.append(np.concatenate([np.arange(s.start, s.stop) for s in slices]))
        at = {c: k for k, c in enumerate(self.classes)}
        variables = [np.union1d(self.inside[at[i]], self.inside[at[j]]) for i, j in self.elements]
        self.sizes = np.array([len(v) for v in variables])
        self.size = int(self.sizes.max(initial=0))
        count, largest = len(self.elements), max(len(v) for v in self.inside)
        self.index = np.full((count, self.size), self.part.size, np.int64)
        for e, found in enumerate(variables):
            self.index[e, : len(found)] = found
        # For each label: numbers of its elements and of the other classes, and where the variables of the label's
        # class and of the others lie among all elements' variables; what is left over goes behind the last.
        self.terms = []
        for i in self.classes:
            others = [j for a, j in ordered if a == i]
            numbers = [number[(min(i, j), max(i, j)) if merged else (i, j)] for j in others]
            places = np.full((2, len(others), largest), count * self.size, np.int64)
            for k, (e, j) in enumerate(zip(numbers, others, strict=True)):
                for side, c in enumerate((i, j)):
                    mine = self.inside[at[c]]
                    places[side, k, : len(mine)] = e * self.size + np.searchsorted(variables[e], mine)
            self.terms.append((np.array(numbers, int), np.array([at[j] for j in others], int), places))
        self.mask = np.zeros((len(self.classes),) * 2, bool)
        for i, j in ordered:
            self.mask[at[i], at[j]] = True
        self.models = []
        for c, mine in zip(self.classes, self.inside, strict=True):
            w = np.zeros(len(mine), self.dtype)
            self.models.append(Model(network, layout, w, np.empty_like(w), ops, (c,)))
        # For values alone: what classes share is computed once.
        self.whole = Model(network, layout, np.zeros(self.part.size, self.dtype), None, ops, self.classes)
        self.largest = largest
        self.extended = np.zeros(self.part.size + 1, self.dtype)
        self.flat = np.zeros(count * self.size + 1, self.dtype)
        # Of a merged element either label will do.
        present = [(e[0],) if not merged else e for e in self.elements]
        self.labels = np.array([[at[c] for c in (p[0], p[-1])] for p in present], int).reshape(count, 2)
        self.capacity = 0
        self.reserve(1)

    @property
    def nbytes(self) -> int:
        """Bytes of everything it holds."""
        own = [v for v in vars(self).values() if isinstance(v, np.ndarray)]
        terms = [a for term in self.terms for a in term]
        models = sum(2 * m.w.nbytes + m.activation_bytes + m.buffer_bytes for m in self.models)
        whole = self.whole.w.nbytes + self.whole.activation_bytes + self.whole.buffer_bytes
        return models + whole + sum(a.nbytes for a in (*own, *terms, *self.inside))

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        count = len(self.classes)
        self.samples = np.zeros(count * self.largest * batch, self.dtype)
        self.scores = np.empty(count * batch, self.dtype)
        self.dscores = np.empty(count * batch)
        self.ones = np.empty(batch, self.dtype)
        for model in (*self.models, self.whole):
            model.reserve(batch)

    def restrict(self, vector: np.ndarray, out: np.ndarray) -> None:
        """out (elements, size) = the elements' variables in a vector over the part."""
        self.extended[:-1] = vector
        self.extended[-1] = 0
        np.take(self.extended, self.index, out=out, mode="clip")

    def accumulate(self, values: np.ndarray, out: np.ndarray) -> None:
        """out (part,) = the sum of what the elements (elements, size) add to each weight."""
        self.extended.fill(0)
        self.ops.accumulate(values, self.index, self.extended)
        out[...] = self.extended[:-1]

    def value(self, w: np.ndarray, x: np.ndarray, labels: np.ndarray, loss: Loss, scale: float) -> float:
        """The scaled sum of the elements at the part's weights w, over samples x (features, b), labels (b,) numbers
        among `classes`.
        """
        if not len(labels):
            return 0.0
        np.copyto(self.whole.w, w)
        return loss(self.whole.forward(x), labels, scale, None, self.mask)

    def gradients(
        self, w: np.ndarray, x: np.ndarray, labels: np.ndarray, loss: Loss, scale: float, out: np.ndarray
    ) -> float:
        """`value`, and out (elements, size) the gradient of each element; `labels` do not decrease."""
        b = len(labels)
        if b == 0:
            out.fill(0)
            return 0.0
        scores = self._forward(w, x)
        weights = self.dscores[: scores.size].reshape(scores.shape)
        value = loss(scores, labels, scale, weights, self.mask)
        # Of a pairwise loss the derivative with respect to another class's score is that of one term alone.
        exponent = excess(weights)
        small = np.ldexp(weights, -exponent).astype(self.dtype)
        count = len(self.classes)
        samples = self.samples[: count * self.largest * b].reshape(count, self.largest, b)
        for k, model in enumerate(self.models):
            ones = self.ones[:b].reshape(1, b)
            ones.fill(1)
            samples[k, model.part.size :] = 0
            model.backward(ones, samples[k, : model.part.size])
        self.flat.fill(0)
        edges = np.searchsorted(labels, np.arange(count + 1))
        for i, (numbers, others, places) in enumerate(self.terms):
            first, last = edges[i], edges[i + 1]
            if first == last or not len(numbers):
                continue
            mine = small[:, first:last]
            minus = np.matmul(mine[others], samples[i, :, first:last].T)
            plus = np.matmul(samples[:, :, first:last], mine[:, :, None])[others, :, 0]
            # No variable occurs twice on one side of one element.
            self.flat[places[0]] -= minus
            self.flat[places[1]] += plus
        self.flat[-1] = 0
        np.copyto(out, self.flat[:-1].reshape(out.shape))
        give_back(out, exponent)
        return value

    def seen(self, labels: np.ndarray) -> np.ndarray:
        """(elements,) bool: whether the samples have a label of the element."""
        present = np.bincount(labels, minlength=len(self.classes)) > 0
        found: np.ndarray = present[self.labels].any(axis=1)
        return found

    def _forward(self, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        b = x.shape[1]
        self.reserve(b)
        scores = self.scores[: len(self.classes) * b].reshape(-1, b)
        for k, (model, inside) in enumerate(zip(self.models, self.inside, strict=True)):
            np.take(w, inside, out=model.w, mode="clip")
            scores[k] = model.forward(x)[0]
        return scores
