"""Default epochs, minibatch size, learning rate and vocabulary, which depend on the data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from psmpi.config import Config, Numbers, usual_numbers
from psmpi.data import Dataset, open_dataset
from psmpi.errors import UserError, counted
from psmpi.nn.zoo import TOKENS
from psmpi.registry import find_method


def usual(config: Config, tell: Callable[[str], None] | None = None, dataset: Dataset | None = None) -> Config:
    """Fill in epochs, batch_size and lr that are None; tell: prints them.

    A recurrent network without a vocabulary gets that of the data set. dataset: the data set, if it is in memory.
    UserError if the data set cannot be opened.
    """
    private = find_method(config.parallel.method).private(config)
    looks_up = config.model.model in TOKENS and not config.model.vocabulary and not private
    given = None not in (config.run.epochs, config.data.batch_size, config.optimization.lr)
    if given and not looks_up:
        return config
    if private:
        raise UserError(
            "--private-data: the usual numbers are those of all samples, of which a rank sees its own: give --epochs, "
            "--batch-size and --lr"
        )
    data = config.data
    train = (dataset or open_dataset(*data.source)).train
    if looks_up:
        config = replace(config, model=replace(config.model, vocabulary=train.vocabulary))
    if given:
        return config
    samples = train.n
    config = _fill(config, usual_numbers(samples, config))
    if tell is not None:
        run, data, optimization = config.run, config.data, config.optimization
        tell(
            f"{counted(run.epochs, 'epoch')}, {counted(data.batch_size, 'sample')} a minibatch, learning rate "
            f"{optimization.lr:g}: usual for {counted(samples, 'sample')}, {config.model.model} and "
            f"{optimization.optimizer}, where not given (--epochs, --batch-size, --lr)"
        )
    return config


def _fill(config: Config, numbers: Numbers) -> Config:
    """`config` with these numbers in place of None."""
    run, data, optimization = config.run, config.data, config.optimization
    return replace(
        config,
        run=replace(run, epochs=run.epochs or numbers.epochs),
        data=replace(data, batch_size=data.batch_size or numbers.batch_size),
        optimization=replace(optimization, lr=numbers.lr if optimization.lr is None else optimization.lr),
    )
