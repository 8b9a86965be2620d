"""Default epochs, minibatch size and learning rate by number of samples, network and optimizer.

They were tried on the embedded digits, MNIST and CIFAR-10; docs/results.md has the accuracies.
"""

from __future__ import annotations

from typing import NamedTuple

from psmpi.config.tree import Config
from psmpi.optim import find_optimizer

# Number of training samples from which a data set is large; minibatch sizes of small and large ones.
LARGE, SMALL_BATCH, LARGE_BATCH = 10_000, 32, 100
# Least and largest number of epochs, and the number of steps of a training between these.
LEAST_EPOCHS, MOST_EPOCHS, STEPS = 10, 200, 2700


class Rates(NamedTuple):
    """Learning rates of an optimizer.

    For networks of logistic sigmoids, whose gradients are small, on small and on large data sets; and for others.
    """

    small: float
    large: float
    other: float


# Other optimizers have an attribute `rates`.
RATES = {
    "sgd": Rates(1.0, 1.0, 0.1),
    "momentum": Rates(0.1, 0.1, 0.1),
    "nesterov": Rates(0.1, 0.1, 0.1),
    "adam": Rates(1e-2, 1e-3, 1e-3),
    "adamw": Rates(1e-2, 1e-3, 1e-3),
    "rmsprop": Rates(1e-2, 3e-3, 1e-3),
    "lion": Rates(1e-3, 1e-3, 1e-4),
    "muon": Rates(3e-2, 3e-2, 1e-2),
}


class Numbers(NamedTuple):
    """Epochs, minibatch size and learning rate of a training."""

    epochs: int
    batch_size: int
    lr: float


def usual_numbers(samples: int, config: Config) -> Numbers:
    """Default numbers for so many training samples, and the network and optimizer of a configuration.

    A given batch_size determines the epochs.
    """
    large = samples >= LARGE
    batch = config.data.batch_size or min(samples, LARGE_BATCH if large else SMALL_BATCH)
    epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, -(-STEPS // -(-samples // batch))))
    name = config.optimization.optimizer
    rates = RATES[name] if name in RATES else Rates(*find_optimizer(name).rates)
    return Numbers(epochs, batch, (rates.large if large else rates.small) if _saturates(config) else rates.other)


def _saturates(config: Config) -> bool:
    """Whether the network has logistic sigmoids without normalization before them."""
    model = config.model
    if model.batch_norm:
        return False
    if model.model == "custom" or model.layers:
        return any(table.get("type") == "sigmoid" for table in model.layers if isinstance(table, dict))
    return model.model in ("psnet", "psnet-24", "psnet-35", "lenet")
