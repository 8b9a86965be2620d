"""One step of partitioned quasi-Newton training: PLBFGS, PLSR1 and PLSE over the ranks of the pair partition.

Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41). Every element keeps its own curvature on the worker that
owns it. A product of the whole matrix B with a vector is one scatter and one gather. No weights are sent, as the
workers repeat the steps of the owners of the weights bit for bit.
"""

from __future__ import annotations

from math import inf, isfinite

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers import Exchange
from psmpi.data import Batch
from psmpi.methods.psl.element_set import ElementSet, elements_of, largest_element
from psmpi.nn.losses import Loss
from psmpi.nn.objective import DIVERGED
from psmpi.optim import given
from psmpi.optim.curvature import ElementOperators, Outcome, curvature_ops
from psmpi.optim.globalization import SHORTEST, Extrapolation, TrustRegion, armijo
from psmpi.optim.truncated_cg import truncated_cg
from psmpi.training.context import Context
from psmpi.training.element_worker import ElementWorker
from psmpi.training.state import State

# Largest factor of sigma over its first value, as the learning rate goes to 0.
STIFF = 1e6
# Shortest first step of a line search.
TINY = 1e-30


class PartitionedNewton:
    """Steps of w (this rank's shard) and w_part (its worker's part), which stay equal where they overlap.

    world: all ranks; `worker` is None on ranks that only hold weights. scalars: the trust radius, the first length that
    a line search tries, theta of the adaptive momentum and counts, the same on every rank. The state has, over the
    shard and if they are used, `v` of the momentum and `squares` of the gradients, and as tables this rank's rows of
    the elements' curvature.
    """

    def __init__(
        self,
        context: Context,
        state: State,
        world: Group,
        exchange: Exchange,
        worker: ElementWorker | None,
        w_part: np.ndarray,
        w: np.ndarray,
    ):
        o, ops, scalars = context.config.optimization, context.ops, state.scalars
        self.world, self.exchange, self.worker, self.account = world, exchange, worker, state.account
        self.numbers, self.layout = context.numbers, context.layout
        self.w_part, self.w, self.dtype, self.scalars = w_part, w, w.dtype, scalars
        self.search, self.extend = o.globalization == "line-search", o.line_search == "basic"
        self.follows = o.first_step == "last"
        self.ops, self.curvature, self.batch_multiple = ops, curvature_ops(ops), ops.batch_multiple
        self.rtol, self.itmax, self.sigma = o.cg_tolerance, o.cg_iterations, o.sigma
        self.first_lr, self.first_sigma = o.lr, o.sigma
        self.region = TrustRegion()
        self.momentum: Extrapolation | None = None
        if o.extrapolation != "none":
            self.momentum = Extrapolation(o.extrapolation == "adaptive", given(o, "momentum"))
        scalars.update(radius=1.0, first=1.0, theta=1.0, products=0, trials=0, failed_steps=0)
        self.p_part, self.p = self._pair()
        self.q_part, self.q = self._pair()
        self.g, self.r, self.x = (ops.empty(w.size, self.dtype) for _ in range(3))
        self.x_part, self.t_part = (ops.zeros(w_part.size, self.dtype) for _ in range(2))
        self.account.hold("curvature", self.g, self.r, self.x, self.x_part, self.t_part)
        if self.momentum is not None:
            self.v_part, self.v = self._pair()
            state.vector("v", self.v)
        self.beta2, self.eps = given(o, "beta2"), o.eps
        self.scaled = o.scaling == "moments"
        if self.scaled:
            # Factor from a step of the scaled variables to a step of the weights.
            self.root_part, self.root = self._pair()
            self.squares = ops.zeros(w.size, self.dtype)
            self.account.hold("curvature", self.squares)
            state.vector("squares", self.squares)
            scalars["t"] = 0
        self.counts = dict.fromkeys(("skipped", "rejected", "reset", "updated"), 0)
        # Whether the last step moved the weights, the number of this rank's elements that it updated, and the number of
        # steps that updated no element of any rank.
        self.moved, self.updated, self.idle_steps = False, 0, 0
        self.elements: ElementSet | None = None
        classes: list[tuple[int, int]] = []
        if worker is not None:
            assert worker.place.elements is not None
            classes = elements_of(worker.place.elements, o.merge_pairs)
            self.elements = ElementSet(
                context.network, context.layout, worker.place.classes, worker.place.elements, self.dtype, ops,
                worker.loss, merged=o.merge_pairs,
            )  # fmt: skip
            self.numbers.watch(self.elements.objective)
            self.before, self.after, self.s = (self.elements.make_vectors() for _ in range(3))
            self.account.hold("curvature", self.elements, self.before, self.after, self.s)
            # Outcome of the last pair of each element.
            self.outcome = np.full(len(classes), Outcome.SKIPPED)
        self.operators = ElementOperators(
            len(classes),
            largest_element(context.layout),
            self.dtype,
            o.optimizer,  # type: ignore[arg-type]
            ops,
            memory=o.memory,
            relative=o.curvature == "relative",
            damping=o.damping,
            rescaled=o.initial == "scaled",
        )
        self.account.ask("curvature", lambda: self.operators.arrays)
        # This rank's rows of the elements' curvature, and the classes of these elements.
        state.table("classes", np.array(classes, np.int64).reshape(-1, 2))
        state.table("pairs", self.operators.pairs)
        for name, table in self.operators.state().items():
            state.table(name, table)

    def _pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Make a vector on this rank's part, and on its shard."""
        part, shard = self.exchange.make_vectors()
        self.account.hold("curvature", part, shard)
        return part, shard

    def step(self, batch: Batch, lr: float) -> float:
        """Make one step on training samples; return this rank's share of their mean loss before the step.

        sigma, the multiple of the identity, rises as lr falls below the first learning rate of the schedule. With
        momentum, the loss is taken after the extrapolation. For a loss that is not finite, raise FloatingPointError, or
        with lenient numbers leave the weights as they are; a step that is not sound has a loss of 0.
        """
        self.sigma = self.first_sigma * min(self.first_lr / lr, STIFF) if lr > 0 else self.first_sigma * STIFF
        self._extrapolate()
        x, labels = self._batch(batch)
        self.scale = 1 / len(batch)
        share = 0.0
        if self.elements is not None:
            share = self.elements.gradients(self.w_part, x, labels, self.scale, self.before)
            self.elements.accumulate(self.before, self.q_part)
        start, updated = self.world.agree(np.array([share, self.updated])).tolist()
        self._count(updated)
        part = [(self.q_part, self.elements.part)] if self.elements is not None else []
        if not self.numbers.sound(self.ops, share, part, self.layout):
            return 0.0
        if not isfinite(start):
            if self.numbers.lenient:
                return share
            raise FloatingPointError(DIVERGED)
        self.exchange.backward(self.q_part, self.q)
        self.g[...] = self.q
        if self.scaled:
            self._scale()
        self.x_part.fill(0)
        cg = truncated_cg(
            self.g, self.x, self._product, self._follow, self.world.agree, (self.r, self.p, self.q),
            ops=self.ops, radius=inf if self.search else self.region.radius, rtol=self.rtol, itmax=self.itmax,
        )  # fmt: skip
        self.scalars["products"] += cg.iterations
        if self.elements is not None:
            self.elements.restrict(self.x_part, self.s)
        if self.scaled:
            self.ops.multiply(self.x_part, self.root_part)
            self.ops.multiply(self.x, self.root)

        def value(length: float) -> float:
            self.scalars["trials"] += 1
            share_after = self._value(length, x, labels)
            return float(self.world.agree(np.array([share_after]))[0])

        length: float | None = None
        if self.search:
            first = float(self.scalars["first"])
            searched = armijo(value, start, cg.slope, extend=self.extend, first=first)
            length = None if searched is None else searched[0]
            if self.follows:
                # After a failed search the next one begins with the length that it ended with, until steps get longer.
                self.scalars["first"] = max(first * SHORTEST, TINY) if length is None else min(1.0, 10 * length)
        elif cg.iterations:
            decrease = -(cg.slope + cg.curvature / 2)
            length = 1.0 if self.region.judge(start, value(1.0), decrease, cg.length) else None
        self.moved = length is not None
        if length is not None:
            self._move(length)
            self._update(x, labels, length)
        else:
            self.scalars["failed_steps"] += 1
            if self.momentum is not None:
                self.momentum.fail()
        self.scalars["radius"] = self.region.radius
        if self.momentum is not None:
            self.scalars["theta"] = self.momentum.theta
        # The loss's constant for each sample belongs to no element: the worker in column 0 adds it.
        counts = self.worker is not None and self.worker.place.column == 0
        return share + (self._loss().constant if counts else 0.0)

    def restored(self) -> None:
        """Go on from restored scalars, vectors and tables."""
        self.operators.settled()
        self.exchange.forward(self.w, self.w_part)
        self.region.radius = float(self.scalars["radius"])
        if not self.follows:
            # A run with --first-step last may have left another length.
            self.scalars["first"] = 1.0
        if self.momentum is not None:
            self.momentum.theta = float(self.scalars["theta"])
            self.exchange.forward(self.v, self.v_part)

    def events(self) -> dict[str, int]:
        """Return this rank's counts of failed updates since the start. Collective."""
        (updated,) = self.world.agree(np.array([float(self.updated)])).tolist()
        self._count(updated)
        # All ranks count the same steps, so only rank 0 reports them.
        reports = self.world.rank == 0
        pairs = {f"curvature_pairs_{name}": self.counts[name] for name in ("skipped", "rejected", "reset")}
        return {**pairs, "steps_without_update": self.idle_steps * reports}

    def _count(self, updated: float) -> None:
        """Count the last step, once, if it updated no element of any rank."""
        self.idle_steps += self.moved and not updated
        self.moved = False

    def _loss(self) -> Loss:
        assert self.worker is not None
        return self.worker.loss

    def _scale(self) -> None:
        """Update the scale of the variables on all ranks, and scale the gradient g."""
        self.scalars["t"] += 1
        correction = 1 - self.beta2 ** self.scalars["t"]
        self.curvature.moment_scale(self.g, self.squares, self.root, self.beta2, correction, self.eps)
        self.exchange.forward(self.root, self.root_part)
        self.ops.multiply(self.g, self.root)

    def _batch(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return this worker's samples of a minibatch, (features, b or more), and their labels (b,) among its classes.

        Repeated samples after the first b make the size a multiple of `batch_multiple`, as the backend needs.
        """
        worker, ids = self.worker, batch.ids
        if worker is None:
            return self.x_part[:0], np.empty(0, np.int64)
        labels = worker.numbers[worker.dataset.train.labels[ids]]
        own = np.flatnonzero(labels >= 0)
        filled = (
            np.resize(ids[own], -(-len(own) // self.batch_multiple) * self.batch_multiple) if len(own) else ids[own]
        )
        worker.reserve(max(1, len(filled)))
        x = worker.x[: worker.features * len(filled)].reshape(worker.features, len(filled))
        worker.train.fetch(filled, x)
        return x, labels[own]

    def _product(self, p: np.ndarray, q: np.ndarray) -> None:
        """Compute q = (B + sigma I) p, both over the shard."""
        self.exchange.forward(p, self.p_part)
        if self.elements is not None:
            self.operators.restricted_product(self.elements.restriction, self.p_part, self.q_part)
        self.exchange.backward(self.q_part, q)
        if self.sigma:
            self.ops.combine(q, (1.0, q), (self.sigma, p))

    def _follow(self, a: float) -> None:
        self.ops.combine(self.x_part, (1.0, self.x_part), (a, self.p_part))

    def _value(self, length: float, x: np.ndarray, labels: np.ndarray) -> float:
        """Return this rank's share of the loss after a step of `length`; infinity if it is not finite."""
        if self.elements is None:
            return 0.0
        self.ops.combine(self.t_part, (1.0, self.w_part), (length, self.x_part))
        try:
            value = self.elements.value(self.t_part, x, labels, self.scale)
        except FloatingPointError:
            return inf
        return value if isfinite(value) else inf

    def _move(self, length: float) -> None:
        """Add length * x to the weights, and to the momentum's vector."""
        moved = [(self.w_part, self.x_part)]
        if self.momentum is not None:
            moved.append((self.v_part, self.x_part))
        if self.exchange.inside is None:
            moved.append((self.w, self.x))
        if self.exchange.inside is None and self.momentum is not None:
            moved.append((self.v, self.x))
        for vector, x in moved:
            self.ops.combine(vector, (1.0, vector), (length, x))

    def _extrapolate(self) -> None:
        if self.momentum is None:
            return
        factor, moved = self.momentum.next(), [(self.w_part, self.v_part)]
        # If the shard is a slice of the part, the two share memory.
        if self.exchange.inside is None:
            moved.append((self.w, self.v))
        for w, v in moved:
            self.ops.scale(v, factor)
            self.ops.combine(w, (1.0, w), (1.0, v))

    def _update(self, x: np.ndarray, labels: np.ndarray, length: float) -> None:
        """Give each element the pair of the step just taken, on the same minibatch."""
        if self.elements is None:
            return
        try:
            self.elements.gradients(self.w_part, x, labels, self.scale, self.after)
        except FloatingPointError:
            self.after.fill(np.nan)
        with np.errstate(all="ignore"):
            self.after -= self.before
        self.ops.scale(self.s.reshape(-1), length)
        # The array of the earlier gradients is free from here on.
        if self.scaled:
            self.elements.restrict(self.root_part, self.before)
            self.ops.multiply(self.after.reshape(-1), self.before.reshape(-1))
        self.outcome = outcome = self.operators.push(self.s, self.after, self.elements.seen(labels), self.before)
        for name, which in (
            ("skipped", Outcome.SKIPPED),
            ("rejected", Outcome.REJECTED),
            ("reset", Outcome.RESET),
            ("updated", Outcome.UPDATED),
        ):
            self.counts[name] += int(np.count_nonzero(outcome == which))
        self.updated = int(np.count_nonzero(outcome == Outcome.UPDATED))
