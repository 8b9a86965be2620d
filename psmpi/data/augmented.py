"""Data sets whose training images are augmented, by the words of --augment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from psmpi.data.augment import Augmentation
from psmpi.data.split import Dataset
from psmpi.errors import UserError


def with_augmentation(dataset: Dataset, words: Sequence[str], seed: int) -> Dataset:
    """A data set whose training images are augmented, by `words`: flip, shift:N, crop:N. UserError for others."""
    kinds = [match for word in words if (match := re.fullmatch(r"(flip|(shift|crop):([1-9]\d{0,3}))", word))]
    said = " ".join(words)
    names = [match[2] or "flip" for match in kinds]
    if len(kinds) < len(words) or len(set(names)) < len(names) or {"shift", "crop"} <= set(names):
        raise UserError(
            f"--augment {said}: expected flip, and shift:N or crop:N with the pixels to move at most, as shift:2"
        )
    if len(dataset.shape) != 3 or dataset.train.compressed is not None:
        raise UserError(f"--augment {said} is for images, and the samples have the shape {dataset.shape}: leave it out")
    most = max((int(match[3]) for match in kinds if match[3]), default=0)
    if most >= min(dataset.shape[1:]):
        raise UserError(
            f"--augment {said}: images of the shape {dataset.shape} cannot be moved by {most} pixels; give less"
        )
    fill = "reflect" if "crop" in names else "zero"
    made = Augmentation(dataset.shape, seed, "flip" in names, most, fill)
    return replace(dataset, train=replace(dataset.train, augmentation=made))
