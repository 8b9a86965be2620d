"""Random weights and samples for a network, and models on them."""

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import restrict
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.model import Model


def random_problem(network, batch=3, dtype=np.float64, seed=0):
    layout = network.layout()
    rng = np.random.default_rng(seed)
    w = rng.normal(size=layout.size).astype(dtype)
    x = rng.normal(size=(int(np.prod(network.in_shape)), batch)).astype(dtype)
    if isinstance(network.layers[0], Embedding):
        x = rng.integers(0, network.layers[0].vocabulary, x.shape).astype(dtype)
    d = rng.normal(size=(network.classes, *([network.steps] if network.steps else []), batch)).astype(dtype)
    return layout, w, x, d


def make_model(network, layout, w, classes=None, fold=True):
    """A model of `classes` on a copy of its part of w, with a gradient vector of NaN."""
    part = layout.part(range(network.classes) if classes is None else classes)
    return Model(
        network, layout, restrict(w, part), np.full(part.size, np.nan, w.dtype), NumpyOps(), classes, fold=fold
    )
