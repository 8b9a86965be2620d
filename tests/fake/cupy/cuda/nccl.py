"""NCCL between processes of one host, through files. A call waits for the stream, so work keeps the stream's order."""

import ctypes
import os
import secrets
import tempfile
import time
from pathlib import Path

import numpy as np

from cupy.cuda import current

available = True
NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = 7, 8, 0
DTYPES = {NCCL_FLOAT32: np.dtype(np.float32), NCCL_FLOAT64: np.dtype(np.float64)}


def get_unique_id():
    return secrets.token_bytes(128)


def groupStart():
    pass


def groupEnd():
    pass


def _memory(address, count, datatype):
    size = count * DTYPES[datatype].itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), DTYPES[datatype])


class NcclCommunicator:
    def __init__(self, ndev, commId, rank):
        if type(commId) is not bytes:
            raise TypeError(f"expected bytes, {type(commId)} found")
        assert len(commId) == 128 and 0 <= rank < ndev
        self.size, self.rank, self.calls = ndev, rank, 0
        self.folder = Path(tempfile.gettempdir()) / f"fake-nccl-{os.getuid()}-{commId[:8].hex()}"
        self.folder.mkdir(exist_ok=True)

    def _share(self, own):
        """Write this rank's array to a file, and return the arrays of all ranks in this call."""
        self.calls += 1
        name = self.folder / f"{self.calls}-{self.rank}"
        np.save(name.with_suffix(".part.npy"), own)
        os.replace(name.with_suffix(".part.npy"), name.with_suffix(".npy"))
        arrays = []
        for rank in range(self.size):
            path, end = self.folder / f"{self.calls}-{rank}.npy", time.monotonic() + 60
            while not path.exists():
                assert time.monotonic() < end, "a rank did not come"
                time.sleep(0.001)
            arrays.append(np.load(path))
        return arrays

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        current().synchronize()
        arrays = self._share(_memory(sendbuf, count, datatype))
        _memory(recvbuf, count, datatype)[:] = sum(arrays)

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        current().synchronize()
        own = _memory(sendbuff, count, datatype) if self.rank == root else np.empty(0)
        _memory(recvbuff, count, datatype)[:] = self._share(own)[root]
