"""The weights of the whole network on every rank, gathered from the shards."""

from __future__ import annotations

import numpy as np

from psmpi.checkpoint.collect import Records, collect
from psmpi.comm.control import Control
from psmpi.layout import copy_runs


def whole_weights(control: Control, records: Records, shard: np.ndarray) -> np.ndarray:
    """The flat vector of the network, (records.total,), on all ranks; shard: this rank's. All ranks call it.

    Rank 0 needs twice the memory of the network during the call.
    """
    flat = np.empty(records.total, shard.dtype)
    pieces = np.empty(records.total if control.rank == 0 else 0, shard.dtype)

    def piece(first: int, last: int) -> np.ndarray:
        return records.piece(shard, first, last)

    def keep(rank: int, first: int, elements: np.ndarray) -> None:
        at = int(records.starts[rank]) + first
        pieces[at : at + len(elements)] = elements

    collect(control, records.sizes, shard.dtype, piece, keep)
    if control.rank == 0:
        starts, stops, places = records.table
        copy_runs(pieces, places, flat, starts, stops - starts)
    control.share_array(flat)
    return flat
