"""Networks as data: what the layers are, what shapes they give, and which inputs and weights each score depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.errors import UserError, nearest
from psmpi.layout import Classes, Each, Layout, Runs, Users, make_layout
from psmpi.nn.layers import LAYERS, Layer, Stage
from psmpi.nn.layers.chain import leaves, make_stages, uses_of
from psmpi.nn.layers.cosine import Cosine
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.table import Shape, Table
from psmpi.nn.layers.uses import Uses

# The model that the tables of a file describe.
CUSTOM = "custom"


@dataclass(frozen=True)
class Network:
    """Layers from `in_shape` to one raw score a class; places: where a file has its layers, by their names.

    tables: those that describe the layers, where it was built from some.
    trunk: whether all layers but the last are meant to be computed by every rank that has some of the classes.
    """

    name: str
    in_shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    trunk: bool = False
    tables: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False)

    @property
    def classes(self) -> int:
        return self.layers[-1].out_shape[0]

    @property
    def steps(self) -> int:
        """The steps at each of which there are scores; 0: there are scores of samples."""
        return self.layers[-1].out_shape[1] if len(self.layers[-1].out_shape) > 1 else 0

    @property
    def sequences(self) -> bool:
        """Whether its samples are sequences."""
        return len(self.in_shape) == 2

    def with_steps(self, steps: int) -> Network:
        """The same network for sequences, or chunks of them, of so many steps; its parameters are the same."""
        layers = tuple(layer.with_steps(steps) for layer in self.layers)
        return replace(self, in_shape=(self.in_shape[0], steps), layers=layers)

    @property
    def scale(self) -> float:
        """What scores are times cosines with; 0 where they are not cosines."""
        last = self.layers[-1]
        return last.scale if isinstance(last, Cosine) else 0.0

    def walk(self) -> Iterator[Layer]:
        """All layers in the order of forward, those inside others instead of these."""
        return leaves(self.layers)

    @property
    def linear(self) -> tuple[Layer, ...]:
        """The layers before which the network can be cut."""
        return tuple(layer for layer in self.walk() if layer.linear)

    @property
    def normalized(self) -> bool:
        """Whether scores of a sample depend on the others of its minibatch, through batch normalization."""
        return any(layer.couples for layer in self.walk())

    @property
    def notes(self) -> list[str]:
        """What its layers leave unused of their inputs, for people, a line each."""
        return [f"{self.named(layer.name)} of --model {self.name}: {layer.note}" for layer in self.walk() if layer.note]

    def named(self, layer: str) -> str:
        """The name of a layer for people, with its place in the file that describes it."""
        return f"{layer} ({self.places[layer]})" if layer in self.places else layer

    @property
    def residual(self) -> bool:
        """Whether it has residual blocks."""
        return any(layer.inner for layer in self.layers)

    def evaluation_batches(self, samples: int) -> list[slice]:
        """The minibatches that an evaluation of `samples` samples takes, in their order, whoever takes them.

        They stay in the cache; with batch normalization they are large, for the sake of its statistics, and no last one
        is much smaller.
        """
        if not self.normalized:
            return [slice(k, min(k + 100, samples)) for k in range(0, samples, 100)]
        edges = np.linspace(0, samples, 1 + max(1, round(samples / 1000))).astype(int).tolist()
        return [slice(a, b) for a, b in pairwise(edges) if a < b]

    def score_uses(self) -> Uses:
        """Each score is of its own class."""
        return ((0, self.classes, Each(0, self.classes)),)

    def users(self) -> list[list[tuple[Any, Uses]]]:
        """For each layer, its parameters with the classes whose scores depend on their units."""
        return [
            layer.users(uses) for layer, uses in zip(self.layers, uses_of(self.layers, self.score_uses()), strict=True)
        ]

    def stages(
        self, classes: Sequence[int], *, fold: bool = True, layers: tuple[int, int] | None = None
    ) -> list[Stage]:
        """The stages of the subnetwork of `classes`, or of its layers (first, behind the last)."""
        inputs = np.ones(self.in_shape[0], bool)
        some = slice(*layers) if layers else slice(None)
        return make_stages(self.layers, self.score_uses(), Classes.of(classes), inputs, fold=fold, some=some)

    def layout(self) -> Layout:
        """The flat vector of this network, ordered by which scores use what."""
        pairs = [pair for layer in self.users() for pair in layer]
        return make_layout([parameter for parameter, _ in pairs], [uses for _, uses in pairs], self.classes)

    def runs(self, layout: Layout, first: int, behind: int) -> Runs:
        """The runs of the flat vector that the parameters of the layers [first, behind) are."""
        return layout.runs_of_parameters({p.name for layer in self.layers[first:behind] for p in layer.parameters()})

    def tie(self) -> str | None:
        """The name of the last layer with weights, before the scores' own rows, that makes every score see all of it.

        None where the network can be partitioned: where some layer before has units that not all classes use, or where
        there is no layer before, or none but those of a trunk.
        """
        if self.trunk:
            return None
        linear = {parameter.name: layer.name for layer in self.linear for parameter in layer.parameters()}
        names = [layer.name for layer in self.linear]
        rows = [uses for pair in self.users() for p, uses in pair if linear.get(p.name) == names[-1]]
        # Two classes may have one score.
        if self.classes == 1 or all(isinstance(users, Each) for runs in rows for _, _, users in runs):
            names.pop()
        weighted = [uses for pairs in self.users() for parameter, uses in pairs if linear.get(parameter.name) in names]
        if not weighted or any(self._apart(users) for runs in weighted for _, _, users in runs):
            return None
        return names[-1]

    def _apart(self, users: Users) -> bool:
        """Whether units of these users are of some classes and not of all."""
        return self.classes > 1 if isinstance(users, Each) else 0 < len(users) < self.classes


def build(
    name: str,
    in_shape: tuple[int, ...],
    layers: Sequence[Mapping[str, Any]],
    classes: int,
    by_step: bool = False,
) -> Network:
    """A network from layer tables, the form of a configuration file's [[model.layers]].

    Each table has `type`, one of psmpi.nn.layers.LAYERS, and that type's settings: `units`, `groups`, `channels`,
    `kernel`, `pad`, `size`, `bias` (true), `affine` (true), of cosine `scale`, of embedding `vocabulary`, of
    residual `layers` and `scale` (1.0), of attention `heads` and `causal` (true), of positions `longest` (all
    steps). by_step: whether there are scores at each step of sequences. UserError names the layer and what does not
    fit.
    """
    reader = TableReader(name)
    made, shape = reader.read(layers, tuple(in_shape))
    places = reader.places if name == CUSTOM else {}
    network = Network(name, tuple(in_shape), made, places, tables=tuple(layers))
    if not made or not network.linear:
        raise UserError(f"model {name!r} has no layer with weights")
    for layer in list(network.walk())[1:]:
        if isinstance(layer, Embedding):
            raise UserError(
                f"model {name!r}, {network.named(layer.name)}: embedding looks samples up: let it be the first layer"
            )
    wanted = (classes, *in_shape[1:]) if by_step else (classes,)
    if shape != wanted:
        hint = ""
        if len(shape) == 2 and not by_step:
            hint = ', and a target a sequence: add a layer {type = "last"} before those of scores'
        elif by_step:
            hint = ", and a target at each step: leave layers out that end sequences (last, flatten)"
        raise UserError(
            f"model {name!r} ends in shape {shape}; the data set has {classes} classes: expected {wanted}{hint}"
        )
    try:
        network.users()
    except UserError as error:
        label, _, said = str(error).partition(": ")
        raise UserError(f"model {name!r}, {network.named(label)}: {said}") from None
    return network


class TableReader:
    """Reads lists of layer tables, and numbers the layers of each kind; places: where the tables are, by layers."""

    def __init__(self, model: str):
        self.model = model
        self.counts: dict[str, int] = {}
        self.places: dict[str, str] = {}

    def read(self, tables: Any, shape: Shape, inside: str = "") -> tuple[tuple[Layer, ...], Shape]:
        """The layers that the tables describe for inputs of `shape`, and the shape of their outputs.

        inside: the place of the table that has these.
        """
        model = "" if self.model == CUSTOM else f"model {self.model!r}, "
        if not isinstance(tables, Sequence) or isinstance(tables, str):
            raise UserError(f"{model}{inside or 'model'}: layers = {tables!r}; expected a list of tables")
        layers: list[Layer] = []
        for number, table in enumerate(tables, 1):
            place = f"{inside}, entry {number} of its layers" if inside else f"[[model.layers]] entry {number}"
            if model and not inside:
                place = f"layer {number}"
            where = f"{model}{place}"
            if not isinstance(table, Mapping):
                raise UserError(f'{where}: {table!r} is not a table like {{type = "dense", units = 10}}')
            settings = dict(table)
            if "type" not in settings:
                raise UserError(
                    f'{where}: no type is given: add, for instance, type = "dense"; known are {", ".join(LAYERS)}'
                )
            kind = str(settings.pop("type"))
            base = kind.removeprefix("separable_") if kind in LAYERS else kind
            self.counts[base] = self.counts.get(base, 0) + 1
            label = f"{base}{self.counts[base]}"
            self.places[label], where = place, f"{where} ({label})"
            if kind not in LAYERS:
                meant = nearest(kind, LAYERS)
                hint = f"did you mean {meant}? Known" if meant else "known"
                raise UserError(f"{where}: unknown layer type {kind!r}; {hint} are {LAYERS.choices()}")
            one = Table(kind, settings, where, partial(self.read, inside=place))
            layers += LAYERS[kind].read(one, label, shape)
            one.finish()
            shape = layers[-1].out_shape
        return tuple(layers), shape
