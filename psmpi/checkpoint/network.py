"""The network that a checkpoint is of."""

from __future__ import annotations

from psmpi.checkpoint.contents import Contents
from psmpi.config import NetworkSettings
from psmpi.nn.network import Network
from psmpi.nn.zoo import make_network


def network_in(contents: Contents, model: NetworkSettings) -> Network:
    """The network with the settings `model` of a checkpoint's configuration, for its samples, classes and task.

    UserError as `make_network`.
    """
    shape, classes = contents.in_shape, contents.layout.classes
    return make_network(model.model, shape, classes, **model.shape, by_step=contents.by_step, task=contents.task)
