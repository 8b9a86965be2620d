"""Checkpoints: HDF5 files of named tensors in their global shapes, whatever ranks wrote or read them.

`format` says what is in a file, `writer` collects one from the ranks, `build` is the process that writes it, `reader`
gives each rank its slices.
"""

from psmpi.checkpoint.format import (
    FORMAT,
    Contents,
    Progress,
    available,
    check,
    folder,
    read_contents,
    validate,
)
from psmpi.checkpoint.lock import take
from psmpi.checkpoint.parallel import supported
from psmpi.checkpoint.provenance import provenance
from psmpi.checkpoint.reader import clear, find, load, load_tables, newest
from psmpi.checkpoint.writer import Writer

__all__ = [
    "FORMAT",
    "Contents",
    "Progress",
    "Writer",
    "available",
    "check",
    "clear",
    "find",
    "folder",
    "load",
    "load_tables",
    "newest",
    "provenance",
    "read_contents",
    "supported",
    "take",
    "validate",
]
