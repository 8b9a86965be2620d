"""Auxiliary networks of blocks, for training only: synthesizers of gradients and of inputs, local classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from psmpi.training.auxiliary import AuxiliaryNetwork, dense, make_auxiliary

# Rows and columns of the kernels of convolutional synthesizers (Jaderberg and others 2017).
KERNEL = 5


def _hidden(widths: Sequence[int], make: Callable[[int], Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [table for width in widths for table in (make(width), {"type": "batch_norm"}, {"type": "relu"})]


def gradient_synthesizer(shape: tuple[int, ...], given: int, hidden: Sequence[int]) -> AuxiliaryNetwork:
    """Return M(h, y), which maps outputs of `shape` and `given` numbers of the target to the gradient of the outputs.

    M is linear without hidden layers. For images M is convolutional, and each number of the target is a plane.
    """
    if len(shape) == 1:
        return make_auxiliary(
            "synthesizer of gradients", (shape[0] + given,), [*_hidden(hidden, dense), dense(shape[0])]
        )
    channels, height, width = shape
    kernel = min(KERNEL, height - 1 + height % 2, width - 1 + width % 2)

    def conv(count: int) -> Mapping[str, Any]:
        return {"type": "conv", "channels": count, "kernel": kernel, "pad": kernel // 2}

    in_shape = channels + given, height, width
    return make_auxiliary("synthesizer of gradients", in_shape, [*_hidden(hidden, conv), conv(channels)])


def input_synthesizer(in_shape: tuple[int, ...], units: int, hidden: Sequence[int]) -> AuxiliaryNetwork:
    """Return I(x), which maps samples of `in_shape` to the `units` inputs of a block."""
    return make_auxiliary("synthesizer of inputs", (prod(in_shape),), [*_hidden(hidden, dense), dense(units)])


def local_classifier(units: int, outputs: int) -> AuxiliaryNetwork:
    """Return a linear classifier: from the `units` outputs of a block to `outputs` scores."""
    return make_auxiliary("local classifier", (units,), [dense(outputs)])


def local_features(shape: tuple[int, ...]) -> AuxiliaryNetwork:
    """Return the features that `predsim` compares: a linear map of a block's outputs, or for images a convolution."""
    if len(shape) == 1:
        return make_auxiliary("local features", shape, [dense(shape[0])])
    kernel = min(3, shape[1] - 1 + shape[1] % 2, shape[2] - 1 + shape[2] % 2)
    return make_auxiliary(
        "local features", shape, [{"type": "conv", "channels": shape[0], "kernel": kernel, "pad": kernel // 2}]
    )
