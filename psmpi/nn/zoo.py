"""The built-in networks. PSNet and LeNet are those of Raynaud, Orban and Bigeon, G-2023-36."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psmpi.errors import UserError
from psmpi.nn.network import Network, build

Table = dict[str, Any]


def _conv(channels: int, kernel: int, activation: str = "sigmoid") -> list[Table]:
    """Convolution, 2 x 2 mean pooling, activation, in this order."""
    return [
        {"type": "conv", "channels": channels, "kernel": kernel},
        {"type": "mean_pool", "size": 2},
        {"type": activation},
    ]


def _psnet(filters: tuple[int, int], kernels: tuple[int, int], widths: Sequence[int], classes: int) -> list[Table]:
    """`filters` of the first layer in all and of the second a class; `widths` of the separable layers a class."""
    tables = _conv(filters[0], kernels[0])
    if kernels[1]:
        tables += _conv(filters[1] * classes, kernels[1])
    tables.append({"type": "flatten"})
    for k in (*widths, 1):
        tables += [{"type": "separable_dense", "units": k * classes, "groups": classes}, {"type": "sigmoid"}]
    tables[-1] = {"type": "identity"}
    return tables[:-1]


def _lenet(widths: Sequence[int], classes: int) -> list[Table]:
    tables = [*_conv(6, 5), *_conv(16, 5), {"type": "flatten"}]
    for width in widths:
        tables += [{"type": "dense", "units": width}, {"type": "sigmoid"}]
    return [*tables, {"type": "dense", "units": classes}]


def _mlp(widths: Sequence[int], classes: int, shape: tuple[int, ...]) -> list[Table]:
    tables: list[Table] = [{"type": "flatten"}] if len(shape) > 1 else []
    for width in widths:
        tables += [{"type": "dense", "units": width}, {"type": "relu"}]
    return [*tables, {"type": "dense", "units": classes}]


MODELS = ("psnet", "psnet-24", "psnet-35", "lenet", "mlp", "custom")


def make_network(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    widths: Sequence[int] = (),
    layers: Sequence[Table] = (),
) -> Network:
    """The network called `name` for samples of `in_shape` (per sample) and `classes` classes.

    `psnet` is `psnet-24` on 28 x 28 images (`psnet-35` has separable layers 35/15/1 instead of 24/15/1), its CIFAR-10
    sister on 32 x 32 and a small one on 8 x 8; `mlp` has hidden `widths` (1024, 1024 by default) with ReLU; `custom`
    is described layer by layer in `layers` (see psmpi.nn.network.build). UserError where the name or the shape is not
    known.
    """
    if name == "custom":
        if not layers:
            raise UserError(
                "--model custom needs the layers in the configuration file: one [[model.layers]] table each"
            )
        return build(name, in_shape, layers, classes)
    if layers:
        raise UserError(f"the configuration has [[model.layers]] but --model is {name!r}: use --model custom")
    if name == "mlp":
        return build(name, in_shape, _mlp(widths or (1024, 1024), classes, in_shape), classes)
    size = in_shape[1:] if len(in_shape) == 3 else ()
    if name in ("psnet", "psnet-24", "psnet-35"):
        if size == (28, 28):
            second = 35 if name == "psnet-35" else 24
            return build(name, in_shape, _psnet((40, 3), (5, 5), (second, 15), classes), classes)
        if size == (32, 32) and name == "psnet":
            return build(name, in_shape, _psnet((60, 3), (5, 5), (35, 15), classes), classes)
        if size == (8, 8) and name == "psnet":
            return build(name, in_shape, _psnet((8, 3), (3, 2), (8,), classes), classes)
    if name == "lenet" and size in ((28, 28), (32, 32)):
        return build(name, in_shape, _lenet((120, 84) if size == (28, 28) else (200, 100), classes), classes)
    if name in MODELS:
        raise UserError(
            f"--model {name} is not made for samples of shape {in_shape}: use --model mlp, or --model custom with the "
            "layers in the configuration file"
        )
    raise UserError(f"--model {name!r} is unknown: choose one of {', '.join(MODELS)}")
