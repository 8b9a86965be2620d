"""The trunk: the layers that all classes share, computed by each rank of a row on its slice of a minibatch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from psmpi.comm.bridge import Bridge
from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, Slices, Step, Sum
from psmpi.data import Resident
from psmpi.errors import UserError
from psmpi.nn.layers.chain import Tape, leaves
from psmpi.nn.model import Model
from psmpi.nn.objective import GRADIENT_LIMIT
from psmpi.training.context import Context
from psmpi.training.spans import make_span, recorder

# Seconds. Of many ranks with an error at once, the last one reports it after 3 s (psmpi.comm.world).
PATIENCE = 4.0


class Trunk:
    """The first `length` layers on one rank of `row`: a slice of each minibatch, and the exchange of features.

    w, g: weights and gradient of the part of `classes`, as in `Model`. All ranks receive the features (units, b), the
    outputs of the trunk; the gradients of a sample's features are summed over the row to the rank that computed them.
    So g holds this slice's share of the trunk's gradient, for the elements of all ranks. Batch normalization uses
    statistics of the whole minibatch. Each rank computes a minibatch of fewer samples than ranks as a whole.
    """

    def __init__(self, context: Context, row: Group, length: int, classes: Sequence[int], w: np.ndarray, g: np.ndarray):
        network, ops = context.network, context.ops
        self.ops, self.dtype, self.row = ops, context.dtype, row
        self.sums: Group | None = None
        if any(layer.couples for layer in leaves(network.layers[:length])):
            if ops.on_device:
                raise UserError(
                    f"--trunk split sums the statistics of --model {network.name}'s batch normalization over ranks in "
                    "host memory: use --trunk replicated, or --backend compiled"
                )
            self.sums = context.group(row.ranks, bridge=Bridge())
        total = None if self.sums is None else self._total
        self.model = Model(network, context.layout, w, g, ops, classes, layers=(0, length), beside=True, total=total)
        self.units = self.model.size
        self.slices = Slices(row, self.units, self.dtype, ops)
        trained = network.runs(context.layout, 0, length) & self.model.part
        self.g = [g[self.model.part.local(a, b)] for a, b in trained.intervals]
        self.inputs = int(np.prod(self.model.in_shape))
        self.batch, self.whole, self.slice = 0, True, slice(0, 0)
        self.forward_pass, self.backward_pass = self._forward, self._backward
        if self.sums is None:
            record = recorder(context.network, ops)
            self.forward_pass, self.backward_pass = record(self._forward), record(self._backward)
        self.capacity = 0

    def _total(self, values: np.ndarray) -> None:
        """Sum statistics over the row, unless this rank has the whole minibatch."""
        if self.sums is not None and not self.whole:
            self.sums.allreduce(values)

    def share(self, batch: int) -> slice:
        """The samples of a minibatch of `batch` whose features this rank computes."""
        return self.slices.of_rank(batch, self.row.rank) if batch >= self.row.size else slice(0, batch)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        own = max(self.share(b).stop - self.share(b).start for b in {batch, min(batch, self.row.size - 1)})
        self.model.reserve(own)
        self.x = self.ops.empty(self.inputs * own, self.dtype)
        self.features = self.ops.empty(self.units * batch, self.dtype)
        self.gradient = self.ops.empty(self.units * batch, self.dtype)
        self.own = self.ops.empty(self.units * own, self.dtype)
        self.slices.reserve(batch)

    @property
    def activation_bytes(self) -> int:
        return int(self.x.nbytes + self.features.nbytes + self.model.activation_bytes)

    @property
    def buffer_bytes(self) -> int:
        return int(self.gradient.nbytes + self.own.nbytes + self.slices.nbytes + self.model.buffer_bytes)

    def forward(self, samples: Resident, ids: np.ndarray) -> np.ndarray:
        """The features (units, b) of the samples `ids` (b,); `samples` must have this rank's share of them."""
        b = len(ids)
        self.reserve(b)
        self.batch, self.whole, self.slice = b, b < self.row.size, self.share(b)
        self.span = make_span(samples.batch(ids[self.slice], self.x).lengths, self.ops)
        self.tape = self.forward_pass(self.slice.stop - self.slice.start)
        made, features = self.tape.scores.reshape(self.units, -1), self.all(b)
        if self.whole:
            features[...] = made
        else:
            self.slices.forward(made, features)
        return features

    def all(self, b: int) -> np.ndarray:
        """Buffer (units, b) of the features of b samples."""
        return self.features[: self.units * b].reshape(self.units, b)

    def dx(self, b: int) -> np.ndarray:
        """Buffer (units, b) of the features' gradient from this rank's elements."""
        return self.gradient[: self.units * b].reshape(self.units, b)

    def backward(self, b: int, own_only: bool = False) -> None:
        """Write this slice's share of the trunk's gradient, from `dx`, which is overwritten.

        own_only: leave out the gradients of other ranks' elements, and send no message.
        """
        dx, n = self.dx(b), self.slice.stop - self.slice.start
        own = self.own[: self.units * n].reshape(self.units, n)
        if own_only or self.whole:
            own[...] = dx[:, self.slice]
        else:
            self.slices.backward(dx, own)
        whole, self.whole = self.whole, self.whole or own_only
        self.backward_pass(n)
        self.whole = whole

    def await_error_of_others(self) -> None:
        """Wait if only features of other ranks are not finite: their error, which names the cause, ends the job."""
        host = self.ops.host
        if np.isfinite(host(self.tape.scores)).all() and not np.isfinite(host(self.all(self.batch))).all():
            time.sleep(PATIENCE)

    def _forward(self, n: int) -> Tape:
        return self.model.forward(self.x[: self.inputs * n].reshape(self.inputs, n), None, self.span)

    def _backward(self, n: int) -> None:
        scores = self.tape.scores
        self.model.backward(self.tape, self.own[: self.units * n].reshape(scores.shape))
        limit = GRADIENT_LIMIT[self.dtype]
        for g in self.g:
            # A sum of limited gradients of many ranks may exceed the limit.
            self.ops.bound(g, limit)

    def messages(self, batch: int) -> list[Message]:
        """The messages of the row in a training step on `batch` samples."""
        if batch < self.row.size:
            return []
        messages = [*self.slices.messages(Step(batch)), *self.slices.messages(Step(batch), back=True)]
        if self.sums is not None:
            for part in self.model.walk():
                for numbers in part.layer.restrict(part.shape[0], part.layer.in_shape).rank_sums:
                    messages += Sum(self.sums, numbers, np.dtype(np.float64)).messages(Step(), back=True)
        return messages
