"""Networks as data: layers, their shapes, and the inputs and weights that each score depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Classes, Each, Layout, Runs, Users, make_layout
from psmpi.nn.layers import LAYERS, Layer, Stage
from psmpi.nn.layers.chain import leaves, make_stages, uses_of
from psmpi.nn.layers.cosine import Cosine
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.table import Shape, Table, similar_layer
from psmpi.nn.layers.uses import Uses

# Name of the model that layer tables of a configuration file describe.
CUSTOM = "custom"


@dataclass(frozen=True)
class Network:
    """Layers from samples of `in_shape` to one raw score for each class.

    places: place of each layer in the configuration file, by the layer's name. trunk: whether every rank that has some
    of the classes computes all layers except the last. tables: layer tables from which the network was built, if any.
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
        """Number of steps with scores; 0 for one score vector per sample."""
        return self.layers[-1].out_shape[1] if len(self.layers[-1].out_shape) > 1 else 0

    @property
    def sequences(self) -> bool:
        """Whether samples are sequences."""
        return len(self.in_shape) == 2

    def with_steps(self, steps: int) -> Network:
        """Return the same network, with the same parameters, for sequences or chunks of `steps` steps."""
        layers = tuple(layer.with_steps(steps) for layer in self.layers)
        return replace(self, in_shape=(self.in_shape[0], steps), layers=layers)

    @property
    def scale(self) -> float:
        """Factor of cosines that gives the scores; 0 if the scores are not cosines."""
        last = self.layers[-1]
        return last.scale if isinstance(last, Cosine) else 0.0

    def walk(self) -> Iterator[Layer]:
        """Iterate over all layers in the order of forward; inner layers replace the layer that contains them."""
        return leaves(self.layers)

    @property
    def linear(self) -> tuple[Layer, ...]:
        """Layers with weights, before which the network can be cut."""
        return tuple(layer for layer in self.walk() if layer.linear)

    @property
    def normalized(self) -> bool:
        """Whether scores of a sample depend on the other samples of its minibatch, through batch normalization."""
        return any(layer.couples for layer in self.walk())

    @property
    def notes(self) -> list[str]:
        """Messages about inputs that layers do not use, one line for each layer with such inputs."""
        return [f"{self.named(layer.name)} of --model {self.name}: {layer.note}" for layer in self.walk() if layer.note]

    def named(self, layer: str) -> str:
        """Return the name of a layer for messages, with its place in the configuration file."""
        return f"{layer} ({self.places[layer]})" if layer in self.places else layer

    @property
    def residual(self) -> bool:
        """Whether the network has residual blocks."""
        return any(layer.inner for layer in self.layers)

    def evaluation_batches(self, samples: int) -> list[slice]:
        """Return the minibatches of an evaluation of `samples` samples, in order, the same for any number of ranks.

        Minibatches of 100 samples stay in the cache. With batch normalization they have about 1000 samples, for better
        statistics, and about equal sizes.
        """
        if not self.normalized:
            return [slice(k, min(k + 100, samples)) for k in range(0, samples, 100)]
        edges = np.linspace(0, samples, 1 + max(1, round(samples / 1000))).astype(int).tolist()
        return [slice(a, b) for a, b in pairwise(edges) if a < b]

    def score_uses(self) -> Uses:
        """Return the users of the scores: each score belongs to its class."""
        return ((0, self.classes, Each(0, self.classes)),)

    def users(self) -> list[list[tuple[Any, Uses]]]:
        """Return, for each layer, its parameters with the classes whose scores depend on their units."""
        return [
            layer.users(uses) for layer, uses in zip(self.layers, uses_of(self.layers, self.score_uses()), strict=True)
        ]

    def stages(
        self, classes: Sequence[int], *, fold: bool = True, layers: tuple[int, int] | None = None
    ) -> list[Stage]:
        """Return the stages of the subnetwork of `classes`, or of its layers = [first, stop)."""
        inputs = np.ones(self.in_shape[0], bool)
        some = slice(*layers) if layers else slice(None)
        return make_stages(self.layers, self.score_uses(), Classes.of(classes), inputs, fold=fold, some=some)

    def layout(self) -> Layout:
        """Return the layout of the flat vector, ordered by the scores that use each parameter."""
        pairs = [pair for layer in self.users() for pair in layer]
        return make_layout([parameter for parameter, _ in pairs], [uses for _, uses in pairs], self.classes)

    def runs(self, layout: Layout, first: int, stop: int) -> Runs:
        """Return the runs of the flat vector with the parameters of the layers [first, stop)."""
        return layout.runs_of_parameters({p.name for layer in self.layers[first:stop] for p in layer.parameters()})

    def tie(self) -> str | None:
        """Return the name of the layer that prevents a partition of the network by classes, or None.

        This layer is the last one with weights before the rows of the scores, if every class uses all units of all
        layers with weights before them. None means that the network can be partitioned: some layer has units that not
        all classes use, or there is no layer with weights before the scores, or the layers before them are a `trunk`.
        """
        if self.trunk:
            return None
        linear = {parameter.name: layer.name for layer in self.linear for parameter in layer.parameters()}
        names = [layer.name for layer in self.linear]
        rows = [uses for pair in self.users() for p, uses in pair if linear.get(p.name) == names[-1]]
        # If two classes have one common score, the last layer has no rows of single classes.
        if self.classes == 1 or all(isinstance(users, Each) for runs in rows for _, _, users in runs):
            names.pop()
        weighted = [uses for pairs in self.users() for parameter, uses in pairs if linear.get(parameter.name) in names]
        if not weighted or any(self._apart(users) for runs in weighted for _, _, users in runs):
            return None
        return names[-1]

    def _apart(self, users: Users) -> bool:
        """Return whether `users` are some classes, but not all."""
        return self.classes > 1 if isinstance(users, Each) else 0 < len(users) < self.classes


