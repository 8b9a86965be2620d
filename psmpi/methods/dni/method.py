"""Decoupled neural interfaces: blocks of layers on different ranks; each block updates without waiting for the others.

Jaderberg and others, "Decoupled neural interfaces using synthetic gradients" (2017); Czarnecki and others,
"Understanding synthetic gradients and decoupled neural interfaces" (2017). A block sends its outputs up, updates along
a synthetic gradient and goes on with the next minibatch. The gradient that the block above returns later trains the
synthesizer: in the paper as soon as it arrives, here a fixed number of minibatches later, so that weights depend
neither on timing nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Set
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.comm.transfers import Boundary, Message, Step
from psmpi.data import Batch, Resident
from psmpi.errors import UserError
from psmpi.layout import Ownership, Runs, plain_layout
from psmpi.methods.dni.block import Block
from psmpi.methods.dni.buffers import CutBuffers, Slots
from psmpi.methods.dni.need import dni_needed
from psmpi.methods.dni.settings import (
    Settings,
    check_dni,
    count_blocks,
    dni_notes,
    dni_warnings,
    find_cuts,
    owner_of,
)
from psmpi.methods.dni.tensors import Tensors, auxiliary_tensors, in_flight
from psmpi.nn.cut import split_layers
from psmpi.training.auxiliary import Auxiliary
from psmpi.training.context import Context
from psmpi.training.evaluator import evaluate
from psmpi.training.method import Exactness, Method
from psmpi.training.state import Places

OPTIONS = ("--layer-blocks", "4", "--model", "mlp", "--widths", "20", "20", "20", "--ahead", "2")


class DecoupledInterfaces(Method):
    """Decoupled neural interfaces on one rank: consecutive blocks and their auxiliary networks, with optimizer states.

    Checkpoints hold minibatches in flight too, so that a resumed training ends in the same bits. Spaces of checkpoints:
    `dni`, weights of auxiliary networks; `dni_m` and so on, vectors of their optimizers; `dni_flight`, outputs and
    returned gradients in flight; `dni_samples`, sample ids of the minibatches in flight.
    """

    name = "dni"
    summary = "blocks of layers on ranks, synthetic gradients"
    settings = (Settings,)
    exactness = Exactness(options=OPTIONS)

    def __init__(self, context: Context):
        network, layout, dataset, ops = context.network, context.layout, context.dataset, context.ops
        self.s = s = context.settings(Settings)
        self.count = count_blocks(context.size, network, s.layer_blocks)
        self.stages = split_layers(network, self.count)
        runs = [network.runs(layout, *stage) for stage in self.stages]
        ranks = [owner_of(k, self.count, context.size) for k in range(self.count)]
        self.rank_blocks = [[k for k, rank in enumerate(ranks) if rank == one] for one in range(context.size)]
        intervals = ([one for k in held for one in runs[k].intervals] for held in self.rank_blocks)
        super().__init__(context, Ownership(tuple(map(Runs.union, intervals))))
        self.batch = context.config.data.batch_size
        self.world = context.group()
        self.w, self.g = (ops.zeros(self.shards[self.rank].size, self.dtype) for _ in range(2))
        self.cuts = find_cuts(network, self.stages, dataset.outputs, s)
        self.slots = Slots(np.full((s.ahead, self.batch), -1, np.int64))
        self.boundaries = [self._boundary(cut.number, cut.units) for cut in self.cuts]
        self.credits = [] if s.returns else [self._boundary(cut.number, 1) for cut in self.cuts]
        held = self.rank_blocks[self.rank]
        first, last = held[0] == 0, held[-1] == self.count - 1
        train = np.arange(dataset.train.n if first or s.synthetic_inputs else 0)
        tests = np.arange(dataset.test.n if first else 0)
        self.train = Resident(dataset.train, train, self.dtype, ops)
        self.tests = Resident(dataset.test, tests, self.dtype, ops)
        self.flight = Tensors(
            *in_flight(self.cuts, s, self.batch, self._owner), context.size, self.rank, ops, self.dtype
        )
        self.auxiliary_w = Tensors(*auxiliary_tensors(self.cuts, self._owner), context.size, self.rank, ops, self.dtype)
        self.auxiliary_g = ops.zeros(self.auxiliary_w.array.size, self.dtype)
        buffers = {k: self._cut_buffers(k) for k in range(held[0] - 1, held[-1] + 1) if 0 <= k < len(self.cuts)}
        self.auxiliary = self._auxiliary()
        ends = np.cumsum([0, *(runs[k].size for k in held)]).tolist()
        self.blocks = [
            Block(
                context, k, self.stages[k], self.w[a:b], self.g[a:b], buffers.get(k - 1), buffers.get(k),
                self._networks(k), self.slots, self.train,
            )
            for k, (a, b) in zip(held, pairwise(ends), strict=True)
        ]  # fmt: skip
        self.metric, self.batches = context.metric(), network.evaluation_batches(dataset.test.n)
        tested = max(at.stop - at.start for at in self.batches)
        for block in self.blocks:
            block.reserve(self.batch, tested)
        self.last = self.blocks[-1] if last else None
        self._declare()
        self.account.hold("gradients", self.g, self.auxiliary_g)
        self.account.hold("samples", self.train, self.tests)
        for block in self.blocks:
            self._count(block)
        self.account.hold("buffers", *(one.outputs for one in buffers.values()))
        self.account.hold("buffers", *(one.targets for one in buffers.values() if one.targets is not None))
        self.measured: dict[str, Any] = {}

    check, needed = staticmethod(check_dni), staticmethod(dni_needed)
    notes, warnings = staticmethod(dni_notes), staticmethod(dni_warnings)

    def _owner(self, block: int) -> int:
        """The rank of a block."""
        return owner_of(block, self.count, self.context.size)

    def _boundary(self, cut: int, units: int) -> Boundary:
        return Boundary(self.world, self._owner(cut), self._owner(cut + 1), units, self.dtype)

    def _cut_buffers(self, cut: int) -> CutBuffers:
        """This rank's buffers of a cut."""
        shape, held = (self.s.ahead, self.cuts[cut].units * self.batch), self.rank_blocks[self.rank]
        below, above = cut in held, cut + 1 in held
        none = self.ops.empty(0, self.dtype)
        outputs = self.flight.views.get(f"cut{cut + 1}.outputs")
        if outputs is None:
            wanted = below or self.s.synthetic_inputs
            outputs = self.ops.empty(shape[0] * shape[1], self.dtype).reshape(shape) if wanted else none
        targets = self.flight.views.get(f"cut{cut + 1}.targets")
        if targets is None and self.s.returns and (below or above):
            targets = self.ops.empty(shape[0] * shape[1], self.dtype).reshape(shape)
        ticket = self.ops.zeros(self.s.ahead, self.dtype).reshape(-1, 1, 1)
        credit = self.credits[cut] if self.credits else None
        return CutBuffers(self.boundaries[cut], credit, outputs, targets, ticket, [[] for _ in range(self.s.ahead)])

    def _auxiliary(self) -> dict[tuple[int, str], Auxiliary]:
        """This rank's auxiliary networks, by cut and name."""
        auxiliary, at = {}, 0
        for cut in self.cuts:
            for name, network in cut.networks.items():
                if cut.side(name) not in self.rank_blocks[self.rank]:
                    continue
                place = slice(at, at + network.layout().size)
                at = place.stop
                auxiliary[cut.number, name] = Auxiliary(
                    self.context.config, network, self.auxiliary_w.array[place], self.auxiliary_g[place], self.ops,
                    f"cut {cut.number + 1} {name}", zero=name == "gradient",
                )  # fmt: skip
        return auxiliary

    def _networks(self, block: int) -> dict[str, Auxiliary]:
        """The auxiliary networks of a block."""
        return {name: one for (cut, name), one in self.auxiliary.items() if self.cuts[cut].side(name) == block}

    def _declare(self) -> None:
        """Declare the state: vectors of each block, spaces of auxiliary networks and of minibatches in flight."""
        state, shard = self.state, self.shards[self.rank]
        spots: list[Places] = [
            [(shard.local(a, b), block.runs.local(a, b)) for a, b in block.runs.intervals] for block in self.blocks
        ]
        state.pieces("weights", list(zip((block.w for block in self.blocks), spots, strict=True)))
        optimizers = [block.optimizer for block in self.blocks]
        for name in optimizers[0].vectors:
            state.pieces(name, list(zip((one.vectors[name] for one in optimizers), spots, strict=True)))
        for one in (*optimizers, *(aux.optimizer for aux in self.auxiliary.values())):
            self.account.hold("optimizer", *one.work, one.scratch)
        self.state.scalars["steps"] = 0
        # fits, learnt: steps of synthesizers and of local losses; since: first minibatch with valid tensors in flight.
        for name in ("fits", "learnt", "since"):
            state.scalar(name, 0)
        state.scalars.update(optimizers[0].scalars)
        lost = f"the auxiliary networks of {self.count} blocks, with these options: they start from initial weights"
        layout, runs = self.auxiliary_w.layout, self.auxiliary_w.owned
        if layout.size:
            state.space("dni", [self.auxiliary_w.array], self.dtype, layout, runs, "weights", lost)
            steps = "the optimizers of the auxiliary networks: they start from zeros"
            steppers = [one.optimizer for one in self.auxiliary.values()]
            for name in optimizers[0].vectors:
                arrays = [one.vectors[name] for one in steppers]
                state.space(f"dni_{name}", arrays, self.dtype, layout, runs, "optimizer", steps, of_optimizer=True)
        lost = "the minibatches in flight, with these options: no synthesizer learns from these minibatches"
        layout, runs = self.flight.layout, self.flight.owned
        if layout.size:
            state.space("dni_flight", [self.flight.array], self.dtype, layout, runs, "buffers", lost)
            ids = plain_layout({"samples": self.slots.ids.shape})
            everyone = [Runs(((0, ids.size),))] * self.context.size
            state.space("dni_samples", [self.slots.ids.reshape(-1)], np.dtype(np.int64), ids, everyone, "samples", lost)

    def _count(self, block: Block) -> None:
        """Add the activations and buffers of a block to the account."""
        self.account.ask("activations", lambda: (block.x, block.model.activation_bytes))
        self.account.ask("buffers", lambda: (block.dy, block.model.buffer_bytes))
        self.account.hold("buffers", block.samples_in_order, *block.networks.values())
        self.account.hold("buffers", *(one for one in (block.local, block.objective) if one is not None))

    def step(self, batch: Batch, lr: float) -> None:
        k, s = int(self.scalars["steps"]), self.s
        back = k - s.ahead
        for block in self.blocks:
            block.finish(k % s.ahead)
        if back >= self.scalars["since"]:
            for block in self.blocks:
                block.fit(back, lr, int(self.scalars["fits"]))
            self.scalars["fits"] += 1
        self.slots.put(k, batch.ids)
        for block in self.blocks:
            block.optimizer.scalars.update({name: self.scalars[name] for name in block.optimizer.scalars})
        done = int(self.scalars["learnt"])
        if s.bp_lambda:
            for block in self.blocks:
                block.forward(k)
            for block in reversed(self.blocks):
                self.loss_sum += block.learn(k, lr, done)
        else:
            for block in self.blocks:
                block.forward(k)
                self.loss_sum += block.learn(k, lr, done)
        if "t" in self.scalars:
            self.scalars["t"] += 1
        self.scalars["learnt"] = done + 1
        self.scalars["steps"] = k + 1

    def drain(self) -> None:
        for block in self.blocks:
            for slot in range(self.s.ahead):
                block.finish(slot)

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        for block in self.blocks:
            block.predicted = -1
        if {"dni", "dni_flight", "dni_samples"} & fresh or self.context.config.run.new_data:
            # The tensors in flight belong to other networks, minibatches or samples: no synthesizer learns from them.
            self.scalars["since"] = self.scalars["steps"]
        if fresh & self.state.spaces.keys() - {"dni_flight", "dni_samples"}:
            self.scalars["fits"] = self.scalars["learnt"] = 0
            for one in self.auxiliary.values():
                one.begin(weights="dni" in fresh)
        steps = int(self.scalars["steps"])
        for k in range(max(int(self.scalars["since"]), steps - self.s.ahead), steps):
            self._check_slot(k)

    def _check_slot(self, k: int) -> None:
        """Raise UserError unless minibatch k in flight has samples, and all of them are training samples."""
        ids = self.slots.of(k)
        if not len(ids) or ids.min() < 0 or ids.max() >= self.dataset.train.n:
            raise UserError(
                "the minibatches in flight of the checkpoint are not training samples of this data set: use another one"
            )

    def test(self) -> dict[str, float]:
        self.drain()
        with self.counter.paused():
            sums = evaluate(self.metric, self.batches, self._test_scores, self.tests.targets, self.ops)
        self.measured = self._errors()
        return self.metric.scores(self.world.agree(sums))

    def _test_scores(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the scores of test samples on the last block's rank, else None; outputs go from block to block."""
        b, y = len(ids), None
        for block in self.blocks:
            if block.number == 0:
                x = block.room(b)
                self.tests.fetch(ids, x)
            elif y is not None:
                x = y
            else:
                x = block.room(b)
                self.boundaries[block.number - 1].forward(None, x)
            y = block.model.forward(x).scores.reshape(block.units, b)
        if self.last is not None:
            return y
        self.boundaries[self.blocks[-1].number].forward(y, None)
        return None

    def _errors(self) -> dict[str, Any]:
        """Return the `diagnostics`, from the errors since the last test; set these errors to 0."""
        if not self.s.predicts:
            return {}
        sums = np.zeros((len(self.cuts), 2))
        for block in self.blocks:
            if block.above is not None:
                sums[block.number] = block.error
                block.error = np.zeros(2)
        sums = self.world.agree(sums.reshape(-1)).reshape(-1, 2)
        return {"synthetic_error": [round(float(np.sqrt(a / b)), 6) if b > 0 else None for a, b in sums]}

    def diagnostics(self) -> dict[str, Any]:
        """Return "synthetic_error": |synthetic - returned| / |returned| of gradients of each cut, over the epoch."""
        return self.measured

    @property
    def lead(self) -> int:
        return self.s.ahead

    def messages(self, step: int, batch: int) -> list[Message]:
        up = [message for one in self.boundaries for message in one.messages(Step(batch))]
        if self.s.returns:
            return up + [message for one in self.boundaries for message in one.messages(Step(batch), back=True)]
        return up + [message for one in self.credits for message in one.messages(Step(1), back=True)]

    def work(self) -> tuple[str, str, int]:
        numbers = self.rank_blocks[self.rank]
        layers = self.network.layers[self.stages[numbers[0]][0] : self.stages[numbers[-1]][1]]
        names = [layer.name for layer in layers if layer.linear or layer.inner]
        role = f"block {numbers[0] + 1}" if len(numbers) == 1 else f"blocks {numbers[0] + 1} to {numbers[-1] + 1}"
        return (
            role,
            names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
            self.w.size + self.auxiliary_w.array.size,
        )

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.last.loss.clipped if self.last is not None else 0}
