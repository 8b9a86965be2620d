"""Checks of arrays in the user's files: names, shapes and dtypes. Each error says what to save instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.labels import NUMBERED, check_given, check_values
from psmpi.data.rows import RowSource
from psmpi.errors import UserError, counted

# Usual names of the arrays in other programs' files, in lower case.
OTHERS = {
    "x": ("x_train", "train_x", "xtrain", "trainx", "x", "train_images", "images", "train_data", "data", "features"),
    "y": ("y_train", "train_y", "ytrain", "trainy", "y", "train_labels", "labels", "label", "targets", "target"),
}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of an array in a file, known before its values are read.

    source: opens the rows of the array; values: reads the whole array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    source: Callable[[], RowSource]
    values: Callable[[], npt.NDArray[Any]]
    # Names of the features of a table; () for other files.
    columns: tuple[str, ...] = ()


def check_names(path: Path, keys: Sequence[str], wanted: Sequence[str], predicted: bool = False) -> None:
    """Raise UserError unless all `wanted` names are among the `keys` of a file; predicted: see `open_split`."""
    missing = [key for key in wanted if key not in keys]
    if not missing:
        return
    small = {key.lower(): key for key in reversed(keys)}
    renamed = {key: next((small[name] for name in OTHERS[key] if name in small), None) for key in missing}
    if keys and all(key.startswith("arr_") for key in keys):
        advice = "they were saved without names: np.savez(NAME, x=samples, y=labels)"
    elif all(renamed.values()):
        advice = "save " + " and ".join(f"{old} as {key}" for key, old in renamed.items())
    elif "x" in missing and wanted == ("x",):
        advice = "save the samples as x"
    else:
        advice = "expected x (the samples) and y (labels or values): save them under these names"
    if predicted and missing == ["y"]:
        advice = "to predict samples without labels or values add --split all, which takes all samples x" + (
            f", else {advice}" if renamed["y"] else ""
        )
    wanted_array = "column of labels or values" if path.suffix.lower() in (".csv", ".tsv") else f"array {missing[0]!r}"
    raise UserError(f"{path}: no {wanted_array}; found {', '.join(keys) or 'nothing'}; {advice}")


def sample_shape(path: Path, key: str, header: Header) -> tuple[int, ...]:
    """Shape of a sample of the array `key`: (features,) or (channels, height, width). UserError for other axes."""
    shape = header.shape
    if len(shape) not in (2, 3, 4):
        raise UserError(
            f"{path}: {key} has the shape {shape}; expected (samples, features), (samples, height, width) or "
            f"(samples, channels, height, width): reshape it, as with {key}.reshape(len({key}), -1)"
        )
    if 0 in shape:
        raise UserError(f"{path}: {key} is empty, with the shape {shape}; save at least one sample in it")
    return (1, *shape[1:]) if len(shape) == 3 else shape[1:]


def scale_of(path: Path, key: str, header: Header) -> float:
    """Scale of the stored values of the array `key`: 1/255 for uint8, else 1. UserError for a dtype of no numbers."""
    _refuse_kinds(path, key, header)
    dtype = header.dtype
    if dtype == np.uint8:
        return 1 / 255
    if dtype.kind in "biu" or (dtype.kind == "f" and dtype.itemsize <= 8):
        return 1.0
    raise UserError(
        f"{path}: {key} is {dtype}; expected uint8 (pixels 0..255), other integers, truth values, or floating point "
        f"numbers of 64 bits at most; convert it with {key}.astype(np.float32)"
    )


def as_targets(path: Path, key: str, headers: dict[str, Header]) -> tuple[npt.NDArray[Any], int]:
    """Targets in the array `key` and the number of outputs that they need.

    Returns labels (n,) of any integer dtype and the number of classes, or values (n, outputs) float64 and `outputs`.
    UserError for other shapes and dtypes, for values that are not finite, and for labels that do not count from 0.
    """
    header, samples = headers[key], headers["x" + key[1:]].shape[0]
    _refuse_kinds(path, key, header)
    _check_axes(path, key, header.shape, headers["x" + key[1:]].shape)
    values = header.dtype.kind == "f"
    if values and len(header.shape) not in (1, 2):
        raise UserError(
            f"{path}: {key} has the shape {header.shape}; expected values ({samples},) or ({samples}, outputs): save "
            f"{key}.reshape({samples}, -1)"
        )
    if not values and len(header.shape) != 1:
        raise UserError(
            f"{path}: {key} has the shape {header.shape}; expected ({samples},), one label a sample: "
            f"save {key}.ravel(), or {key}.argmax(axis=1) of one-hot rows; of sequences with a label at each step save "
            "their lengths too"
        )
    if values and len(header.shape) == 2 and samples == header.shape[1] != header.shape[0]:
        raise UserError(
            f"{path}: {key} has the shape {header.shape}; expected ({samples}, outputs), one row a sample: save {key}.T"
        )
    if header.shape[0] != samples:
        raise UserError(
            f"{path}: {counted(header.shape[0], 'row' if values else 'label')} in {key} for "
            f"{counted(samples, 'sample')} in {'x' + key[1:]}; expected one {'row' if values else 'label'} a sample: "
            "save arrays of the same length"
        )
    if values:
        # Convert to float64 before the check: a value out of its range becomes infinite.
        rows = header.values().astype(np.float64).reshape(samples, -1)
        check_values(f"{path}, {key}", rows)
        return rows, rows.shape[1]
    labels = header.values()
    return labels, check_given(f"{path}, {key}", labels) + 1


def _check_axes(path: Path, key: str, targets: tuple[int, ...], samples: tuple[int, ...]) -> None:
    """Raise UserError if the samples lie along the last axis of x, as in HDF5 files that MATLAB writes."""
    count = samples[-1]
    if len(targets) not in (1, 2) or samples[0] in targets or count not in (targets[0], targets[-1]) or count < 2:
        return
    x = "x" + key[1:]
    turned = {3: f"np.moveaxis({x}, -1, 0)", 4: f"{x}.transpose(3, 2, 0, 1)"}.get(len(samples), f"{x}.T")
    also = ""
    if len(targets) == 2:
        also = f" and {key}.ravel()" if 1 in targets else f" and {key}.T" if targets[0] != count else ""
    raise UserError(
        f"{path}: {x} has the shape {samples} and {key} {targets}: the samples lie along the last axis, as MATLAB has "
        f"them; expected them along the first: save {turned}{also}"
    )


def is_text(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is of strings: of fixed width, or h5py's dtype of objects for strings of variable length."""
    return dtype.kind in "SU" or (dtype.metadata is not None and dtype.metadata.get("vlen") in (str, bytes))


def _refuse_kinds(path: Path, key: str, header: Header) -> None:
    dtype, labels = header.dtype, key.startswith("y")
    if is_text(dtype):
        kind = f"strings ({dtype})" if dtype.kind in "SU" else "strings"
        advice = f"one label a sample, save {key}.ravel()" if labels else "numbers"
        raise UserError(f"{path}: {key} holds {kind} of shape {header.shape}; expected {advice}")
    if dtype.hasobject:
        advice = f", or of labels {NUMBERED.replace('(y', '(' + key)}" if labels else ""
        raise UserError(
            f"{path}: {key} is an array of Python objects, which psmpi does not load, as loading could run "
            f"code; expected numbers: save np.array({key}.tolist()) after making all samples the same length{advice}"
        )
