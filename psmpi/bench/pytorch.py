"""The measured training step in PyTorch, with the weights of a model of psmpi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from psmpi.bench.problems import LR, Minibatch, Problem
from psmpi.errors import UserError
from psmpi.nn.layers import Layer, Stage
from psmpi.nn.layers.activation import Activation
from psmpi.nn.layers.conv import Conv
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.linear import Linear
from psmpi.nn.layers.pool import Pool
from psmpi.nn.model import Model

# Modes of PyTorch: its defaults, images as (batch, height, width, channels) in memory, or torch.compile.
Kind = Literal["eager", "channels last", "compile"]


def pytorch_step(
    problem: Problem,
    data: Minibatch,
    model: Model,
    kind: Kind = "eager",
    compute: str = "float32",
    wrap: Callable[[Any], Any] = lambda net: net,
) -> tuple[Callable[[], None], Any]:
    """Return a step of PyTorch from the weights of `model`, and its network, on the device of the model.

    compute: float32, tf32, or the dtype of autocast. wrap: applied to the network, for example to distribute it. Raise
    UserError if PyTorch sees no GPU but the model is on one.
    """
    import torch
    from torch import nn

    place = "cpu"
    if model.ops.on_device:
        if not torch.cuda.is_available():
            raise UserError(f"this PyTorch ({torch.__version__}) sees no GPU: install one for your CUDA (pytorch.org)")
        place = f"cuda:{model.ops.device}"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute == "tf32"
    lower = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(compute)

    modules = []
    for stage in problem.network.stages(problem.classes, fold=False):
        for layer in (stage.layer, *stage.absorbed):
            modules += MODULES[type(layer)](nn, layer, stage)
    net = nn.Sequential(*modules)
    _copy_weights(torch, net, model)
    order = torch.channels_last if kind == "channels last" else torch.contiguous_format
    net = wrap(net.to(place, memory_format=order))
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, fused=True)
    x, labels = torch.from_numpy(data.x).to(place), torch.from_numpy(data.labels).to(place)
    x = x.contiguous(memory_format=order) if x.ndim == 4 else x
    others = torch.from_numpy(data.other_scores.T.copy()).to(place)
    first, last = problem.classes[0], problem.classes[-1] + 1

    def loss(x: Any) -> Any:
        with torch.autocast(place.partition(":")[0], lower, enabled=lower is not None):
            scores = net(x)
        scores = scores.float()
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


def _linear(nn: Any, layer: Linear, stage: Stage) -> list[Any]:
    units, inputs = int(stage.outputs.sum()), int(stage.inputs.sum())
    # The groups that the subnetwork keeps. A layer of one group is connected to all kept inputs.
    groups = int(stage.outputs.reshape(layer.groups, -1).any(axis=1).sum())
    if isinstance(layer, Conv):
        return [nn.Conv2d(inputs, units, layer.kernel, groups=groups)]
    if groups == 1:
        return [nn.Linear(inputs, units)]
    # A block-diagonal layer is a grouped 1 x 1 convolution.
    return [nn.Unflatten(1, (inputs, 1, 1)), nn.Conv2d(inputs, units, 1, groups=groups), nn.Flatten()]


# Functions that return the PyTorch modules of a layer in a stage, for the layers of the measured networks.
MODULES: dict[type[Layer], Callable[[Any, Any, Stage], list[Any]]] = {
    Conv: _linear,
    Dense: _linear,
    Pool: lambda nn, layer, _: [(nn.AvgPool2d if layer.kind == "mean" else nn.MaxPool2d)(layer.size)],
    Activation: lambda nn, layer, _: [{"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}[layer.kind]()],
    Flatten: lambda nn, *_: [nn.Flatten()],
}


def _copy_weights(torch: Any, net: Any, model: Model) -> None:
    weighted = [module for module in net if hasattr(module, "weight")]
    parts = [part for part in model.parts if part.layer.linear]
    with torch.no_grad():
        for module, part in zip(weighted, parts, strict=True):
            for name, k in (("weight", 0), ("bias", 1)):
                values = np.concatenate([model.ops.host(pair[k]).reshape(-1) for pair in part.w])
                parameter = getattr(module, name)
                parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
