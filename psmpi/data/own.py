"""Data sets in the user's files: arrays x and y, and optionally x_test and y_test.

With an array `lengths`, samples are sequences, see psmpi.data.sequences. Sparse samples are arrays of compressed rows
instead of x, see psmpi.data.csr.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from psmpi.data.arrays import Header, as_targets, check_names, sample_shape, scale_of
from psmpi.data.csr import CSR_KEYS, with_compressed
from psmpi.data.names import Names, with_numbers
from psmpi.data.sequences import LENGTHS, is_sequences, read_sequences
from psmpi.data.split import Dataset, Split, every_fifth, frozen, hold_out, random_fifth
from psmpi.errors import UserError, counted

SUFFIXES = (".npz", ".h5", ".hdf5")
KEYS = ("x", "y", "x_test", "y_test", LENGTHS, f"{LENGTHS}_test", *CSR_KEYS)


def build(
    name: str,
    path: Path,
    keys: list[str],
    headers: dict[str, Header],
    split_seed: int,
    predicted: bool = False,
    names: Names = None,
    channels_last: bool = False,
) -> Dataset:
    """Make a Dataset of the arrays in `headers`. keys: all names in the file.

    Without x_test and y_test, a fifth of the samples is held out for testing, see `open_dataset`. predicted, names: see
    `open_split`. Targets are labels, see `with_numbers`, or finite values (samples,) or (samples, outputs); for those
    of sequences see `read_sequences`. UserError for arrays that are missing, empty, of a wrong shape or dtype, or that
    do not match, and for other targets.
    """
    keys, headers = with_compressed(path, keys, headers)
    check_names(path, keys, ("x", "y"), predicted)
    if f"{LENGTHS}_test" in headers and LENGTHS not in headers:
        raise UserError(
            f"{path}: found {LENGTHS}_test and no {LENGTHS}: save the steps of each sequence of x as {LENGTHS}"
        )
    if ("x_test" in headers) != ("y_test" in headers):
        save = "save the other one too"
        if predicted and "x_test" in headers:
            save += ", or to predict x_test without labels or values save it as x and add --split all"
        raise UserError(
            f"{path}: found one of x_test and y_test only; expected both or, to have a fifth of the samples "
            f"held out for testing, neither: {save}"
        )
    headers, called = with_numbers(path, headers, names)
    train, outputs = _read(path, "x", headers, called, channels_last=channels_last)
    if "x_test" not in headers:
        y = train.targets
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
        train, test = hold_out(held_out, train)
        _check_counted(path, train, test)
        return Dataset(name, outputs, train.shape, train, test, held_out=True)
    test, outputs_test = _read(path, "x_test", headers, called, channels_last=channels_last)
    native = [headers[key].dtype.newbyteorder("=") for key in ("x", "x_test")]
    if (train.compressed is None) != (test.compressed is None):
        raise UserError(f"{path}: one of x and x_test is sparse; expected the same of both: convert one of them")
    if test.shape != train.shape or native[0] != native[1]:
        raise UserError(
            f"{path}: x has {native[0]} samples of shape {train.shape}, x_test has {native[1]} samples of shape "
            f"{test.shape}; expected the same of both: convert one of them"
        )
    kinds = [_described(split, count) for split, count in ((train, outputs), (test, outputs_test))]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{path}: y has {kinds[0]}, y_test has {kinds[1]}; expected the same of both: integers are labels, "
            "floating point numbers are values"
        )
    _check_counted(path, train, test)
    return Dataset(name, max(outputs, outputs_test), train.shape, train, test)


def _check_counted(path: Path, train: Split, test: Split) -> None:
    """Raise UserError if no step of a split has a target that counts."""
    for split, kind in ((train, "training"), (test, "test")):
        if split.by_step and not split.counts.any():
            raise UserError(
                f"{path}: no step of the {counted(split.n, f'{kind} sequence')} has a target that counts (-1, or NaN, "
                "marks those that do not, and so does the end of a sequence): give some steps a target"
            )


def _read(
    path: Path,
    key: str,
    headers: dict[str, Header],
    names: tuple[str, ...],
    targets: bool = True,
    channels_last: bool = False,
) -> tuple[Split, int]:
    """Split of the array `key`, x or x_test, and its number of classes or values. targets False: all labels are -1."""
    if channels_last and (len(headers[key].shape) != 4 or is_sequences(headers)):
        raise UserError(
            f"{path}: {key} has the shape {headers[key].shape}; --layout nhwc is for images (samples, height, width, "
            "channels): leave it out"
        )
    if is_sequences(headers):
        split, outputs = read_sequences(path, key, headers, targets)
        return replace(split, names=names), len(names) or outputs
    header = headers[key]
    scale, shape, order = scale_of(path, key, header), sample_shape(path, key, header), None
    if channels_last:
        order = np.ascontiguousarray(np.arange(prod(shape)).reshape(shape).transpose(2, 0, 1)).reshape(-1)
        shape = (shape[2], *shape[:2])
    y, outputs = as_targets(path, "y" + key[1:], headers) if targets else (np.full(header.shape[0], -1), 0)
    samples = Split(frozen(y), shape, scale, header.source(), order=order, names=names, columns=header.columns)
    return samples, len(names) or outputs


def _described(split: Split, outputs: int) -> str:
    """Text about the kind of a split's targets, such as "labels" or "2 values a step"."""
    each = "a step" if split.by_step else "a sample"
    if split.task == "classes":
        return "labels" if not split.by_step else f"labels {each}"
    return f"{outputs} values {each}"


def build_all(
    path: Path, keys: list[str], headers: dict[str, Header], names: Names = None, channels_last: bool = False
) -> Split:
    """All samples of x as one split; labels are -1 if there is no y. UserError as in `build`."""
    keys, headers = with_compressed(path, keys, headers)
    check_names(path, keys, ("x",))
    if "y" in headers:
        headers, called = with_numbers(path, {key: headers[key] for key in headers if key != "y_test"}, names)
        return _read(path, "x", headers, called, channels_last=channels_last)[0]
    return _read(path, "x", headers, names or (), targets=False, channels_last=channels_last)[0]
