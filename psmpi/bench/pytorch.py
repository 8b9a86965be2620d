"""The measured step in PyTorch, from the weights of a model of psmpi."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal

import numpy as np

from psmpi.bench.problems import LR, Data, Problem
from psmpi.nn.model import Model
from psmpi.nn.network import Activation, Conv, Flatten, Linear, Pool

# How PyTorch computes: as it comes, with images as (batch, height, width, channels) in memory, or compiled.
Kind = Literal["eager", "channels last", "compile"]


def theirs(problem: Problem, data: Data, model: Model, kind: Kind = "eager") -> tuple[Callable[[], None], Any]:
    """The same step in PyTorch, from the same weights, and its network."""
    import torch
    from torch import nn

    modules, kept = [], np.ones(problem.network.in_shape[0], bool)
    masks = problem.network.kept(problem.classes)
    for layer, mine in zip(problem.network.layers, masks, strict=True):
        modules += _module(nn, layer, kept, mine)
        kept = np.repeat(kept, prod(layer.in_shape[1:])) if isinstance(layer, Flatten) else mine
    net = nn.Sequential(*modules)
    _copy_weights(torch, net, model)
    place = torch.channels_last if kind == "channels last" else torch.contiguous_format
    net = net.to(memory_format=place)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, fused=True)
    x, labels = torch.from_numpy(data.x), torch.from_numpy(data.labels)
    x = x.contiguous(memory_format=place) if x.ndim == 4 else x
    others = torch.from_numpy(data.others.T.copy())
    first, last = problem.classes[0], problem.classes[-1] + 1

    def loss(x: Any) -> Any:
        scores = net(x)
        if scores.shape[1] < others.shape[1]:
            scores = torch.cat([others[:, :first], scores, others[:, last:]], 1)
        if problem.loss == "nll":
            return nn.functional.cross_entropy(scores, labels)
        return (scores - scores.gather(1, labels[:, None])).exp().sum(1).mean()

    evaluate = torch.compile(loss) if kind == "compile" else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        evaluate(x).backward()
        optimizer.step()

    return step, net


def _module(nn: Any, layer: Any, kept: np.ndarray, mine: np.ndarray) -> list[Any]:
    """The PyTorch modules of a layer whose kept input units are `kept`, of output units `mine`."""
    if isinstance(layer, Linear):
        units, inputs = int(mine.sum()), int(kept.sum())
        # Of the groups, those that are left; a layer of one input group sees all that is left.
        groups = int(mine.reshape(layer.groups, -1).any(axis=1).sum())
        if isinstance(layer, Conv):
            return [nn.Conv2d(inputs, units, layer.kernel, groups=groups)]
        if groups == 1:
            return [nn.Linear(inputs, units)]
        # A block-diagonal layer is a grouped 1 x 1 convolution.
        return [nn.Unflatten(1, (inputs, 1, 1)), nn.Conv2d(inputs, units, 1, groups=groups), nn.Flatten()]
    if isinstance(layer, Pool):
        return [(nn.AvgPool2d if layer.kind == "mean" else nn.MaxPool2d)(layer.size)]
    if isinstance(layer, Activation):
        return [{"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "identity": nn.Identity}[layer.kind]()]
    return [nn.Flatten()]


def _copy_weights(torch: Any, net: Any, model: Model) -> None:
    weighted = [module for module in net if hasattr(module, "weight")]
    parts = [step.linear for step in model.steps if step.linear is not None]
    with torch.no_grad():
        for module, part in zip(weighted, parts, strict=True):
            for name, k in (("weight", 0), ("bias", 1)):
                values = np.concatenate([pair[k].reshape(-1) for pair in part.w])
                parameter = getattr(module, name)
                parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
