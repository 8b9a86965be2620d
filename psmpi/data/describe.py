"""A line of text about a data set: samples, shape, range of values, classes with counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psmpi.data.doubts import some_samples
from psmpi.data.split import Dataset, Split
from psmpi.errors import counted

# Most classes that the line lists; for more it gives the smallest and the largest number of samples of a class.
NAMED = 12


def describe(dataset: Dataset) -> str:
    """The line that is printed before training; the range of values is that of a few samples. For example:

    "data flowers.csv: 120 training and 30 test samples (held out) of shape 4, float32 from 0.1 to 7.9; 3 classes:
    setosa (40), versicolor (40), virginica (40)"
    """
    train, tests = dataset.train, counted(dataset.test.n, f"{dataset.tested} sample")
    if dataset.unseen is not None:
        tests += f" (and {counted(dataset.unseen.n, 'test sample')} that nothing looks at)"
    elif dataset.held_out:
        tests += " (held out)"
    shape = " x ".join(map(str, train.shape))
    return (
        f"data {Path(dataset.name).name}: {train.n:,} training and {tests} of shape {shape}, {_range(train)}; "
        f"{_targets(dataset)}"
    )


def _range(split: Split) -> str:
    """The stored dtype, with the smallest and largest value of some samples."""
    some = some_samples(split)
    kind = "tokens" if split.tokens else f"{'sparse ' if split.compressed is not None else ''}{split.dtype}"
    if not some.size or not np.isfinite(some).all():
        return kind
    scaled = f", divided by {1 / split.scale:g}" if split.scale != 1 else ""
    return f"{kind} from {float(some.min()):g} to {float(some.max()):g}{scaled}"


def _targets(dataset: Dataset) -> str:
    train = dataset.train
    if dataset.task == "regression":
        values = train.targets[~np.isnan(train.targets)]
        span = f" from {values.min():.4g} to {values.max():.4g}" if values.size else ""
        return f"{counted(dataset.outputs, 'value')} to learn{' at each step' if train.by_step else ''}{span}"
    if train.characters:
        return f"{counted(dataset.outputs, 'character')}"
    # In parts, since np.bincount copies labels to int64.
    parts = np.array_split(train.targets.reshape(-1), 1 + train.targets.size // (1 << 20))
    counts = sum(np.bincount(part[part >= 0], minlength=dataset.outputs) for part in parts)
    each, classes = " at each step" if train.by_step else "", np.arange(dataset.outputs)
    if len(classes) > NAMED:
        few, most = int(np.min(counts)), int(np.max(counts))
        return f"{len(classes):,} classes{each} of {few:,}{f' to {most:,}' if most > few else ''} samples"
    called = [f"{train.names[k] if train.names else k} ({np.asarray(counts)[k]:,})" for k in classes]
    return f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}{each}: {', '.join(called)}"
