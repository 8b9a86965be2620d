"""The network that one rank computes with: its units of each layer, and the exchanges between layers."""

from __future__ import annotations

from math import prod

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import Halo, Sum
from psmpi.methods.spann.exchange import Ghosts, Total
from psmpi.methods.spann.placed import Placed, PlacedColumns
from psmpi.methods.spann.plan import Plan
from psmpi.nn.layers import Layer
from psmpi.nn.network import Network


class Transfers:
    """The exchanges of a rank, in the order of the layers; group: all ranks."""

    def __init__(self, group: Group, dtype: np.dtype, ops: NumpyOps):
        self.group, self.dtype, self.ops = group, dtype, ops
        self.halos: list[Halo] = []
        self.totals: list[Sum] = []

    def halo(self, step: Placed) -> Halo:
        """Make the halo that brings the input units that a layer needs."""
        assert step.in_owners is not None
        self.halos.append(Halo(self.group, step.in_owners, step.needed, self.dtype, self.ops))
        return self.halos[-1]

    def total(self, units: int) -> Sum:
        """Make the sum over ranks of `units` numbers a sample."""
        self.totals.append(Sum(self.group, units, self.dtype, per_sample=True))
        return self.totals[-1]


def local_network(plan: Plan, rank: int, transfers: Transfers | None = None) -> Network:
    """Return the network of a rank; without `transfers` the network describes the rank, and computes nothing."""
    layers: list[Layer] = []
    scores = plan.scores
    classes = plan.network.classes if scores is None else scores[rank]
    for number, step in enumerate(plan.steps):
        layer, held = step.layer, (len(step.input_units(rank)),)
        if number and step.moves:
            halo = transfers.halo(step) if transfers is not None else None
            layers.append(Ghosts(f"{layer.name}.halo", held, (len(step.needed[rank]),), classes, halo))
        # A rank without units of a layer only takes part in its exchanges.
        if len(step.output_units(rank)):
            layers.append(step.local(rank))
        if isinstance(step, PlacedColumns) and plan.size > 1:
            total = transfers.total(prod(layer.out_shape)) if transfers is not None else None
            layers.append(Total(f"{layer.name}.total", layer.out_shape, layer.out_shape, total))
    return Network(plan.network.name, (len(plan.inputs[rank]),), tuple(layers))


def largest(network: Network) -> int:
    """Return the number of weights of the layer that has most."""
    return max(sum(prod(p.shape) for p in layer.parameters()) for layer in network.layers)
