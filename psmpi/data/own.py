"""Data sets of the user's own: arrays x and y and, if there are any, x_test and y_test in one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.labels import check_given, check_values
from psmpi.data.rows import RowSource
from psmpi.data.split import Dataset, Split, every_fifth, frozen, hold_out, random_fifth
from psmpi.errors import UserError

SUFFIXES = (".npz", ".h5", ".hdf5")
KEYS = ("x", "y", "x_test", "y_test")


@dataclass(frozen=True)
class Header:
    """Shape and dtype of an array in a file, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    source: Callable[[], RowSource]
    values: Callable[[], npt.NDArray[Any]]


def build(name: str, path: Path, keys: list[str], headers: dict[str, Header], split_seed: int) -> Dataset:
    """Make a Dataset of the arrays described by `headers`; `keys` are all the names in the file.

    Without x_test and y_test a fifth of the samples is held out for testing, see `open_dataset`. Raises UserError for arrays that are missing, empty, of the wrong shape or dtype or that do not match, and
    for targets other than labels 0..C-1, or finite values (samples,) or (samples, outputs).
    """
    for key in ("x", "y"):
        if key not in headers:
            raise UserError(
                f"{path}: no array {key!r}; found {', '.join(keys) or 'nothing'}; expected x (the samples) "
                "and y (labels or values): save them under these names"
            )
    if ("x_test" in headers) != ("y_test" in headers):
        raise UserError(
            f"{path}: found one of x_test and y_test only; expected both or, to have a fifth of the samples "
            "held out for testing, neither: save the other one too"
        )
    scale, shape = _scale(path, "x", headers["x"]), _sample_shape(path, "x", headers["x"])
    y, outputs = _targets(path, "y", headers)
    if "x_test" not in headers:
        if len(y) < 5:
            raise UserError(
                f"{path}: x has {len(y)} samples, too few to hold out a fifth for testing; "
                "save more, or add x_test and y_test"
            )
        held_out = every_fifth(len(y)) if split_seed < 0 else random_fifth(y, split_seed)
        if not held_out.any():
            raise UserError(
                f"{path}: each of the {len(y)} samples has a label of its own, so that none can be held out for "
                "testing; give samples of a kind the same label, or add x_test and y_test"
            )
        train, test = hold_out(held_out, y, shape, scale, headers["x"].source())
        return Dataset(name, outputs, shape, train, test, held_out=True)
    test_shape, test_scale = (
        _sample_shape(path, "x_test", headers["x_test"]),
        _scale(path, "x_test", headers["x_test"]),
    )
    native = [headers[key].dtype.newbyteorder("=") for key in ("x", "x_test")]
    if test_shape != shape or native[0] != native[1]:
        raise UserError(
            f"{path}: x has {native[0]} samples of shape {shape}, x_test has {native[1]} samples of shape "
            f"{test_shape}; expected the same of both: convert one of them"
        )
    y_test, outputs_test = _targets(path, "y_test", headers)
    if y_test.ndim != y.ndim or (y.ndim == 2 and outputs != outputs_test):
        kinds = ["labels" if one.ndim == 1 else f"{one.shape[1]} values a sample" for one in (y, y_test)]
        raise UserError(
            f"{path}: y has {kinds[0]}, y_test has {kinds[1]}; expected the same of both: integers are labels, "
            "floating point numbers are values"
        )
    train = Split(frozen(y), shape, scale, headers["x"].source())
    test = Split(frozen(y_test), shape, test_scale, headers["x_test"].source())
    return Dataset(name, max(outputs, outputs_test), shape, train, test)


def build_all(path: Path, keys: list[str], headers: dict[str, Header]) -> Split:
    """All samples of x as one split; labels are -1 where there is no y. Raises UserError as `build` does."""
    if "x" not in headers:
        raise UserError(f"{path}: no array 'x'; found {', '.join(keys) or 'nothing'}; save the samples as x")
    header = headers["x"]
    targets = _targets(path, "y", headers)[0] if "y" in headers else np.full(header.shape[0], -1)
    return Split(frozen(targets), _sample_shape(path, "x", header), _scale(path, "x", header), header.source())


def _sample_shape(path: Path, key: str, header: Header) -> tuple[int, ...]:
    shape = header.shape
    if len(shape) not in (2, 3, 4):
        raise UserError(
            f"{path}: {key} has the shape {shape}; expected (samples, features), (samples, height, width) or "
            "(samples, channels, height, width): reshape it"
        )
    if 0 in shape:
        raise UserError(f"{path}: {key} is empty, with the shape {shape}; save at least one sample in it")
    return (1, *shape[1:]) if len(shape) == 3 else shape[1:]


def _scale(path: Path, key: str, header: Header) -> float:
    _refuse_objects(path, key, header)
    native = header.dtype.newbyteorder("=")
    if native == np.uint8:
        return 1 / 255
    if native in (np.dtype(np.float32), np.dtype(np.float64)):
        return 1.0
    raise UserError(
        f"{path}: {key} is {header.dtype}; expected uint8 (pixels 0..255), float32 or float64; convert it "
        f"with {key}.astype(np.float32), or {key}.astype(np.uint8) for pixels 0..255"
    )


def _targets(path: Path, key: str, headers: dict[str, Header]) -> tuple[npt.NDArray[Any], int]:
    """Labels (n,) of any integer type and the number of classes they need, or values (n, outputs) and their number."""
    header, samples = headers[key], headers["x" + key[1:]].shape[0]
    _refuse_objects(path, key, header)
    values = header.dtype.kind == "f"
    if values and len(header.shape) not in (1, 2):
        raise UserError(
            f"{path}: {key} has the shape {header.shape}; expected values ({samples},) or ({samples}, outputs): save "
            f"{key}.reshape({samples}, -1)"
        )
    if not values and len(header.shape) != 1:
        raise UserError(
            f"{path}: {key} has the shape {header.shape}; expected ({samples},), one label a sample: "
            f"save {key}.ravel(), or {key}.argmax(axis=1) of one-hot rows"
        )
    if header.shape[0] != samples:
        raise UserError(
            f"{path}: {header.shape[0]} {'rows' if values else 'labels'} in {key} for {samples} samples in "
            f"{'x' + key[1:]}; expected one {'row' if values else 'label'} a sample: save arrays of the same length"
        )
    if values:
        # In float64 first: what is too large for it is not finite.
        rows = header.values().astype(np.float64).reshape(samples, -1)
        check_values(f"{path}, {key}", rows)
        return rows, rows.shape[1]
    labels = header.values()
    return labels, check_given(f"{path}, {key}", labels) + 1


def _refuse_objects(path: Path, key: str, header: Header) -> None:
    if header.dtype.hasobject:
        raise UserError(
            f"{path}: {key} is an array of Python objects, which psmpi does not load, as loading could run "
            f"code; expected numbers: save np.array({key}.tolist()) after making all samples the same length"
        )
