"""A trained network to predict with, on arrays and on one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi import checkpoint
from psmpi.arrays.settings import raised
from psmpi.backend import make_backend
from psmpi.checkpoint import Contents
from psmpi.checkpoint.network import network_in
from psmpi.checkpoint.tensors import make_tensors
from psmpi.config import Config, from_toml
from psmpi.data import Resident, Split, given_samples
from psmpi.errors import UserError, expanded
from psmpi.layout import Layout, Runs, restrict
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.sequences import stretch
from psmpi.training.predictor import calibrate as calibrate_model
from psmpi.training.predictor import span_of
from psmpi.training.spans import check_tokens

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained network with all of its weights, which predicts by itself: under mpirun each rank all that it is given.

    contents: what its checkpoint says; vector: its weights, in the order of the network's layout; classes: what is
    predicted, sorted, (classes,), None in a regression. It can be pickled and used by several threads.
    """

    contents: Contents = field(repr=False)
    vector: Array = field(repr=False)
    classes: Array | None

    @cached_property
    def config(self) -> Config:
        """The configuration of its training."""
        return from_toml(self.contents.config, "configuration", foreign=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its training by name, those of the method that trained it too."""
        sections = (*self.config.sections.values(), *self.config.chosen.values())
        return {name: value for section in sections for name, value in asdict(section).items()}

    @property
    def weights(self) -> dict[str, Array]:
        """Copies of its parameters by name, in their shapes."""
        return named_weights(self.contents.layout, self.vector)

    @property
    def network(self) -> Network:
        """Its layers."""
        contents, model = self.contents, self.config.model
        return network_in(contents, model)

    def scores(
        self,
        x: Any,
        lengths: Any = None,
        *,
        calibrate: Any = None,
        dtype: npt.DTypeLike | None = None,
        threads: int = 1,
    ) -> Array:
        """The network's raw scores, or the values of a regression, of samples x: (n, outputs), or (n, steps, outputs).

        x, lengths: as `psmpi.fit` takes them. calibrate: samples, such as those of the training, that give networks
        with batch normalization their statistics; without them x does. dtype: of the arithmetic, that of the weights if
        not given. UserError for samples that do not fit.
        """
        with raised():
            last = self.config.data.layout == "nhwc"
            split = given_samples(x, lengths, last)
            network = self._network_for(split)
            some = None if calibrate is None else given_samples(calibrate, channels_last=last)
            if network.normalized and some is None and split.n < 2:
                raise UserError(
                    f"model {network.name} normalizes over samples, and a single one is none: add calibrate=x, samples "
                    "of the training"
                )
            if some is not None and not network.normalized:
                raise UserError(f"calibrate: model {network.name} has no batch normalization; leave it out")
            return self._scores(network, split, some, np.dtype(dtype or self.vector.dtype), threads)

    def _network_for(self, split: Split) -> Network:
        """The network for samples like these, of sequences for as many steps."""
        network, shape = self.network, self.contents.in_shape
        if split.steps and split.shape != shape and split.shape[0] == shape[0]:
            network = stretch(network, split.steps) or network
        if split.shape != network.in_shape:
            raise UserError(f"x has samples of shape {split.shape}, and the network was trained on {shape}")
        return network

    def _scores(self, network: Network, split: Split, some: Split | None, dtype: np.dtype[Any], threads: int) -> Array:
        from threadpoolctl import threadpool_limits

        layout, each = network.layout(), max(1, network.steps)
        found = np.empty((split.n * each, network.classes), dtype)
        with threadpool_limits(threads), np.errstate(all="ignore"):
            # Weights that no score depends on are of no part.
            w = restrict(self.vector.astype(dtype, copy=False), layout.part(range(network.classes)))
            model = Model(network, layout, w, None, make_backend("auto", threads))
            if some is not None:
                calibrate_model(model, some, some.n, dtype)
            for at in network.evaluation_batches(split.n):
                ids = np.arange(at.start, at.stop)
                samples, some_x = Resident(split, ids, dtype), np.empty((split.features, len(ids)), dtype)
                check_tokens(network, samples, "given")
                samples.fetch(ids, some_x)
                y = model.forward(some_x, None, span_of(split, ids)).scores
                rows = y.transpose(2, 1, 0) if y.ndim == 3 else y.T
                found[at.start * each : at.stop * each] = rows.reshape(-1, network.classes)
        return found.reshape(split.n, network.steps, -1) if network.steps else found

    def predict(self, x: Any, lengths: Any = None, **options: Any) -> Array:
        """The most probable class of each sample, as in `classes`, or its value, (n,).

        Of several outputs (n, outputs); where each step of sequences has a target (n, steps, ...). options: as of
        `scores`.
        """
        found = self.scores(x, lengths, **options)
        if self.classes is None:
            return found[..., 0] if found.shape[-1] == 1 else found
        predicted: Array = self.classes[found.argmax(axis=-1)]
        return predicted

    def predict_proba(self, x: Any, lengths: Any = None, **options: Any) -> Array:
        """The softmax of the scores, float64, in the order of `classes`; options: as of `scores`.

        They estimate probabilities where the loss was cross-entropy, nll, or one whose least is at the same scores.
        """
        if self.classes is None:
            raise UserError("predict_proba is of classes, and this network predicts values: use predict")
        found = self.scores(x, lengths, **options).astype(np.float64)
        found -= found.max(axis=-1, keepdims=True)
        np.exp(found, out=found)
        found /= found.sum(axis=-1, keepdims=True)
        return found


def named_weights(layout: Layout, vector: Array) -> dict[str, Array]:
    """The parameters of a flat vector (layout.size,) by name, copies in their shapes."""
    found = {}
    for tensor in make_tensors(layout):
        values = np.empty(tensor.size, vector.dtype)
        for first, last, at in tensor.spans:
            values[first:last] = vector[at : at + last - first]
        found[tensor.name] = values.reshape(tensor.shape)
    return found


def flat_weights(layout: Layout, named: Mapping[str, Array], dtype: npt.DTypeLike) -> Array:
    """The reverse of `named_weights`; arrays of other shapes are a ValueError."""
    vector = np.zeros(layout.size, dtype)
    for tensor in make_tensors(layout):
        values = np.asarray(named[tensor.name])
        if values.shape != tensor.shape:
            raise ValueError(f"{tensor.name} is {values.shape}, the layout says {tensor.shape}")
        flat = values.reshape(-1)
        for first, last, at in tensor.spans:
            vector[at : at + last - first] = flat[first:last]
    return vector


def load(run: str | PathLike[str]) -> Fitted:
    """The network of a checkpoint, or of the newest one of a run directory; UserError where there is none to read."""
    with raised():
        path = checkpoint.newest(expanded(Path(run), "checkpoint"))
        contents = checkpoint.validate(path)
        if contents.part is not None:
            raise UserError(
                f"checkpoint {path} holds only the part of some classes: put the parts together with psmpi inspect join"
            )
        dtype = np.dtype(from_toml(contents.config, str(path), foreign=True).model.dtype)
        vector = np.empty(contents.layout.size, dtype)
        checkpoint.load(path, contents.layout, Runs(((0, contents.layout.size),)), {"weights": vector})
        return fitted(contents, vector)


def fitted(contents: Contents, vector: Array, classes: Array | None = None) -> Fitted:
    """A network that is in memory; classes: what its classes are called, those of the contents if not given."""
    if contents.task == "regression":
        classes = None
    elif classes is None:
        names = contents.names or tuple(contents.characters) or range(contents.layout.classes)
        classes = np.array(names)
    return Fitted(contents, vector, classes)
