"""A part of the method `sil` on one rank: a run of layers, its loss, and its inputs."""

from __future__ import annotations

import numpy as np

from psmpi.methods.sil.cost import count
from psmpi.methods.sil.plan import Settings
from psmpi.methods.sil.targets import LabelReader, TargetDistance, draw_targets
from psmpi.nn.losses import Loss
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.training.account import nbytes
from psmpi.training.context import Context


class TrainedPart:
    """Part number `number`: the layers `stage`, their weights w and gradient g (n,).

    stored: (training samples, inputs), the handed-over inputs, row i of sample i. columns: the labels of the part
    before, that of class i as sample i, if the part learns from labels; noise: buffer for the noise on these. cut_sums:
    (4,), over the outputs measured so far: distances, samples right by the nearest column, samples right by least
    squares, samples. alive: (units,) bool, the units that were above 0.
    """

    def __init__(self, context: Context, number: int, stage: tuple[int, int], w: np.ndarray, g: np.ndarray):
        network, layout, dataset, ops = context.network, context.layout, context.dataset, context.ops
        s, dtype, classes, config = context.settings(Settings), w.dtype, network.classes, context.config
        self.number, self.last, self.w, self.g = number, stage[1] == len(network.layers), w, g
        self.runs, self.cost = network.runs(layout, *stage), count(network, *stage)
        self.model = Model(network, layout, w, g, ops, layers=stage)
        self.inputs, self.units = int(np.prod(self.model.in_shape)), self.model.size
        context.put_weights(self.runs, w)
        self.optimizer = context.optimizer(self.runs)
        if self.last:
            self.loss: Loss = context.loss()
        else:
            targets = draw_targets(s.labels, self.units, classes, s.labels_seed, number + 1, s.labels_scale)
            self.loss, self.reader = TargetDistance(targets, s.labels_scale, ops), LabelReader(targets)
        self.loss.lenient = context.numbers.lenient
        self.cut_sums, self.alive = np.zeros(4), np.zeros(self.units, bool)
        drawn = np.empty((0, classes), dtype)
        if number and s.hand_over in ("stale", "labels"):
            drawn = draw_targets(s.labels, self.inputs, classes, s.labels_seed, number, s.labels_scale)
        self.columns = ops.samples(np.ascontiguousarray(drawn.T, dtype), 1.0)
        kept = dataset.train.n if number and s.hand_over in ("stored", "stale") else 0
        self.stored = ops.empty(kept * self.inputs, dtype).reshape(kept, self.inputs)
        self.samples = ops.samples(self.stored, 1.0)
        # Largest minibatch of training, of a hand-over and of a test.
        pieces = [at for split in (dataset.train, dataset.test) for at in network.evaluation_batches(split.n)]
        batch = max(config.data.batch_size, *(at.stop - at.start for at in pieces))
        self.objective = Objective(self.loss, self.model)
        context.numbers.watch(self.objective)
        self.model.reserve(batch)
        # Only training minibatches have gradients.
        most = config.data.batch_size
        self.objective.reserve(self.units, most)
        self.x = ops.empty(self.inputs * batch, dtype)
        self.dx = ops.empty(self.inputs * most if number and s.recovery_epochs else 0, dtype)
        self.noise = ops.mirror(ops.empty(self.inputs * most if number and s.hand_over == "labels" else 0, dtype))
        self._pass, self._back = self.objective.record(self._derive), ops.record(self._take_back)

    def room(self, b: int) -> np.ndarray:
        """View (inputs, b) of the buffer for inputs."""
        return self.x[: self.inputs * b].reshape(self.inputs, b)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Return the outputs (units, b) of inputs x (inputs, b)."""
        self.tape = self.model.forward(x)
        return self.tape.scores.reshape(self.units, -1)

    def learn(self, x: np.ndarray, labels: np.ndarray, scale: float, dx: np.ndarray | None = None) -> float:
        """Fill g with the gradient of the scaled sum of the part's losses on inputs x (inputs, b); return that sum.

        dx: None, or an array of the shape of the model's inputs, filled with their gradient.
        """
        b = len(labels)
        self.objective.bring(labels)
        self._pass(x, dx, b, scale)
        return self.objective.value()

    def _derive(self, x: np.ndarray, dx: np.ndarray | None, b: int, scale: float) -> None:
        outputs = self.forward(x)
        self.objective.derive(self.tape, outputs, self.objective.targets(b), scale, dx=dx)

    def back(self, dy: np.ndarray, dx: np.ndarray | None) -> None:
        """Fill g, and dx unless it is None, from dy, the gradient of the outputs, which is overwritten."""
        self._back(self.tape.outputs[0], dy, dx)

    def _take_back(self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None) -> None:
        """Back-propagate; x, the inputs of the tape, is the key of the recorded pass."""
        self.model.backward(self.tape, dy.reshape(self.tape.scores.shape), dx=dx)

    def look(self, labels: np.ndarray) -> None:
        """Add the measurements of the last forward pass's outputs to `cut_sums` and `alive`."""
        y = self.model.ops.host(self.tape.scores).reshape(self.units, -1)
        nearest = np.count_nonzero(self.reader.nearest(y) == labels)
        solved = np.count_nonzero(self.reader.probabilities(y).argmax(axis=0) == labels)
        self.cut_sums += [self.loss(y, labels, 1.0), float(nearest), float(solved), float(len(labels))]
        self.alive |= (y > 0).any(axis=1)

    def forget(self) -> None:
        """Reset `cut_sums` and `alive`."""
        self.cut_sums.fill(0)
        self.alive.fill(False)

    def memory(self) -> dict[str, int]:
        own = [self.dx, self.noise.array, self.columns, self.objective]
        if not self.last:
            own += [self.loss, self.reader]
        return {
            "optimizer": nbytes(*self.optimizer.work, self.optimizer.scratch),
            "activations": nbytes(self.x, self.model.activation_bytes),
            "buffers": nbytes(self.model.buffer_bytes, *own),
            "samples": nbytes(self.samples),
        }