def build(
    name: str,
    in_shape: tuple[int, ...],
    layers: Sequence[Mapping[str, Any]],
    classes: int,
    by_step: bool = False,
) -> Network:
    """Build a network from layer tables, as in [[model.layers]] of a configuration file.

    Each table has `type`, one of psmpi.nn.layers.LAYERS, and settings of that type: `units`, `groups`, `channels`,
    `kernel`, `pad`, `size`, `bias` (true), `affine` (true); `scale` of cosine; `vocabulary` of embedding; `layers` and
    `scale` (1.0) of residual; `heads` and `causal` (true) of attention; `longest` (all steps) of positions. by_step:
    whether the network has scores at each step of sequences. UserError names the layer and the setting that does not
    fit.
    """
    reader = TableReader(name)
    built, shape = reader.read(layers, tuple(in_shape))
    places = reader.places if name == CUSTOM else {}
    network = Network(name, tuple(in_shape), built, places, tables=tuple(layers))
    if not built or not network.linear:
        raise UserError(f"model {name!r} has no layer with weights")
    for layer in list(network.walk())[1:]:
        if isinstance(layer, Embedding):
            raise UserError(
                f"model {name!r}, {network.named(layer.name)}: an embedding takes the tokens of samples: let it be the "
                "first layer"
            )
    wanted = (classes, *in_shape[1:]) if by_step else (classes,)
    if shape != wanted:
        hint = ""
        if len(shape) == 2 and not by_step:
            hint = ', and one target per sequence: add a layer {type = "last"} before the layers of the scores'
        elif by_step:
            hint = ", and a target at each step: remove layers that end sequences (last, flatten)"
        raise UserError(
            f"model {name!r} ends in shape {shape}; the data set has {classes} classes: expected {wanted}{hint}"
        )
    try:
        network.users()
    except UserError as error:
        label, _, reason = str(error).partition(": ")
        raise UserError(f"model {name!r}, {network.named(label)}: {reason}") from None
    return network


class TableReader:
    """Reader of lists of layer tables, which numbers the layers of each kind.

    counts: number of layers of each kind so far; places: place of each layer's table, by the layer's name.
    """

    def __init__(self, model: str):
        self.model = model
        self.counts: dict[str, int] = {}
        self.places: dict[str, str] = {}

    def read(self, tables: Any, shape: Shape, inside: str = "") -> tuple[tuple[Layer, ...], Shape]:
        """Return the layers that the tables describe for inputs of `shape`, and the shape of their outputs.

        inside: place of the table that contains these tables, "" for the model's tables. UserError for tables or
        settings that do not fit.
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
                similar = similar_layer(table, LAYERS) if isinstance(table, str) else ""
                example = f'type = "{similar}", ...' if similar else 'type = "dense", units = 10'
                raise UserError(f"{where}: {table!r} is not a table like {{{example}}}")
            settings = dict(table)
            if "type" not in settings:
                raise UserError(
                    f'{where}: no type is given: add, for instance, type = "dense"; known are {", ".join(LAYERS)}'
                )
            kind = str(settings.pop("type"))
            base = kind.removeprefix("separable_") if kind in LAYERS else kind.partition(":")[0]
            self.counts[base] = self.counts.get(base, 0) + 1
            label = f"{base}{self.counts[base]}"
            self.places[label], where = place, f"{where} ({label})"
            if kind not in LAYERS:
                similar = similar_layer(kind, LAYERS)
                settings_beside = ", with its settings as keys of the table" if ":" in kind or "(" in kind else ""
                hint = f"did you mean {similar}{settings_beside}? Known" if similar else "known"
                raise UserError(f"{where}: unknown layer type {kind!r}; {hint} are {LAYERS.choices()}")
            layer_table = Table(kind, settings, where, partial(self.read, inside=place))
            layers += LAYERS[kind].read(layer_table, label, shape)
            layer_table.finish()
            shape = layers[-1].out_shape
        return tuple(layers), shape
