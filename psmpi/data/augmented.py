"""Augmentation of a data set's training images by the words of --augment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from psmpi.data.augment import Augmentation
from psmpi.data.split import Dataset
from psmpi.errors import UserError


def with_augmentation(dataset: Dataset, words: Sequence[str], seed: int) -> Dataset:
    """The data set with augmented training images. words: flip, and shift:N or crop:N; N: largest shift in pixels.

    Pixels beyond the border are zeros with shift, and reflected with crop. UserError for other words, for samples that
    are not images, and for a shift of the whole image.
    """
    kinds = [match for word in words if (match := re.fullmatch(r"(flip|(shift|crop):([1-9]\d{0,3}))", word))]
    option = " ".join(words)
    names = [match[2] or "flip" for match in kinds]
    if len(kinds) < len(words) or len(set(names)) < len(names) or {"shift", "crop"} <= set(names):
        raise UserError(
            f"--augment {option}: expected flip, and shift:N or crop:N with the pixels to move at most, as shift:2"
        )
    if len(dataset.shape) != 3 or dataset.train.compressed is not None:
        raise UserError(
            f"--augment {option} is for images, and the samples have the shape {dataset.shape}: leave it out"
        )
    most = max((int(match[3]) for match in kinds if match[3]), default=0)
    if most >= min(dataset.shape[1:]):
        raise UserError(
            f"--augment {option}: images of the shape {dataset.shape} cannot be moved by {most} pixels; give less"
        )
    fill = "reflect" if "crop" in names else "zero"
    augmentation = Augmentation(dataset.shape, seed, "flip" in names, most, fill)
    return replace(dataset, train=replace(dataset.train, augmentation=augmentation))
