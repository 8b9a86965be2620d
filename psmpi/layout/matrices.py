"""Whole weight matrices of a local vector, for optimizers that step a matrix as one thing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from psmpi.errors import UserError
from psmpi.layout.layout import Layout, Parameter
from psmpi.layout.runs import Runs


@dataclass(frozen=True)
class Matrix:
    """Matrix (rows, columns) that lies in a local vector from element `start` on, row after row."""

    start: int
    rows: int
    columns: int

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.rows * self.columns)


def hidden_weights(layout: Layout) -> tuple[Parameter, ...]:
    """The weights of hidden layers: parameters of more than one number a unit, without the first and the last."""
    return tuple(p for p in layout.parameters if p.unit_size > 1)[1:-1]


def whole_matrices(layout: Layout, runs: Runs) -> tuple[Matrix, ...]:
    """The matrices of hidden layers that the local vector of `runs` has, in its order.

    A matrix is the units of one parameter that the same classes use, a row each: (units, unit size) of a layer that all
    classes use, convolutions included. Those of a block-diagonal layer are a matrix each group. So matrices are of the
    network, whatever the ranks. UserError where `runs` have some rows of a matrix without the others.
    """
    found = []
    hidden = {p.name for p in hidden_weights(layout)}
    for parameter, pieces in zip(layout.parameters, layout.by_parameter, strict=True):
        if parameter.name not in hidden:
            continue
        size, group = parameter.unit_size, parameter.units // _groups(parameter)
        for piece in pieces:
            cuts = [piece.first, *range(piece.first - piece.first % group + group, piece.last, group), piece.last]
            for first, last in pairwise(cuts):
                start = piece.offset + (first - piece.first) * size
                begin, end = _places(runs, start, start + (last - first) * size)
                if end - begin == (last - first) * size:
                    found.append(Matrix(begin, last - first, size))
                elif end > begin:
                    raise UserError(
                        f"units {first} to {last} of {parameter.name} are a matrix that one rank has to step as a "
                        "whole, and a shard has a part of it: use --masters 1 or --placement owner, or an "
                        "--optimizer that steps each weight by itself"
                    )
    return tuple(sorted(found, key=lambda matrix: matrix.start))


def _groups(parameter: Parameter) -> int:
    """The groups of a block-diagonal layer: the first axis, where the units are on the first two."""
    return parameter.shape[0] if parameter.shape[0] < parameter.units else 1


def _places(runs: Runs, *edges: int) -> tuple[int, ...]:
    """The number of elements of `runs` before each of these elements of the flat vector."""
    at = np.array(edges, np.int64)
    if not len(runs.starts):
        return (0,) * len(edges)
    k = np.maximum(runs.starts.searchsorted(at, side="right") - 1, 0)
    inside = np.clip(at, runs.starts[k], runs.stops[k]) - runs.starts[k]
    return tuple((runs.offsets[k] + inside).tolist())
