"""The backend of a rank of a training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.backend import NumpyOps, make_backend
from psmpi.comm import nccl
from psmpi.comm.protocol import World
from psmpi.comm.world import host_by_host, local_rank
from psmpi.config import Config
from psmpi.errors import UserError, unused_option


def backend_of(world: World, config: Config, threads: int, tell: Callable[[str], None]) -> NumpyOps:
    """Make the backend of this rank and compile its kernels. tell: prints a note if a GPU cannot be used.

    Raises UserError for options of GPUs on a backend without one.
    """
    parallel, dtype = config.parallel, np.dtype(config.model.dtype)
    settings = (parallel.compute, parallel.cuda_graphs, parallel.convolution)
    made = [make_backend(parallel.backend, threads, local_rank(world), *settings)]

    def compile_kernels() -> None:
        try:
            made[0].compile(dtype)
        except UserError as error:
            if parallel.backend == "cupy":
                raise
            made[0] = make_backend("auto", threads)
            if world.rank == 0:
                tell(f"note: the GPU is not used: {str(error).removeprefix('--backend cupy: ')}")

    # The first rank of a host compiles the kernels, the others find them in its cache.
    host_by_host(world, compile_kernels)
    ops = made[0]
    if not ops.on_device:
        for option, given in (
            ("--gpu-aware", parallel.gpu_aware),
            ("--nccl", parallel.nccl),
            (f"--compute {parallel.compute}", parallel.compute != "float32"),
            (f"--convolution {parallel.convolution}", parallel.convolution != "own"),
        ):
            if given:
                raise unused_option(option, "--backend", ("cupy",), ops.name)
    elif parallel.nccl:
        nccl.check_devices(world, ops.pci_id)
    return ops
