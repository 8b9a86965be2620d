"""Layer-parallel training: residual layers dealt to ranks, states and adjoints solved by multigrid in layer time.

Guenther, Ruthotto, Schroder, Cyr and Gauger, "Layer-parallel training of deep residual neural networks", arXiv
1812.04352. In a step, some multigrid cycles solve for the states of all layers at once, and some for their adjoints.
The optimizer steps along the resulting gradient, which is exact only after enough cycles (one-shot optimisation).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from math import inf, isfinite
from typing import Any

import numpy as np

from psmpi.comm.transfers import Boundary, Message, Step, Sum
from psmpi.data import Batch, Resident
from psmpi.layout import Ownership, Runs, plain_layout
from psmpi.methods.layer_parallel.cycle import exact_cycles
from psmpi.methods.layer_parallel.layers import Layers
from psmpi.methods.layer_parallel.need import layer_parallel_needed
from psmpi.methods.layer_parallel.penalty import Penalty
from psmpi.methods.layer_parallel.plan import inside
from psmpi.methods.layer_parallel.settings import (
    Settings,
    check_layer_parallel,
    keeps,
    layer_parallel_notes,
    layer_parallel_warnings,
    plan_of,
)
from psmpi.methods.layer_parallel.solver import Solver
from psmpi.nn.layers.residual import Residual
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.training.context import Context
from psmpi.training.descent import Descent
from psmpi.training.evaluator import evaluate
from psmpi.training.method import Exactness, Method
from psmpi.training.replica import verify

OPTIONS = ("--model", "deep", "--widths", "6", "--depth", "32")


class LayerParallel(Method):
    """Layer-parallel training on one rank: consecutive residual layers.

    The first rank of a row also has the layers before the residual ones, the last rank those after them. Checkpoints
    hold the states and adjoints for warm starts, in spaces `layer_states` and `layer_adjoints`.
    """

    name = "layer_parallel"
    summary = "residual layers on ranks, multigrid in layer time"
    settings = (Settings,)
    usual_options = ("--model", "deep", "--epochs", "20")
    skips = True
    exactness = Exactness(options=OPTIONS, wide=("--model", "deep", "--widths", "150", "--depth", "16"))

    def __init__(self, context: Context):
        network, layout, dataset, ops = context.network, context.layout, context.dataset, context.ops
        self.s = s = context.settings(Settings)
        self.plan = plan = plan_of(context.size, network, s)
        super().__init__(context, Ownership(tuple(plan.runs(layout, plan.position(r)) for r in range(context.size))))
        self.position, self.row = plan.position(self.rank), plan.row(self.rank)
        self.world, self.row_group = context.group(), context.group(plan.members(self.row))
        self.peers = context.group(plan.peers(self.position))
        shard, batch = self.shards[self.rank], min(context.config.data.batch_size, dataset.train.n)
        self.batch, self.per_epoch = batch, -(-dataset.train.n // context.config.data.batch_size)
        self.share = -(-batch // plan.rows)
        self.w, self.g = (ops.zeros(shard.size, self.dtype) for _ in range(2))
        context.put_weights(shard, self.w)
        self.descent = Descent(context, shard, allsum=self._over_layers, world=self.world)
        self.optimizer = self.descent.optimizer
        self.sums = Sum(self.peers, self.w.size, self.dtype)
        stages = plan.stages(self.position)
        at = {name: inside(network, layout, stage, shard) for name, stage in stages.items()}
        self.models = {
            name: Model(network, layout, self.w[at[name]], self.g[at[name]], ops, layers=stages[name])
            for name in ("opening", "closing")
            if name in stages
        }
        place = at["march"]
        self.layers = Layers(network, layout, stages["march"], self.w[place], self.g[place], ops)
        numbers = (plan.steps + 1) * self.layers.units * self.share
        self.states, self.adjoints = (ops.zeros(numbers, self.dtype) for _ in range(2))
        self.solver = Solver(self.layers, plan.steps, self.row_group, self.states, self.adjoints, s.relaxations, ops)
        self.solver.reserve(self.share, s.factors)
        self.objective: Objective | None = None
        if "closing" in self.models:
            self.loss = context.loss()
            self.objective = Objective(self.loss, self.models["closing"])
            context.numbers.watch(self.objective)
        self.penalty = self._penalty(shard)
        first = self.position == 0
        self.metric, batches = context.metric(), network.evaluation_batches(dataset.test.n)
        self.batches = batches[self.row :: plan.rows]
        tested = np.concatenate([np.arange(0), *(np.arange(at.start, at.stop) for at in self.batches)])
        self.train = Resident(dataset.train, np.arange(dataset.train.n if first else 0), self.dtype, ops)
        self.tests = Resident(dataset.test, tested if first else tested[:0], self.dtype, ops)
        self._reserve(max(self.share, *(at.stop - at.start for at in batches)))
        self.exact = exact_cycles(plan.depth, s.factors, s.relaxations)
        self.keeps = keeps(s, context.config, dataset)
        self._declare(numbers)
        # (forward or adjoint, cycle, 2): sums of squared residuals and of squared states since the last test.
        self.residuals = np.zeros((2, 1 + max(self.exact, s.forward_cycles, s.adjoint_cycles), 2))
        self.gradient_error: float | None = None
        self.last_gradient = ops.empty(self.w.size if s.adapt_every else 0, self.dtype)
        self.account.hold("gradients", self.last_gradient)
        self.measured: dict[str, Any] = {}

    check, needed = staticmethod(check_layer_parallel), staticmethod(layer_parallel_needed)
    notes, warnings = staticmethod(layer_parallel_notes), staticmethod(layer_parallel_warnings)

    def _penalty(self, shard: Runs) -> Penalty | None:
        s, plan = self.s, self.plan
        if not (s.gamma_tik or s.gamma_ddt):
            return None
        numbers = plan.penalized(self.position)
        slices = [inside(self.network, self.layout, (k, k + 1), shard) for k in numbers]
        layer = self.network.layers[numbers[0]]
        assert isinstance(layer, Residual)
        size, at = slices[0].stop - slices[0].start, self.position
        previous = Boundary(self.row_group, at - 1, at, size, self.dtype) if at else None
        following = Boundary(self.row_group, at, at + 1, size, self.dtype) if at < plan.ranks - 1 else None
        return Penalty(slices, (previous, following), s.gamma_tik, s.gamma_ddt, layer.scale, self.dtype, self.ops)

    def _reserve(self, most: int) -> None:
        """Make room for training and test minibatches of up to `most` samples."""
        for model in self.models.values():
            model.reserve(most)
        self.layers.reserve(most)
        if self.objective is not None:
            self.objective.reserve(self.network.classes, self.share)
        inputs = self.dataset.train.features if self.position == 0 else 0
        self.x = self.ops.empty(inputs * most, self.dtype)
        # Outputs of two consecutive layers in an evaluation.
        self.spare = self.ops.empty(2 * self.layers.units * most, self.dtype).reshape(2, -1)

    def _declare(self, numbers: int) -> None:
        """Declare the state, and account for memory."""
        state, s, plan = self.state, self.s, self.plan
        state.vector("weights", self.w)
        state.optimizer(self.optimizer)
        state.scalars["steps"] = 0
        # kept: samples of the step whose states are kept, 0 for none; forward, adjoint: cycles of passes, 0 for exact.
        for name, value in (("kept", 0), ("forward", s.forward_cycles), ("adjoint", s.adjoint_cycles)):
            state.scalar(name, value)
        size = numbers // (plan.steps + 1)
        layout = plain_layout({"values": (plan.rows, plan.depth + 1, size)})
        lost = "the states for a warm start: the next step starts cold"
        for name, array, back in (("layer_states", self.states, False), ("layer_adjoints", self.adjoints, True)):
            if not self.keeps[back]:
                self.account.hold("activations", array)
                continue
            owned = []
            for rank in range(self.context.size):
                position = plan.ranks - 1 - plan.position(rank) if back else plan.position(rank)
                start = (plan.row(rank) * (plan.depth + 1) + position * plan.steps) * size
                owned.append(Runs(((start, start + numbers),)))
            state.space(name, [array], self.dtype, layout, owned, "activations", lost)
        account = self.account
        account.hold("gradients", self.g)
        account.hold("samples", self.train, self.tests)
        account.hold("activations", self.x, self.spare)
        account.ask("activations", lambda: (self.layers.kept_bytes,))
        account.hold("buffers", self.layers, self.solver)
        account.hold("buffers", *(one for one in (self.penalty, self.objective) if one is not None))
        for model in self.models.values():
            account.ask("activations", partial(lambda one: (one.activation_bytes,), model))
            account.ask("buffers", partial(lambda one: (one.buffer_bytes,), model))

    def _over_layers(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of `values` over all layers; all rows have the same values, so row 0 alone adds them."""
        return self.world.agree(values * (self.row == 0))

    def _stride(self, step: int) -> int:
        """Return the distance between trained layers in a step; 1: all layers are trained."""
        return self.s.stride(step // self.per_epoch, self.plan.depth)

    def step(self, batch: Batch, lr: float) -> None:
        step = int(self.scalars["steps"])
        stride, b = self._stride(step), len(batch)
        if step and stride != self._stride(step - 1):
            self._begin_depth()
        # The order of a minibatch has no meaning; sorted, the samples of a whole data set keep their places between
        # steps, as warm starts need.
        ids = np.sort(batch.ids)
        warm = b == self.batch == self.scalars["kept"] and stride == 1
        loss = self.descent.search(self.w, self.g, lr, partial(self._gradient, ids, stride, warm))
        self.loss_sum += loss * b
        if stride > 1:
            self._interpolate(stride)
        sound = self.numbers.mode != "skip" or self.numbers.in_row == 0
        self.scalars["kept"] = b if sound and stride == 1 and any(self.keeps) else 0
        self.scalars["steps"] = step + 1

    def _gradient(self, ids: np.ndarray, stride: int, warm: bool, trial: bool) -> float:
        """Fill g with the gradient of mean loss plus penalties over samples `ids`; return this rank's share of the sum.

        A `trial` of a line search starts from the states of the trial before it.
        """
        kept = [(warm or (trial and stride == 1)) and keep for keep in self.keeps]
        cycles = int(self.scalars["forward"]), int(self.scalars["adjoint"])
        own = ids[np.array_split(np.arange(len(ids)), self.plan.rows)[self.row]]
        loss = self._passes(own, len(ids), stride, cycles, kept, trial)
        every = self.s.adapt_every
        if every and cycles[0] and int(self.scalars["steps"]) % every == 0:
            loss = self._adapt(own, len(ids), stride, cycles, loss)
        if self.penalty is not None:
            loss += self.penalty.add(self.w, self.g, stride) * (self.row == 0)
        return loss

    def _passes(
        self, ids: np.ndarray, b: int, stride: int, cycles: tuple[int, int], warm: Sequence[bool], trial: bool
    ) -> float:
        """Fill g with the gradient of the sum of losses / b over all rows' samples; return this rank's share of it."""
        loss = 0.0
        self.g.fill(0)
        if len(ids):
            self.solver.begin(len(ids), stride, self.s.factors if cycles[0] else ())
            self._open(ids)
            loss = self._close(ids, b, self.solver.forward(cycles[0], warm[0]), trial)
            self._go_back(cycles[1], warm[1])
        if self.plan.rows > 1:
            self.sums.backward(self.g, self.g)
        return loss

    def _open(self, ids: np.ndarray) -> None:
        """Write the first state of the forward march, on the first rank of the row."""
        if self.position:
            return
        x = self.x[: self.dataset.train.features * len(ids)].reshape(-1, len(ids))
        self.train.fetch(ids, x)
        if "opening" in self.models:
            self.opened = self.models["opening"].forward(x)
            x = self.opened.scores
        self.solver.u[0][...] = x.reshape(-1)

    def _close(self, ids: np.ndarray, b: int, state: np.ndarray, trial: bool) -> float:
        """Write the first state of the adjoint march, on the last rank of the row; return the sum of losses / b.

        Raise FloatingPointError for a loss that is not finite; a `trial` returns infinity. Other ranks return 0.
        """
        if self.objective is None:
            return 0.0
        model, objective, n = self.models["closing"], self.objective, len(ids)
        objective.ids = ids
        objective.bring(self.dataset.train.targets[ids].T)
        tape = model.forward(state.reshape(-1, n))
        dx = self.solver.w[0].reshape(*model.in_shape, n)
        loss = inf
        try:
            objective.derive(tape, tape.scores.reshape(-1, n), objective.targets(n), 1 / b, dx=dx)
            loss = objective.value()
        except FloatingPointError:
            # The other ranks wait for adjoints, so a failed trial sends zeros.
            if not trial:
                raise
            dx.fill(0)
        return inf if trial and not isfinite(loss) else loss

    def _go_back(self, cycles: int, warm: bool) -> None:
        """Solve for the adjoints, and fill g from states and adjoints."""
        adjoint = self.solver.backward(cycles, warm)
        self.solver.gradients()
        for sums, cycle in zip(self.residuals, (self.solver.forward_cycle, self.solver.adjoint_cycle), strict=True):
            for total, squares in zip(sums, cycle.residuals, strict=False):
                total += squares
        if "opening" in self.models:
            dy = self.layers.scratch[: adjoint.size]
            dy[...] = adjoint
            self.models["opening"].backward(self.opened, dy.reshape(self.opened.scores.shape))

    def _adapt(self, ids: np.ndarray, b: int, stride: int, cycles: tuple[int, int], loss: float) -> float:
        """Fill g with the gradient after one more cycle; return the loss.

        If the two gradients differ by more than --adapt-bound, later passes have one more cycle.
        """
        self.last_gradient[...] = self.g
        self.g.fill(0)
        further = cycles[0] + 1, cycles[1] + 1
        if len(ids):
            loss = self._close(ids, b, self.solver.more_forward(1), False)
            self._go_back(further[1], False)
        if self.plan.rows > 1:
            self.sums.backward(self.g, self.g)
        self.ops.combine(self.last_gradient, (1.0, self.last_gradient), (-1.0, self.g))
        squares = np.array([self.ops.squared_norm(self.last_gradient), self.ops.squared_norm(self.g)])
        difference, whole = self._over_layers(squares)
        self.gradient_error = float(np.sqrt(difference / whole)) if whole > 0 else 0.0
        # NaN fails this comparison; the optimizer step handles a gradient that is not finite.
        if self.gradient_error > self.s.adapt_bound:
            exact = max(further) >= self.exact
            self.scalars["forward"], self.scalars["adjoint"] = (0, 0) if exact else further
        return loss

    def _begin_depth(self) -> None:
        """Reset the optimizer, as other layers are trained from here on."""
        for vector in self.optimizer.vectors.values():
            vector.fill(0)
        for name in ("t", "count", "head"):
            if name in self.optimizer.scalars:
                self.optimizer.scalars[name] = 0

    def _interpolate(self, stride: int) -> None:
        """Copy the weights of each trained layer to the layers between it and the next trained one."""
        parts = self.layers.slices
        for k, at in enumerate(parts):
            if k % stride:
                self.layers.w[at] = self.layers.w[parts[k - k % stride]]

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if {"layer_states", "layer_adjoints"} & fresh or self.context.config.run.new_data:
            self.scalars["kept"] = 0

    def test(self) -> dict[str, float]:
        if self.plan.rows > 1:
            verify(self.peers, self.ops.host(self.w), "use another MPI library")
        with self.counter.paused():
            sums = evaluate(self.metric, self.batches, self._test_scores, self._test_targets, self.ops)
        self.measured = self._measured()
        return self.metric.scores(self.world.agree(sums))

    def _test_targets(self, ids: np.ndarray) -> np.ndarray:
        targets: np.ndarray = self.dataset.test.targets[ids].T
        return targets

    def _test_scores(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the exact scores of test samples on the last rank, else None: layer after layer, rank after rank."""
        b, size = len(ids), self.layers.units * len(ids)
        at, last = self.position, self.plan.ranks - 1
        if at == 0:
            x = self.x[: self.dataset.test.features * b].reshape(-1, b)
            self.tests.fetch(ids, x)
            if "opening" in self.models:
                x = self.models["opening"].forward(x).scores
            state = x.reshape(-1)
        else:
            state = self.spare[1, :size]
            self.solver.boundaries[at - 1].forward(None, state)
        state = self.layers.march(state, [one[:size] for one in self.spare])
        if at < last:
            self.solver.boundaries[at].forward(state, None)
            return None
        return self.models["closing"].forward(state.reshape(-1, b)).scores.reshape(-1, b)

    def _measured(self) -> dict[str, Any]:
        """Return the `diagnostics` since the last test, and reset the sums of residuals."""
        values: dict[str, Any] = {}
        self.world.agree(self.residuals.reshape(-1))
        for name, sums in zip(("forward_residual", "adjoint_residual"), self.residuals, strict=True):
            values[name] = [float(f"{np.sqrt(a / b):.4g}") for a, b in sums if b > 0]
        self.residuals.fill(0)
        if self.s.adapt_every:
            values["cycles"] = [int(self.scalars["forward"]), int(self.scalars["adjoint"])]
            values["gradient_error"] = self.gradient_error
        if self.s.nested_depths:
            values["layers"] = self.plan.depth // self._stride(max(0, int(self.scalars["steps"]) - 1))
        return values

    def diagnostics(self) -> dict[str, Any]:
        """Return the relative residual of each cycle, of states and of adjoints: the root of |residual|^2 / |state|^2.

        With --adapt-every also the cycles of passes, 0 for exact ones, and the relative error of the gradient that was
        compared last; with --nested-depths the number of trained layers.
        """
        return self.measured

    def messages(self, step: int, batch: int) -> list[Message] | None:
        """Return the messages of this row, and those with the ranks of other rows that have the same layers."""
        if self.optimizer.needs_closure or self.s.adapt_every:
            return None
        s, stride = self.s, self._stride(step)
        share = len(np.array_split(np.arange(batch), self.plan.rows)[self.row])
        n, size = self.dataset.train.n, self.context.config.data.batch_size
        last = min(size, n - (step - 1) % self.per_epoch * size) if step else 0
        warm = batch == self.batch == last and stride == 1 == self._stride(max(0, step - 1))
        cold = not (warm and self.keeps[0]), not (warm and self.keeps[1])
        messages = []
        if share:
            messages += self.solver.messages(share, (s.forward_cycles, s.adjoint_cycles), cold, s.levels)
        if self.penalty is not None:
            messages += self.penalty.messages()
        return messages + (self.sums.messages(Step(1), back=True) if self.plan.rows > 1 else [])

    @property
    def lead(self) -> int:
        return 1

    def work(self) -> tuple[str, str, int]:
        stages = list(self.plan.stages(self.position).values())
        names = [one.name for one in self.network.layers[stages[0][0] : stages[-1][1]] if one.linear or one.inner]
        role = f"layers, row {self.row + 1}" if self.plan.rows > 1 else "layers"
        return role, names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", self.w.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.loss.clipped if self.objective is not None else 0}
