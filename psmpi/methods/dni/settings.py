"""Settings of the method `dni`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import Annotated, ClassVar, Literal

from psmpi.config import Config, Least
from psmpi.data import Dataset
from psmpi.errors import UserError, counted
from psmpi.methods.dni.auxiliary import (
    gradient_synthesizer,
    input_synthesizer,
    local_classifier,
    local_features,
)
from psmpi.nn.cut import split_layers, starts
from psmpi.nn.losses import LOSSES
from psmpi.nn.network import Network
from psmpi.training.auxiliary import AuxiliaryNetwork
from psmpi.training.checks import check_classes, check_first_order, check_slices
from psmpi.training.context import check_optimizer, configured_loss

# Maximum of --ahead: the number of a minibatch is an MPI tag, and a rank keeps the minibatches in flight in memory.
MOST_AHEAD = 1024


@dataclass(frozen=True)
class Settings:
    """Decoupled neural interfaces (dni)."""

    table: ClassVar[str] = "dni"
    results: ClassVar[bool] = True

    layer_blocks: Annotated[int, Least(0)] = 0
    """Blocks of consecutive layers, a multiple of the ranks. 0: one block a rank, at least 2."""
    synthetic: Literal["cdni", "dni"] = "cdni"
    """Inputs of a gradient synthesizer.

    cdni: outputs of the block, and the targets
    dni: outputs of the block
    """
    synthesizer_hidden: tuple[int, ...] = ()
    """Widths of the hidden layers of a synthesizer, each with batch normalization and ReLU. If not given: no hidden
    layer, the synthesizer is linear."""
    synthesizer_lr: float = 0.0
    """Learning rate of synthesizers and local losses, changed over the run as --lr is. 0: --lr, but with sgd, momentum
    and nesterov at most the stable rate of a linear synthesizer."""
    ahead: Annotated[int, Least(1)] = 2
    """Minibatches that a block may start before the gradient of the first one returns. A synthesizer learns from a
    gradient exactly this many minibatches later, so results depend neither on timing nor on ranks."""
    bp_lambda: float = 0.0
    """Share of the returned gradient in a block's update; the rest is synthetic (BP(lambda)). 1 is back-propagation as
    a lock-step pipeline. Values above 0 need --ahead 1."""
    synthetic_inputs: bool = False
    """Synthesize the inputs of each block from the samples too, so that no block waits for the one below."""
    local_loss: Literal["none", "greedy", "predsim"] = "none"
    """Local losses in place of synthetic gradients.

    none: synthetic gradients
    greedy: --loss of a linear classifier on the block's outputs
    predsim: greedy, and a similarity loss (Nokland and Eidnes 2019)
    """

    @property
    def predicts(self) -> bool:
        """Whether gradients are synthesized."""
        return self.local_loss == "none" and self.bp_lambda < 1

    @property
    def returns(self) -> bool:
        """Whether blocks return gradients to the blocks below."""
        return self.local_loss == "none"


def count_blocks(size: int, network: Network, asked: int) -> int:
    """Return the number of blocks on `size` ranks: `asked`, or for 0 one a rank and at least 2.

    Raise UserError if the model has too few layers for them, or the ranks cannot hold equally many blocks.
    """
    depth = len(starts(network))
    blocks = asked or max(2, size)
    if blocks < 2 or blocks > depth or blocks % size:
        fit = [k for k in range(2, depth + 1) if k % size == 0]
        fix = f"use --layer-blocks {fit[-1]}" if fit else f"start {counted(max(1, depth), 'rank')} or fewer"
        if depth < 2:
            fix = "use another model or method"
        raise UserError(
            f"--method dni cannot cut --model {network.name} into {counted(blocks, 'block')} on "
            f"{counted(size, 'rank')}: the model has at most {depth} blocks, dni needs two or more, and every rank "
            f"holds the same number; {fix}"
        )
    return blocks


@dataclass(frozen=True)
class Cut:
    """The cut above block `number`, from 0: shape of the block's outputs, auxiliary networks by name.

    The networks "gradient", "scores" and "features" are on the rank of block `number`, "inputs" on the rank of the
    block above.
    """

    number: int
    shape: tuple[int, ...]
    networks: dict[str, AuxiliaryNetwork]

    @property
    def units(self) -> int:
        return prod(self.shape)

    def side(self, name: str) -> int:
        """Return the block on whose rank the auxiliary network `name` of the cut is."""
        return self.number + (name == "inputs")


def find_cuts(network: Network, stages: list[tuple[int, int]], outputs: int, s: Settings) -> list[Cut]:
    """Return the cuts between blocks. outputs: the number of classes, or of values of a sample."""
    cuts = []
    for number, (_, stop) in enumerate(stages[:-1]):
        shape = network.layers[stop - 1].out_shape
        networks = {}
        if s.predicts:
            given = outputs if s.synthetic == "cdni" else 0
            networks["gradient"] = gradient_synthesizer(shape, given, s.synthesizer_hidden)
        if s.synthetic_inputs:
            networks["inputs"] = input_synthesizer(network.in_shape, prod(shape), s.synthesizer_hidden)
        if s.local_loss != "none":
            networks["scores"] = local_classifier(prod(shape), outputs)
        if s.local_loss == "predsim":
            networks["features"] = local_features(shape)
        cuts.append(Cut(number, shape, networks))
    return cuts


def owner_of(block: int, blocks: int, size: int) -> int:
    """Return the rank of a block."""
    return block // (blocks // size)


def check_dni(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    s = config.of(Settings)
    blocks = count_blocks(size, network, s.layer_blocks)
    layout = network.layout()
    if layout.dead.size:
        raise UserError(
            f"--model {network.name} has units that no score depends on, and --method dni would train them for "
            "nothing: use a network without such units"
        )
    check_slices(network, config.data.batch_size, 1, "ranks")
    check_first_order(config, "takes one loss for all weights, and each block has its own gradient")
    for name, value, most in (("bp-lambda", s.bp_lambda, 1.0), ("synthesizer-lr", s.synthesizer_lr, 1e9)):
        if not (isfinite(value) and 0 <= value <= most):
            raise UserError(f"--{name} {value:g}: expected a number from 0 to {most:g}")
    if s.ahead > MOST_AHEAD:
        raise UserError(
            f"--ahead {s.ahead}: expected 1 to {MOST_AHEAD}; blocks keep the outputs of that many minibatches"
        )
    if s.bp_lambda > 0 and s.ahead > 1:
        raise UserError(
            f"--bp-lambda {s.bp_lambda:g} waits for the gradient from above before each update, and --ahead {s.ahead} "
            "does not: add --ahead 1"
        )
    if any(width < 1 for width in s.synthesizer_hidden):
        raise UserError(f"--synthesizer-hidden {' '.join(map(str, s.synthesizer_hidden))}: expected widths from 1 up")
    if s.local_loss != "none" and (s.synthetic != "cdni" or s.bp_lambda):
        raise UserError(
            f"--local-loss {s.local_loss} uses no synthetic gradients and none from above: use --synthetic cdni "
            "and --bp-lambda 0, the defaults"
        )
    if s.local_loss != "none" and s.synthesizer_hidden and not s.synthetic_inputs:
        raise UserError(
            f"--synthesizer-hidden is for synthesizers, and --local-loss {s.local_loss} has none: leave it out"
        )
    if s.bp_lambda == 1 and (s.synthesizer_hidden or s.synthesizer_lr or s.synthetic != "cdni"):
        raise UserError(
            "--bp-lambda 1 is back-propagation, without synthesizers: leave out --synthetic, --synthesizer-hidden and "
            "--synthesizer-lr"
        )
    if s.synthetic_inputs and s.bp_lambda:
        raise UserError(
            "--synthetic-inputs lets blocks go on without those below, and --bp-lambda waits for those above: use one"
        )
    if s.local_loss == "predsim":
        check_classes(dataset, "--local-loss predsim", "use --local-loss greedy")
    least = 1 if s.synthesizer_hidden and (s.predicts or s.synthetic_inputs) else 0
    if (least and dataset.train.n % config.data.batch_size == 1) or config.data.batch_size <= least:
        raise UserError(
            f"--batch-size {config.data.batch_size}: --synthesizer-hidden normalizes over a minibatch, and one of them "
            "has a single sample; use another size"
        )
    configured_loss(config, dataset)
    check_optimizer(config, layout, ())
    for cut in find_cuts(network, split_layers(network, blocks), dataset.outputs, s):
        for one in cut.networks.values():
            check_optimizer(config, one.layout(), ())


def dni_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.notes`."""
    s = config.of(Settings)
    blocks = count_blocks(size, network, s.layer_blocks)
    stages = split_layers(network, blocks)
    cuts = find_cuts(network, stages, network.classes, s)
    parameters = sum(one.layout().size for cut in cuts for one in cut.networks.values())
    if parameters:
        kind = "synthesizers" if s.local_loss == "none" else "local losses"
        times = parameters / network.layout().size
        yield f"{blocks} blocks; {kind} have {parameters:,} parameters, {times:.2g} times the network's"


def dni_warnings(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.warnings`."""
    s = config.of(Settings)
    name = config.objective.loss
    if s.predicts and "exp_clip" in LOSSES[name].settings:
        yield (
            f"gradients of the loss {name} differ in size by orders of magnitude, and are hard to predict: blocks "
            "learn more with --loss nll or logistic"
        )
    if s.predicts and s.ahead > 3 and not network.normalized:
        yield (
            f"with --ahead {s.ahead} synthesizers learn from old gradients, on which networks without batch "
            "normalization may diverge: use a lower --lr, or --ahead 3 or less"
        )
    if s.predicts and s.synthetic == "dni":
        yield (
            "--synthetic dni has to infer the target from a block's outputs, and learns far less than cdni where these "
            "are classes"
        )
