"""Time a training by PyTorch's DistributedDataParallel over gloo; a program under mpirun for `bench network`."""

from __future__ import annotations

import json
import sys
import time

STEPS, WARM = 40, 5


def main(argv: list[str]) -> int:
    """Time steps with the options of psmpi.train; the last line that rank 0 prints is JSON."""
    import os

    import numpy as np
    import torch
    import torch.distributed as dist
    import tyro

    from psmpi.backend import NumpyOps
    from psmpi.bench.hosts import NETWORK
    from psmpi.bench.problems import Minibatch, Problem
    from psmpi.bench.pytorch import pytorch_step
    from psmpi.comm.control import Control
    from psmpi.comm.world import start
    from psmpi.config import Config
    from psmpi.data import open_dataset
    from psmpi.layout import Runs
    from psmpi.nn.init import initial_weights
    from psmpi.nn.model import Model
    from psmpi.nn.zoo import make_network
    from psmpi.training.usual import usual

    world = start()
    config = usual(tyro.cli(Config, args=argv, config=(tyro.conf.OmitArgPrefixes,)))
    dataset = open_dataset(*config.data.source)
    net = make_network(
        config.model.model,
        dataset.shape,
        dataset.outputs,
        **config.model.shape,
        by_step=dataset.train.by_step,
        task=dataset.task,
    )
    problem = Problem(net, config.objective.loss, tuple(range(net.classes)))
    layout = net.layout()
    part: Runs = layout.part(problem.classes)
    w = np.zeros(part.size, np.float32)
    initial_weights(net, layout, part, w, seed=0)
    model = Model(net, layout, w, np.zeros_like(w), NumpyOps())
    torch.set_num_threads(1)
    host = f"{NETWORK}1" if os.environ.get("GLOO_SOCKET_IFNAME") else "127.0.0.1"
    port = Control(world).share(str(29400 + os.getpid() % 500))
    dist.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=world.rank, world_size=world.size)
    size = -(-config.data.batch_size // world.size)
    step, _ = pytorch_step(problem, Minibatch(problem, size), model, wrap=torch.nn.parallel.DistributedDataParallel)
    for _ in range(WARM):
        step()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    dist.barrier()
    if world.rank == 0:
        print(json.dumps({"ms_per_step": 1e3 * (time.perf_counter() - begin) / STEPS}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
