"""Settings of the method `bptt`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, ClassVar, Literal

from psmpi.config import Config, Least, option
from psmpi.data import Dataset
from psmpi.errors import UserError, counted, unused_option
from psmpi.nn.losses import LOSSES
from psmpi.nn.network import Network
from psmpi.nn.sequences import chunks, count_states
from psmpi.training.auxiliary import AuxiliaryNetwork, dense, make_auxiliary
from psmpi.training.checks import check_first_order, check_recurrent
from psmpi.training.context import check_optimizer


@dataclass(frozen=True)
class Settings:
    """Truncated back-propagation through time (bptt)."""

    table: ClassVar[str] = "bptt"
    results: ClassVar[bool] = True

    unroll: Annotated[int, Least(1)] = 20
    """Steps of a window. The pass goes forward and backward within a window, and an optimizer step follows. The last
    window of a sequence may be shorter. With the steps of a whole sequence this is plain back-propagation."""
    future: Literal["none", "synthetic"] = "none"
    """Gradient of a window's last states from later windows (Jaderberg et al. 2017).

    none: zero, plain truncation
    synthetic: predicted from the states by a small network, which learns from what the next window sends back
    """
    future_hidden: tuple[int, ...] = ()
    """Widths of the hidden ReLU layers in the network of --future synthetic. If not given: no hidden layer, the network
    is linear."""
    future_lr: float = 0.0
    """Learning rate of the network of --future synthetic, changed over the run as --lr is. 0: --lr, but with sgd,
    momentum and nesterov at most the stable rate of a linear network of these states. Several times --lr is often
    better."""


def windows(network: Network, s: Settings) -> list[tuple[int, int]]:
    """Return (first step, stop) of each window."""
    return chunks(network.in_shape[1], s.unroll)


def future_network(network: Network, s: Settings) -> AuxiliaryNetwork | None:
    """Return M, which maps the states at a window's end to their gradient; None if no gradient is predicted."""
    if s.future == "none" or len(windows(network, s)) == 1:
        return None
    states = count_states(network.layers)
    hidden = [table for width in s.future_hidden for table in (dense(width), {"type": "relu"})]
    return make_auxiliary("network of future gradients", (states,), [*hidden, dense(states)])


def check_bptt(network: Network, dataset: Dataset, config: Config) -> None:
    """Raise UserError for a network, data or options that the method cannot train, beyond the checks of `Replica`."""
    s = config.of(Settings)
    check_recurrent(network, dataset, config)
    if config.objective.psl_weights != "none":
        raise UserError(
            f"{option('psl_weights')} {config.objective.psl_weights} is not for --method bptt: leave it out"
        )
    check_first_order(config, "evaluates the loss more than once a step, and each window has its own")
    if not (isfinite(s.future_lr) and 0 <= s.future_lr <= 1e9):
        raise UserError(f"--future-lr {s.future_lr:g}: expected a number from 0 to 1e9")
    if any(width < 1 for width in s.future_hidden):
        raise UserError(f"--future-hidden {' '.join(map(str, s.future_hidden))}: expected widths from 1 up")
    if s.future == "none" and (s.future_hidden or s.future_lr):
        words = "--future-hidden" if s.future_hidden else "--future-lr"
        raise unused_option(words, "--future", ("synthetic",), s.future)
    predictor = future_network(network, s)
    if predictor is not None:
        check_optimizer(config, predictor.layout(), ())


def bptt_notes(network: Network, s: Settings) -> Iterator[str]:
    """See `Method.notes`."""
    count, predictor = len(windows(network, s)), future_network(network, s)
    suffix = ""
    if predictor is not None:
        size = predictor.layout().size
        suffix = f"; the network that predicts gradients has {counted(size, 'parameter')}, "
        suffix += f"{size / network.layout().size:.2g} times the trained network's"
    yield f"{counted(count, 'window')} of {network.in_shape[1]} steps{suffix}"


def bptt_warnings(config: Config) -> Iterator[str]:
    """See `Method.warnings`."""
    name = config.objective.loss
    if config.of(Settings).future == "synthetic" and "exp_clip" in LOSSES[name].settings:
        yield (
            f"gradients of the loss {name} differ in size by orders of magnitude, and are hard to predict: sequences "
            "are learnt better with --loss nll"
        )
