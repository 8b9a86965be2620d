"""Checks of configurations that several methods share; they need no MPI and no arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from psmpi.config import Config, Data
from psmpi.data import Dataset, Split
from psmpi.data.bounded import bytes_of
from psmpi.errors import UserError, unused_option
from psmpi.nn.layers.last import Last
from psmpi.nn.network import CUSTOM, Network
from psmpi.nn.sequences import count_states, find_head, find_padding
from psmpi.optim import is_first_order
from psmpi.optim.curvature import RULES
from psmpi.registry import WHOLE, all_methods

# Fewer samples than this are too few for statistics.
FEW = 8


def check_sequences(kind: Any, network: Network, dataset: Dataset) -> None:
    """UserError if the method `kind` does not train on sequences, or not on targets at each step."""
    takes, steps = kind.sequences, dataset.train.by_step
    if network.sequences and (not takes or (steps and takes != "steps")):
        what = "a target at each step" if takes else "samples that are sequences"
        fit = [name for name, one in all_methods().items() if one.sequences == "steps" or (one.sequences and not steps)]
        raise UserError(f"--method {kind.name} does not train on {what}: use --method {', '.join(fit)}")
    check_padding(network, dataset)


def check_padding(network: Network, dataset: Dataset, chunked: bool = False) -> None:
    """UserError if a layer would take the padding of shorter sequences for steps; chunked: see `find_padding`."""
    padded = find_padding(network, chunked)
    if padded is not None and any(is_ragged(split) for split in (dataset.train, dataset.test)):
        end = "" if chunked else 'a layer {type = "last"} in its place, or '
        raise UserError(
            f"{network.named(padded.name)} of --model {network.name} takes the padding of shorter sequences: put "
            f"{end}a recurrent layer (rnn, gru, lstm) between it and the samples, past which nothing goes, or use "
            "sequences of one length"
        )


def check_recurrent(network: Network, dataset: Dataset, config: Config) -> None:
    """UserError without recurrent layers, and for layers that need all steps of a sequence at once."""
    method = config.parallel.method
    if not network.sequences:
        raise UserError(
            f"--method {method} is for sequences, and the samples of {dataset.name} have the shape {dataset.shape}: of "
            "images make sequences (--dataset NAME:rows), or save sequences with their lengths"
        )
    if not count_states(network.layers):
        raise UserError(
            f"--method {method} is for recurrent layers, and --model {network.name} has none: use --model rnn, gru or "
            "lstm, or custom"
        )
    whole = next((layer for layer in network.walk() if layer.whole_sequences), None)
    if whole is not None:
        raise UserError(
            f"{network.named(whole.name)} of --model {network.name} needs whole sequences, and --method {method} takes "
            f"them apart into chunks: leave the layer out, or use --method {WHOLE}"
        )
    check_padding(network, dataset, chunked=True)
    head = network.layers[find_head(network) :]
    if head and not isinstance(head[0], Last):
        raise UserError(
            f"{network.named(head[0].name)} of --model {network.name} needs all steps at once, and --method {method} "
            'takes sequences apart: end them with a layer {type = "last"}'
        )


def is_ragged(split: Split) -> bool:
    """Whether sequences have different lengths."""
    return split.lengths is not None and bool((split.lengths < split.steps).any())


def check_classes(dataset: Dataset, what: str, fix: str) -> None:
    """UserError for a regression, which `what` cannot learn."""
    if dataset.task != "classes":
        raise UserError(f"{what} is for classes, and {dataset.name} has values to learn: {fix}")


def check_margin(network: Network, dataset: Dataset, config: Config) -> None:
    """UserError for a margin where scores are not cosines of classes, or where an optimizer takes terms apart."""
    given, optimizer = f"--margin {config.objective.margin:g}", config.optimization.optimizer
    if network.scale:
        check_classes(dataset, "a network of cosines (--scale)", "use --model mlp, or leave the option out")
    if not config.objective.margin:
        return
    if not network.scale:
        fix = 'let [[model.layers]] end in a layer of type "cosine"' if network.name == CUSTOM else "add --scale 16"
        fix = fix if network.name in (CUSTOM, "head") else "use --model head --scale 16"
        raise UserError(f"{given} is put between cosines, and the scores here are none: {fix}, or leave it out")
    if optimizer in RULES:
        raise UserError(
            f"{given} changes the label's score in all terms alike, and --optimizer {optimizer} takes terms apart: use "
            "another one (adam, lbfgs, ...)"
        )


def check_slices(network: Network, batch: int, slices: int, of: str, fewer: str = "ranks") -> None:
    """UserError if a minibatch has too few samples for `slices` slices. of, fewer: the words of the message."""
    least = 2 if network.normalized else 1
    if batch < least * slices:
        lacks = "with a single sample, which batch normalization makes 0" if batch >= slices else "without a sample"
        raise UserError(
            f"--batch-size {batch} leaves some of {slices} {of} {lacks}: use --batch-size {least * slices} or more, or "
            f"fewer {fewer}"
        )


def check_first_order(config: Config, why: str) -> None:
    """UserError for an optimizer that is not of first order; why: the reason, after its name in the message."""
    if not is_first_order(config.optimization.optimizer):
        raise UserError(
            f"--optimizer {config.optimization.optimizer} {why}: with --method {config.parallel.method} use a "
            "first-order one (sgd, momentum, adam, ...)"
        )


def check_not_partitioned(config: Config) -> None:
    """UserError for a partitioned quasi-Newton optimizer."""
    if config.optimization.optimizer in RULES:
        users = [name for name, method in all_methods().items() if method.partitioned]
        words = f"--optimizer {config.optimization.optimizer}"
        raise unused_option(words, "--method", users, config.parallel.method)


def check_layers(network: Network, config: Config, parts: int = 2) -> None:
    """UserError if the layers of a network cannot be dealt to ranks, or cut into `parts`."""
    method = config.parallel.method
    if network.residual and parts > 1:
        raise UserError(
            f"--model {network.name} has residual blocks, and --method {method} takes single layers apart: use "
            f"--model mlp or another network without them, or --method {WHOLE}"
        )
    layout = network.layout()
    if layout.dead.size:
        raise UserError(
            f"--model {network.name} has units that no score depends on, and --method {method} would train them for "
            "nothing: use a network without such units"
        )


def notes(size: int, network: Network, dataset: Dataset, batch: int) -> Iterator[str]:
    """Notes on a network and its data: unused inputs, and statistics of too few samples."""
    yield from network.notes
    if not network.normalized:
        return
    n, last = dataset.train.n, dataset.train.n % batch
    if 0 < last < max(FEW, 2 * size):
        fits = next((b for b in range(batch, 1, -1) if n % b == 0 or n % b >= max(FEW, b // 2, 2 * size)), batch)
        better = f": --batch-size {fits} leaves {n % fits or 'none'}" if fits != batch else ""
        yield (
            f"the last minibatch of an epoch has {last} of the {n} samples, on which batch normalization takes its "
            f"statistics as on all others{better}"
        )
    tests = dataset.test
    if tests.task != "classes":
        return
    shares = np.bincount(tests.labels, minlength=tests.labels.max() + 1) / tests.n
    pieces = [tests.labels[at] for at in network.evaluation_batches(tests.n)]
    # In a random order two of these are about sqrt(classes / samples) apart.
    far = [np.abs(np.bincount(one, minlength=len(shares)) / len(one) - shares).sum() for one in pieces]
    if any(d > max(0.5, 4 * (len(shares) / len(one)) ** 0.5) for d, one in zip(far, pieces, strict=True)):
        yield (
            "the test samples are in the order of their classes, and batch normalization takes the statistics of about "
            "1,000 of them in turn, of few classes each: save them in a random order, or do not trust the tests"
        )


def slices_are_normalized(of: str) -> str:
    """The warning that batch normalization depends on the number of ranks; of: the end of the message."""
    return (
        "batch normalization takes the statistics of each rank's own slice of a minibatch: the result depends on the "
        f"number of ranks{of}"
    )


def check_data(data: Data, private: bool) -> None:
    """UserError for invalid settings of the data, and for settings that `private` data sets do not take."""
    if not 0 <= data.validation < 1:
        raise UserError(f"--validation {data.validation:g}: expected a share of the training samples, as 0.1, or 0")
    if data.data_memory:
        bytes_of(data.data_memory)
    for option, given in (
        ("--validation", data.validation),
        ("--augment", data.augment),
        ("--data-memory", data.data_memory),
    ):
        if given and private:
            raise UserError(f"{option} is for samples that all ranks can read: leave it out, or --private-data")
