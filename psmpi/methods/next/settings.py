"""Settings of the method `next`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from math import isfinite
from typing import Annotated, ClassVar, Literal

import numpy as np

from psmpi.config import Config, Least, option
from psmpi.data import Dataset
from psmpi.errors import UserError, counted, unused_option
from psmpi.methods.next.convex import Terms, read_set
from psmpi.methods.next.deal import classes_each, deal_samples
from psmpi.methods.next.graph import Graph, make_graph
from psmpi.methods.next.partial import MOST
from psmpi.nn.network import Network
from psmpi.optim import find_optimizer
from psmpi.training.checks import check_first_order, check_slices
from psmpi.training.context import check_optimizer, configured_loss
from psmpi.training.rounds import Rounds, check_rounds


@dataclass(frozen=True)
class Settings:
    """In-network training (next)."""

    table: ClassVar[str] = "next"
    results: ClassVar[bool] = True

    agents: Annotated[int, Least(1)] = 8
    """Agents, each with weights and samples of its own. Ranks share them: as many ranks as agents, or fewer."""
    graph: str = "ring"
    """Links between the agents: a name below, or a text file with two numbers of agents a line.

    ring: two neighbours for each agent
    grid: neighbours on a rectangular grid
    exponential: links to the agents 1, 2, 4, ... places on
    complete: links between all agents
    erdos:P: each pair of agents with probability P
    """
    graph_seed: Annotated[int, Least(0)] = 0
    """Seed of erdos:P and of failing links."""
    link_probability: float = 1.0
    """Probability that a link works in an iteration. 1: all links work."""
    split: str = "iid"
    """Training samples of the agents.

    iid: dealt at random
    sorted: dealt by class or value
    skewed:K: about K classes for each agent
    """
    private_data: bool = False
    """Let each rank open the file --dataset on its own host. No other rank reads its samples; agents of a rank share
    them. {rank} in the name stands for the number of the rank."""
    rule: Literal["tracking", "next", "dgd", "extra", "choco", "kgt"] = "tracking"
    """Rule of an agent's step.

    tracking: the optimizer's step along a tracked mean of all agents' gradients
    next: step to the minimum of a convex model with the tracked gradient
    dgd: the optimizer's step along the agent's own gradient
    extra: dgd, corrected by the messages before
    choco: dgd that sends only the largest changes
    kgt: local steps with tracking
    """
    tracking: Literal["full", "minibatch"] = "full"
    """Gradients of a step.

    full: over all samples of an agent; the minibatch size only sets the number of steps of an epoch
    minibatch: over the agent's share of a minibatch
    """
    tau: float = 1.0
    """Curvature of the convex model of --rule next, added to that of the regularizer."""
    mu: float = 0.0
    """Decrease of the step of --rule next: the learning rate a becomes a (1 - mu a) after each iteration."""
    regularizer: Literal["none", "l2", "l1"] = "none"
    """Term that --rule next adds to the loss, times --regularizer-weight.

    none: no term
    l2: squares of all weights
    l1: magnitudes of all weights
    """
    regularizer_weight: float = 0.0
    """Factor of the regularizer."""
    linearization: Literal["full", "partial"] = "full"
    """Linearization in the convex model of --rule next.

    full: of the loss
    partial: of the network inside the loss; fewer iterations with more work each, up to 10,000 weights
    """
    inner_blocks: Annotated[int, Least(1)] = 1
    """Blocks of weights in which --linearization partial solves its convex model, one for each core."""
    constraint: str = "none"
    """Constraint on the weights of --rule next.

    none: no constraint
    box:B: each weight between -B and B
    ball:R: vector of weights of length up to R
    """
    gossip_density: float = 0.1
    """Share of the components that --rule choco sends, as values and places. Above 0.5 it sends more than all
    values."""
    gossip_rate: float = 0.3
    """Rate at which agents of --rule choco approach their neighbours, above 0 and up to 1."""

    @property
    def terms(self) -> Terms:
        """The regularizer and the set of the convex model; raise UserError for an unknown set."""
        return Terms(self.regularizer, self.regularizer_weight, *read_set(self.constraint))


# Rules that use a setting, for settings that not all rules use.
USERS = {
    "tau": ("next",),
    "mu": ("next",),
    "regularizer": ("next",),
    "regularizer_weight": ("next",),
    "linearization": ("next",),
    "inner_blocks": ("next",),
    "constraint": ("next",),
    "gossip_density": ("choco",),
    "gossip_rate": ("choco",),
}
# Most samples of a pass in a gradient over all samples of an agent, unless minibatches are larger.
CHUNK = 256
# Rules whose step is plain gradient descent.
PLAIN = ("next", "extra", "kgt")
# Rules that remember the vectors sent over a link, so that every link must work in every exchange.
FIXED = ("extra", "choco")


def owners(agents: int, size: int) -> tuple[int, ...]:
    """Return the rank of each agent."""
    return tuple(rank for rank, part in enumerate(np.array_split(np.arange(agents), size)) for _ in part)


@lru_cache(maxsize=4)
def graph_of(s: Settings) -> Graph:
    """Return the graph of the settings; raise UserError if there is none."""
    return make_graph(s.graph, s.agents, s.graph_seed, s.link_probability)


def check_next(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    s, o = config.of(Settings), config.optimization
    _check_numbers(s)
    if size > s.agents:
        raise UserError(
            f"--agents {s.agents} on {counted(size, 'rank')}: every rank needs an agent; use --agents {size} or more, "
            "or fewer ranks"
        )
    check_rounds(config, "between two exchanges")
    if s.rule != "kgt" and config.of(Rounds).local_steps != Rounds().local_steps:
        raise unused_option("--local-steps", "--rule", ("kgt",), s.rule)
    check_first_order(config, "has line searches and curvature pairs, and every agent would need its own")
    if find_optimizer(o.optimizer).needs_matrices:
        raise UserError(
            f"--optimizer {o.optimizer} steps whole matrices, and agents step vectors: use adam, momentum or sgd"
        )
    if s.rule in PLAIN and o.optimizer != "sgd":
        raise UserError(
            f"--rule {s.rule} makes its own steps, plain gradient descent: add --optimizer sgd, or use --rule "
            f"tracking, which steps by --optimizer {o.optimizer}"
        )
    if s.rule in PLAIN and o.weight_decay:
        raise UserError(f"--weight-decay is not for --rule {s.rule}: use --rule next with --regularizer l2")
    if s.rule == "next":
        _check_model(network, config, s)
    if s.split not in ("iid", "sorted"):
        classes_each(s.split)
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())
    graph_of(s)
    if s.tracking == "minibatch":
        check_slices(network, config.data.batch_size, s.agents, "agents", "--agents")
    if s.private_data:
        # The samples of ranks are known only when all ranks have opened their files.
        return
    if dataset.train.n < s.agents:
        raise UserError(f"--agents {s.agents}: there are {dataset.train.n:,} training samples only; use fewer")
    check_samples(network, dataset, config, s.agents)


def _check_numbers(s: Settings) -> None:
    for name, least, most in (
        ("tau", 0.0, 1e9),
        ("link_probability", 0.0, 1.0),
        ("gossip_density", 0.0, 1.0),
        ("gossip_rate", 0.0, 1.0),
    ):
        value = getattr(s, name)
        if not least < value <= most:
            raise UserError(f"{option(name)} {value:g}: expected a number above {least:g}, up to {most:g}")
    for name, most in (("mu", 1e9), ("regularizer_weight", 1e9)):
        value = getattr(s, name)
        if not (isfinite(value) and 0 <= value <= most):
            raise UserError(f"{option(name)} {value:g}: expected 0 or a number above it, up to {most:g}")
    for name, rules in USERS.items():
        if s.rule not in rules and getattr(s, name) != _default(name):
            raise unused_option(option(name), "--rule", rules, s.rule)
    if s.graph_seed and s.link_probability == 1 and not s.graph.startswith("erdos:"):
        raise UserError(
            f"--graph-seed {s.graph_seed}: nothing is drawn of --graph {s.graph} if all links work: leave it out"
        )
    if s.rule in FIXED and s.link_probability < 1:
        raise UserError(
            f"--link-probability {s.link_probability:g}: --rule {s.rule} needs every link in every exchange; use "
            "--rule tracking, next, dgd or kgt"
        )
    if (s.regularizer == "none") != (s.regularizer_weight == 0):
        raise UserError(
            f"--regularizer {s.regularizer} with --regularizer-weight {s.regularizer_weight:g}: give both, or none"
        )


def _check_model(network: Network, config: Config, s: Settings) -> None:
    """Raise UserError for a convex model that cannot be solved, or a step that leaves its set."""
    lr, size = config.optimization.lr, network.layout().size
    if not (lr <= 1 and s.mu * lr < 1):
        raise UserError(
            f"--lr {lr:g} with --mu {s.mu:g}: the step length of --rule next is 1 at most, and --mu times it is below "
            "1; use a smaller --lr, or a larger --tau for shorter steps"
        )
    kind = s.terms.kind
    if s.linearization == "full":
        if s.inner_blocks > 1:
            raise unused_option(f"--inner-blocks {s.inner_blocks}", "--linearization", ("partial",), s.linearization)
        return
    if size > MOST:
        raise UserError(
            f"--linearization partial of {size:,} weights: it keeps the derivatives of all scores by all weights, "
            f"and is for {MOST:,} weights at most; use --linearization full"
        )
    if network.normalized:
        raise UserError(
            "--linearization partial takes the derivatives of one sample at a time, and batch normalization couples "
            "them: use --linearization full, or a model without it"
        )
    if config.objective.loss == "hinge":
        raise UserError(
            "--linearization partial solves problems with smooth losses, and hinge has kinks: use --loss nll, or "
            "logistic, or --linearization full"
        )
    if config.objective.margin:
        raise UserError("--margin is not for --linearization partial: leave it out, or use --linearization full")
    if s.inner_blocks > size:
        raise UserError(f"--inner-blocks {s.inner_blocks}: the model has {counted(size, 'weight')} only; use fewer")
    if kind == "ball" and s.inner_blocks > 1:
        raise UserError(
            f"--constraint {s.constraint} with --inner-blocks {s.inner_blocks}: separate blocks cannot keep one length "
            "of all weights; use one block, or box:B"
        )


def _default(name: str) -> object:
    return next(one.default for one in fields(Settings) if one.name == name)


def check_samples(network: Network, dataset: Dataset, config: Config, agents: int) -> None:
    """Raise UserError if an agent would have too few samples, in all or in a step.

    agents: the number of all agents, or for a private data set of this rank's.
    """
    s, n = config.of(Settings), len(dataset.own or range(dataset.train.n))
    if n < agents:
        raise UserError(
            f"--private-data: a rank has {counted(n, 'training sample')} for its {counted(agents, 'agent')}: use fewer "
            "--agents"
        )
    dealt = deal_samples(dataset, agents, s.split, config.run.seed)
    fewest = min(map(len, dealt))
    steps = -(-dataset.train.n // config.data.batch_size)
    least = 2 if network.normalized else 1
    if fewest < least:
        raise UserError(
            f"--split {s.split} leaves an agent with {counted(fewest, 'sample')}, and each agent needs at least {least}"
            f"{' for batch normalization' * network.normalized}: use fewer --agents"
        )
    if s.tracking == "minibatch" and fewest < least * steps:
        raise UserError(
            f"--tracking minibatch: the smallest of the {agents} agents' shares has {counted(fewest, 'sample')}, too "
            f"few for {counted(steps, 'step')} an epoch: use --batch-size "
            f"{-(-dataset.train.n // (fewest // least))} or more"
        )


def next_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.notes`."""
    s = config.of(Settings)
    graph = graph_of(s)
    low, high = min(graph.degrees), max(graph.degrees)
    each = counted(low, "neighbour") if low == high else f"{low} to {high} neighbours"
    fails = f", each link works with probability {s.link_probability:g}" if s.link_probability < 1 else ""
    yield f"{counted(s.agents, 'agent')} with {each} each, spectral gap {graph.gap:.3g}{fails}"


def next_warnings(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.warnings`."""
    if network.normalized and config.of(Settings).tracking == "full":
        yield (
            "batch normalization takes its statistics from the samples of a pass: with --tracking full these are up to "
            f"{max(CHUNK, config.data.batch_size)} samples of an agent"
        )
