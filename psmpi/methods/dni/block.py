"""One block of the method `dni`: forward pass, update from a synthetic gradient, fit of its synthesizers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.data import Resident
from psmpi.methods.dni.buffers import CutBuffers, Slots, view
from psmpi.methods.dni.local import LocalLoss
from psmpi.methods.dni.settings import Settings
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.training.auxiliary import Auxiliary
from psmpi.training.context import Context, configured_loss
from psmpi.training.descent import no_sum


class Block:
    """Block `number` of the network: the layers `stage`, their weights w and gradient g (n,).

    below, above: buffers of the block's two cuts; None at the ends of the network. networks: auxiliary networks by
    name. error: (2,), sums of |predicted - returned|^2 and |returned|^2 of gradients.
    """

    def __init__(
        self,
        context: Context,
        number: int,
        stage: tuple[int, int],
        w: np.ndarray,
        g: np.ndarray,
        below: CutBuffers | None,
        above: CutBuffers | None,
        networks: dict[str, Auxiliary],
        slots: Slots,
        samples: Resident,
    ):
        network, ops = context.network, context.ops
        self.number, self.w, self.g, self.ops, self.context = number, w, g, ops, context
        self.s, self.slots, self.samples = context.settings(Settings), slots, samples
        self.below, self.above, self.networks = below, above, networks
        self.runs = network.runs(context.layout, *stage)
        self.model = Model(network, context.layout, w, g, ops, layers=stage)
        self.inputs, self.units = int(np.prod(self.model.in_shape)), self.model.size
        self.classes, self.numbers, self.clip = network.classes, context.numbers, context.config.optimization.clip
        context.put_weights(self.runs, w)
        self.optimizer = context.optimizer(self.runs)
        self.objective: Objective | None = None
        self.local: LocalLoss | None = None
        if above is None:
            self.loss = context.loss()
            self.objective = Objective(self.loss, self.model)
            context.numbers.watch(self.objective)
        elif "scores" in networks:
            # `context.loss` would set margin, scale and class weights, which are for the network's own scores.
            loss = configured_loss(context.config, context.dataset)
            loss.lenient = context.numbers.lenient
            self.local = LocalLoss(ops, loss, networks["scores"], networks.get("features"), network.classes)
        self.forward_pass, self.backward_pass = ops.record(self.model.forward), ops.record(self._take_back)
        self.derive_pass = self.objective.record(self._derive) if self.objective is not None else None
        # Minibatch whose forward pass, at the synthesizer's present weights, is on the synthesizer's tape; -1: none.
        self.predicted = -1
        self.error = np.zeros(2)

    def reserve(self, batch: int, tests: int) -> None:
        """Make room for training minibatches of up to `batch` samples, and test minibatches of up to `tests`."""
        most = max(batch, tests)
        self.model.reserve(most)
        copies_inputs = self.below is not None and (not self.below.local or "inputs" in self.networks)
        self.x = self.ops.empty(self.inputs * (most if self.below is None or copies_inputs else 0), self.w.dtype)
        self.samples_in_order = self.ops.put(np.arange(batch))
        self.dy = self.ops.empty(self.units * batch if self.above is not None else 0, self.w.dtype)
        for name, one in self.networks.items():
            if self.local is None or name == "inputs":
                one.reserve(batch)
        if self.local is not None:
            self.local.reserve(batch)
        if self.objective is not None:
            self.objective.reserve(self.classes, batch)

    def room(self, b: int) -> np.ndarray:
        """View (inputs, b) of the buffer for inputs."""
        return self.x[: self.inputs * b].reshape(self.inputs, b)

    def _slot(self, k: int) -> int:
        return k % self.s.ahead

    def _rate(self, lr: float) -> Callable[[Auxiliary], float]:
        """Return a function from an auxiliary network to its learning rate. lr: the learning rate of the blocks."""
        if self.s.synthesizer_lr:
            share = lr / self.context.config.optimization.lr
            return lambda _: share * self.s.synthesizer_lr
        return lambda one: one.bearable(lr)

    def forward(self, k: int) -> None:
        """Compute the outputs of minibatch k; begin to send them up and to receive their gradient."""
        ids = self.slots.of(k)
        self.tape_x = self._take_inputs(k, ids)
        self.tape = self.forward_pass(self.tape_x)
        if self.above is not None:
            b, cut, slot = len(ids), self.above, self._slot(k)
            h = view(cut.outputs, slot, self.units, b)
            h[...] = self.tape.scores.reshape(self.units, b)
            if not cut.local:
                back: np.ndarray = cut.ticket[slot]
                returns = cut.credit or cut.boundary
                if cut.targets is not None:
                    back = view(cut.targets, slot, self.units, b)
                cut.handles[slot] += [cut.boundary.begin(h, None, k), returns.begin_back(None, back, k)]

    def _take_inputs(self, k: int, ids: np.ndarray) -> np.ndarray:
        """Inputs (inputs, b) of minibatch k: samples, outputs of the block below, or their synthetic replacement."""
        b, cut = len(ids), self.below
        if cut is None:
            x = self.room(b)
            self.samples.fetch(ids, x)
            return x
        slot = self._slot(k)
        if "inputs" in self.networks:
            one = self.networks["inputs"]
            if not cut.local:
                cut.handles[slot].append(cut.boundary.begin(None, view(cut.outputs, slot, self.inputs, b), k))
            samples = one.x(b)
            self.samples.fetch(ids, samples)
            x = self.room(b)
            x[...] = one.forward(samples)
            self._credit(cut, slot, k)
            return x
        if cut.local:
            return view(cut.outputs, slot, self.inputs, b)
        x = self.room(b)
        cut.boundary.begin(None, x, k).finish()
        self._credit(cut, slot, k)
        return x

    def _credit(self, cut: CutBuffers, slot: int, k: int) -> None:
        """With local losses, send the block below a credit: minibatch k has arrived."""
        if cut.credit is not None and not cut.local:
            cut.handles[slot].append(cut.credit.begin_back(cut.ticket[slot], None, k))

    def learn(self, k: int, lr: float, done: int) -> float:
        """Update the block on minibatch k, right after `forward`; return the summed loss, 0 in all but the last block.

        done: steps of local losses so far.
        """
        ids = self.slots.of(k)
        b, cut, slot = len(ids), self.below, self._slot(k)
        e = dx = None
        if cut is not None and cut.targets is not None:
            e = view(cut.targets, slot, self.inputs, b)
            dx = e.reshape(*self.model.in_shape, b)
        loss = 0.0
        if self.objective is not None:
            self.objective.ids = ids
            self.objective.bring(self._targets(ids))
            assert self.derive_pass is not None
            self.derive_pass(self.tape_x, dx, b)
            loss = self.objective.value()
        else:
            self.backward_pass(self.tape_x, self._signal(k, ids, lr, done), dx)
        if cut is not None and e is not None and not cut.local:
            cut.handles[slot].append(cut.boundary.begin_back(e, None, k))
        self.ops.scale(self.g, 1 / b)
        if self.numbers.sound(self.ops, loss, [(self.g, self.runs)], self.context.layout, b):
            if self.clip > 0:
                self.numbers.clip(self.g, self.clip, no_sum, self.ops, self.context.layout, self.runs)
            self.optimizer.step(self.w, self.g, lr, no_sum)
        for one in (self.below, self.above):
            if one is not None:
                one.poll()
        return loss

    def _derive(self, x: np.ndarray, dx: np.ndarray | None, b: int) -> None:
        """Fill g and dx with the gradient of the summed losses. x: inputs of the tape, the key of a recorded pass."""
        assert self.objective is not None
        scores = self.tape.scores.reshape(self.units, b)
        self.objective.derive(self.tape, scores, self.objective.targets(b), 1.0, dx=dx)

    def _take_back(self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None) -> None:
        """Fill g and dx from dy, the outputs' gradient, which is overwritten. x: as in `_derive`."""
        self.model.backward(self.tape, dy.reshape(self.tape.scores.shape), dx=dx)

    def _targets(self, ids: np.ndarray) -> np.ndarray:
        """Return the labels (b,), or the values (outputs, b), of samples."""
        targets: np.ndarray = self.context.dataset.train.targets[ids]
        return targets if self.context.dataset.task == "classes" else targets.T

    def _signal(self, k: int, ids: np.ndarray, lr: float, done: int) -> np.ndarray:
        """Return the gradient (units, b) of minibatch k's outputs: local, synthetic, or mixed with the returned one."""
        b, cut, slot = len(ids), self.above, self._slot(k)
        assert cut is not None
        h = view(cut.outputs, slot, self.units, b)
        if self.local is not None:
            return self.local.learn(h, self._targets(ids), self._rate(lr), done)
        dy = self.dy[: self.units * b].reshape(self.units, b)
        share = self.s.bp_lambda
        if share:
            cut.finish(slot)
            assert cut.targets is not None
            dy[...] = view(cut.targets, slot, self.units, b)
        if share < 1:
            synthetic = self._predict(h, ids)
            self.predicted = k
            if share:
                self.ops.combine(dy.reshape(-1), (share, dy.reshape(-1)), (1 - share, synthetic.reshape(-1)))
            else:
                dy[...] = synthetic
        return dy

    def _predict(self, h: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the synthetic gradient (units, b) of outputs h (units, b)."""
        one, b = self.networks["gradient"], len(ids)
        x = one.x(b)
        x[: self.units] = h
        if self.s.synthetic == "cdni":
            # One-hot labels, or values; each is a plane if the block's outputs are images.
            targets = self.ops.put(self._targets(ids))
            given = x[self.units :].reshape(self.context.dataset.outputs, -1, b)
            if self.context.dataset.task == "classes":
                given.fill(0)
                given[targets, :, self.samples_in_order[:b]] = 1
            else:
                given[...] = targets[:, None, :]
        return one.forward(x)

    def fit(self, k: int, lr: float, done: int) -> None:
        """Fit the synthesizers to the returned gradient and the inputs of minibatch k. done: their steps so far.

        The messages of the minibatch's slot must be finished.
        """
        slot, ids = self._slot(k), self.slots.of(k)
        b, rate = len(ids), self._rate(lr)
        if "gradient" in self.networks:
            cut, one = self.above, self.networks["gradient"]
            assert cut is not None and cut.targets is not None
            if self.predicted == k:
                # `_predict` has computed this with the same weights.
                predicted = one.tape.scores.reshape(self.units, b)
            else:
                predicted = self._predict(view(cut.outputs, slot, self.units, b), ids)
            self.predicted = -1
            self.error += self._fit(one, predicted, view(cut.targets, slot, self.units, b), rate(one), done)
        if "inputs" in self.networks:
            cut, one = self.below, self.networks["inputs"]
            assert cut is not None
            samples = one.x(b)
            self.samples.fetch(ids, samples)
            self._fit(one, one.forward(samples), view(cut.outputs, slot, self.inputs, b), rate(one), done)

    def _fit(self, one: Auxiliary, predicted: np.ndarray, target: np.ndarray, lr: float, done: int) -> np.ndarray:
        """Step along the gradient of (1/b) |predicted - target|^2; return |predicted - target|^2 and |target|^2."""
        b, flat = predicted.shape[1], target.reshape(-1)
        differ = self.ops.scratch("misfit", flat.size, flat.dtype)[: flat.size]
        self.ops.combine(differ, (1.0, predicted.reshape(-1)), (-1.0, flat))
        squares = np.array([self.ops.squared_norm(differ), self.ops.squared_norm(flat)])
        one.backward(differ.reshape(predicted.shape))
        one.step(lr, 2 / b, done)
        return squares

    def finish(self, slot: int) -> None:
        """Wait for the messages of a slot; afterwards its buffers are free."""
        for cut in (self.below, self.above):
            if cut is not None:
                cut.finish(slot)
