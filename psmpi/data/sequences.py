"""Sequences: samples are (steps, features) in files and (features, steps) in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header, scale_of
from psmpi.data.labels import check_given, check_values
from psmpi.data.split import Dataset, Split, frozen
from psmpi.errors import UserError, counted

# Suffixes of a data set's name that make sequences of images: a step is a row of pixels, or a pixel.
VIEWS = ("rows", "pixels")
# Name of the array whose presence makes samples sequences.
LENGTHS = "lengths"


def is_sequences(headers: dict[str, Header]) -> bool:
    """Whether the samples of a file are sequences, which means that the file has an array of lengths."""
    return LENGTHS in headers


def lengths_name(key: str) -> str:
    """Name of the array of lengths of x or x_test: lengths or lengths_test."""
    return LENGTHS + key[1:]


def read_sequences(path: Path, key: str, headers: dict[str, Header], targets: bool = True) -> tuple[Split, int]:
    """Split of the sequences in the array `key`, x or x_test, and the number of classes or values that they need.

    targets: whether the file has targets; False: all labels are -1. UserError for arrays that cannot be sequences, or
    their lengths or targets.
    """
    header = headers[key]
    if len(header.shape) not in (2, 3):
        raise UserError(
            f"{path}: {key} has the shape {header.shape}, and beside {LENGTHS} samples are sequences; expected "
            f"(samples, steps) or (samples, steps, features): reshape it, or leave {LENGTHS} out"
        )
    if 0 in header.shape:
        raise UserError(f"{path}: {key} is empty, with the shape {header.shape}; save at least one sample in it")
    samples, steps = header.shape[:2]
    features = header.shape[2] if len(header.shape) == 3 else 1
    whole = len(header.shape) == 2 and header.dtype.kind in "iu"
    scale = 1.0 if whole else scale_of(path, key, header)
    lengths = _lengths(path, lengths_name(key), headers, samples, steps)
    labels, outputs = np.full(samples, -1), 0
    if targets:
        labels, outputs = _targets(path, "y" + key[1:], headers, lengths)
    order = time_last(steps, features)
    return Split(frozen(labels), (features, steps), scale, header.source(), None, lengths, order), outputs


def time_last(steps: int, features: int) -> npt.NDArray[np.int64] | None:
    """Positions, in a sample stored as (steps, features), of the values of (features, steps); None: the same order."""
    if 1 in (steps, features):
        return None
    return np.ascontiguousarray(np.arange(steps * features, dtype=np.int64).reshape(steps, features).T).reshape(-1)


def _lengths(path: Path, key: str, headers: dict[str, Header], samples: int, steps: int) -> npt.NDArray[np.int32]:
    if key not in headers:
        raise UserError(
            f"{path}: no array {key!r}, and there is {LENGTHS}: save the steps of each test sequence as {key}"
        )
    header = headers[key]
    if header.dtype.kind not in "iu" or header.shape != (samples,):
        raise UserError(
            f"{path}: {key} is {header.dtype} of shape {header.shape}; expected integers ({samples},), the number of "
            "steps of each sequence"
        )
    values = header.values()
    wrong = np.flatnonzero((values < 1) | (values > steps))
    if len(wrong):
        raise UserError(
            f"{path}: {key} has {values[wrong[0]]} for sample {wrong[0]}; expected 1 to {steps}, the steps that x has: "
            "remove empty sequences, and save all steps of the others"
        )
    lengths = values.astype(np.int32)
    lengths.flags.writeable = False
    return lengths


def _targets(
    path: Path, key: str, headers: dict[str, Header], lengths: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[Any], int]:
    """Targets of sequences as in `Split`, and the number of classes or values that they need."""
    header, samples, steps = headers[key], len(lengths), headers["x" + key[1:]].shape[1]
    kind, shape = header.dtype.kind, header.shape
    fits = [shape[:1] == (samples,) and len(shape) <= 2] if kind == "f" else [shape in ((samples,), (samples, steps))]
    fits.append(kind == "f" and len(shape) == 3 and shape[:2] == (samples, steps))
    if kind not in "iuf" or not any(fits):
        raise UserError(
            f"{path}: {key} is {header.dtype} of shape {shape} for {counted(samples, 'sequence')} of {steps} steps; "
            f"expected integers, labels ({samples},) or ({samples}, {steps}), or floating point numbers, values "
            f"({samples},), ({samples}, outputs) or ({samples}, {steps}, outputs)"
        )
    values, beyond = header.values(), np.arange(steps) >= lengths[:, None]
    where = f"{path}, {key}"
    if kind == "f":
        rows = values.astype(np.float64)
        if len(shape) < 3:
            rows = rows.reshape(samples, -1)
            check_values(where, rows)
        else:
            rows[beyond] = np.nan
            counts = ~np.isnan(rows).any(axis=2)
            rows[~counts] = np.nan
            if counts.any():
                check_values(where, rows[counts])
        return rows, rows.shape[-1]
    labels = values.astype(np.int64)
    if len(shape) == 1:
        return labels, check_given(where, labels) + 1
    labels[beyond] = -1
    counts = labels != -1
    if not counts.any():
        raise UserError(f"{where}: all labels are -1, which marks steps that do not count: give some steps a label")
    return labels, check_given(where, labels[counts]) + 1


def viewed(dataset: Dataset, view: str) -> Dataset:
    """A data set of images as sequences: (channels x width, height) by rows, (channels, height x width) by pixels."""
    train, test = (viewed_split(split, view, dataset.name) for split in (dataset.train, dataset.test))
    return replace(dataset, shape=train.shape, train=train, test=test)


def viewed_split(split: Split, view: str, name: str) -> Split:
    """One split of images as sequences, as `viewed`; UserError for samples that are not images."""
    if len(split.shape) != 3:
        raise UserError(f"{name}:{view}: the samples have the shape {split.shape} and are no images: leave :{view} out")
    channels, height, width = split.shape
    if view == "pixels":
        return replace(split, shape=(channels, height * width))
    at = np.arange(split.features, dtype=np.int64).reshape(split.shape)
    order = np.ascontiguousarray(at.transpose(0, 2, 1)).reshape(-1)
    if split.order is not None:
        order = split.order[order]
    return replace(split, shape=(channels * width, height), order=order)
