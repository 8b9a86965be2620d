"""The operations in NumPy: the reference for tests of the other backends, and their fallback."""

from psmpi.backend.reference.arrays import CHUNK
from psmpi.backend.reference.convolution import Convolution, Im2col, Stripes
from psmpi.backend.reference.losses import exponent_of
from psmpi.backend.reference.moves import CompressedSamples, Mirror, RunCopies, Samples
from psmpi.backend.reference.ops import NumpyOps
from psmpi.backend.reference.recurrence import CELLS, Recurrence
from psmpi.backend.reference.shared import SLOPES, Descent, Pairs, Room, Rows
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct

__all__ = [
    "CELLS",
    "CHUNK",
    "SLOPES",
    "CompressedSamples",
    "Convolution",
    "Descent",
    "Im2col",
    "Mirror",
    "NumpyOps",
    "Pairs",
    "Recurrence",
    "Room",
    "Rows",
    "RunCopies",
    "Samples",
    "SparseIndex",
    "SparseProduct",
    "Stripes",
    "exponent_of",
]
