"""Validation samples: a share of the training samples, drawn once, that no training step sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from psmpi.data.split import Dataset, hold_out
from psmpi.errors import UserError, counted

# Keeps these random numbers apart from all others drawn from the same seed.
_TAG = 0x76616C69


def with_validation(dataset: Dataset, share: float, seed: int) -> Dataset:
    """A data set of which a `share` of the training samples is for validation, see `random_share`.

    UserError where that is none of them, or leaves none.
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
    """Which rows are drawn, (n,): of each class `share` of its samples rounded down or up, else of all samples.

    targets: labels (n,), or any others (n, ...), of which all samples are drawn alike. They depend on the targets, the
    share and the seed alone; a seed of -1 is as good as another one here.
    """
    count = len(targets)
    sequence = np.random.SeedSequence([seed + 1, _TAG])
    order = np.random.Generator(np.random.Philox(sequence)).permutation(count)
    if targets.ndim == 1:
        order = order[np.argsort(targets[order], kind="stable")]
    # Of any 1 / share that follow each other one is drawn, so that classes share the rounding.
    places = np.floor(np.arange(count + 1) * share + 0.5)
    chosen = np.zeros(count, np.bool_)
    chosen[order[places[1:] > places[:-1]]] = True
    return chosen
