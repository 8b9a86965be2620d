"""Random layouts, boxes and ownerships for property tests."""

from itertools import pairwise
from math import prod

import numpy as np
from hypothesis import strategies as st

from psmpi.layout import Box, Ownership, Parameter, Runs, make_layout

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def layouts(draw):
    """Layouts of random parameters, whose units are used by random sets of classes."""
    parameters, uses = [], []
    for number, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=3))):
        units = prod(shape[: draw(st.integers(1, len(shape)))])
        parameters.append(Parameter(f"p{number}", tuple(shape), units))
        edges = sorted({0, units, *draw(st.lists(st.integers(0, units), max_size=3))})
        uses.append([(a, b, frozenset(draw(st.sets(st.integers(0, 2), max_size=2)))) for a, b in pairwise(edges)])
    return make_layout(parameters, uses, 3)


@st.composite
def boxes(draw, layout):
    parameter = draw(st.sampled_from(layout.parameters))
    ranges = [tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in parameter.shape]
    return Box(parameter.name, tuple(ranges[: draw(st.integers(0, len(ranges)))]))


def positions(layout):
    """For each parameter by name, an array of its shape with the position of each element in the flat vector."""
    arrays = {}
    for parameter, pieces in zip(layout.parameters, layout.by_parameter, strict=True):
        size = parameter.unit_size
        places = [np.arange(p.offset, p.offset + (p.last - p.first) * size) for p in pieces]
        arrays[parameter.name] = np.concatenate(places).reshape(parameter.shape)
    return arrays


@st.composite
def ownerships(draw, layout, ranks):
    """Ownerships of random boxes, which several ranks may share; one rank gets the remaining elements."""
    runs = [layout.runs_of(draw(st.lists(boxes(layout), max_size=3))) for _ in range(ranks)]
    last = draw(st.integers(0, ranks - 1))
    rest = Runs.union([(0, layout.size)]) - Ownership(tuple(runs)).union
    runs[last] = Runs.union(runs[last].intervals + rest.intervals)
    return Ownership(tuple(runs))
