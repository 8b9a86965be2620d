"""Data sets of arrays in memory: NumPy arrays, objects that convert to them, and sparse SciPy matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header
from psmpi.data.csr import PARTS
from psmpi.data.labels import MAX_CLASSES
from psmpi.data.names import check_names
from psmpi.data.own import build, build_all
from psmpi.data.rows import ArrayRows
from psmpi.data.sequences import LENGTHS
from psmpi.data.split import Dataset, Split
from psmpi.data.validation import with_validation
from psmpi.errors import UserError, counted

Array = npt.NDArray[Any]
# Name of a data set of arrays in memory, and the path that stands for it in errors.
ARRAYS = "arrays"
PLACE = Path(ARRAYS)
# Whole numbers up to this magnitude are exact in float32.
EXACT = 1 << 24


def given_dataset(
    x: Any,
    y: Any,
    x_test: Any = None,
    y_test: Any = None,
    lengths: Any = None,
    lengths_test: Any = None,
    split_seed: int = 0,
    channels_last: bool = False,
    validation: float = 0.0,
) -> tuple[Dataset, Array | None]:
    """Make the data set of samples x (n, ...) and targets y; return it and the classes, sorted, None for values.

    x: dense, (n, features), (n, height, width) or (n, channels, height, width), uint8 (divided by 255), other integers
    or floats; or a SciPy sparse matrix. With lengths (n,), samples are sequences, see psmpi.data.sequences. y:
    integers, booleans or strings (n,) are labels; floating point numbers (n,) or (n, outputs) are values. Without
    x_test and y_test, a fifth of the samples is held out for testing. split_seed, channels_last, validation: see
    `psmpi.data.open_dataset`. UserError for other arrays and for arrays that do not fit together.
    """
    if (x_test is None) != (y_test is None):
        raise UserError("one of x_test and y_test is given only: give both, or neither")
    headers = {**_samples("x", x, lengths is not None), **_lengths(LENGTHS, lengths)}
    targets, classes = _targets("y", y)
    headers["y"] = _header(targets)
    if x_test is not None:
        headers |= {**_samples("x_test", x_test, lengths is not None), **_lengths(f"{LENGTHS}_test", lengths_test)}
        headers["y_test"] = _header(_targets_like("y_test", y_test, classes))
    built = build(ARRAYS, PLACE, list(headers), headers, split_seed, channels_last=channels_last)
    names = _names("y", classes)
    train, test = (replace(split, names=names) for split in (built.train, built.test))
    dataset = replace(built, train=train, test=test)
    return with_validation(dataset, validation, split_seed) if validation else dataset, classes


def _names(key: str, classes: Array | None) -> tuple[str, ...]:
    """Names of the classes; () for values, and for classes that are the numbers 0..C-1."""
    if classes is None or (classes.dtype.kind in "iu" and np.array_equal(classes, np.arange(len(classes)))):
        return ()
    # Latin-1 decodes any bytes and keeps their order.
    names = [label.decode("latin-1") if isinstance(label, bytes) else str(label) for label in classes.tolist()]
    try:
        return check_names(names)
    except ValueError as error:
        raise UserError(f"{key} has labels that cannot name classes ({error}): give short ones, or numbers") from None


def task_of(y: Any) -> str:
    """The task that targets y set: "classes" or "regression"; UserError for an array that cannot be targets."""
    return "regression" if _labels("y", y).dtype.kind == "f" else "classes"


def given_samples(x: Any, lengths: Any = None, channels_last: bool = False) -> Split:
    """Make a split of samples x (n, ...) without targets; x, lengths, errors: as in `given_dataset`."""
    headers = {**_samples("x", x, lengths is not None), **_lengths(LENGTHS, lengths)}
    return build_all(PLACE, list(headers), headers, channels_last=channels_last)


def _header(values: Array) -> Header:
    """Header of an array in memory, as for an array of a file; its source has one row for each sample."""
    rows = len(values) if values.ndim else 0
    return Header(values.shape, values.dtype, lambda: ArrayRows(values.reshape(rows, -1)), lambda: values)


def _samples(key: str, x: Any, sequences: bool) -> dict[str, Header]:
    """Headers of the samples x: one for a dense array, one for each array of a sparse matrix."""
    if hasattr(x, "tocsr"):
        rows = x.tocsr()
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        parts = {name: np.asarray(getattr(rows, name)) for name in PARTS}
        if parts["data"].dtype.kind == "b":
            parts["data"] = parts["data"].astype(np.float32)
        return {f"{key}_{name}": _header(part) for name, part in parts.items()}
    return {key: _header(_numbers(key, x, sequences))}


def _numbers(key: str, x: Any, sequences: bool) -> Array:
    """Convert x to a dense array of a dtype for samples. Integers of sequences stay, since they may be tokens."""
    try:
        values = np.asarray(x)
        if values.dtype.kind == "O":
            values = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} is no array of numbers ({error}): give samples of one length, as numbers") from None
    if np.ma.isMaskedArray(x) and np.ma.getmask(x).any():
        raise UserError(f"{key} has masked values, and samples have all of theirs: fill them in, {key}.filled(0)")
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b" or (kind == "f" and size not in (4, 8)):
        return values.astype(np.float32 if size < 8 else np.float64)
    if kind in "iu" and values.dtype != np.uint8 and not sequences:
        exact = not values.size or max(-int(values.min()), int(values.max())) <= EXACT
        return values.astype(np.float32 if exact else np.float64)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _lengths(key: str, lengths: Any) -> dict[str, Header]:
    return {} if lengths is None else {key: _header(np.asarray(lengths))}


def _labels(key: str, y: Any) -> Array:
    """Convert y to an array of labels or values; objects become integers, floats or strings. UserError for others."""
    try:
        values = np.asarray(y)
        if values.dtype.kind == "O":
            kinds = {type(label) for label in values.ravel().tolist()}
            if len(kinds) > 1 and str in kinds:
                raise UserError(f"{key} has labels of several types, {_named(kinds)}: give them one type")
            values = np.array(values.tolist())
    except ValueError as error:
        raise UserError(f"{key} is no array of targets ({error}): give one label or value a sample") from None
    if values.dtype.kind not in "biufUS":
        raise UserError(f"{key} is {values.dtype}: give integers, strings or booleans as labels, or floats as values")
    return values


def _named(kinds: set[type]) -> str:
    return " and ".join(sorted(kind.__name__ for kind in kinds))


def _targets(key: str, y: Any) -> tuple[Array, Array | None]:
    """Convert targets: return values and None, or the class number of each label and the classes, sorted."""
    values = _labels(key, y)
    if values.dtype.kind == "f":
        return values, None
    if values.ndim == 2 and values.shape[1] == 1:
        raise UserError(f"{key} has the shape {values.shape}; expected ({len(values)},): give {key}.ravel()")
    if values.ndim != 1:
        # Labels at each step of sequences, with -1 for steps that do not count; other arrays are refused later.
        return values, None
    classes, numbers = np.unique(values, return_inverse=True)
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{key} has {len(classes):,} classes; expected {MAX_CLASSES:,} at most: give floats as values")
    return numbers.reshape(values.shape), classes


def _targets_like(key: str, y: Any, classes: Array | None) -> Array:
    """Convert the targets of test samples: class numbers by the given `classes`. UserError for an unknown label."""
    values = _labels(key, y)
    if classes is None:
        return values
    if values.dtype.kind == "f" or (values.dtype.kind in "US") != (classes.dtype.kind in "US"):
        raise UserError(f"{key} is {values.dtype}, and y has labels of {classes.dtype}: give labels of one type")
    if values.ndim != 1:
        raise UserError(f"{key} has the shape {values.shape}; expected ({len(values)},): give one label a sample")
    unknown = values[~np.isin(values, classes)]
    if len(unknown):
        raise UserError(
            f"{key} has the label {unknown[0]!s} of {counted(len(unknown), 'sample')}, which y has not: such a class "
            "cannot be learnt; leave these samples out, or train on some"
        )
    return np.searchsorted(classes, values)
