"""The network of a checkpoint."""

from __future__ import annotations

from psmpi.checkpoint.contents import Contents
from psmpi.config import NetworkSettings
from psmpi.nn.network import Network
from psmpi.nn.zoo import make_network


def network_in(contents: Contents, model: NetworkSettings) -> Network:
    """Make the network of a checkpoint; model: its settings in the checkpoint's configuration.

    UserError as in `make_network`.
    """
    shape, classes = contents.in_shape, contents.layout.classes
    return make_network(model.model, shape, classes, **model.shape, by_step=contents.by_step, task=contents.task)
