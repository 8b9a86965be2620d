"""A generated data set: points of a square in five equal classes by the value of MATLAB's `peaks` function."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from psmpi.data.rows import ArrayRows
from psmpi.data.split import Dataset, Split, every_fifth, frozen, hold_out

SAMPLES, CLASSES, SIDE = 6250, 5, 3.0
# Seed of these random numbers.
_TAG = 0x7065616B


def peaks(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values (n,) of MATLAB's `peaks` function at points (n, 2)."""
    x, y = points.T
    first = 3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
    second = 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2)
    third = np.exp(-((x + 1) ** 2) - y**2) / 3
    values: npt.NDArray[np.float64] = first - second - third
    return values


def open_peaks() -> Dataset:
    """Points (2,) of [-3, 3]^2, float64, in 5 equal classes: always the same 5,000 for training and 1,250 for testing.

    This is the task of Haber and Ruthotto (2017) and of Guenther et al., arXiv 1812.04352.
    """
    points = np.random.Generator(np.random.Philox(_TAG)).uniform(-SIDE, SIDE, (SAMPLES, 2))
    labels = peaks(points).argsort(kind="stable").argsort(kind="stable") * CLASSES // SAMPLES
    train, test = hold_out(every_fifth(SAMPLES), Split(frozen(labels), (2,), 1.0, ArrayRows(points)))
    return Dataset("peaks", CLASSES, (2,), train, test)
