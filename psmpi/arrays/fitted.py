"""A trained network that predicts from arrays, on one process."""

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
    """A trained network with all of its weights. It predicts without MPI: under mpirun each rank predicts its own x.

    contents: configuration, layout and progress, as in a checkpoint. vector: the weights in the order of the network's
    layout, (layout.size,), in the dtype of the training. classes: the labels in the order of the scores, (classes,);
    None in a regression. An object can be pickled and used by several threads.
    """

    contents: Contents = field(repr=False)
    vector: Array = field(repr=False)
    classes: Array | None

    @cached_property
    def config(self) -> Config:
        """The configuration of the network's training."""
        return from_toml(self.contents.config, "configuration", foreign=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the network's training by name, including those of its training method."""
        sections = (*self.config.sections.values(), *self.config.chosen.values())
        return {name: value for section in sections for name, value in asdict(section).items()}

    @property
    def weights(self) -> dict[str, Array]:
        """Copies of the parameters by name, in their shapes."""
        return named_weights(self.contents.layout, self.vector)

    @property
    def network(self) -> Network:
        """The layers of the network, without weights."""
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
        """Raw scores, or the values of a regression, of samples x: (n, outputs), or (n, steps, outputs).

        x, lengths: as `psmpi.fit` takes them. calibrate: samples, such as those of the training, that batch
        normalization takes its statistics from; x if not given. dtype: of the arithmetic and of the scores, that of
        the weights if not given. UserError for samples of another shape than those of the training, for a single
        sample without `calibrate` if the network has batch normalization, and for `calibrate` if it has none.
        """
        with raised():
            last = self.config.data.layout == "nhwc"
            split = given_samples(x, lengths, last)
            network = self._network_for(split)
            calibration = None if calibrate is None else given_samples(calibrate, channels_last=last)
            if network.normalized and calibration is None and split.n < 2:
                raise UserError(
                    f"model {network.name} normalizes over samples, and a single sample is not enough: add "
                    "calibrate=x, samples of the training"
                )
            if calibration is not None and not network.normalized:
                raise UserError(f"calibrate: model {network.name} has no batch normalization; leave it out")
            return self._scores(network, split, calibration, np.dtype(dtype or self.vector.dtype), threads)

    def _network_for(self, split: Split) -> Network:
        """The network for the steps of these samples; UserError if their shape is not that of the training."""
        network, shape = self.network, self.contents.in_shape
        if split.steps and split.shape != shape and split.shape[0] == shape[0]:
            network = stretch(network, split.steps) or network
        if split.shape != network.in_shape:
            raise UserError(f"x has samples of shape {split.shape}, and the network was trained on {shape}")
        return network

    def _scores(
        self, network: Network, split: Split, calibration: Split | None, dtype: np.dtype[Any], threads: int
    ) -> Array:
        from threadpoolctl import threadpool_limits

        layout, each = network.layout(), max(1, network.steps)
        scores = np.empty((split.n * each, network.classes), dtype)
        with threadpool_limits(threads), np.errstate(all="ignore"):
            # The part of all classes has no weights that no score depends on.
            w = restrict(self.vector.astype(dtype, copy=False), layout.part(range(network.classes)))
            model = Model(network, layout, w, None, make_backend("auto", threads))
            if calibration is not None:
                calibrate_model(model, calibration, calibration.n, dtype)
            for at in network.evaluation_batches(split.n):
                ids = np.arange(at.start, at.stop)
                samples, values = Resident(split, ids, dtype), np.empty((split.features, len(ids)), dtype)
                check_tokens(network, samples, "given")
                samples.fetch(ids, values)
                y = model.forward(values, None, span_of(split, ids)).scores
                rows = y.transpose(2, 1, 0) if y.ndim == 3 else y.T
                scores[at.start * each : at.stop * each] = rows.reshape(-1, network.classes)
        return scores.reshape(split.n, network.steps, -1) if network.steps else scores

    def predict(self, x: Any, lengths: Any = None, **options: Any) -> Array:
        """The most probable class of each sample, one of `classes`, or its value in a regression: (n,).

        A regression with several outputs returns (n, outputs). If each step of a sequence has a target, the result is
        (n, steps, ...). options, errors: as in `scores`.
        """
        scores = self.scores(x, lengths, **options)
        if self.classes is None:
            return scores[..., 0] if scores.shape[-1] == 1 else scores
        predicted: Array = self.classes[scores.argmax(axis=-1)]
        return predicted

    def predict_proba(self, x: Any, lengths: Any = None, **options: Any) -> Array:
        """The softmax of the scores in the order of `classes`: (n, classes), or (n, steps, classes), float64.

        It estimates probabilities if the loss was cross-entropy (nll) or has its minimum at the same scores. options:
        as in `scores`. UserError for a regression.
        """
        if self.classes is None:
            raise UserError("predict_proba needs classes, and this network predicts values: use predict")
        scores = self.scores(x, lengths, **options).astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores


def named_weights(layout: Layout, vector: Array) -> dict[str, Array]:
    """The parameters of a flat vector (layout.size,) by name, copies in their shapes."""
    weights = {}
    for tensor in make_tensors(layout):
        values = np.empty(tensor.size, vector.dtype)
        for first, last, at in tensor.spans:
            values[first:last] = vector[at : at + last - first]
        weights[tensor.name] = values.reshape(tensor.shape)
    return weights


def flat_weights(layout: Layout, named: Mapping[str, Array], dtype: npt.DTypeLike) -> Array:
    """The inverse of `named_weights`: a flat vector (layout.size,) of `dtype`; ValueError for a shape that differs."""
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
    """The network of a checkpoint, or of the newest checkpoint of a run directory.

    UserError if there is no checkpoint, or if it is damaged or holds only the part of some classes.
    """
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
    """Make a Fitted of weights in memory. classes: the labels, (classes,); those of the contents if not given."""
    if contents.task == "regression":
        classes = None
    elif classes is None:
        names = contents.names or tuple(contents.characters) or range(contents.layout.classes)
        classes = np.array(names)
    return Fitted(contents, vector, classes)
