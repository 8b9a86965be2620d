"""Weights of classes in the gradient of the training loss, by --class-weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.config import Config, listed
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.optim import is_first_order
from psmpi.registry import all_methods
from psmpi.training.checks import check_classes

BALANCED = "balanced"
# The largest weight: derivatives that are bounded stay small enough for any backward pass.
MOST = 1e6


def class_weights(given: str, dataset: Dataset) -> np.ndarray | None:
    """The weight of each class, (classes,) float64, by the training labels of a data set; None where none are `given`.

    balanced: n / (C n_c), of n samples with C different labels, n_c of them with that of class c, as in scikit-learn; 1
    of a class without samples. Else numbers separated by commas. UserError for anything else.
    """
    if not given:
        return None
    if given == BALANCED:
        counts = np.bincount(dataset.train.labels, minlength=dataset.outputs)
        found = np.ones(len(counts))
        np.divide(dataset.train.n / np.count_nonzero(counts), counts, out=found, where=counts > 0)
    else:
        try:
            found = np.array([float(word) for word in given.split(",")])
        except ValueError:
            found = np.zeros(dataset.outputs)
    if len(found) != dataset.outputs:
        names = dataset.train.names
        order = f", in the order {listed(names)}" if 0 < len(names) <= 20 else ""
        raise UserError(
            f"--class-weights {given}: there are {len(found)} numbers, and {dataset.name} has {dataset.outputs} "
            f"classes: give one for each{order}, or {BALANCED}"
        )
    if not ((found > 0) & (found <= MOST)).all():
        raise UserError(
            f"--class-weights {given}: expected {BALANCED}, or for each class a number above 0 and up to {MOST:g}, as "
            "1,2.5,1 for three classes"
        )
    return found


def check_class_weights(kind: Any, dataset: Dataset, config: Config) -> None:
    """UserError for weights that are none, or that the method `kind`, the optimizer or the targets cannot have."""
    given, optimizer = config.objective.class_weights, config.optimization.optimizer
    if not given:
        return
    if not kind.weighs_classes:
        those = listed([name for name, known in all_methods().items() if known.weighs_classes])
        raise UserError(
            f"--class-weights is of --method {those}, and the method here is {kind.name}: leave it out, or choose one "
            "of these"
        )
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
