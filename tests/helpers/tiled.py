"""Losses and gradients by tiles of classes, or of all classes at once."""

import numpy as np
import pytest

from psmpi.backend import CompiledOps, NumpyOps
from psmpi.backend.compiled.library import level
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.nn.tiles import TiledObjective

BACKENDS = ["numpy", pytest.param("compiled", marks=pytest.mark.skipif(level() == 0, reason="no compiled kernels"))]


def make_ops(name):
    return CompiledOps() if name == "compiled" else NumpyOps()


def derive(network, w, x, labels, loss, ops, tiled, scale=0.125):
    """Return the loss, its gradient with respect to the flat vector, and the number of clipped terms.

    tiled: compute by tiles of classes.
    """
    gradient = np.full_like(w, np.nan)
    model = Model(network, network.layout(), w, gradient, ops, tiled=tiled)
    objective = (TiledObjective if tiled else Objective)(loss, model)
    objective.reserve(network.classes, len(labels))
    objective.bring(labels)
    tape = model.forward(x)
    objective.losses(tape.scores.reshape(-1, len(labels)), objective.targets(len(labels)), scale)
    objective.backward(tape)
    return objective.value(), gradient, loss.clipped
