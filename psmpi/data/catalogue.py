"""Opening a data set by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from psmpi.data.arrays import Header
from psmpi.data.characters import open_characters
from psmpi.data.cifar import open_cifar10
from psmpi.data.digits import open_digits
from psmpi.data.given import ARRAYS
from psmpi.data.hdf5 import read_hdf5
from psmpi.data.mnist import open_mnist
from psmpi.data.names import Names
from psmpi.data.npy import NPY, is_pair, pair_in, read_pair
from psmpi.data.npz import read_npz
from psmpi.data.own import SUFFIXES, build, build_all
from psmpi.data.peaks import open_peaks
from psmpi.data.private import RANK, of_rank
from psmpi.data.sequences import VIEWS, viewed, viewed_split
from psmpi.data.split import Dataset, Numbering, Split
from psmpi.data.svmlight import SVM, is_svmlight, open_svmlight, open_whole_svmlight
from psmpi.data.table import is_table, read_table
from psmpi.data.tasks import TASKS, open_task
from psmpi.data.text import CONTEXT, is_text, open_text, open_whole_text
from psmpi.data.text import SUFFIX as TEXT
from psmpi.data.validation import with_validation
from psmpi.errors import UserError, expanded, nearest

DATASETS = ("digits", "peaks", "mnist", "cifar10", "characters", *TASKS)


def parted(name: str) -> tuple[str, str]:
    """Split a name into name and suffix, such as ("mnist", "rows") and ("adding", "100"); without one, ""."""
    first, _, suffix = name.rpartition(":")
    return (first, suffix) if first in DATASETS or (first and suffix in VIEWS) else (name, "")


def locate(name: str, data_dir: str | Path | None, tell: Callable[[str], None]) -> str:
    """The absolute path of a user's file, or `name` itself for a data set of DATASETS.

    A name with {rank} keeps it in the path; the file of rank 0 must exist. tell: prints a warning if `data_dir` and the
    current directory both have a file of that name. UserError for an unknown name and for a missing file.
    """
    whole_name, (name, view) = name, parted(name)
    if name in DATASETS or parted(name)[0] in DATASETS:
        return whole_name
    folder, first = _folder(data_dir), of_rank(name, 0)
    path, local = _locate(first, folder), expanded(first, "--dataset")
    if local.is_file() and not local.samefile(path):
        tell(f"warning: the data set is {path}, and there is another {local}: name the one that is meant by its path")
    if RANK in name:
        # The path with {rank}, in the folder in which rank 0's file is.
        path = expanded(name, "--dataset") if path == local or folder is None else folder / name
    return str(path.absolute()) + (f":{view}" if view else "")


def open_dataset(
    name: str,
    data_dir: str | Path | None,
    split_seed: int = 0,
    context: int = CONTEXT,
    label: str = "",
    external: bool = False,
    channels_last: bool = False,
    validation: float = 0.0,
    *,
    characters: str = "",
    names: Names = None,
) -> Dataset:
    """Open the data set `name`: digits (embedded), peaks (generated), mnist, cifar10, characters, a task, or a file.

    Files: .npz, .h5, .hdf5, pairs of .npy (psmpi.data.npy), .csv (psmpi.data.table, which also explains `label`), .svm
    (psmpi.data.svmlight), and .txt, a text in windows of `context` characters (psmpi.data.text). A relative path is
    looked up in `data_dir`, if given, and then in the current directory. Tasks are generated (psmpi.data.tasks):
    adding, copying, repeat_copy, modular_addition, sparse, ratings; a suffix sets the size, as in adding:100. The
    suffixes :rows and :pixels make sequences of images (psmpi.data.sequences).

    split_seed: seed of the test samples of a file without any. They are a fifth of each class (of all samples in a
    regression); with -1 every fifth sample; of a text the last tenth. external: whether the arrays of an HDF5 file may
    lie in other files. channels_last: whether images in the user's files are (height, width, channels). validation:
    share of the training samples that are for validation (psmpi.data.validation). characters: numbers the characters of
    a text; names: number the labels of classes (psmpi.data.names).

    The function reads the labels and checks headers and sizes of all files, but reads no samples; it reads a text or a
    table whole. UserError for an unknown name, for missing files and for files of the wrong format, size or content.
    """
    where = (name, data_dir, split_seed, context, label, external, channels_last)
    dataset = _open(*where, characters, names)
    return with_validation(dataset, validation, split_seed) if validation else dataset


def _open(
    name: str,
    data_dir: str | Path | None,
    split_seed: int,
    context: int,
    label: str,
    external: bool,
    channels_last: bool,
    characters: str,
    names: Names,
) -> Dataset:
    """`open_dataset` without validation samples."""
    folder, (name, suffix) = _folder(data_dir), parted(name)
    if channels_last and (name in DATASETS or is_text(name) or is_svmlight(name) or is_table(name)):
        raise UserError(f"--layout nhwc is for images in .npz, .h5 and .npy files: leave it out of --dataset {name}")
    if name in TASKS:
        return open_task(name, suffix, split_seed)
    if name == "characters" and suffix not in VIEWS:
        return open_characters(suffix, split_seed)
    if suffix:
        _check_view(name, suffix)
        where = (data_dir, split_seed, context, label, external, channels_last, characters, names)
        return viewed(_open(name, *where), suffix)
    if name == "digits":
        return open_digits()
    if name == "peaks":
        return open_peaks()
    if name == "mnist":
        return open_mnist(folder)
    if name == "cifar10":
        return open_cifar10(folder)
    if is_text(name):
        return open_text(name, _locate(name, folder), context, characters)
    if is_svmlight(name):
        return open_svmlight(name, _locate(name, folder), split_seed)
    path, keys, headers = _read_own(name, folder, label, external)
    return build(name, path, keys, headers, split_seed, names=names, channels_last=channels_last)


def open_split(
    name: str,
    data_dir: str | Path | None,
    split: str,
    split_seed: int = 0,
    context: int = CONTEXT,
    label: str = "",
    external: bool = False,
    channels_last: bool = False,
    validation: float = 0.0,
    *,
    characters: str = "",
    predicted: bool = False,
    numbering: Numbering | None = None,
    names: Names = None,
    features: int = 0,
    columns: tuple[str, ...] = (),
) -> Split:
    """Open one split of a data set: "train", "test", "validation", or "all", which is all samples x of a file.

    Labels are -1 if the file has none. data_dir, split_seed to validation, characters, names: see `open_dataset`.
    predicted: whether the samples are to be predicted, so that errors say how to leave out targets. numbering: that of
    the training's sparse samples (.svm). features: number of features of the network, which tells a table without
    labels; columns: names of these features, by which a table's columns are chosen. UserError as `open_dataset`, and
    for a split that the data set does not have.
    """
    base, view = parted(name)
    if split == "all" and base in DATASETS:
        raise UserError(f"{name} has the splits train and test; `all` is for files of your own")
    if view and base not in DATASETS:
        _check_view(base, view)
        where = (context, label, external, channels_last, validation)
        images = open_split(base, data_dir, split, split_seed, *where, predicted=predicted, names=names)
        return viewed_split(images, view, base)
    if is_text(base) and split == "all":
        return open_whole_text(_locate(name, _folder(data_dir)), context, characters)
    if is_svmlight(base):
        path = _locate(base, _folder(data_dir))
        if split == "all":
            return open_whole_svmlight(path, numbering)
        dataset = open_svmlight(base, path, split_seed, numbering, predicted)
    elif base in DATASETS or is_text(base):
        dataset = open_dataset(name, data_dir, split_seed, context, characters=characters)
    else:
        own = _read_own(name, _folder(data_dir), label, external, features, split == "all", columns)
        if split == "all":
            return build_all(*own, names, channels_last)
        dataset = build(name, *own, split_seed, predicted, names, channels_last)
    if validation:
        dataset = with_validation(dataset, validation, split_seed)
    samples = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}[split]
    if samples is None:
        raise UserError(f"{name} has no validation samples, as the training had no --validation: give another --split")
    return samples


def _check_view(name: str, view: str) -> None:
    if view not in VIEWS:
        raise UserError(
            f"--dataset {name}:{view}: expected {' or '.join(f'{name}:{known}' for known in VIEWS)}, or {name}"
        )


def _read_own(
    name: str,
    folder: Path | None,
    label: str,
    external: bool,
    features: int = 0,
    whole: bool = False,
    columns: tuple[str, ...] = (),
) -> tuple[Path, list[str], dict[str, Header]]:
    path = _locate(name, folder)
    if is_table(path.name):
        return path, *read_table(path, label, features, whole, columns)
    if label:
        raise UserError(f"--label {label}: of {path.name} the array y has the labels; --label is for tables, .csv")
    if is_pair(path.name):
        return path, *read_pair(path)
    return path, *(read_npz(path) if path.suffix.lower() == ".npz" else read_hdf5(path, external))


def _folder(data_dir: str | Path | None) -> Path | None:
    return None if data_dir is None else expanded(data_dir, "--data-dir")


def _locate(name: str, folder: Path | None) -> Path:
    if name == ARRAYS:
        raise UserError(
            "the samples of this run were arrays in memory: go on with psmpi.fit(x, y, resume=...), predict with "
            "psmpi.load(...).predict(x), or name a file that holds them with --dataset"
        )
    places = [expanded(name, "--dataset")]
    if folder is not None and not places[0].is_absolute():
        places.insert(0, folder / name)
    pairs = [pair for pair in map(pair_in, places) if pair is not None]
    if pairs:
        return pairs[0]
    if not (Path(name).suffix.lower() in (*SUFFIXES, TEXT) or is_svmlight(name) or is_table(name) or is_pair(name)):
        meant = nearest(name, DATASETS)
        hint = f"did you mean {meant}? Choose" if meant else "choose"
        raise UserError(
            f"unknown data set {name!r}; {hint} one of {', '.join(DATASETS)}, or the path of a file that ends in "
            f"{', '.join((*SUFFIXES, '.csv', NPY, TEXT, *SVM))}"
        )
    for place in places:
        if place.is_file():
            return place
    folders = [place for place in places if place.is_dir()]
    if folders:
        raise UserError(f"{folders[0]}: a directory, and not a file: name the file that is meant")
    if RANK in name:
        raise UserError(
            f"--dataset {name}: {RANK} stands for the number of a rank in trainings with --private-data, and no file "
            "has that name itself: name the file of one rank"
        )
    searched = ", ".join(str(place.parent.absolute()) for place in places)
    raise UserError(
        f"{name}: no such file in {searched}; correct the path, or name the file's directory with --data-dir"
    )
