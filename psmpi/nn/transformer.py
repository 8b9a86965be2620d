"""Layer tables of --model transformer.

The model follows Vaswani et al. (2017), with normalization before each branch (Radford et al. 2019), GELU, and learned
position vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psmpi.errors import UserError

WIDTH, BLOCKS, HEADS, RATIO = 64, 2, 4, 4


def transformer(
    widths: Sequence[int], blocks: Sequence[int], heads: int, opening: dict[str, Any], end: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the tables of a transformer: opening layer, positions, blocks of two branches, normalization, and end.

    widths: width of the vectors (default 64), and of the hidden layer of each block (default 4 times the width);
    blocks: one number of blocks (default 2); heads: of attention, 0 for the default 4; opening: table of an embedding
    or a dense layer without `units`; end: tables of the scores of each step, or of the last step. UserError for
    invalid numbers.
    """
    if len(widths) > 2 or len(blocks) > 1 or min((*widths, *blocks), default=1) < 1:
        raise UserError(
            f"--widths {_words(widths)} --blocks {_words(blocks)}: --model transformer takes a width, optionally a "
            "hidden width, and one number of blocks, all above 0"
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
    """Return the tables of one block: a branch of attention, and a branch of two dense layers."""
    attend = [{"type": "layer_norm"}, _dense(3 * width), {"type": "attention", "heads": heads}, _dense(width)]
    think = [{"type": "layer_norm"}, _dense(hidden), {"type": "gelu"}, _dense(width)]
    return [{"type": "residual", "layers": layers} for layers in (attend, think)]


def _dense(units: int) -> dict[str, Any]:
    return {"type": "dense", "units": units}


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) or "(none)"
