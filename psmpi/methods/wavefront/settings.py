"""Settings of the method `wavefront`, the deal of its layers, and its checks of a configuration, without MPI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

from psmpi.config import Config, Least
from psmpi.data import Dataset
from psmpi.errors import UserError, counted
from psmpi.methods.wavefront.schedule import usual_steps
from psmpi.nn.layers.chain import leaves
from psmpi.nn.network import Network
from psmpi.nn.sequences import chunks, find_head, is_recurrent
from psmpi.training.checks import check_first_order, check_recurrent
from psmpi.training.context import check_optimizer, configured_loss

# Most chunks of a sequence: the number of a chunk is an MPI tag.
MOST_CHUNKS = 4096


@dataclass(frozen=True)
class Settings:
    """Recurrent layers as a wavefront (wavefront)."""

    table: ClassVar[str] = "wavefront"
    results: ClassVar[bool] = True

    chunk_steps: Annotated[int, Least(0)] = 0
    """Steps of a chunk of sequences that a rank computes before it sends them on. 0: a quarter of the steps over the
    ranks and threads that go over layers, at least 1, or all steps if there is only one. Short chunks let ranks start
    earlier, and make more and smaller messages and products. Results change by rounding only."""
    skew: Annotated[int, Least(1)] = 1
    """Threads of a rank that go over its recurrent layers in turn, each over some. At most the number of these layers.
    Works with the compiled and the numpy backend, best with --threads 1."""


@dataclass(frozen=True)
class Lanes:
    """Deal of the layers of a network to ranks and lanes.

    ranks: for each rank its lanes, which are runs (first, stop) of layers that process chunks; head: the run of layers
    after the last step, on the last rank, or None if each step has scores. steps: of a chunk.
    """

    ranks: tuple[tuple[tuple[int, int], ...], ...]
    head: tuple[int, int] | None
    steps: int

    def layers(self, rank: int) -> tuple[int, int]:
        """Return the run of all layers of a rank."""
        last = self.head if self.head is not None and rank == len(self.ranks) - 1 else self.ranks[rank][-1]
        return self.ranks[rank][0][0], last[1]


def deal(network: Network, ranks: int, skew: int, chunk_steps: int) -> Lanes:
    """Deal layers to ranks so that the most multiplications of a rank are minimal; within a rank to lanes likewise.

    The network has a recurrent layer. Raise UserError for fewer recurrent layers than ranks, or on a rank than threads.
    """
    head, layers = find_head(network), network.layers
    recurrent = [k for k in range(head) if is_recurrent(layers[k])]
    if ranks > len(recurrent):
        raise UserError(
            f"--method wavefront gives each rank at least one recurrent layer, and --model {network.name} has "
            f"{len(recurrent)} for {counted(ranks, 'rank')}: start {len(recurrent)} or fewer, or give the model more "
            "layers, for instance --widths 128 128 128 128"
        )
    runs = _split(network, recurrent, (0, head), ranks)
    lanes = []
    for rank, run in enumerate(runs):
        own = [k for k in recurrent if run[0] <= k < run[1]]
        if skew > len(own):
            raise UserError(
                f"--skew {skew}: rank {rank} has {counted(len(own), 'recurrent layer')}: use --skew {len(own)} or less"
            )
        lanes.append(tuple(_split(network, own, run, skew)))
    steps = chunk_steps or usual_steps(network.in_shape[1], ranks * skew)
    return Lanes(tuple(lanes), (head, len(layers)) if head < len(layers) else None, steps)


def _split(network: Network, starts: list[int], run: tuple[int, int], parts: int) -> list[tuple[int, int]]:
    """Cut a run of layers before some of `starts` into `parts` runs whose largest cost is minimal; return these."""
    layers, stops = network.layers, [*starts[1:], run[1]]
    first = [run[0], *starts[1:]]
    costs = [sum(layer.macs for layer in leaves(layers[a:b])) for a, b in zip(first, stops, strict=True)]
    # best[p][n]: minimal largest cost of the first n pieces in p parts, and the first piece of the last part.
    best: list[list[tuple[float, int]]] = [[(0.0 if n == 0 else float("inf"), 0) for n in range(len(costs) + 1)]]
    for p in range(1, parts + 1):
        row = [(float("inf"), 0)] * (len(costs) + 1)
        for n in range(p, len(costs) + 1):
            # Among equal cuts, the last one: earlier parts are then the larger ones.
            row[n] = min((max(best[p - 1][k][0], sum(costs[k:n])), -k) for k in range(p - 1, n))
            row[n] = row[n][0], -row[n][1]
        best.append(row)
    edges, n = [len(costs)], len(costs)
    for p in range(parts, 0, -1):
        n = best[p][n][1]
        edges.append(n)
    edges.reverse()
    return [(first[a], stops[b - 1]) for a, b in pairwise(edges)]


def check_wavefront(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    s = config.of(Settings)
    check_recurrent(network, dataset, config)
    lanes = deal(network, size, s.skew, s.chunk_steps)
    steps = network.in_shape[1]
    if s.chunk_steps > steps:
        raise UserError(f"--chunk-steps {s.chunk_steps}: sequences have {steps} steps; use at most as many, or 0")
    if len(chunks(steps, lanes.steps)) > MOST_CHUNKS:
        least = -(-steps // MOST_CHUNKS)
        raise UserError(
            f"--chunk-steps {lanes.steps} makes {len(chunks(steps, lanes.steps))} chunks of {steps} steps, and "
            f"{MOST_CHUNKS} are the most: use --chunk-steps {least} or more"
        )
    runs = network.runs(network.layout(), *lanes.layers(size - 1))
    if lanes.head is not None and network.runs(network.layout(), *lanes.head).inside(runs) is None:
        raise UserError(
            f"--model {network.name} has layers of single classes before and after the last step, which --method "
            "wavefront cannot separate: use dense layers in place of separable ones before the last step"
        )
    check_first_order(config, "evaluates the loss more than once a step, and each evaluation needs all ranks in turn")
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())


def wavefront_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.notes`."""
    s = config.of(Settings)
    lanes = deal(network, size, s.skew, s.chunk_steps)
    count, stages = len(chunks(network.in_shape[1], lanes.steps)), size * s.skew
    if stages > 1:
        yield (
            f"{counted(count, 'chunk')} of {counted(lanes.steps, 'step')} over {stages} runs of layers: each "
            f"computes for at most {count / (count + stages - 1):.0%} of the time"
        )
