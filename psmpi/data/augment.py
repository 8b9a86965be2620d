"""Augmentation of images: shifts and flips, applied when a minibatch is fetched, that depend on sample and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.backend import NumpyOps

# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x6175676D
_ODD = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Augmentation:
    """Random shifts and flips of training images of `shape` (channels, height, width).

    flip: mirror half of the images left to right. most: largest shift along height and along width, in pixels. fill:
    values from beyond the border, "zero" or "reflect". epoch: the present epoch, set by the training loop. The shift
    and the flip of an image depend on the seed, the epoch and the image's number only.
    """

    def __init__(self, shape: tuple[int, ...], seed: int, flip: bool, most: int, fill: str):
        self.shape, self.seed, self.flip, self.most, self.fill = shape, seed, flip, most, fill
        self.epoch = 0

    def moves(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Moves (3, b) int32 of the images `ids` (b,): rows down, columns to the right, 1 for a flip, made first."""
        words = [_hash(ids.astype(np.uint64), [self.seed, _TAG, self.epoch, k]) for k in range(3)]
        moves = np.zeros((3, len(ids)), np.int32)
        for k in range(2 if self.most else 0):
            moves[k] = (words[k] >> np.uint64(32)) % np.uint64(2 * self.most + 1)
            moves[k] -= self.most
        if self.flip:
            moves[2] = words[2] >> np.uint64(63)
        return moves

    def apply(self, ids: npt.NDArray[np.int64], ops: NumpyOps, x: Any, out: Any) -> None:
        """Fill `out` with the moved images x, both (features, b) arrays of `ops`; ids: numbers of the images, (b,)."""
        shape = (*self.shape, len(ids))
        ops.move_images(x.reshape(shape), self.moves(ids), self.fill == "reflect", out.reshape(shape))


def _hash(ids: npt.NDArray[np.uint64], key: Sequence[int]) -> npt.NDArray[np.uint64]:
    """A hash (b,) of 64 bits of each id (b,) and the key, by steps of SplitMix64 (Steele, Lea, Flood 2014)."""
    start = 0
    for number in key:
        start = int(_mixed(np.array([(start + number * _STEP + _STEP) & _MASK], np.uint64))[0])
    return _mixed(ids * np.uint64(_STEP) + np.uint64(start))


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for shift, odd in zip((30, 27), _ODD, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(odd)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
