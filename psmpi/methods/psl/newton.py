"""One step of partitioned quasi-Newton training: PLBFGS, PLSR1 and PLSE over the ranks of the pair partition.

Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41). Every element keeps its own curvature on the worker that
owns it. A product of the whole matrix B with a vector is one scatter and one gather; no weights travel, for the workers
repeat the steps of the owners of the weights bit for bit.
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

# How often the multiple of the identity may become the one of the start, where the learning rate goes to 0.
STIFF = 1e6
# The shortest step that a line search begins with.
TINY = 1e-30


class PartitionedNewton:
    """Steps w (this rank's shard) and w_part (what its worker computes with), which stay equal where both lie.

    world: all ranks; `worker` is None on ranks that only hold weights. scalars: the radius, the first length that a
    line search tries, theta of the adaptive momentum and counts, the same on every rank. Declared to the state, over
    the shard, where they are used: `v` of the momentum, `squares` of the gradients, and as tables this rank's rows of
    what elements remember.
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
            # What a step in the scaled variables is multiplied by to be one in the weights.
            self.root_part, self.root = self._pair()
            self.squares = ops.zeros(w.size, self.dtype)
            self.account.hold("curvature", self.squares)
            state.vector("squares", self.squares)
            scalars["t"] = 0
        self.counts = dict.fromkeys(("skipped", "rejected", "reset", "updated"), 0)
        # Pairs that the last step brought to this rank's elements, and steps that brought none to any.
        self.taken, self.brought, self.idle = False, 0, 0
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
            # What the last pairs did to their elements.
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
        # This rank's rows of what all elements remember, and which elements they are.
        state.table("classes", np.array(classes, np.int64).reshape(-1, 2))
        state.table("pairs", self.operators.pairs)
        for name, table in self.operators.state().items():
            state.table(name, table)

    def _pair(self) -> tuple[np.ndarray, np.ndarray]:
        """A vector on this rank's part, and on its shard."""
        part, shard = self.exchange.make_vectors()
        self.account.hold("curvature", part, shard)
        return part, shard

    def step(self, batch: Batch, lr: float) -> float:
        """One step on training samples; returns this rank's share of their mean loss before it.

        As lr falls below the one the schedule starts from, the multiple of the identity rises.
        With a momentum "before" is after the extrapolation. Where that loss is not finite, FloatingPointError, or the
        weights stay; a step that is not sound has a loss of 0.
        """
        self.sigma = self.first_sigma * min(self.first_lr / lr, STIFF) if lr > 0 else self.first_sigma * STIFF
        self._extrapolate()
        x, labels = self._batch(batch)
        self.scale = 1 / len(batch)
        share = 0.0
        if self.elements is not None:
            share = self.elements.gradients(self.w_part, x, labels, self.scale, self.before)
            self.elements.accumulate(self.before, self.q_part)
        start, brought = self.world.agree(np.array([share, self.brought])).tolist()
        self._count(brought)
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
        found = truncated_cg(
            self.g, self.x, self._product, self._follow, self.world.agree, (self.r, self.p, self.q),
            ops=self.ops, radius=inf if self.search else self.region.radius, rtol=self.rtol, itmax=self.itmax,
        )  # fmt: skip
        self.scalars["products"] += found.iterations
        if self.elements is not None:
            self.elements.restrict(self.x_part, self.s)
        if self.scaled:
            self.ops.multiply(self.x_part, self.root_part)
            self.ops.multiply(self.x, self.root)

        def value(length: float) -> float:
            self.scalars["trials"] += 1
            mine = self._value(length, x, labels)
            return float(self.world.agree(np.array([mine]))[0])

        length: float | None = None
        if self.search:
            first = float(self.scalars["first"])
            searched = armijo(value, start, found.slope, extend=self.extend, first=first)
            length = None if searched is None else searched[0]
            if self.follows:
                # After a search that found nothing the next one begins where it ended, until steps are longer again.
                self.scalars["first"] = max(first * SHORTEST, TINY) if length is None else min(1.0, 10 * length)
        elif found.iterations:
            decrease = -(found.slope + found.curvature / 2)
            length = 1.0 if self.region.judge(start, value(1.0), decrease, found.length) else None
        self.taken = length is not None
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
        # What every sample adds, whatever the weights, is no part of any element: one worker counts it.
        counts = self.worker is not None and self.worker.place.column == 0
        return share + (self._loss().constant if counts else 0.0)

    def restored(self) -> None:
        """Take up scalars, vectors and tables that were restored."""
        self.operators.settled()
        self.exchange.forward(self.w, self.w_part)
        self.region.radius = float(self.scalars["radius"])
        if not self.follows:
            # A run with --first-step last may have left another.
            self.scalars["first"] = 1.0
        if self.momentum is not None:
            self.momentum.theta = float(self.scalars["theta"])
            self.exchange.forward(self.v, self.v_part)

    def events(self) -> dict[str, int]:
        """Counts of what went wrong, on this rank since the start. All ranks call it."""
        (brought,) = self.world.agree(np.array([float(self.brought)])).tolist()
        self._count(brought)
        # What all ranks count is the first one's.
        mine = self.world.rank == 0
        pairs = {f"curvature_pairs_{name}": self.counts[name] for name in ("skipped", "rejected", "reset")}
        return {**pairs, "steps_without_update": self.idle * mine}

    def _count(self, brought: float) -> None:
        """Count the last step, once, if it brought no pair to any element of any rank."""
        self.idle += self.taken and not brought
        self.taken = False

    def _loss(self) -> Loss:
        assert self.worker is not None
        return self.worker.loss

    def _scale(self) -> None:
        """Update the scale of the variables, on all ranks, and bring the gradient to them."""
        self.scalars["t"] += 1
        correction = 1 - self.beta2 ** self.scalars["t"]
        self.curvature.moment_scale(self.g, self.squares, self.root, self.beta2, correction, self.eps)
        self.exchange.forward(self.root, self.root_part)
        self.ops.multiply(self.g, self.root)

    def _batch(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """This worker's samples of the minibatch, (features, b or more), and their labels (b,) among its classes.

        Whatever follows the labelled samples makes the minibatch a multiple that suits the backend.
        """
        worker, ids = self.worker, batch.ids
        if worker is None:
            return self.x_part[:0], np.empty(0, np.int64)
        labels = worker.numbers[worker.dataset.train.labels[ids]]
        mine = np.flatnonzero(labels >= 0)
        filled = (
            np.resize(ids[mine], -(-len(mine) // self.batch_multiple) * self.batch_multiple) if len(mine) else ids[mine]
        )
        worker.reserve(max(1, len(filled)))
        x = worker.x[: worker.features * len(filled)].reshape(worker.features, len(filled))
        worker.train.fetch(filled, x)
        return x, labels[mine]

    def _product(self, p: np.ndarray, q: np.ndarray) -> None:
        """q = (B + sigma I) p."""
        self.exchange.forward(p, self.p_part)
        if self.elements is not None:
            self.operators.restricted_product(self.elements.restriction, self.p_part, self.q_part)
        self.exchange.backward(self.q_part, q)
        if self.sigma:
            self.ops.combine(q, (1.0, q), (self.sigma, p))

    def _follow(self, a: float) -> None:
        self.ops.combine(self.x_part, (1.0, self.x_part), (a, self.p_part))

    def _value(self, length: float, x: np.ndarray, labels: np.ndarray) -> float:
        """This rank's share of the loss after a step of this length; infinity where it is not finite."""
        if self.elements is None:
            return 0.0
        self.ops.combine(self.t_part, (1.0, self.w_part), (length, self.x_part))
        try:
            value = self.elements.value(self.t_part, x, labels, self.scale)
        except FloatingPointError:
            return inf
        return value if isfinite(value) else inf

    def _move(self, length: float) -> None:
        """w += length x, and so the momentum."""
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
        # Where the shard is a slice of the part they share memory.
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
        # The gradients before are not needed any more.
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
        self.brought = int(np.count_nonzero(outcome == Outcome.UPDATED))
