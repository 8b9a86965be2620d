"""The operations in NumPy, written to be plainly correct.

The minibatch is the last axis: an image array is (channels, height, width, batch), a feature array (features, batch).
So a class's channels, features and scores are contiguous rows, flattening is a reshape, and copies run along the batch.
All arrays of a call have the same dtype, float32 or float64.
"""

from __future__ import annotations

from psmpi.backend.reference.attention import Attention
from psmpi.backend.reference.losses import Losses
from psmpi.backend.reference.shared import SharedUpdates
from psmpi.backend.reference.vectors import Vectors


class NumpyOps(Attention, Losses, SharedUpdates, Vectors):
    """The NumPy backend. Other backends derive from it and override operations with faster ones."""
