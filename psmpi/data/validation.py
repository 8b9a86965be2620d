"""Validation samples: a share of the training samples, drawn once, that no training step sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from psmpi.data.split import Dataset, hold_out
from psmpi.errors import UserError, counted

# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x76616C69


def with_validation(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The data set with a `share` of its training samples, drawn by `random_share`, as validation samples.

    UserError for a share that takes none or all of the training samples.
    """
    chosen = random_share(dataset.train.targets, share, seed)
    count = int(chosen.sum())
    if not 0 < count < len(chosen):
        raise UserError(
            f"--validation {share:g}: of {counted(len(chosen), 'training sample')} that is {count}: give a share that "
            "takes some and leaves some"
        )
    train, validation = hold_out(chosen, dataset.train)
    return replace(dataset, train=train, validation=validation)


def random_share(targets: npt.NDArray[np.generic], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Mask (n,) of drawn rows: `share` of the samples of each class, rounded down or up.

    targets: labels (n,); for other targets (n, ...) classes do not matter, and `share` of all samples is drawn. The
    mask depends on the targets, the share and the seed, -1 or more, only.
    """
    count = len(targets)
    sequence = np.random.SeedSequence([seed + 1, _TAG])
    order = np.random.Generator(np.random.Philox(sequence)).permutation(count)
    if targets.ndim == 1:
        order = order[np.argsort(targets[order], kind="stable")]
    # Draw one of 1 / share consecutive samples in the order of classes, so that classes share the rounding.
    places = np.floor(np.arange(count + 1) * share + 0.5)
    chosen = np.zeros(count, np.bool_)
    chosen[order[places[1:] > places[:-1]]] = True
    return chosen
