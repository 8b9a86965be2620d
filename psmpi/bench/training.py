"""What a benchmark of training steps needs of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from psmpi.comm.protocol import World
from psmpi.config import Config
from psmpi.data import Dataset, Minibatches
from psmpi.nn.network import Network


class Training(NamedTuple):
    """A training that could begin: its method, a class, its minibatches and their learning rates, threads a rank."""

    method: Any
    network: Network
    dataset: Dataset
    batches: Minibatches
    rate: Callable[[int], float]
    threads: int


def prepare(config: Config, world: World) -> Training:
    """The training that a configuration describes, on the ranks of `world`; UserError where there can be none."""
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
    """Run work(config, ...), a benchmark's program on these ranks, by options; returns the exit status.

    words: options of psmpi.train and of `work`; name: the command that started the ranks.
    """
    from psmpi.comm.world import start
    from psmpi.command import answer, parsed, with_training_options
    from psmpi.config import defaults

    def go() -> int:
        # Before options are read: one rank then speaks of what is wrong with them.
        start()
        return int(parsed(with_training_options(work, defaults(words), words), words, name))

    return answer(go)
