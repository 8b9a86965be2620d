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
from psmpi.data.npz import read_npz
from psmpi.data.own import SUFFIXES, build, build_all
from psmpi.data.peaks import open_peaks
from psmpi.data.private import RANK, of_rank
from psmpi.data.sequences import VIEWS, viewed, viewed_split
from psmpi.data.split import Dataset, Numbering, Split
from psmpi.data.svmlight import SVM, is_svmlight, open_svmlight, open_whole_svmlight
from psmpi.data.tasks import TASKS, open_task
from psmpi.data.text import CONTEXT, is_text, open_text, open_whole_text
from psmpi.data.text import SUFFIX as TEXT
from psmpi.errors import UserError, expanded, nearest

DATASETS = ("digits", "peaks", "mnist", "cifar10", "characters", *TASKS)


def parted(name: str) -> tuple[str, str]:
    """A name and its suffix: ("mnist", "rows"), ("adding", "100"); no suffix: ""."""
    first, _, suffix = name.rpartition(":")
    return (first, suffix) if first in DATASETS or (first and suffix in VIEWS) else (name, "")


def locate(name: str, data_dir: str | Path | None, tell: Callable[[str], None]) -> str:
    """The absolute path of a file of the user's own, or the `name` of a data set that has one.

    Of names with {rank} the path has that too, and rank 0's file is looked for. `tell` hears of another file of that
    name. UserError for an unknown name, and where there is no such file.
    """
    given, (name, view) = name, parted(name)
    if name in DATASETS or parted(name)[0] in DATASETS:
        return given
    folder, first = _folder(data_dir), of_rank(name, 0)
    path, here = _locate(first, folder), expanded(first, "--dataset")
    if here.is_file() and not here.samefile(path):
        tell(f"warning: the data set is {path}, and there is another {here}: name the one that is meant by its path")
    if RANK in name:
        # As it was found.
        path = expanded(name, "--dataset") if path == here or folder is None else folder / name
    return str(path.absolute()) + (f":{view}" if view else "")


def open_dataset(
    name: str,
    data_dir: str | Path | None,
    split_seed: int = 0,
    context: int = CONTEXT,
    characters: str = "",
    external: bool = False,
) -> Dataset:
    """Open the data set `name`: digits (embedded), peaks (generated), mnist, cifar10, characters, a task, or a file.

    Files are .npz, .h5 or .hdf5, .svm (see psmpi.data.svmlight), or .txt: a text in windows of `context` characters,
    numbered as in `characters` if given, see psmpi.data.text. Tasks are generated, see psmpi.data.tasks: adding,
    copying, repeat_copy, modular_addition, sparse, ratings, or with a size adding:100. With :rows or :pixels behind its
    name images are sequences, see psmpi.data.sequences. A relative path is looked up in `data_dir` first, if
    given, and then in the current directory. The test samples of a file without any are a fifth of each class (of all
    samples in a regression), drawn with
    `split_seed`, or with -1 every fifth sample, and of a text its last tenth. external: whether the arrays of an HDF5
    file may lie in other files. Reads the labels and checks the headers
    and sizes of all files, but reads no samples; reads a text whole. Raises UserError for an unknown name, for missing
    files and for files of the wrong format, size or content.
    """
    folder, (name, suffix) = _folder(data_dir), parted(name)
    if name in TASKS:
        return open_task(name, suffix, split_seed)
    if name == "characters" and suffix not in VIEWS:
        return open_characters(suffix, split_seed)
    if suffix:
        _check_view(name, suffix)
        return viewed(open_dataset(name, data_dir, split_seed, context, external=external), suffix)
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
    path, keys, headers = _read_own(name, folder, external)
    return build(name, path, keys, headers, split_seed)


def open_split(
    name: str,
    data_dir: str | Path | None,
    split: str,
    split_seed: int = 0,
    context: int = CONTEXT,
    characters: str = "",
    predicted: bool = False,
    numbering: Numbering | None = None,
    external: bool = False,
) -> Split:
    """The `train` or `test` samples of a data set, or `all` the samples x of a file, labelled or not (then -1).

    context, characters, external: see `open_dataset`. numbering: of a text of sparse samples that belongs to another
    one.

    predicted: whether they are to be predicted, so that errors can say how to do without targets. Raises UserError as
    open_dataset does.
    """
    base, view = parted(name)
    if split == "all" and base in DATASETS:
        raise UserError(f"{name} has the splits train and test; `all` is for files of your own")
    if view and base not in DATASETS:
        _check_view(base, view)
        return viewed_split(
            open_split(base, data_dir, split, split_seed, context, predicted=predicted, external=external), view, base
        )
    if is_text(base) and split == "all":
        return open_whole_text(_locate(name, _folder(data_dir)), context, characters)
    if is_svmlight(base):
        path = _locate(base, _folder(data_dir))
        if split == "all":
            return open_whole_svmlight(path, numbering)
        dataset = open_svmlight(base, path, split_seed, numbering, predicted)
    elif base in DATASETS or is_text(base):
        dataset = open_dataset(name, data_dir, split_seed, context, characters)
    else:
        own = _read_own(name, _folder(data_dir), external)
        if split == "all":
            return build_all(*own)
        dataset = build(name, *own, split_seed, predicted)
    return dataset.test if split == "test" else dataset.train


def _check_view(name: str, view: str) -> None:
    if view not in VIEWS:
        raise UserError(f"--dataset {name}:{view}: expected {' or '.join(f'{name}:{one}' for one in VIEWS)}, or {name}")


def _read_own(name: str, folder: Path | None, external: bool) -> tuple[Path, list[str], dict[str, Header]]:
    path = _locate(name, folder)
    return path, *(read_npz(path) if path.suffix.lower() == ".npz" else read_hdf5(path, external))


def _folder(data_dir: str | Path | None) -> Path | None:
    return None if data_dir is None else expanded(data_dir, "--data-dir")


def _locate(name: str, folder: Path | None) -> Path:
    if name == ARRAYS:
        raise UserError(
            "the samples of this run were arrays in memory: go on with psmpi.fit(x, y, resume=...), predict with "
            "psmpi.load(...).predict(x), or name a file that holds them with --dataset"
        )
    if Path(name).suffix.lower() not in (*SUFFIXES, TEXT) and not is_svmlight(name):
        meant = nearest(name, DATASETS)
        hint = f"did you mean {meant}? Choose" if meant else "choose"
        raise UserError(
            f"unknown data set {name!r}; {hint} one of {', '.join(DATASETS)}, or the path of a file that ends in "
            f"{', '.join((*SUFFIXES, TEXT, *SVM))}"
        )
    places = [expanded(name, "--dataset")]
    if folder is not None and not places[0].is_absolute():
        places.insert(0, folder / name)
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
