"""Data sets of the user's own: arrays x and y and, if there are any, x_test and y_test in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psmpi.data.arrays import Header, as_targets, check_names, sample_shape, scale_of
from psmpi.data.split import Dataset, Split, every_fifth, frozen, hold_out, random_fifth
from psmpi.errors import UserError, counted

SUFFIXES = (".npz", ".h5", ".hdf5")
KEYS = ("x", "y", "x_test", "y_test")


def build(
    name: str, path: Path, keys: list[str], headers: dict[str, Header], split_seed: int, predicted: bool = False
) -> Dataset:
    """Make a Dataset of the arrays described by `headers`; `keys` are all the names in the file.

    Without x_test and y_test a fifth of the samples is held out for testing, see `open_dataset`; predicted: see
    `open_split`. Raises UserError for arrays that are missing, empty, of the wrong shape or dtype or that do not match,
    and for targets other than labels 0..C-1, or finite values (samples,) or (samples, outputs).
    """
    check_names(path, keys, ("x", "y"), predicted)
    if ("x_test" in headers) != ("y_test" in headers):
        save = "save the other one too"
        if predicted and "x_test" in headers:
            save += ", or to predict x_test without labels or values save it as x and add --split all"
        raise UserError(
            f"{path}: found one of x_test and y_test only; expected both or, to have a fifth of the samples "
            f"held out for testing, neither: {save}"
        )
    scale, shape = scale_of(path, "x", headers["x"]), sample_shape(path, "x", headers["x"])
    y, outputs = as_targets(path, "y", headers)
    if "x_test" not in headers:
        if len(y) < 5:
            raise UserError(
                f"{path}: x has {counted(len(y), 'sample')}, too few to hold out a fifth for testing; "
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
        sample_shape(path, "x_test", headers["x_test"]),
        scale_of(path, "x_test", headers["x_test"]),
    )
    native = [headers[key].dtype.newbyteorder("=") for key in ("x", "x_test")]
    if test_shape != shape or native[0] != native[1]:
        raise UserError(
            f"{path}: x has {native[0]} samples of shape {shape}, x_test has {native[1]} samples of shape "
            f"{test_shape}; expected the same of both: convert one of them"
        )
    y_test, outputs_test = as_targets(path, "y_test", headers)
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
    check_names(path, keys, ("x",))
    header = headers["x"]
    shape, scale = sample_shape(path, "x", header), scale_of(path, "x", header)
    targets = as_targets(path, "y", headers)[0] if "y" in headers else np.full(header.shape[0], -1)
    return Split(frozen(targets), shape, scale, header.source())
