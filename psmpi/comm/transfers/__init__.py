"""Transfers of vectors between ranks, one a file: forward, its adjoint backward, and its messages.

Transfers know arrays through their group's bridge; they know no layers and no losses.
"""

from psmpi.comm.transfers.base import Handle, Message, Overlapping, Step, Transfer, totals
from psmpi.comm.transfers.boundary import Boundary
from psmpi.comm.transfers.deal import Deal
from psmpi.comm.transfers.exchange import Exchange
from psmpi.comm.transfers.gather import Gather
from psmpi.comm.transfers.halo import Halo
from psmpi.comm.transfers.neighbours import Neighbours
from psmpi.comm.transfers.rows import RowExchange
from psmpi.comm.transfers.slices import Slices
from psmpi.comm.transfers.spread import Spread
from psmpi.comm.transfers.subnets import Subnets
from psmpi.comm.transfers.sum import Sum

__all__ = [
    "Boundary",
    "Deal",
    "Exchange",
    "Gather",
    "Halo",
    "Handle",
    "Message",
    "Neighbours",
    "Overlapping",
    "RowExchange",
    "Slices",
    "Spread",
    "Step",
    "Subnets",
    "Sum",
    "Transfer",
    "totals",
]
