"""PSNets: layers that all classes share, followed by private layers of each class, so that classes can be partitioned.

The PSNets for images of 28 x 28 and 32 x 32 are from Raynaud, Orban and Bigeon, G-2023-36.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import isqrt
from typing import Any

LayerTable = dict[str, Any]
# Preferred number of positions along a side of an image after the convolutions.
MOST = 7


def psnet_conv(channels: int, kernel: int, pool: int = 2) -> list[LayerTable]:
    """Return the tables of a convolution, a mean pooling (if pool > 1) and a sigmoid, in this order."""
    pooling: list[LayerTable] = [{"type": "mean_pool", "size": pool}] if pool > 1 else []
    return [{"type": "conv", "channels": channels, "kernel": kernel}, *pooling, {"type": "sigmoid"}]


def psnet(convolutions: Sequence[list[LayerTable]], widths: Sequence[int], classes: int) -> list[LayerTable]:
    """Return tables of convolutions, then separable layers of `widths` units per class, and one score per class."""
    tables = [table for layers in convolutions for table in layers] + [{"type": "flatten"}]
    for width in widths:
        tables += [{"type": "separable_dense", "units": width * classes, "groups": classes}, {"type": "sigmoid"}]
    return [*tables, {"type": "separable_dense", "units": classes, "groups": classes}]


def fitted_psnet(in_shape: tuple[int, ...], classes: int) -> list[LayerTable]:
    """Return the tables of a PSNet for samples of any shape and any number of classes.

    Images of 5 x 5 and more have two convolutions, with pooling that leaves few positions and drops as few rows and
    columns as possible. All other samples are flattened, and take a shared dense layer of 64 units and a dense layer of
    15 units per class.
    """
    if len(in_shape) != 3 or min(in_shape[1:]) < 5:
        tables: list[LayerTable] = [{"type": "flatten"}] if len(in_shape) > 1 else []
        for units in (64, 15 * classes):
            tables += [{"type": "dense", "units": units}, {"type": "sigmoid"}]
        return [*tables, {"type": "separable_dense", "units": classes, "groups": classes}]
    _, rows, columns = in_shape
    if min(rows, columns) < 12:
        (second,) = _fitted(rows - 2, columns - 2, 1, (2 if min(rows, columns) > 5 else 1,), (3, 2))
        return psnet([psnet_conv(12, 3, pool=1), psnet_conv(3 * classes, *second)], (10,), classes)
    grey = in_shape[0] == 1
    pools = range(2, 2 + max(1, isqrt(max(rows, columns) // 6)))
    both = _fitted(rows, columns, 2, pools, (5, 6, 4, 3, 7))
    convolutions = [
        psnet_conv(channels, *one) for channels, one in zip((40 if grey else 60, 3 * classes), both, strict=True)
    ]
    return psnet(convolutions, (24 if grey else 35, 15), classes)


def _fitted(rows: int, columns: int, count: int, pools: Sequence[int], kernels: Sequence[int]) -> list[tuple[int, int]]:
    """Return kernel and pooling window of `count` convolutions that suit images of `rows` x `columns`.

    Criteria, in this order: at most 2 MOST positions remain along each side; windows drop the fewest rows and columns;
    at most MOST positions, or the fewest above, remain; windows are small; kernels are early in `kernels`.
    """
    candidates = []
    for choice in product(product(kernels, pools), repeat=count):
        sides, lost = [rows, columns], 0
        for kernel, pool in choice:
            outputs = [side - kernel + 1 for side in sides]
            lost += sum(side % pool for side in outputs)
            sides = [side // pool for side in outputs]
        if min(sides) > 0:
            windows = [pool for _, pool in choice]
            order = [kernels.index(kernel) for kernel, _ in choice]
            remaining = max(*sides, MOST)
            candidates.append((remaining > 2 * MOST, lost, remaining, max(windows), sum(windows), sum(order), choice))
    return list(min(candidates)[-1])
