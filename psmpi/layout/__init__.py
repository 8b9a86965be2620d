"""Index arithmetic of partitioned networks: layouts, runs, grids, and who owns what.

Everything here is pure data about the flat vector: no arrays of weights, no devices, no messages.
"""

from psmpi.layout.grid import (
    PARTITIONS,
    Pair,
    Worker,
    all_pairs,
    group_pairs,
    make_grid,
    pair_columns,
    private_runs,
    score_columns,
)
from psmpi.layout.layout import Block, Layout, Parameter, Piece, make_layout
from psmpi.layout.moves import Move, plan_moves
from psmpi.layout.roles import Roles, assign_roles, replicate
from psmpi.layout.rows import Rows
from psmpi.layout.runs import Runs, accumulate, restrict
from psmpi.layout.share import Share, Shares
from psmpi.layout.split import even_edges, split_evenly

__all__ = [
    "PARTITIONS",
    "Block",
    "Layout",
    "Move",
    "Pair",
    "Parameter",
    "Piece",
    "Roles",
    "Rows",
    "Runs",
    "Share",
    "Shares",
    "Worker",
    "accumulate",
    "all_pairs",
    "assign_roles",
    "even_edges",
    "group_pairs",
    "make_grid",
    "make_layout",
    "pair_columns",
    "plan_moves",
    "private_runs",
    "replicate",
    "restrict",
    "score_columns",
    "split_evenly",
]
