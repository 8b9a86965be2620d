"""Model: a network, or the subnetwork of some classes, over a local weight vector, with forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from math import prod

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Layout, Runs
from psmpi.nn.cut import couples, tail_of
from psmpi.nn.layers import Part, SampleSums, Site
from psmpi.nn.layers.base import Total
from psmpi.nn.layers.chain import Chain, Room, Tape, room_bytes
from psmpi.nn.layers.workspace import WHOLE, Span, Workspace
from psmpi.nn.network import Network


class Model:
    """Scores of `classes` (by default all) as a function of a local weight vector.

    w, g: (part.size,) arrays of one dtype, the weights and their gradient, which `backward` writes; the part is
    `layout.part(classes)`. With g = None, backward only writes sums. The last axis of activations is the minibatch.
    fold: fold mean pooling directly after a convolution into the convolution's kernel.
    layers: [first, stop) restricts the model to these layers, from the outputs of the layer before them to the outputs
    of the last one. The part then has only the weights of these layers, or with `beside` still those of all layers,
    which models beside this one use.
    space: workspace of another model, to share it.
    total: sums on the host over the ranks that compute with the other slices of each minibatch, see `Layer.rank_sums`.
    across: sums over the ranks that have the other units of the same samples, see `Layer.unit_sums`.
    tiled: passes end before the layers `tail` = [first, stop) in which every class has private units; tiles of classes
    compute these (psmpi.nn.tiles).
    apart: g is only as large as the weights of the largest layer. Backward writes each layer's gradient to the start of
    g, where it is valid while `finished` is called with the layer's part.

    A pass returns a `Tape`, whose arrays belong to a room. By default this is the model's room, which the next pass
    overwrites; passes that are open at the same time need separate rooms (`open`).
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        w: np.ndarray,
        g: np.ndarray | None,
        ops: NumpyOps,
        classes: Sequence[int] | None = None,
        *,
        fold: bool = True,
        layers: tuple[int, int] | None = None,
        beside: bool = False,
        space: Workspace | None = None,
        total: Total | None = None,
        across: Total | None = None,
        tiled: bool = False,
        apart: bool = False,
    ):
        self.network, self.layout, self.ops = network, layout, ops
        if classes is None:
            classes = range(network.classes)
        self.classes: Sequence[int] = classes if isinstance(classes, range) else tuple(sorted(classes))
        self.part: Runs = layout.part(self.classes)
        if layers is not None and not beside:
            self.part = self.part & network.runs(layout, *layers)
        for name, vector in (("w", w), ("g", None if apart else g)):
            if vector is not None and (vector.shape, vector.dtype) != ((self.part.size,), w.dtype):
                raise ValueError(
                    f"the part of classes {self.classes} has {self.part.size} parameters; got {name} {vector.shape} "
                    f"{vector.dtype}"
                )
        self.w, self.g, self.dtype = w, g, w.dtype
        # begins: whether inputs are samples; ends: whether outputs are scores.
        first, stop = layers or (0, len(network.layers))
        self.tail = tail_of(network) if tiled else None
        if self.tail is not None:
            stop = self.tail[0]
            layers = first, stop
        self.begins, self.ends = first == 0, stop == len(network.layers)
        # Whether backward passes compute the gradient of the inputs.
        self.gives_dx = beside and not self.begins
        # Whether passes need no sums over ranks.
        self.no_sums = total is None and across is None
        self.shared = space is not None
        self.space = space or Workspace(ops, self.dtype)
        stages = network.stages(self.classes, fold=fold, layers=layers)
        in_shape = network.layers[first].in_shape if first < len(network.layers) else network.in_shape
        if stages:
            in_shape = (int(stages[0].inputs.sum()), *stages[0].layer.in_shape[1:])
        site = Site(layout, self.part, ops, self.space, self.dtype, total, across)
        self.chain = Chain(stages, site, in_shape, apart)
        self.chain.bind(w, g)
        # Parts are numbered from 0; the tail has the next number.
        self.tail_number = 0
        for part in self.walk():
            part.number = self.tail_number
            self.tail_number += 1
        self.room = Room(0)
        # The last pass through the model's room.
        self.last: Tape | None = None
        # A gradient that is added to g, and its views.
        self.added: tuple[np.ndarray, list[object]] | None = None

    @property
    def slices(self) -> dict[int, slice]:
        """Slices of each part's weights in w, by the number of the part; empty unless the model is `apart`."""
        pairs = zip(self.parts, self.chain.slices or [], strict=False)
        return {part.number: at for part, at in pairs if part.weighted}

    def move(self, w: np.ndarray, g: np.ndarray | None) -> None:
        """Compute with other vectors of the same sizes from now on."""
        self.w, self.g = w, g
        self.chain.bind(w, g)

    @property
    def parts(self) -> list[Part]:
        """Parts of the layers, in order."""
        return self.chain.parts

    def walk(self) -> Iterator[Part]:
        """Iterate over all parts, including inner parts, in the order of forward."""
        yield from self.chain.walk()

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of an input sample."""
        return self.chain.in_shape

    @property
    def size(self) -> int:
        """Output numbers per sample."""
        return self.parts[-1].size if self.parts else prod(self.in_shape)

    @property
    def steps(self) -> int:
        """Number of steps with scores; 0 for one score vector per sample, or for a model without scores."""
        return self.network.steps if self.ends else 0

    @property
    def finished(self) -> Callable[[int], None] | None:
        """Function that `backward` calls with the number of each part with weights once its gradient is complete."""
        return self.space.finished

    @finished.setter
    def finished(self, tell: Callable[[int], None] | None) -> None:
        self.space.finished = tell

    def reserve(self, batch: int) -> None:
        """Allocate memory for passes of up to `batch` samples."""
        if batch <= self.room.batch:
            return
        # Free the smaller arrays first, even if a caller has kept the tape that uses them.
        if self.last is not None:
            self.last.outputs.clear()
            self.last.kept.clear()
        self.room, self.last = Room(0), None
        self.room = self.open(batch)
        if self.g is not None:
            self.chain.reserve_backward(batch, self.gives_dx)

    def open(self, batch: int) -> Room:
        """Return a new room for a pass of up to `batch` samples that is open together with other passes."""
        self.chain.reserve(batch)
        return self.chain.room(batch)

    def reserve_backward(self, batch: int) -> None:
        """Allocate memory for backward passes of up to `batch` samples whose tapes another model has made."""
        self.chain.reserve(batch)
        self.chain.reserve_backward(batch)

    def filled(self) -> list[tuple[int, int, int]]:
        """Return the runs of g that each part, or the tail, fills in `backward`: (start, stop, number of the part)."""
        runs = []
        for part in self.walk():
            own = set() if part.layer.inner else {p.name for p in part.layer.parameters()}
            runs += self._places(self.layout.runs_of_parameters(own), part.number)
        if self.tail is not None:
            runs += self._places(self.network.runs(self.layout, *self.tail), self.tail_number)
        return runs

    def _places(self, runs: Runs, number: int) -> list[tuple[int, int, int]]:
        """Return runs of the flat vector as runs (start, stop, number) of the local vector."""
        runs = runs & self.part
        starts = self.part.places(runs.starts, runs.stops)
        stops = starts + runs.stops - runs.starts
        return [(a, b, number) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

    @property
    def activation_bytes(self) -> int:
        """Bytes of the layers' outputs in the model's room."""
        return room_bytes(self.room)[0]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all other arrays except weights: arrays of parts, and the workspace unless it is shared."""
        arrays = [array for part in self.parts for array in part.arrays()]
        kept = room_bytes(self.room)[1] + sum(int(a.nbytes) for a in arrays)
        return kept + (0 if self.shared else self.space.nbytes) + (self.added[0].nbytes if self.added else 0)

    def forward(self, x: np.ndarray, room: Room | None = None, span: Span = WHOLE) -> Tape:
        """Return the tape of a forward pass of x (features, b); its scores are (len(classes), b).

        Features have the order of the network's in_shape. With `layers`, x has the outputs of the layer before them,
        (elements, b) or images, and `scores` of the tape are the outputs of the last layer. Scores at each step of
        sequences are (len(classes), steps, b). room: by default the model's. span: steps of the sequences; a chunk x
        (units, steps, b) may have fewer steps than the network.
        """
        images = self._shaped(x)
        if room is None:
            self.reserve(x.shape[-1])
        self.space.span = span
        tape = self.chain.forward(images, room or self.room)
        if room is None:
            self.last = tape
        return tape

    def trace(self, x: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """Iterate over the parts with their outputs for x, in new arrays.

        x may have up to as many samples as `reserve` has made room for, so that shared memory is not reallocated. A
        chunk of sequences starts with states of 0.
        """
        self.space.span = WHOLE
        return self.chain.trace(self._shaped(x), self.chain.room(x.shape[-1]))

    def _shaped(self, x: np.ndarray) -> np.ndarray:
        """Return x (features, b) in the shape of samples; chunks of sequences are returned unchanged."""
        if x.ndim == 3 and len(self.in_shape) == 2:
            return x
        return x.reshape(*self.in_shape, x.shape[-1])

    def backward(
        self,
        tape: Tape,
        dy: np.ndarray,
        *,
        first: int = 0,
        last: int | None = None,
        dx: np.ndarray | None = None,
        sums: SampleSums | None = None,
        add: bool = False,
        weights: bool = True,
    ) -> None:
        """Write the gradient of a pass to g, given the gradient dy (len(classes), b) of its scores; dy is overwritten.

        first, last: restrict the pass to parts `first` to `last`; dy is then the gradient of the last part's output.
        dx: array of the shape of the first part's input, filled with the gradient of that input. add: add the gradient
        to g. sums: compute weighted sums of the samples' gradients instead of the gradient. weights: False computes
        only the gradient of the input.
        """
        into: object = sums
        if weights and sums is None:
            into = self._cleared_gradient()[1] if add else [part.g for part in self.parts]
        self.space.turn = 1
        self.chain.backward(tape, dy, into, first=first, last=last, dx=dx)
        if add and self.added is not None and self.g is not None and into is self.added[1]:
            self.ops.combine(self.g, (1.0, self.g), (1.0, self.added[0]))

    def _cleared_gradient(self) -> tuple[np.ndarray, list[object]]:
        """Return a vector of zeros for a gradient that is added, and its views; skipped parts thus add nothing."""
        if self.added is None:
            vector = self.ops.zeros(self.part.size, self.dtype)
            self.added = vector, self.chain.views(vector)
        self.added[0].fill(0)
        return self.added

    def calibrate(self, minibatches: Iterable[np.ndarray], spans: Iterable[Span] | None = None) -> None:
        """Normalize by the joint statistics of `minibatches` (features, b) from now on, not by each minibatch's.

        The model can then only make forward passes. spans: one for each minibatch of sequences. ValueError for a
        `tiled` model whose tail has statistics too.
        """
        if self.tail is not None and couples(self.network, self.tail):
            raise ValueError("layers that are computed by tiles of classes have no statistics over all classes")
        for part in self.parts:
            part.gather_statistics()
        for x, span in zip(minibatches, repeat(WHOLE) if spans is None else spans, strict=False):
            self.forward(x, None, span)
        for part in self.parts:
            part.fix_statistics()

    def statistics(self) -> dict[str, np.ndarray]:
        """Return the statistics that `calibrate` has fixed, (units,) each, by name."""
        return {name: values for part in self.parts for name, values in part.statistics().items()}
