"""Weights of classes in the gradient of the training loss, by --class-weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError, listed, unused_option
from psmpi.optim import is_first_order
from psmpi.registry import all_methods
from psmpi.training.checks import check_classes

BALANCED = "balanced"
# The largest weight: it keeps bounded derivatives small enough for every backward pass.
MOST = 1e6


def class_weights(given: str, dataset: Dataset) -> np.ndarray | None:
    """The weight of each class, (classes,) float64, as --class-weights says; None for "".

    "balanced": n / (C n_c) for n samples, C different labels and n_c samples of class c, as in scikit-learn; 1 for a
    class without samples. Other texts are numbers separated by commas. UserError for anything else.
    """
    if not given:
        return None
    if given == BALANCED:
        counts = np.bincount(dataset.train.labels, minlength=dataset.outputs)
        weights = np.ones(len(counts))
        np.divide(dataset.train.n / np.count_nonzero(counts), counts, out=weights, where=counts > 0)
    else:
        try:
            weights = np.array([float(word) for word in given.split(",")])
        except ValueError:
            weights = np.zeros(dataset.outputs)
    if len(weights) != dataset.outputs:
        names = dataset.train.names
        order = f", in the order {listed(names)}" if 0 < len(names) <= 20 else ""
        raise UserError(
            f"--class-weights {given}: there are {len(weights)} numbers, and {dataset.name} has {dataset.outputs} "
            f"classes: give one for each{order}, or {BALANCED}"
        )
    if not ((weights > 0) & (weights <= MOST)).all():
        raise UserError(
            f"--class-weights {given}: expected {BALANCED}, or for each class a number above 0 and up to {MOST:g}, as "
            "1,2.5,1 for three classes"
        )
    return weights


def check_class_weights(kind: Any, dataset: Dataset, config: Config) -> None:
    """UserError for malformed weights, and for weights with a method, optimizer or targets that do not take them."""
    given, optimizer = config.objective.class_weights, config.optimization.optimizer
    if not given:
        return
    if not kind.weighs_classes:
        users = [name for name, known in all_methods().items() if known.weighs_classes]
        raise unused_option("--class-weights", "--method", users, kind.name)
    check_classes(dataset, "--class-weights", "leave it out")
    if dataset.train.by_step:
        raise UserError(
            f"--class-weights is for samples with one label each, and those of {dataset.name} have one at each step: "
            "leave it out"
        )
    if not is_first_order(optimizer):
        raise UserError(
            f"--class-weights weighs gradients and not the value of the loss, and --optimizer {optimizer} compares "
            "values: use a first-order one (adam, sgd, momentum, ...)"
        )
    class_weights(given, dataset)
