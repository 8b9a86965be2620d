"""Index arithmetic of partitioned networks: layouts, runs, grids and ownerships.

Everything here is pure data about the flat vector: no arrays of weights, no devices, no messages.
"""

from psmpi.layout.box import Box, box_runs, tile
from psmpi.layout.classes import Classes, Each, Users
from psmpi.layout.domains import Domains
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
from psmpi.layout.layout import Block, Layout, Parameter, Piece, make_layout, plain_layout
from psmpi.layout.matrices import Matrix, hidden_weights, whole_matrices
from psmpi.layout.moves import Move, plan_moves
from psmpi.layout.ownership import Ownership
from psmpi.layout.partitions import check_mode, partition
from psmpi.layout.pattern import PACKED, Pattern, Transposed, radix_pattern, radix_strides, random_pattern, unpack
from psmpi.layout.roles import Roles, assign_roles, replicate
from psmpi.layout.runs import Runs, accumulate, copy_runs, cross, restrict
from psmpi.layout.share import Share, Shares
from psmpi.layout.split import even_edges, split_evenly
from psmpi.layout.stretch import Stretch, spelled
from psmpi.layout.table_rows import TableRows
from psmpi.layout.volume import Volume, measure, needs, weights_of

__all__ = [
    "PACKED",
    "PARTITIONS",
    "Block",
    "Box",
    "Classes",
    "Domains",
    "Each",
    "Layout",
    "Matrix",
    "Move",
    "Ownership",
    "Pair",
    "Parameter",
    "Pattern",
    "Piece",
    "Roles",
    "Runs",
    "Share",
    "Shares",
    "Stretch",
    "TableRows",
    "Transposed",
    "Users",
    "Volume",
    "Worker",
    "accumulate",
    "all_pairs",
    "assign_roles",
    "box_runs",
    "check_mode",
    "copy_runs",
    "cross",
    "even_edges",
    "group_pairs",
    "hidden_weights",
    "make_grid",
    "make_layout",
    "measure",
    "needs",
    "pair_columns",
    "partition",
    "plain_layout",
    "plan_moves",
    "private_runs",
    "radix_pattern",
    "radix_strides",
    "random_pattern",
    "replicate",
    "restrict",
    "score_columns",
    "spelled",
    "split_evenly",
    "tile",
    "unpack",
    "weights_of",
    "whole_matrices",
]
