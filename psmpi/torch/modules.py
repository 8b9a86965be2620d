"""The layers of psmpi in PyTorch. Arrays are (batch, units, ...); parameters have psmpi's names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.activation import Activation
from psmpi.nn.layers.attention import Attention
from psmpi.nn.layers.base import Layer
from psmpi.nn.layers.batch_norm import EPS, BatchNorm
from psmpi.nn.layers.binary import Binary
from psmpi.nn.layers.chain import leaves
from psmpi.nn.layers.conv import Conv
from psmpi.nn.layers.cosine import Cosine
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.dot import Dot
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.gelu import Gelu
from psmpi.nn.layers.group_norm import GroupNorm
from psmpi.nn.layers.last import Last
from psmpi.nn.layers.layer_norm import LayerNorm
from psmpi.nn.layers.pad import Pad
from psmpi.nn.layers.pool import Pool
from psmpi.nn.layers.positions import Positions
from psmpi.nn.layers.recurrent import Recurrent
from psmpi.nn.layers.residual import Residual
from psmpi.nn.layers.unit_length import EPS as LENGTH_EPS
from psmpi.nn.layers.unit_length import UnitLength
from psmpi.nn.network import Network

# Forward pass of a layer: (layer, parameters by their names without the layer's, x (batch, units, ...), lengths
# (batch,) or None) -> y (batch, units, ...).
Forward = Callable[[Any, Mapping[str, Tensor], Tensor, "Tensor | None"], Tensor]


class Weights(nn.Module):  # type: ignore[misc]
    """The parameters of one layer."""

    def __init__(self, parameters: Sequence[Parameter]):
        super().__init__()
        for parameter in parameters:
            self.register_parameter(parameter.name.rpartition(".")[2], nn.Parameter(torch.zeros(parameter.shape)))


class Scores(nn.Module):  # type: ignore[misc]
    """A network from samples to scores, see `psmpi.torch.module_of`. Its weights are 0 until `filled` sets them.

    UserError for a kind of layer that is not in FORWARD.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.layers, self.sequences, self.steps = network.layers, network.sequences, network.steps
        self.tokens = isinstance(network.layers[0], Embedding)
        for layer in leaves(network.layers):
            if type(layer) not in FORWARD:
                raise UserError(
                    f"layer {network.named(layer.name)} is {type(layer).__name__}, which psmpi.torch does not have: "
                    "export the network with psmpi inspect export --out FILE.onnx"
                )
            if layer.parameters():
                self.add_module(layer.name, Weights(layer.parameters()))

    def filled(self, weights: Mapping[str, np.ndarray]) -> Scores:
        """Set the weights by name and take their dtype; return this module."""
        state = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in weights.items()}
        self.to(next(iter(state.values())).dtype)
        self.load_state_dict(state)
        return self

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of samples x (batch, ...), with shapes as in `psmpi.torch.module_of`."""
        if self.sequences:
            x = x[:, None] if self.tokens else x.movedim(1, 2)
        scores = self._through(self.layers, x, lengths)
        return scores.movedim(1, 2) if self.steps else scores

    def _through(self, layers: Sequence[Layer], x: Tensor, lengths: Tensor | None) -> Tensor:
        for layer in layers:
            if isinstance(layer, Residual):
                x = x + layer.scale * self._through(layer.layers, x, lengths)
            else:
                own = dict(self._modules[layer.name].named_parameters()) if layer.parameters() else {}
                x = FORWARD[type(layer)](layer, own, x, lengths)
        return x


def _dense(layer: Dense, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    groups, inputs = layer.groups, layer.group_inputs
    stripes = x[:, : groups * inputs].reshape(len(x), groups, inputs, -1)
    rows = w["weight"].reshape(groups, -1, inputs)
    y = torch.einsum("gui,bgis->bgus", rows, stripes).reshape(len(x), layer.units, *x.shape[2:])
    return y + _across(w["bias"], y) if layer.bias else y


def _across(values: Tensor, y: Tensor) -> Tensor:
    """Reshape values (units,) so that they broadcast over y (batch, units, ...)."""
    return values.reshape(-1, *(1,) * (y.dim() - 2))


def _cosine(layer: Cosine, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    rows = w["weight"]
    return F.linear(x, layer.scale * rows / (rows.square().sum(1, keepdim=True) + LENGTH_EPS).sqrt())


def _conv(layer: Conv, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return F.conv2d(x, w["weight"], w.get("bias"), groups=layer.groups)


def _pool(layer: Pool, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return F.avg_pool2d(x, layer.size) if layer.kind == "mean" else F.max_pool2d(x, layer.size)


def _activation(layer: Activation, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
    return x if layer.kind == "identity" else functions[layer.kind](x)


def _batch_norm(layer: BatchNorm, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, w.get("weight"), w.get("bias"), training=True, eps=EPS)


def _group_norm(layer: GroupNorm, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return F.group_norm(x, layer.groups, w["weight"], w["bias"], EPS)


def _layer_norm(layer: LayerNorm, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (layer.over,), w["weight"], w["bias"], EPS).movedim(-1, 1)


def _embedding(layer: Embedding, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return F.embedding(x[:, 0].long(), w["weight"].T).movedim(2, 1)


def _attention(layer: Attention, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    heads, steps = layer.heads, x.shape[-1]
    q, k, v = x.reshape(len(x), heads, 3, -1, steps).movedim(-1, 3).unbind(2)
    mask = None
    if not layer.causal and lengths is not None:
        mask = (torch.arange(steps, device=x.device) < lengths[:, None])[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=layer.causal)
    return y.movedim(2, 3).reshape(len(x), -1, steps)


def _recurrent(layer: Recurrent, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    inputs = torch.einsum("ri,bis->sbr", w["weight"], x) + w.get("bias", torch.zeros((), dtype=x.dtype))
    h = x.new_zeros(len(x), layer.units)
    c, outputs = h, []
    for t, a in enumerate(inputs):
        new, cell = CELLS[layer.kind](a, F.linear(h, w["recurrent"], w.get("recurrent_bias")), h, c)
        live = torch.ones((), dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        h, c = torch.where(live, new, h), torch.where(live, cell, c)
        outputs.append(h)
    return torch.stack(outputs, 2)


def _rnn(a: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(a + u), c


def _lstm(a: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (a + u).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(a: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (ar, az, an), (ur, uz, un) = a.chunk(3, 1), u.chunk(3, 1)
    z = torch.sigmoid(az + uz)
    return (1 - z) * torch.tanh(an + torch.sigmoid(ar + ur) * un) + z * h, c


def _last(layer: Last, w: Mapping[str, Tensor], x: Tensor, lengths: Tensor | None) -> Tensor:
    return x[..., -1] if lengths is None else x[torch.arange(len(x)), :, lengths.long() - 1]


CELLS = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}
# Forward pass of each kind of layer. `Scores._through` computes Residual, which contains layers.
FORWARD: dict[type[Layer], Forward] = {
    Activation: _activation,
    Attention: _attention,
    BatchNorm: _batch_norm,
    Binary: lambda layer, w, x, lengths: torch.cat([(1 - x) / 2, (1 + x) / 2], 1),
    Conv: _conv,
    Cosine: _cosine,
    Dense: _dense,
    Dot: lambda layer, w, x, lengths: (x[..., 0] * x[..., 1]).sum(1, keepdim=True),
    Embedding: _embedding,
    Flatten: lambda layer, w, x, lengths: x.reshape(len(x), prod(layer.in_shape)),
    Gelu: lambda layer, w, x, lengths: F.gelu(x),
    GroupNorm: _group_norm,
    Last: _last,
    LayerNorm: _layer_norm,
    Pad: lambda layer, w, x, lengths: F.pad(x, (layer.size,) * 4),
    Pool: _pool,
    Positions: lambda layer, w, x, lengths: x + w["weight"][:, : x.shape[-1]],
    Recurrent: _recurrent,
    UnitLength: lambda layer, w, x, lengths: x / (x.square().sum(1, keepdim=True) + LENGTH_EPS).sqrt(),
}
