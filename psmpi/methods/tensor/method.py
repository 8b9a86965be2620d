"""Tensor parallelism: weight matrices and activations cut into tiles on a grid of ranks.

Bian, Xu, Wang and You, "Maximizing parallelism in distributed training for huge neural networks", arXiv 2105.14450
(3-D), on grids of any shape; Shoeybi et al., "Megatron-LM", arXiv 1909.08053 (1-D); van de Geijn and Watts, "SUMMA"
(1997), and Xu et al., arXiv 2104.05343 (2-D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from psmpi.comm.bridge import Bridge
from psmpi.comm.transfers import Message, Spread, Step, Sum
from psmpi.config import Config
from psmpi.data import Batch, Resident
from psmpi.errors import UserError
from psmpi.layout import Box, Layout, Ownership, Runs
from psmpi.methods.tensor.local import local_layout, local_network, make_products, starts_of_vectors
from psmpi.methods.tensor.need import tensor_needed
from psmpi.methods.tensor.settings import Settings, check_tensor, plan_of, tensor_notes
from psmpi.nn.layers.chain import Tape, leaves
from psmpi.nn.layers.workspace import WHOLE, Workspace
from psmpi.nn.model import Model
from psmpi.nn.objective import GRADIENT_LIMIT
from psmpi.training.context import Context
from psmpi.training.dealt_scores import DealtScores
from psmpi.training.descent import Descent
from psmpi.training.method import Exactness, Method
from psmpi.training.spans import check_tokens, make_span
from psmpi.training.state import Places


class TensorParallel(Method):
    """Tensor parallelism on one rank: its units of each layer, its samples of a minibatch, its tile of each weight.

    w, g: the rank's tiles of weights, then its units of the other parameters, of which ranks with other samples have
    copies.
    """

    name = "tensor"
    summary = "tiles of weight matrices on a grid of ranks"
    settings = (Settings,)
    skips = weighs_classes = True
    sequences = "steps"
    usual_options = ("--dataset", "copying:5", "--model", "transformer", "--loss", "nll", "--epochs", "3")
    exactness = Exactness(
        options=("--model", "mlp", "--widths", "24", "16"),
        wide=("--dataset", "digits:rows", "--model", "transformer", "--widths", "160", "--blocks", "1"),
    )

    def __init__(self, context: Context):
        network, ops, s = context.network, context.ops, context.settings(Settings)
        self.plan = plan = plan_of(context.size, network, context.config)
        grid = plan.grid
        if network.normalized and ops.on_device and grid.size("i") > 1:
            raise UserError(
                f"--grid {','.join(map(str, grid.sizes))} sums the statistics of batch normalization in host memory: "
                f"use --grid 1,{context.size},1, or --backend compiled"
            )
        super().__init__(context, Ownership.of_boxes(context.layout, map(plan.boxes, range(context.size))))
        self.at, self.rows = grid.place(self.rank), grid.size("i")
        shard, own = self.shards[self.rank], local_layout(plan, self.rank)
        self.w, self.g = (ops.zeros(shard.size, self.dtype) for _ in range(2))
        self.places = find_places(plan.boxes(self.rank), context.layout, shard)
        self._draw(shard)
        self.world = context.group()
        # Ranks with the same samples and other units, in the order of scores; ranks with the same units, other samples.
        units = grid.members(self.rank, *(plan.scores.axes or ("j", "l")))
        self.units, self.samples = context.group(units), context.group(grid.members(self.rank, "i"))
        keeps, self.space = s.saved == "gathered", Workspace(ops, self.dtype)
        rank_products = make_products(plan, self.rank, context.group, ops, self.space, keeps=keeps, ahead=s.prefetch)
        self.products, self.weights = rank_products.by_layer, rank_products.weights
        self.local = local_network(plan, self.rank, keeps, self.products)
        # Groups of the same ranks, for sums in host memory.
        self.units_by_host = context.group(units, bridge=Bridge())
        over_samples = context.group(self.samples.ranks, bridge=Bridge())
        self.model = Model(
            self.local, own, self.w, self.g, ops, space=self.space,
            total=over_samples.allreduce if over_samples.size > 1 else None,
            across=self.units_by_host.allreduce if len(units) > 1 else None,
        )  # fmt: skip
        counts = plan.scores.counts if plan.scores.axes else None
        self.scores = DealtScores(context, self.model, self.units, self.units_by_host, counts, self.world)
        self.descent = Descent(context, shard, allsum=self._over_tiles, world=self.world, layout=own)
        # From `tiles` on, parameters of which ranks with other samples have copies; from `whole` on, all ranks have.
        tiles, whole = starts_of_vectors(plan, own)
        self.vectors, first = slice(tiles, own.size), self.at["i"] == 0
        has_copies = self.samples.size > 1 and tiles < own.size
        self.shared = Spread(self.samples, own.size - tiles, self.dtype) if has_copies else None
        # Copies that another rank counts in norms.
        self.copies = slice(whole if first else tiles, whole if first and self.units.rank == 0 else own.size)
        self._declare()
        dataset = context.dataset
        self.train = Resident(dataset.train, np.arange(dataset.train.n), self.dtype, ops)
        self.tests = Resident(dataset.test, np.arange(dataset.test.n), self.dtype, ops)
        self.account.hold("samples", self.train, self.tests)
        self.scores.account(self.account)
        check_tokens(network, self.train, "training")
        check_tokens(network, self.tests, "test")
        self.capacity, self.span = 0, WHOLE
        self.batches = network.evaluation_batches(dataset.test.n)
        most = max(context.config.data.batch_size, *(at.stop - at.start for at in self.batches))
        self._reserve(-(-most // self.rows))

    @classmethod
    def arrangements(cls, config: Config) -> Iterator[tuple[str, Config]]:
        method = replace(config, parallel=replace(config.parallel, method=cls.name))
        for grid in ("auto", "1d"):
            yield f"--method {cls.name} --grid {grid}", method.changed(Settings, grid=grid)

    check, needed, notes = staticmethod(check_tensor), staticmethod(tensor_needed), staticmethod(tensor_notes)

    def _draw(self, shard: Runs) -> None:
        """Set the initial weights, drawn in the order of the shard."""
        drawn, mirror = np.empty(shard.size, self.dtype), self.ops.mirror(self.w)
        self.context.draw_weights(shard, drawn)
        for in_shard, in_vector in self.places:
            mirror.host[in_vector] = drawn[in_shard]
        mirror.push()
        mirror.settle()

    def _declare(self) -> None:
        """Declare the state, and account for memory."""
        state, model = self.state, self.model
        state.pieces("weights", [(self.w, self.places)])
        optimizer = self.descent.optimizer
        for name, vector in optimizer.vectors.items():
            state.pieces(name, [(vector, self.places)])
        state.scalars = optimizer.scalars
        self.account.ask("optimizer", lambda: optimizer.arrays)
        self.account.hold("gradients", self.g)
        self.account.ask("activations", lambda: (self.x, model.activation_bytes))
        self.account.ask("buffers", lambda: (model.buffer_bytes, self.space))
        if self.weights is not None:
            self.account.hold("buffers", self.weights)

    def _reserve(self, batch: int) -> None:
        """Make room for shares of minibatches of up to `batch` samples."""
        if batch > self.capacity:
            self.capacity = batch
            self.x = self.ops.empty(self.dataset.train.features * batch, self.dtype)
            self.model.reserve(batch)
            self.scores.reserve(batch)

    def _over_tiles(self, values: np.ndarray) -> np.ndarray:
        """Return sums over all weights of squared gradients, from each rank's own; copies count once."""
        values -= self.ops.squared_norm(self.g[self.copies])
        return self.world.agree(values)

    def step(self, batch: Batch, lr: float) -> None:
        ids, counts = self._share(batch.ids)
        loss = self._gradient(ids, counts / self.dataset.train.count(batch.ids))
        if self.descent.sound(loss, self.g):
            self.loss_sum += loss * len(batch)
            self.descent.step(self.w, self.g, lr)

    def _share(self, ids: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return this rank's samples of a minibatch, and whether they count.

        A rank without samples takes part in sums over ranks with the first sample, which does not count.
        """
        share = Batch(ids).share(self.at["i"], self.rows).ids
        return (share, True) if len(share) else (ids[:1], False)

    def _gradient(self, ids: np.ndarray, scale: float) -> float:
        """Fill g with the gradient of the minibatch's loss; return this rank's share of the loss."""
        tape = self._forward(self.train, ids)
        self.model.backward(tape, self.scores.derivatives(tape, self.train, ids, scale))
        if self.weights is not None:
            self.weights.finish()
        if self.shared is not None:
            vectors = self.g[self.vectors]
            self.shared.backward(vectors, vectors)
            self.shared.forward(vectors, vectors)
        self.ops.unscale(self.g, self.scores.objective.report.array, GRADIENT_LIMIT[self.dtype])
        return self.scores.value()

    def _forward(self, samples: Resident, ids: np.ndarray) -> Tape:
        """Forward pass of this rank's share of a minibatch."""
        b = len(ids)
        self._reserve(b)
        whole = self.x[: self.dataset.train.features * b].reshape(-1, b)
        samples.fetch(ids, whole)
        self.span = make_span(samples.lengths(ids), self.ops)
        size = prod(self.local.in_shape)
        at = self.plan.start.piece(self.at)[0] * (size // self.local.in_shape[0])
        if self.weights is not None:
            self.weights.begin()
        return self.model.forward(whole[at : at + size], None, self.span)

    def test(self) -> dict[str, float]:
        totals = self.scores.metric.zeros()
        with self.counter.paused():
            for at in self.batches:
                ids, counts = self._share(np.arange(at.start, at.stop))
                scores = self.ops.host(self._forward(self.tests, ids).scores)
                if counts:
                    self.scores.add_sums(totals, scores, self.tests, ids)
        return self.scores.metric.scores(self.world.agree(totals))

    def messages(self, step: int, batch: int) -> list[Message] | None:
        """Return the messages of this rank's groups; None if the number of steps with a loss varies."""
        share = len(self._share(np.arange(batch))[0])
        train, messages = self.dataset.train, []
        if train.by_step and (train.counts != train.counts[0]).any():
            return None
        tiles = self.plan.tiles
        for name, products in self.products.items():
            tile = tiles[name]
            columns = share * prod(tile.layer.in_shape[1:])
            messages += products.messages(columns, not tile.reads_samples)
        wide = np.dtype(np.float64)
        for layer in leaves(self.local.layers):
            for numbers in layer.unit_sums if self.units.size > 1 else ():
                messages += Sum(self.units, numbers * share * prod(layer.in_shape[1:]), wide).messages(
                    Step(), back=True
                )
            for numbers in layer.rank_sums if self.samples.size > 1 else ():
                messages += Sum(self.samples, numbers, wide).messages(Step(), back=True)
        messages += self.scores.messages(share * (int(train.counts[0]) if train.by_step else 1))
        if self.shared is not None:
            messages += self.shared.messages(Step(), back=True) + self.shared.messages(Step())
        return messages

    def work(self) -> tuple[str, str, int]:
        grid = self.plan.grid
        return f"tile {', '.join(str(at) for at in self.at.values())} of {grid.text}", "all", self.w.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.scores.loss.clipped}


def find_places(boxes: Sequence[Box], layout: Layout, shard: Runs) -> Places:
    """Return where the elements of boxes, one after the other, lie in the local vector of a shard.

    Each place is (slice of the shard's vector, slice of the vector of boxes).
    """
    places: Places = []
    at = 0
    for box in boxes:
        for start, stop in layout.runs_of(box).intervals:
            in_shard, in_boxes = shard.local(start, stop), slice(at, at + stop - start)
            at = in_boxes.stop
            # Merge adjacent places.
            if places and places[-1][0].stop == in_shard.start:
                in_shard, in_boxes = (
                    slice(places[-1][0].start, in_shard.stop),
                    slice(places.pop()[1].start, in_boxes.stop),
                )
            places.append((in_shard, in_boxes))
    return places
