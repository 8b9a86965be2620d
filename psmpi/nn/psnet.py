"""PSNets: layers that all classes share, and behind them layers of each class, so that they are cut by classes.

Those for images of 28 x 28 and 32 x 32 are of Raynaud, Orban and Bigeon, G-2023-36.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LayerTable = dict[str, Any]


def psnet_conv(channels: int, kernel: int, pool: int = 2) -> list[LayerTable]:
    """Convolution, mean pooling, sigmoid, in this order."""
    pooling: list[LayerTable] = [{"type": "mean_pool", "size": pool}] if pool > 1 else []
    return [{"type": "conv", "channels": channels, "kernel": kernel}, *pooling, {"type": "sigmoid"}]


def psnet(convolutions: Sequence[list[LayerTable]], widths: Sequence[int], classes: int) -> list[LayerTable]:
    """Convolutions, then separable layers of `widths` units a class and one score a class."""
    tables = [table for layers in convolutions for table in layers] + [{"type": "flatten"}]
    for width in widths:
        tables += [{"type": "separable_dense", "units": width * classes, "groups": classes}, {"type": "sigmoid"}]
    return [*tables, {"type": "separable_dense", "units": classes, "groups": classes}]


def fitted_psnet(in_shape: tuple[int, ...], classes: int) -> list[LayerTable]:
    """A PSNet for samples of any shape and any number of classes: layers that all classes share, then those of each.

    Images of 5 x 5 and more have two convolutions, whose pooling leaves 7 x 7 positions at most where the smaller side
    allows that; all else is a vector, before a dense layer that is shared and one of 15 units a class.
    """
    short, long = (min(in_shape[1:]), max(in_shape[1:])) if len(in_shape) == 3 else (0, 0)
    if short < 5:
        tables: list[LayerTable] = [{"type": "flatten"}] if len(in_shape) > 1 else []
        for units in (64, 15 * classes):
            tables += [{"type": "dense", "units": units}, {"type": "sigmoid"}]
        return [*tables, {"type": "separable_dense", "units": classes, "groups": classes}]
    if short < 12:
        return psnet(
            [psnet_conv(12, 3, pool=1), psnet_conv(3 * classes, 3, pool=2 if short > 5 else 1)], (10,), classes
        )
    kernel, pool = 5 if short >= 16 else 3, 2

    def left(side: int, size: int) -> int:
        return int(((side - kernel + 1) // size - kernel + 1) // size)

    while left(long, pool) > 7 and left(short, pool + 1) > 0:
        pool += 1
    grey = in_shape[0] == 1
    convolutions = [psnet_conv(channels, kernel, pool) for channels in (40 if grey else 60, 3 * classes)]
    return psnet(convolutions, (24 if grey else 35, 15), classes)
