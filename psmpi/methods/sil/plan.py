"""The plan of the method `sil`: phases, ranks and checks; made without MPI and arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar, Literal

import numpy as np

from psmpi.config import Config, Least
from psmpi.data import Dataset
from psmpi.errors import UserError, unused_option
from psmpi.layout import split_evenly
from psmpi.nn.cut import split_layers
from psmpi.nn.network import Network
from psmpi.registry import WHOLE
from psmpi.training.checks import check_classes, check_first_order, check_layers, check_slices, slices_are_normalized
from psmpi.training.context import check_optimizer, configured_loss
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, samples_needed, vectors_needed

# Smallest and largest value of labels at scale 1, and of activations.
LAWS = {"uniform": (0.0, 1.0), "sign": (-1.0, 1.0), "gaussian": (-inf, inf), "orthogonal": (-inf, inf)}
REACH = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "relu": (0.0, inf), "identity": (-inf, inf)}


@dataclass(frozen=True)
class Settings:
    """Synthetic intermediate labels (sil)."""

    table: ClassVar[str] = "sil"
    results: ClassVar[bool] = True

    parts: Annotated[int, Least(0)] = 0
    """Runs of layers that are trained separately. The ranks must be a divisor or a multiple of them. 0: one for each
    rank, at least 2 if there are two layers."""
    labels: Literal["uniform", "gaussian", "sign", "orthogonal"] = "uniform"
    """Distribution of the vectors that stand for the classes.

    uniform: U(0, 1)
    gaussian: N(0, 1)
    sign: -1 or 1
    orthogonal: orthogonal vectors
    """
    labels_seed: Annotated[int, Least(0)] = 0
    """Seed of these vectors."""
    labels_scale: float = 1.0
    """Factor kappa on these vectors. The loss is divided by its square."""
    hand_over: Literal["stored", "recompute", "stale", "labels"] = "stored"
    """Inputs from which a part learns.

    stored: outputs of the finished part before, kept in memory; parts train one after the other
    recompute: the same, computed anew for each minibatch
    stale: outputs of the part before at the end of the last epoch; parts train at once
    labels: labels of the part before, with noise; parts train at once
    """
    labels_noise: float = 0.1
    """Standard deviation of the noise of --hand-over labels, relative to --labels-scale."""
    part_epochs: tuple[int, ...] = ()
    """Epochs of each part, in turn. If not given: equal shares."""
    recovery_epochs: Annotated[int, Least(0)] = 0
    """Last epochs in which all parts train together as one network, of --epochs; 0: none."""


@dataclass(frozen=True)
class Phase:
    """Epochs [start, stop) in which `parts` are trained: each alone, or `joined` as one network."""

    name: str
    start: int
    stop: int
    parts: tuple[int, ...]
    joined: bool = False


def plan_phases(parts: int, epochs: int, settings: Settings) -> list[Phase]:
    """Return the phases of training; raise UserError if the epochs do not add up."""
    given, recovery, mode = settings.part_epochs, settings.recovery_epochs, settings.hand_over
    left, everyone, in_turn = epochs - recovery, tuple(range(parts)), mode in ("stored", "recompute")
    typed = f"--part-epochs {' '.join(map(str, given))}"
    if given and not in_turn:
        raise UserError(f"{typed} is for parts in turn, and with --hand-over {mode} all learn at once: leave it out")
    if given and (len(given) != parts or any(not isinstance(n, int) or n < 1 for n in given)):
        raise UserError(f"{typed}: expected a number from 1 up for each of {parts} part(s)")
    if given and sum(given) != left:
        total = sum(given) + recovery
        raise UserError(
            f"{typed} and --recovery-epochs {recovery} add up to {total}, not to --epochs {epochs}: use --epochs "
            f"{total}"
        )
    least = parts if in_turn else 1
    if left < least:
        raise UserError(
            f"--epochs {epochs} with --recovery-epochs {recovery} leaves some of {parts} part(s) untrained: use "
            f"--epochs {least + recovery} or more"
        )
    phases, start = [], 0
    lengths = given or [len(group) for group in split_evenly(range(left), parts)]
    for k, length in enumerate(lengths if in_turn else [left]):
        phases.append(Phase(f"part {k + 1}" if in_turn else "all parts", start, start + length,
                            (k,) if in_turn else everyone))  # fmt: skip
        start += length
    return [*phases, Phase("recovery", start, epochs, everyone, joined=True)] if recovery else phases


@dataclass(frozen=True)
class Assignment:
    """Assignment of parts to ranks: a run of parts to each rank, or `rows` ranks to each part."""

    size: int
    parts: int

    @property
    def rows(self) -> int:
        return max(1, self.size // self.parts)

    def rank(self, part: int, row: int) -> int:
        return part // max(1, self.parts // self.size) * self.rows + row

    def parts_of(self, rank: int) -> list[int]:
        return [k for k in range(self.parts) if self.rank(k, rank % self.rows) == rank]


def count_parts(size: int, network: Network, asked: int) -> int:
    """Return the number of parts on `size` ranks: `asked`, or for 0 one a rank and at least 2 if there are two layers.

    Raise UserError if the model has too few layers for them, or ranks and parts do not divide each other.
    """
    depth = len(network.linear)
    parts = asked or max(size, min(2, depth))
    fit = [k for k in range(1, depth + 1) if k % size == 0 or size % k == 0]
    if parts not in fit:
        raise UserError(
            f"--method sil cannot cut --model {network.name}, with {depth} layer(s) with weights, into {parts} parts "
            f"on {size} rank(s): every rank holds equally many parts, or every part has equally many ranks; use "
            f"--parts {fit[-1]}{f', or --method {WHOLE}' if depth == 1 else ''}"
        )
    return parts


def cut_activation(network: Network, stop: int) -> str:
    """Return the activation whose range the outputs of the layers before `stop` have."""
    for layer in reversed(network.layers[:stop]):
        if layer.activation:
            return layer.activation
        if not layer.keeps_range:
            break
    return "identity"


def check_sil(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    s = config.of(Settings)
    check_classes(dataset, "--method sil", "use another method")
    parts = count_parts(size, network, s.parts)
    plan_phases(parts, config.run.epochs, s)
    check_layers(network, config, parts)
    check_first_order(config, "takes one loss for all weights, and each part has its own")
    check_slices(network, config.data.batch_size, Assignment(size, parts).rows, "ranks of a part")
    if config.parallel.nccl and Assignment(size, parts).rows == 1:
        raise UserError(f"--nccl sums over the ranks of a part, and each of {parts} part(s) has one: leave it out")
    if not 1e-6 <= s.labels_scale <= 1e6:
        raise UserError(f"--labels-scale {s.labels_scale}: expected a number from 1e-6 to 1e6, usually 1")
    if s.hand_over != "labels" and s.labels_noise != Settings().labels_noise:
        raise unused_option(f"--labels-noise {s.labels_noise}", "--hand-over", ("labels",), s.hand_over)
    if not 0 <= s.labels_noise <= 1e6:
        raise UserError(f"--labels-noise {s.labels_noise}: expected 0 (none) or a number above it, up to 1e6")
    widths = [int(np.prod(network.layers[stop - 1].out_shape)) for _, stop in split_layers(network, parts)[:-1]]
    if s.labels == "orthogonal" and min(widths, default=network.classes) < network.classes:
        raise UserError(
            f"--labels orthogonal: {network.classes} vectors of {min(widths)} units cannot be; use --labels uniform"
        )
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())


def sil_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`."""
    s, layout, dtype = config.of(Settings), network.layout(), np.dtype(config.model.dtype)
    parts = count_parts(size, network, s.parts)
    assignment, stages = Assignment(size, parts), split_layers(network, parts)
    pieces = [at.stop - at.start for n in (dataset.train.n, dataset.test.n) for at in network.evaluation_batches(n)]
    all_needs = []
    for rank in range(size):
        held, tests = (
            assignment.parts_of(rank),
            network.evaluation_batches(dataset.test.n)[rank % assignment.rows :: assignment.rows],
        )
        shard = sum(network.runs(layout, *stages[k]).size for k in held)
        needs = [vectors_needed(config, layout, shard, shard, shard)]
        for k in held:
            needs.append(passes_needed(config, network, max(config.data.batch_size, *pieces), layers=stages[k]))
            units = int(np.prod(network.layers[stages[k][1] - 1].out_shape))
            needs.append(derivatives_needed(config, config.data.batch_size * units))
            if k and s.hand_over in ("stored", "stale"):
                inputs = int(np.prod(network.layers[stages[k][0]].in_shape))
                needs.append({"samples": dtype.itemsize * dataset.train.n * inputs})
        if 0 in held:
            tested, share = sum(at.stop - at.start for at in tests), -(-config.data.batch_size // assignment.rows)
            needs.append(samples_needed(dataset, dataset.train.n, tested, share))
        all_needs.append(added(*needs))
    return all_needs


def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.warnings`."""
    s = config.of(Settings)
    if network.normalized and Assignment(size, count_parts(size, network, s.parts)).rows > 1:
        yield slices_are_normalized(" of a part")
    o = config.optimization
    if s.hand_over in ("stored", "recompute") and (o.schedule != "constant" or o.warmup_steps):
        yield (
            "the learning rate schedule runs over all epochs, and parts are trained one after the other: each part has "
            "a piece of it"
        )
    for k, (_, stop) in enumerate(split_layers(network, count_parts(size, network, s.parts))[:-1]):
        units, kind = int(np.prod(network.layers[stop - 1].out_shape)), cut_activation(network, stop)
        (least, most), (low, high) = (np.array(LAWS[s.labels]) * s.labels_scale, REACH[kind])
        if least < low or most > high:
            yield (
                f"part {k + 1} ends in {kind}, which does not reach all of --labels {s.labels} --labels-scale "
                f"{s.labels_scale:g}: --labels uniform --labels-scale 1 is within its reach"
            )
        if units < network.classes:
            yield (
                f"part {k + 1} has {units} outputs for {network.classes} classes: its labels do not determine the "
                "probabilities of the classes"
            )
