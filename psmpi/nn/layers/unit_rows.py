"""The rows of one parameter in local vectors, for layers with weights of each unit."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.nn.layers.base import SampleSums, Site, Stage


class UnitRows:
    """The rows of a parameter (units, ...) in the local vectors of a subnetwork.

    The layer must be `exact`, since a unit that no score uses has no row. name: of the parameter, after the layer's
    name. runs: (units, start) in the order of units: a slice of output units with adjacent rows, and the start of the
    first row.
    """

    def __init__(self, stage: Stage, site: Site, name: str = "weight"):
        layer, layout = stage.layer, site.layout
        parameter = next(p for p in layer.parameters() if p.name == f"{layer.name}.{name}")
        self.row, size = parameter.shape[1:], parameter.unit_size
        number, local = layout.parameters.index(parameter), np.cumsum(stage.outputs) - 1
        self.runs: list[tuple[slice, int]] = []
        for piece in layout.pieces():
            if piece.parameter == number and stage.outputs[piece.first]:
                first, count = int(local[piece.first]), piece.last - piece.first
                at = site.part.local(piece.offset, piece.offset + count * size).start
                self.runs.append((slice(first, first + count), at))
        self.runs.sort(key=lambda run: run[0].start)

    def views(self, vector: np.ndarray) -> list[np.ndarray]:
        """Views (..., units of the run, *row) of each run in a vector (..., part's weights)."""
        views = []
        for units, at in self.runs:
            shape = (*vector.shape[:-1], units.stop - units.start, *self.row)
            size = int(np.prod(shape[vector.ndim - 1 :]))
            views.append(vector[..., at : at + size].reshape(shape))
        return views

    def write_sums(self, products: np.ndarray, into: Any) -> None:
        """Write the gradient of a parameter (units,): sums of `products` (units, ..., b). into: see `Part.backward`."""
        if into is None:
            return
        flat = products.reshape(len(products), -1, products.shape[-1]).sum(axis=1)
        weighted = isinstance(into, SampleSums)
        for (units, _), out in zip(self.runs, self.views(into.into) if weighted else into, strict=True):
            out[...] = into.weights @ flat[units].T if weighted else flat[units].sum(axis=1)
