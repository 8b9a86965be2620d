"""The NumPy operations, written to be obviously right.

Activations keep the minibatch last: an image array is (channels, height, width, batch), a feature array (features,
batch). So a class's channels, features and scores are contiguous rows, flattening is a reshape, and every copy below
runs along the batch. All arrays of one call share one dtype, float32 or float64.
"""

from __future__ import annotations

from psmpi.backend.reference.attention import Attention
from psmpi.backend.reference.losses import Losses
from psmpi.backend.reference.shared import SharedUpdates
from psmpi.backend.reference.vectors import Vectors


class NumpyOps(Attention, Losses, SharedUpdates, Vectors):
    """All operations; other backends override those that they do faster."""
