"""Prepare a training from a configuration, for benchmarks of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from psmpi.comm.protocol import World
from psmpi.config import Config
from psmpi.data import Dataset, Minibatches
from psmpi.nn.network import Network


class Training(NamedTuple):
    """A prepared training. method: the class of the method; rate: learning rate of a step; threads: for each rank."""

    method: Any
    network: Network
    dataset: Dataset
    batches: Minibatches
    rate: Callable[[int], float]
    threads: int


def prepare(config: Config, world: World) -> Training:
    """Prepare the training that a configuration describes, on the ranks of `world`; UserError if it is impossible."""
    from psmpi.comm.world import host
    from psmpi.data import open_dataset
    from psmpi.nn.zoo import make_network
    from psmpi.registry import find_method
    from psmpi.training.loop import plan_steps

    model = config.model
    dataset = open_dataset(*config.data.source)
    network = make_network(
        model.model, dataset.shape, dataset.outputs, **model.shape, by_step=dataset.train.by_step, task=dataset.task
    )
    method = find_method(config.parallel.method)
    method.check(world.size, network, dataset, config)
    batches, _, rate = plan_steps(dataset, config)
    ranks, cores = host(world)
    return Training(method, network, dataset, batches, rate, config.parallel.threads or max(1, cores // ranks))


def run_ranks(work: Callable[..., int], words: list[str], name: str) -> int:
    """Parse options, run work(config, ...) on these ranks, and return the exit status.

    words: options of psmpi.train and of `work`. name: the command that started the ranks, for messages.
    """
    from psmpi.comm.world import start
    from psmpi.command import answer, parsed, with_training_options
    from psmpi.config import defaults

    def go() -> int:
        # Start MPI before options are parsed, so that only one rank prints errors about them.
        start()
        return int(parsed(with_training_options(work, defaults(words), words), words, name))

    return answer(go)
