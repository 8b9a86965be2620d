"""Networks of slab layers, see psmpi.nn.layers.slab."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod
from typing import Any

from psmpi.errors import UserError

LayerTable = dict[str, Any]
DOMAINS, WIDTHS = (4,), (256, 256)


def slabs(
    widths: Sequence[int], domains: Sequence[int], halo: int, classes: int, in_shape: tuple[int, ...]
) -> list[LayerTable]:
    """Return the tables of hidden slab layers of `widths` neurons (default 256, 256) with tanh, and of the scores.

    domains: number of domains (default 4), or rows and columns; halo: -1 for an eighth of a domain, or for one row of
    pixels if the inputs are flattened images. UserError for sizes that do not fit each other.
    """
    domains, widths = tuple(domains) or DOMAINS, tuple(widths) or WIDTHS
    if len(domains) > 2 or any(n < 1 for n in domains):
        raise UserError(
            f"--domains {' '.join(map(str, domains))}: expected a whole number above 0, or two, rows and columns"
        )
    if prod(domains) == 1 and halo > 0:
        raise UserError(
            f"--halo {halo}: with --domains {' '.join(map(str, domains))} there is no neighbouring domain: leave "
            "--halo out, or use --domains 2 or more"
        )
    end: LayerTable = {"type": "dense", "units": classes}
    if len(domains) == 1:
        size, count = prod(in_shape), domains[0]
        _check_multiples(count, size, widths)
        tables: list[LayerTable] = [{"type": "flatten"}] if len(in_shape) > 1 else []
        sizes = [size, *widths]
        for number, width in enumerate(widths):
            usual = max(1, sizes[number] // count // 8)
            if number == 0 and len(in_shape) == 3:
                usual = min(in_shape[2], size // count)
            slab = {"type": "slab", "units": width, "domains": count, "halo": usual if halo < 0 else halo}
            tables += [slab, {"type": "tanh"}]
        return [*tables, end]
    if len(in_shape) != 3:
        raise UserError(
            f"--domains {domains[0]} {domains[1]} are tiles of images, but samples have the shape {in_shape}: use "
            f"--domains {prod(domains)}"
        )
    tables = []
    for width in widths:
        side = isqrt(width)
        if side * side != width or any(side % n for n in domains):
            good = [k * k for k in range(1, 2 * side + prod(domains) + 1) if not any(k % n for n in domains)]
            near = min(good, key=lambda size: abs(size - width))
            raise UserError(
                f"--widths {width}: with --domains {domains[0]} {domains[1]} layers are square fields that the domains "
                f"cut into equal tiles: use {near}"
            )
        slab = {"type": "slab", "units": [side, side], "domains": list(domains)}
        tables += [slab if halo < 0 else {**slab, "halo": halo}, {"type": "tanh"}]
    return [*tables, {"type": "flatten"}, end]


def _check_multiples(count: int, size: int, widths: Sequence[int]) -> None:
    """Raise UserError if the domains of a layer would not have equal sizes."""
    if size % count:
        good = [n for n in range(1, min(size, 2 * count) + 1) if size % n == 0]
        raise UserError(
            f"--domains {count}: samples have {size} numbers, which {count} domains cannot share equally: use "
            f"--domains {min(good, key=lambda n: abs(n - count))}"
        )
    for width in widths:
        if width % count or width < 1:
            near = max(count, round(width / count) * count)
            raise UserError(f"--widths {width} is not a multiple of --domains {count}: use {near}")
