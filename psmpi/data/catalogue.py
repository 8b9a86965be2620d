"""Opening a data set by its name."""

from __future__ import annotations

from pathlib import Path

from psmpi.data.cifar import open_cifar10
from psmpi.data.digits import open_digits
from psmpi.data.hdf5 import open_hdf5
from psmpi.data.mnist import open_mnist
from psmpi.data.npz import open_npz
from psmpi.data.own import SUFFIXES
from psmpi.data.split import Dataset
from psmpi.errors import UserError

DATASETS = ("digits", "mnist", "cifar10")


def open_dataset(name: str, data_dir: str | Path | None) -> Dataset:
    """Open the data set `name`: digits (embedded), mnist, cifar10, or the path of an .npz, .h5 or .hdf5 file.

    A relative path is looked up in `data_dir` first, if given, and then in the current directory. Reads
    the labels and checks the headers and sizes of all files, but reads no samples. Raises UserError for an
    unknown name, for missing files and for files of the wrong format, size or content.
    """
    folder = None if data_dir is None else Path(data_dir)
    if name == "digits":
        return open_digits()
    if name == "mnist":
        return open_mnist(folder)
    if name == "cifar10":
        return open_cifar10(folder)
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}, "
            f"or the path of a file that ends in {', '.join(SUFFIXES)}"
        )
    path = _locate(name, folder)
    return open_npz(name, path) if suffix == ".npz" else open_hdf5(name, path)


def _locate(name: str, folder: Path | None) -> Path:
    places = [Path(name)]
    if folder is not None and not Path(name).is_absolute():
        places.insert(0, folder / name)
    for place in places:
        if place.is_file():
            return place
    searched = ", ".join(str(place.parent.absolute()) for place in places)
    raise UserError(
        f"{name}: no such file in {searched}; correct the path, or name the file's directory with --data-dir"
    )
