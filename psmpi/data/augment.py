"""Images that are moved and mirrored when a minibatch of them is fetched, as their number and the epoch say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.backend import NumpyOps

# Keeps these random numbers apart from all others drawn from the same seed.
_TAG = 0x6175676D
_ODD = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Augmentation:
    """Moves of the training images (channels, height, width) in an epoch, by `most` pixels at most.

    flip: half of them are mirrored, left to right. most: along each side, up and down and to both sides; fill: what is
    beyond the image, "zero" or "reflect". epoch: set by the training loop. Of an image it all depends on the seed, the
    epoch and the image's number alone.
    """

    def __init__(self, shape: tuple[int, ...], seed: int, flip: bool, most: int, fill: str):
        self.shape, self.seed, self.flip, self.most, self.fill = shape, seed, flip, most, fill
        self.epoch = 0

    def moves(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Of the images `ids` (b,) rows down, columns to the right, and 1 for a mirror, (3, b); moved after that."""
        words = [_hash(ids.astype(np.uint64), [self.seed, _TAG, self.epoch, k]) for k in range(3)]
        made = np.zeros((3, len(ids)), np.int32)
        for k in range(2 if self.most else 0):
            made[k] = (words[k] >> np.uint64(32)) % np.uint64(2 * self.most + 1)
            made[k] -= self.most
        if self.flip:
            made[2] = words[2] >> np.uint64(63)
        return made

    def apply(self, ids: npt.NDArray[np.int64], ops: NumpyOps, x: Any, out: Any) -> None:
        """Fill `out` with the images x, (features, b) of numbers `ids` (b,), moved; arrays of `ops`."""
        shape = (*self.shape, len(ids))
        ops.move_images(x.reshape(shape), self.moves(ids), self.fill == "reflect", out.reshape(shape))


def _hash(ids: npt.NDArray[np.uint64], key: Sequence[int]) -> npt.NDArray[np.uint64]:
    """64 bits for each of the ids and a key: steps of SplitMix64 (Steele, Lea, Flood 2014)."""
    start = 0
    for number in key:
        start = int(_mixed(np.array([(start + number * _STEP + _STEP) & _MASK], np.uint64))[0])
    return _mixed(ids * np.uint64(_STEP) + np.uint64(start))


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for shift, odd in zip((30, 27), _ODD, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(odd)
    found: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return found
