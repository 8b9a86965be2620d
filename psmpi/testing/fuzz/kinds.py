"""The kinds of hostile files: how to make one, and how psmpi opens it."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np

from psmpi.config import Config, check, read_file, to_toml
from psmpi.nn.layers.pattern_file import read_pattern
from psmpi.nn.zoo import make_network
from psmpi.testing.fuzz import arrays, checkpoints, known
from psmpi.testing.fuzz.base import Kind, put, toml_text, use_data, use_own
from psmpi.testing.fuzz.mutations import Rng, mutate


@cache
def _config_text() -> str:
    return to_toml(Config())


LAYERS = """
[model]
model = "custom"
[[model.layers]]
kind = "convolution"
channels = 4
kernel = 3
[[model.layers]]
kind = "relu"
[[model.layers]]
kind = "dense"
units = 4
"""


def _toml(rng: Rng, folder: Path) -> Path:
    text = _config_text() if rng.random() < 0.7 else LAYERS
    return put(folder, "own.toml", toml_text(rng, text).encode("utf-8", "replace"))


def _use_toml(path: Path) -> None:
    config = read_file(str(path))
    check(config, set())
    make_network(config.model.model, (1, 8, 8), 4, **config.model.shape)


def _pattern(rng: Rng, folder: Path) -> Path:
    data = io.BytesIO()
    np.savez(data, format=np.array("csr"), shape=np.array([4, 6]), indptr=np.array([0, 1, 2, 3, 4]),
             indices=np.array([0, 5, 2, 3]), data=np.ones(4))  # fmt: skip
    return put(folder, "own.npz", mutate(rng, data.getvalue()))


def _use_pattern(path: Path) -> None:
    read_pattern(str(path))


KINDS: dict[str, Kind] = {
    "checkpoint": Kind(checkpoints.damaged, checkpoints.use_damaged),
    "resealed": Kind(checkpoints.resealed, checkpoints.use_resealed),
    "npz": Kind(arrays.npz, use_own),
    "sparse": Kind(arrays.sparse, use_own),
    "hdf5": Kind(arrays.hdf5, use_own),
    "svmlight": Kind(arrays.svmlight, use_own),
    "idx": Kind(known.idx, lambda path: use_data(Path("mnist"), path)),
    "cifar": Kind(known.cifar, lambda path: use_data(Path("cifar10"), path)),
    "toml": Kind(_toml, _use_toml),
    "pattern": Kind(_pattern, _use_pattern),
}
