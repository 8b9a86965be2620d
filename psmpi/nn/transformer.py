"""The transformer: the layers of --model transformer, as tables.

Vaswani et al. (2017), with normalization before each branch (Radford et al. 2019), GELU, and learned vectors of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psmpi.errors import UserError

WIDTH, BLOCKS, HEADS, RATIO = 64, 2, 4, 4


def transformer(
    widths: Sequence[int], blocks: Sequence[int], heads: int, opening: dict[str, Any], end: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Tables of a transformer for sequences: the opening layer, blocks of two branches, a normalization, and the end.

    widths: of the vectors of steps (64), and of the hidden layer of each block (4 times that); blocks: their number
    (2); heads: of attention (4, or 0 for that). opening: an embedding or a dense layer without its units; end: scores
    of each step, or of the last one. UserError for numbers that make none.
    """
    if len(widths) > 2 or len(blocks) > 1 or min((*widths, *blocks), default=1) < 1:
        raise UserError(
            f"--widths {_words(widths)} --blocks {_words(blocks)}: --model transformer has a width, perhaps the hidden "
            "one, and one number of blocks, all above 0"
        )
    width = widths[0] if widths else WIDTH
    hidden, count = widths[1] if len(widths) > 1 else RATIO * width, blocks[0] if blocks else BLOCKS
    heads = heads or HEADS
    if width % heads:
        raise UserError(
            f"--heads {heads} does not divide the width of --model transformer, {width}: use --widths "
            f"{heads * max(1, round(width / heads))}, or other --heads"
        )
    repeated = block(width, hidden, heads) * count
    return [{**opening, "units": width}, {"type": "positions"}, *repeated, {"type": "layer_norm"}, *end]


def block(width: int, hidden: int, heads: int) -> list[dict[str, Any]]:
    """Tables of one block: the branch of attention, and that of two dense layers."""
    attend = [{"type": "layer_norm"}, _dense(3 * width), {"type": "attention", "heads": heads}, _dense(width)]
    think = [{"type": "layer_norm"}, _dense(hidden), {"type": "gelu"}, _dense(width)]
    return [{"type": "residual", "layers": layers} for layers in (attend, think)]


def _dense(units: int) -> dict[str, Any]:
    return {"type": "dense", "units": units}


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) or "(none)"
