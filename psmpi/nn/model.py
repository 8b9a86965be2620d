"""A network, or the subnetwork of some classes, over a local weight vector: forward and backward."""

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
    """The scores of `classes` (all by default) as a function of the part's local weight vector.

    w, g: (part.size,) arrays of one dtype, the weights and (written by `backward`) their gradient; the part is
    `layout.part(classes)`. With g = None backward writes sums alone. Activations put the minibatch last. With `fold`,
    mean pooling right after a convolution is folded into its kernel. With `layers`, (first, behind the last), these
    alone: the model goes from the outputs of the layer before the first to those of the last, and the part is of these
    layers, or with `beside` still of all, whose other weights are those of models beside this one.
    space: the workspace of another model, to be shared with it. total: sums over the ranks that compute with the other
    slices of each minibatch, for layers that state such sums; on the host. across: those over the ranks that have the
    other units of the same samples, where layers are `restrict`ed to some. With `tiled` passes end before the layers
    that every class has for itself, `tail` (first, behind the last), which are computed by tiles of classes
    (psmpi.nn.tiles). With `apart` g is as large as the weights of the largest layer (`largest`) alone: the gradient of
    each layer is there, at its beginning, when `finished` tells of its part, and no later.

    A pass is a `Tape`. Its arrays are those of a room: by default the model's own, which the next pass overwrites;
    passes that are open at once go through rooms of their own (`open`).
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
        # Whether inputs are samples, and outputs scores.
        first, behind = layers or (0, len(network.layers))
        self.tail = tail_of(network) if tiled else None
        if self.tail is not None:
            behind = self.tail[0]
            layers = first, behind
        self.begins, self.ends = first == 0, behind == len(network.layers)
        # Whether backward passes hand on the gradient of the inputs.
        self.hands_on = beside and not self.begins
        # Whether passes make no sums over ranks.
        self.alone = total is None and across is None
        self.shared = space is not None
        self.space = space or Workspace(ops, self.dtype)
        stages = network.stages(self.classes, fold=fold, layers=layers)
        in_shape = network.layers[first].in_shape if first < len(network.layers) else network.in_shape
        if stages:
            in_shape = (int(stages[0].inputs.sum()), *stages[0].layer.in_shape[1:])
        site = Site(layout, self.part, ops, self.space, self.dtype, total, across)
        self.chain = Chain(stages, site, in_shape, apart)
        self.chain.bind(w, g)
        # The number behind those of its parts: that of a tail.
        self.behind = 0
        for part in self.walk():
            part.number = self.behind
            self.behind += 1
        self.room = Room(0)
        # The last pass through it.
        self.last: Tape | None = None
        # Gradients that are to be added to g.
        self.more: tuple[np.ndarray, list[object]] | None = None

    @property
    def slices(self) -> dict[int, slice]:
        """Where the weights of each part are, by the numbers that `finished` tells, where gradients are apart."""
        pairs = zip(self.parts, self.chain.slices or [], strict=False)
        return {part.number: at for part, at in pairs if part.weighted}

    def move(self, w: np.ndarray, g: np.ndarray | None) -> None:
        """Compute with other vectors from now on, of the same sizes."""
        self.w, self.g = w, g
        self.chain.bind(w, g)

    @property
    def parts(self) -> list[Part]:
        """The parts of the layers, one after the other."""
        return self.chain.parts

    def walk(self) -> Iterator[Part]:
        """All parts, those inside others too, in the order of forward."""
        yield from self.chain.walk()

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return self.chain.in_shape

    @property
    def size(self) -> int:
        """Numbers that a pass puts out a sample."""
        return self.parts[-1].size if self.parts else prod(self.in_shape)

    @property
    def steps(self) -> int:
        """The steps at each of which a pass puts out scores; 0: one of each sample, or no scores."""
        return self.network.steps if self.ends else 0

    @property
    def finished(self) -> Callable[[int], None] | None:
        """Called with the number of each part with weights when `backward` has made its gradient."""
        return self.space.finished

    @finished.setter
    def finished(self, tell: Callable[[int], None] | None) -> None:
        self.space.finished = tell

    def reserve(self, batch: int) -> None:
        """Make room for passes of up to `batch` samples."""
        if batch <= self.room.batch:
            return
        # The smaller arrays go first, whoever has kept the pass that used them.
        if self.last is not None:
            self.last.outputs.clear()
            self.last.kept.clear()
        self.room, self.last = Room(0), None
        self.room = self.open(batch)
        if self.g is not None:
            self.chain.reserve_backward(batch, self.hands_on)

    def open(self, batch: int) -> Room:
        """Room for a pass of up to `batch` samples beside others."""
        self.chain.reserve(batch)
        return self.chain.room(batch)

    def reserve_backward(self, batch: int) -> None:
        """Make room for backward passes of up to `batch` samples, of tapes that were made elsewhere."""
        self.chain.reserve(batch)
        self.chain.reserve_backward(batch)

    def filled(self) -> list[tuple[int, int, int]]:
        """(start, stop, number) of the runs of g that each part with weights fills, and the tail, in `backward`."""
        found = []
        for part in self.walk():
            own = set() if part.layer.inner else {p.name for p in part.layer.parameters()}
            found += self._places(self.layout.runs_of_parameters(own), part.number)
        if self.tail is not None:
            found += self._places(self.network.runs(self.layout, *self.tail), self.behind)
        return found

    def _places(self, runs: Runs, number: int) -> list[tuple[int, int, int]]:
        """(start, stop, number) of the local vector that runs of the flat one are."""
        runs = runs & self.part
        starts = self.part.places(runs.starts, runs.stops)
        stops = starts + runs.stops - runs.starts
        return [(a, b, number) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

    @property
    def activation_bytes(self) -> int:
        """Bytes of the layers' outputs, in the model's own room."""
        return room_bytes(self.room)[0]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all else that it holds: what parts keep, the outputs' gradients and what else layers share."""
        arrays = [array for part in self.parts for array in part.arrays()]
        kept = room_bytes(self.room)[1] + sum(int(a.nbytes) for a in arrays)
        return kept + (0 if self.shared else self.space.nbytes) + (self.more[0].nbytes if self.more else 0)

    def forward(self, x: np.ndarray, room: Room | None = None, span: Span = WHOLE) -> Tape:
        """x (features, b), features in the order of the network's in_shape -> a tape; its scores are (len(classes), b).

        With `layers`, from the outputs of the one before them to those of the last, (elements, b) or images. Scores at
        each step of sequences are (len(classes), steps, b). span: the steps that they have, of chunks of them too,
        which may be of less steps than the network's, x (units, steps, b).
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
        """The parts with their outputs for x, one after the other, in arrays that no other pass uses.

        x: of no more samples than there is room for; what all passes share stays where it is. A chunk of sequences
        begins with states of 0 here.
        """
        self.space.span = WHOLE
        return self.chain.trace(self._shaped(x), self.chain.room(x.shape[-1]))

    def _shaped(self, x: np.ndarray) -> np.ndarray:
        """x (features, b) in the shape of samples; chunks of sequences have theirs already."""
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
        """Write into g the gradient of a pass, given that of its scores, dy (len(classes), b), which is used up.

        first, last: of some parts alone, dy being that of the last one's output. dx, of the shape of the first one's
        input, is filled with the gradient of that. add: the gradient is added to g. With `sums` it is not made, but
        the sums of the samples' gradients; without `weights` neither.
        """
        into: object = sums
        if weights and sums is None:
            into = self._more()[1] if add else [part.g for part in self.parts]
        self.space.turn = 1
        self.chain.backward(tape, dy, into, first=first, last=last, dx=dx)
        if add and self.more is not None and self.g is not None and into is self.more[1]:
            self.ops.combine(self.g, (1.0, self.g), (1.0, self.more[0]))

    def _more(self) -> tuple[np.ndarray, list[object]]:
        """Room for a gradient that is to be added, zeros; parts that are not asked add nothing."""
        if self.more is None:
            made = self.ops.zeros(self.part.size, self.dtype)
            self.more = made, self.chain.views(made)
        self.more[0].fill(0)
        return self.more

    def calibrate(self, minibatches: Iterable[np.ndarray], spans: Iterable[Span] | None = None) -> None:
        """Normalize by the statistics of these minibatches (features, b) together from now on, not of each one.

        spans: of each, of sequences. For forward passes alone. ValueError for a model that is `tiled`, whose tail has
        statistics too.
        """
        if self.tail is not None and couples(self.network, self.tail):
            raise ValueError("layers that go by tiles of classes keep no statistics of all of them")
        for part in self.parts:
            part.gather_statistics()
        for x, span in zip(minibatches, repeat(WHOLE) if spans is None else spans, strict=False):
            self.forward(x, None, span)
        for part in self.parts:
            part.fix_statistics()

    def statistics(self) -> dict[str, np.ndarray]:
        """The statistics that `calibrate` has fixed, (units,) each, by name."""
        return {name: values for part in self.parts for name, values in part.statistics().items()}
