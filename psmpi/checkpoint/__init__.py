"""Checkpoints: HDF5 files of named tensors in their global shapes, independent of the ranks that write or read them.

`format` has the layout of the file, `contents` its texts, `soundness` the checks of both, `tensors` the places of
tensors in a flat vector. `writer` collects a checkpoint from the ranks, `build` is the process that writes it, `reader`
fills each rank's shard.
"""

from psmpi.checkpoint.contents import Contents, Progress, read_contents
from psmpi.checkpoint.format import FORMAT, available, best, check_file, folder
from psmpi.checkpoint.lock import Lock
from psmpi.checkpoint.parallel import supported
from psmpi.checkpoint.provenance import provenance
from psmpi.checkpoint.reader import clear, find, load, load_space, load_tables, newest
from psmpi.checkpoint.soundness import validate
from psmpi.checkpoint.writer import Unsaved, Writer

__all__ = [
    "FORMAT",
    "Contents",
    "Lock",
    "Progress",
    "Unsaved",
    "Writer",
    "available",
    "best",
    "check_file",
    "clear",
    "find",
    "folder",
    "load",
    "load_space",
    "load_tables",
    "newest",
    "provenance",
    "read_contents",
    "supported",
    "validate",
]
