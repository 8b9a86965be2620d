"""Whole weight matrices of a local vector, for optimizers that step each matrix as a whole."""

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
    """Return the weights of hidden layers: parameters of more than one number per unit, without the first and last."""
    return tuple(p for p in layout.parameters if p.unit_size > 1)[1:-1]


def whole_matrices(layout: Layout, runs: Runs) -> tuple[Matrix, ...]:
    """Return the matrices of hidden layers in the local vector of `runs`, in the order of that vector.

    A matrix has one row for each unit of a parameter that the same classes use: (units, unit size) for a layer that
    all classes use, convolutions included. A block-diagonal layer has one matrix for each group. The matrices depend
    on the network alone, not on the number of ranks. UserError if `runs` have only some rows of a matrix.
    """
    matrices = []
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
                    matrices.append(Matrix(begin, last - first, size))
                elif end > begin:
                    raise UserError(
                        f"units {first} to {last} of {parameter.name} are a matrix that one rank has to step as a "
                        "whole, but a shard has only a part of it: use --masters 1 or --placement owner, or an "
                        "--optimizer that steps each weight by itself"
                    )
    return tuple(sorted(matrices, key=lambda matrix: matrix.start))


def _groups(parameter: Parameter) -> int:
    """Return the number of groups: the first axis of a block-diagonal layer, whose units are on two axes, else 1."""
    return parameter.shape[0] if parameter.shape[0] < parameter.units else 1


def _places(runs: Runs, *edges: int) -> tuple[int, ...]:
    """Return the number of elements of `runs` before each of the elements `edges` of the flat vector."""
    at = np.array(edges, np.int64)
    if not len(runs.starts):
        return (0,) * len(edges)
    k = np.maximum(runs.starts.searchsorted(at, side="right") - 1, 0)
    inside = np.clip(at, runs.starts[k], runs.stops[k]) - runs.starts[k]
    return tuple((runs.offsets[k] + inside).tolist())
