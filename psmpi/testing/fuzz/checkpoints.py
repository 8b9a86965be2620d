"""Hostile checkpoints: damaged files, and changed files whose digest was computed again."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from psmpi import checkpoint
from psmpi.checkpoint.build import write_file
from psmpi.checkpoint.format import as_data, seal
from psmpi.checkpoint.network import network_in
from psmpi.checkpoint.scan import scan
from psmpi.checkpoint.tensors import Tensor
from psmpi.config import Config, from_toml, to_toml
from psmpi.data import identify, open_dataset
from psmpi.inspect.look import show, state
from psmpi.layout import Runs
from psmpi.nn.zoo import make_network
from psmpi.testing.fuzz.base import odd_object, put, toml_text
from psmpi.testing.fuzz.looking import looking
from psmpi.testing.fuzz.mutations import Rng, mutate, mutate_near, mutate_plain, spelled


@cache
def good_checkpoint(gzip_level: int) -> bytes:
    """The bytes of a checkpoint of a small network with Adam's state, at this level of compression."""
    import tempfile

    from psmpi.config import NetworkSettings

    config = Config(model=NetworkSettings(model="mlp", widths=(8,)))
    network = make_network("mlp", (6,), 4, **config.model.shape)
    layout = network.layout()
    dataset = open_dataset("digits", None, 0)
    contents = checkpoint.Contents(
        to_toml(config),
        (6,),
        layout,
        checkpoint.Progress(step=3, epoch=1, seconds=1.5, loss_sum=2.5, rows=({"epoch": 1, "test_accuracy": 0.5},)),
        {"t": 3},
        {"seed": 0, "samples": 20},
        {"ranks": [["host", "worker"]]},
        {"versions": {"psmpi": "0"}, "command": ["python", "-m", "psmpi.train"]},
        data=identify(dataset).table(),
    )

    def read(vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        into[...] = np.arange(first, first + len(into)) / 100

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000000003.h5"
        write_file(path, contents, dict.fromkeys(("weights", "m", "v"), np.dtype("f4")), read, gzip_level)
        return path.read_bytes()


def damaged(rng: Rng, folder: Path) -> Path:
    return put(folder, "step-000000003.h5", mutate(rng, good_checkpoint(int(rng.integers(2)))))


def use_damaged(path: Path) -> None:
    try:
        checkpoint.validate(path)
    finally:
        # psmpi scans a file in a separate process, as it does the validation.
        with looking():
            scan(str(path))


def resealed(rng: Rng, folder: Path) -> Path:
    data = good_checkpoint(int(rng.integers(2)))
    if rng.random() < 0.5:
        # Mostly change HDF5's metadata, not the tensors.
        places = [(512, 4096), (512, len(data)), (len(data) // 2, len(data))]
        path = put(folder, "step-000000003.h5", mutate_near(rng, data, places))
    else:
        path = put(folder, "step-000000003.h5", data)
        _edit(rng, path)
    seal(path)
    return path


TEXTS = ("layout", "progress", "scalars", "random", "data", "placement", "provenance", "metrics", "config")


def _edit(rng: Rng, path: Path) -> None:
    """Change one text of a checkpoint, or replace one of its HDF5 objects."""
    with h5py.File(path, "r+") as file:
        if rng.random() < 0.75:
            name = TEXTS[rng.integers(len(TEXTS))]
            text = str(file[name].asstr()[0])
            plain = name != "config"
            changed = spelled(rng, mutate_plain(rng, json.loads(text))) if plain else toml_text(rng, text)
            del file[name]
            file.create_dataset(name, data=as_data(changed), chunks=(1,), fletcher32=bool(rng.random() < 0.9))
            return
        names = ["weights/dense1.weight", "weights/dense1.bias", "optimizer/m/dense1.weight", "provenance", "weights"]
        name = names[rng.integers(len(names))]
        kind = int(rng.integers(5))
        old = file[name].shape if isinstance(file[name], h5py.Dataset) else (4,)
        del file[name]
        odd_object(rng, file, name, old, kind, path.parent)


def use_resealed(path: Path) -> None:
    """Read a checkpoint as psmpi's commands verify and show, a prediction and a resumed run do."""
    contents = checkpoint.validate(path)
    with redirect_stdout(io.StringIO()):
        changed, problem = state(path)
        assert changed == "whole" or problem
        show(path)
        show(path, json=True)
    model = from_toml(contents.config, str(path), foreign=True).model
    layout = network_in(contents, model).layout()
    w = np.empty(layout.size, np.dtype(model.dtype))
    checkpoint.load(path, layout, Runs.union([(0, layout.size)]), {"weights": w}, contents.part)
