"""Shares: the rows and columns of a network's parameters that a subnetwork has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Share:
    """A subnetwork's share of a parameter of the whole network: some rows (units) and columns, or all (None).

    source: name of the parameter. rows, columns: increasing; a column is a position among the weights of one unit.
    owners: workers that have this share, in order; all workers have the parameters of units and blocks that are not
    dealt out.
    """

    source: str
    rows: np.ndarray | None
    columns: np.ndarray | None
    owners: tuple[int, ...]


# Shares by the name of the subnetwork's parameter.
Shares = dict[str, Share]
