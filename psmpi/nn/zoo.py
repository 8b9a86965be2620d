"""Built-in networks. PSNet and LeNet are from Raynaud, Orban and Bigeon, G-2023-36."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from psmpi.errors import LayersError, UserError, unused_option
from psmpi.layout import radix_strides
from psmpi.nn.layers import ACTIVATIONS, LAYERS
from psmpi.nn.network import Network, build
from psmpi.nn.psnet import fitted_psnet, psnet, psnet_conv
from psmpi.nn.slabs import slabs
from psmpi.nn.transformer import transformer
from psmpi.registry import WHOLE

LayerTable = dict[str, Any]


def _lenet(widths: Sequence[int], classes: int) -> list[LayerTable]:
    tables = [*psnet_conv(6, 5), *psnet_conv(16, 5), {"type": "flatten"}]
    for width in widths:
        tables += [{"type": "dense", "units": width}, {"type": "sigmoid"}]
    return [*tables, {"type": "dense", "units": classes}]


def _mlp(widths: Sequence[int], classes: int, shape: tuple[int, ...]) -> list[LayerTable]:
    tables: list[LayerTable] = [{"type": "flatten"}] if len(shape) > 1 else []
    for width in widths:
        tables += [{"type": "dense", "units": width}, {"type": "relu"}]
    return [*tables, {"type": "dense", "units": classes}]


def _linear(outputs: int, shape: tuple[int, ...], task: str) -> list[LayerTable]:
    """Return one dense layer: one score per class, one number for two classes, or the values of a regression."""
    tables: list[LayerTable] = [{"type": "flatten"}] if len(shape) > 1 else []
    if outputs == 2 and task == "classes":
        return [*tables, {"type": "dense", "units": 1}, {"type": "binary"}]
    return [*tables, {"type": "dense", "units": outputs}]


def _resnet(channels: Sequence[int], blocks: Sequence[int], classes: int, size: int) -> list[LayerTable]:
    """Return sections of residual blocks with pre-activation (He et al. 2016); images are halved between sections."""
    tables: list[LayerTable] = []
    for number, (count, width) in enumerate(zip(blocks, channels, strict=True)):
        if number:
            tables.append({"type": "mean_pool", "size": 2})
            size //= 2
        tables.append({"type": "conv", "channels": width, "kernel": 3, "pad": 1, "bias": False})
        branch = [
            {"type": "batch_norm"},
            {"type": "relu"},
            {"type": "conv", "channels": width, "kernel": 3, "pad": 1, "bias": False},
        ] * 2
        tables += [{"type": "residual", "layers": branch} for _ in range(count)]
    end: list[LayerTable] = [{"type": "batch_norm"}, {"type": "relu"}, {"type": "mean_pool", "size": size}]
    return [*tables, *end, {"type": "flatten"}, {"type": "dense", "units": classes}]


def _deep(
    width: int, depth: int, final_time: float, activation: str, classes: int, shape: tuple[int, ...], images: bool
) -> list[LayerTable]:
    """Return an opening layer, `depth` residual layers u + T/depth act(K u + b), and scores; images: convolutions.

    Source: Guenther et al., arXiv 1812.04352.
    """
    one: LayerTable = {"type": "dense", "units": width}
    if images:
        one = {"type": "conv", "channels": width, "kernel": 3, "pad": 1}
    flatten: list[LayerTable] = [{"type": "flatten"}] if len(shape) > 1 else []
    branch = {"type": "residual", "layers": [one, {"type": activation}], "scale": final_time / depth}
    tables = [*([] if images else flatten), one, {"type": activation}, *[branch] * depth]
    return [*tables, *(flatten if images else []), {"type": "dense", "units": classes}]


def _normalized(tables: Sequence[LayerTable]) -> list[LayerTable]:
    """Return the layers with batch normalization in place of biases, before activations and after the scores.

    The normalization of the scores has no parameters.
    """
    normalized: list[LayerTable] = []
    pending = False
    for table in tables:
        linear = LAYERS[table["type"]].linear
        if pending and (linear or table["type"] in ACTIVATIONS):
            normalized.append({"type": "batch_norm"})
            pending = False
        normalized.append({**table, "bias": False} if linear else table)
        pending = pending or linear
    return [*normalized, {"type": "batch_norm", "affine": False}] if pending else normalized


def _head(
    widths: Sequence[int],
    layers: Sequence[LayerTable],
    in_shape: tuple[int, ...],
    classes: int,
    finish: Any,
    scale: float,
) -> Network:
    """Return a trunk of `layers`, or of `widths` units with ReLU, and a layer of one score, or cosine, per class."""
    if layers and widths:
        raise UserError("--widths: the configuration file has the trunk's [[model.layers]]: leave one of the two out")
    last = {"type": "cosine", "units": classes, "scale": scale} if scale else {"type": "dense", "units": classes}
    own = _mlp(widths or (512, 128), classes, in_shape)
    if layers:
        tables = [*layers, last]
    elif scale:
        # The trunk of cosines ends without a ReLU, after which all angles would be at most a right angle.
        tables = [*finish(own[:-2]), last]
    else:
        tables = finish(own)
    return replace(build("head", in_shape, tables, classes), trunk=True)


def _make_deep(
    name: str, in_shape: tuple[int, ...], classes: int, widths: Sequence[int], batch_norm: bool, deep: dict[str, Any]
) -> Network:
    """Return the network `deep` or `deep-conv`, see `make_network`."""
    images = name == "deep-conv"
    if len(widths) > 1 or (widths and widths[0] < 1):
        raise UserError(f"--widths {' '.join(map(str, widths))}: --model {name} has one width, above 0")
    if batch_norm:
        raise UserError(
            f"--batch-norm: the layers of --model {name} are time steps and cannot be normalized: leave it out"
        )
    width = widths[0] if widths else 4 if images else 16
    return build(name, in_shape, _deep(width, **deep, classes=classes, shape=in_shape, images=images), classes)


def _make_radix(in_shape: tuple[int, ...], classes: int, widths: Sequence[int], depth: int, finish: Any) -> Network:
    """Return the network `radix`: a random sparse layer, then mixed-radix systems, `depth` layers with ReLU in all."""
    width = widths[0] if widths else 1024
    if len(widths) > 1 or width < CONNECTIONS:
        raise UserError(
            f"--widths {' '.join(map(str, widths))}: --model radix has one width, of {CONNECTIONS} or more: each unit "
            f"has {CONNECTIONS} connections"
        )
    inputs, strides = prod(in_shape), radix_strides(width, CONNECTIONS)
    first = {"pattern": "random", "fan_in": min(CONNECTIONS, inputs)}
    more = [{"pattern": "radix", "radix": CONNECTIONS, "stride": strides[k % len(strides)]} for k in range(depth - 1)]
    tables: list[LayerTable] = [{"type": "flatten"}] if len(in_shape) > 1 else []
    for pattern in (first, *more):
        tables += [{"type": "sparse", "units": width, "init": "he", **pattern}, {"type": "relu"}]
    return build("radix", in_shape, finish([*tables, {"type": "dense", "units": classes}]), classes)


def _of_sequences(
    kind: str,
    widths: Sequence[int],
    blocks: Sequence[int],
    heads: int,
    classes: int,
    in_shape: tuple[int, ...],
    vocabulary: int,
    by_step: bool,
) -> list[LayerTable]:
    """Return recurrent layers or a transformer, and scores of each step or of the last step."""
    if vocabulary and in_shape[0] > 1:
        raise UserError(
            f"--vocabulary {vocabulary} is for tokens, but the sequences have {in_shape[0]} features per step: leave "
            "the option out, or save tokens as integers (samples, steps)"
        )
    embedding = {"type": "embedding", "vocabulary": vocabulary}
    end: list[LayerTable] = [*([] if by_step else [{"type": "last"}]), {"type": "dense", "units": classes}]
    if kind == "transformer":
        return transformer(widths, blocks, heads, embedding if vocabulary else {"type": "dense"}, end)
    widths = tuple(widths) or (128, 128)
    tables = [{**embedding, "units": widths[0]}] if vocabulary else []
    return [*tables, *({"type": kind, "units": width} for width in widths), *end]


def _factors(
    widths: Sequence[int], vocabulary: int, in_shape: tuple[int, ...], outputs: int, task: str
) -> list[LayerTable]:
    """Return layers that learn a vector of each row and column of a matrix; products of vectors are the entries."""
    if not vocabulary or in_shape != (1, 2) or outputs != 1 or task != "regression":
        raise UserError(
            "--model factors learns entries of a matrix: samples are two tokens, row and rows + column, integers "
            "(samples, 2) with lengths, of a --vocabulary, and have one value each, as --dataset ratings; for others "
            f"use --model mlp, on several ranks with --method {WHOLE} because it cannot be partitioned, or --model head"
        )
    if len(widths) > 1 or min(widths, default=1) < 1:
        raise UserError(f"--widths {' '.join(map(str, widths))}: --model factors has one rank, above 0")
    return [{"type": "embedding", "vocabulary": vocabulary, "units": widths[0] if widths else 10}, {"type": "dot"}]


SEQUENCES = ("rnn", "gru", "lstm", "transformer")
# Models that take tokens and learn a vector for each token.
TOKENS = (*SEQUENCES, "factors")
MODELS = (
    "psnet", "psnet-24", "psnet-35", "lenet", "linear", "mlp", "head", "resnet", "deep", "deep-conv", "radix",
    "slabs", *TOKENS, "custom",
)  # fmt: skip
# Number of inputs of each unit of radix.
CONNECTIONS = 32
DEEP = {"depth": 32, "final_time": 1.0, "activation": "tanh"}


def make_network(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    widths: Sequence[int] = (),
    layers: Sequence[LayerTable] = (),
    blocks: Sequence[int] = (),
    batch_norm: bool = False,
    scale: float = 0.0,
    vocabulary: int = 0,
    heads: int = 0,
    domains: Sequence[int] = (),
    halo: int = -1,
    by_step: bool = False,
    task: str = "classes",
    **deep: Any,
) -> Network:
    """Build the network called `name` for samples of shape `in_shape` and `classes` classes.

    psnet: the same as psnet-24 on 28 x 28 images, the network for CIFAR-10 on 32 x 32 images, and a fitted network for
        other shapes, see psmpi.nn.psnet. psnet-24, psnet-35: separable layers 24/15/1 and 35/15/1.
    lenet: LeNet for images of 28 x 28 or 32 x 32.
    linear: one dense layer; for two classes with one score, see psmpi.nn.layers.binary.
    mlp: hidden layers of `widths` units (1024, 1024) with ReLU.
    head: a trunk of `layers`, or of `widths` units (512, 128) with ReLU, and one score per class, by which the network
        is partitioned. With a `scale`, a score is scale times the cosine of the angle between the trunk's outputs,
        without the last ReLU, and the class's row of weights.
    resnet: sections of `widths` channels (16, 32) with `blocks` residual blocks each (3).
    deep, deep-conv: `depth` (32) residual layers of one width of `widths` (16), or convolutions of as many channels
        (4), with `activation` (tanh): the time steps up to `final_time` (1.0).
    radix: `depth` (32) sparse layers of one width of `widths` (1024) with ReLU and 32 connections per unit, in the
        topology of RadiX-Nets (Robinett and Kepner 2019), with He's initial weights.
    rnn, gru, lstm: recurrent layers of `widths` units (128, 128) for sequences (features, steps), or for tokens with a
        `vocabulary`.
    transformer: for the same sequences, with `heads`, see psmpi.nn.transformer.
    factors: the scalar product of vectors of two tokens, of one width of `widths` (10).
    slabs: hidden layers of `widths` neurons, cut into `domains` with a `halo`, see psmpi.nn.slabs.
    custom: the layer tables `layers`, see psmpi.nn.network.build.

    Numbers in brackets are defaults. batch_norm: batch normalization instead of biases. by_step: scores at each step of
    sequences. task: see `Split.task`. UserError for an unknown name, an option of other models, or a shape that the
    network does not take.
    """
    if batch_norm and name in TOKENS:
        raise UserError(f"--batch-norm would mix the steps of sequences: leave it out with --model {name}")
    if heads and name != "transformer":
        raise unused_option("--heads", "--model", ("transformer",), name)
    for word, is_set in (("domains", domains), ("halo", halo >= 0)):
        if is_set and name != "slabs":
            raise unused_option(f"--{word}", "--model", ("slabs",), name)
    if vocabulary and name not in TOKENS:
        instead = 'begin [[model.layers]] with {type = "embedding", vocabulary = V, units = U}'
        raise unused_option("--vocabulary", "--model", TOKENS, name, instead)
    if batch_norm and name == "linear":
        raise UserError("--batch-norm needs several layers, but --model linear has one: leave it out")
    if batch_norm and (name in ("resnet", "custom") or (name == "head" and layers)):
        raise UserError(
            f"--batch-norm is not for --model {name}, whose layers already state where batch normalization goes: leave "
            "it out"
        )
    if blocks and name not in ("resnet", "transformer"):
        raise unused_option("--blocks", "--model", ("resnet", "transformer"), name)
    for setting, usual in DEEP.items() if name not in ("deep", "deep-conv") else ():
        if deep.get(setting, usual) != usual and (name, setting) != ("radix", "depth"):
            users = ("deep", "deep-conv", *(["radix"] if setting == "depth" else []))
            raise unused_option(f"--{setting.replace('_', '-')}", "--model", users, name)
    if scale and name != "head":
        instead = 'let --model custom end in a layer {type = "cosine", units = CLASSES, scale = S}'
        raise unused_option("--scale", "--model", ("head",), name, instead)
    if name == "custom":
        if not layers:
            raise UserError(
                "--model custom needs the layers in the configuration file: one [[model.layers]] table each"
            )
        try:
            return build(name, in_shape, layers, classes, by_step)
        except UserError as error:
            raise LayersError(str(error)) from None
    if layers and name != "head":
        raise UserError(
            f"the configuration has [[model.layers]] but --model is {name!r}: use --model custom, or --model head "
            "if the layers are a trunk"
        )
    if name == "head" and not by_step:
        try:
            return _head(widths, layers, in_shape, classes, _normalized if batch_norm else list, scale)
        except UserError as error:
            raise LayersError(str(error)) from None
    if name in SEQUENCES and len(in_shape) == 2:
        tables = _of_sequences(name, widths, blocks, heads, classes, in_shape, vocabulary, by_step)
        return build(name, in_shape, tables, classes, by_step)
    if name == "factors" and not by_step:
        return build(name, in_shape, _factors(widths, vocabulary, in_shape, classes, task), classes)
    if by_step:
        raise UserError(
            f"--model {name} has one score vector per sample, but each step of a sequence has a target: use --model "
            f"{', '.join(SEQUENCES)}, or custom"
        )
    if len(in_shape) == 2 and name not in ("psnet", "linear", "mlp", "head", "deep", "radix", "slabs"):
        raise UserError(
            f"--model {name} is not made for sequences {in_shape}: use --model {', '.join(SEQUENCES)}, or mlp"
        )
    if name == "slabs":
        tables = slabs(widths, domains, halo, classes, in_shape)
        return build(name, in_shape, _normalized(tables) if batch_norm else tables, classes)
    network = _built_in(name, in_shape, classes, widths, blocks, batch_norm)
    if name == "linear":
        network = build(name, in_shape, _linear(classes, in_shape, task), classes)
    if name == "deep" or (name == "deep-conv" and len(in_shape) == 3):
        network = _make_deep(name, in_shape, classes, widths, batch_norm, {**DEEP, **deep})
    if name == "radix":
        depth = int(deep.get("depth", DEEP["depth"]))
        network = _make_radix(in_shape, classes, widths, depth, _normalized if batch_norm else list)
    if network is not None:
        return network
    if name in MODELS:
        last = len(in_shape) == 3 and in_shape[2] in (1, 3, 4) and min(in_shape[:2]) > 4
        hint = "if the channels come last, add --layout nhwc, or " if last else ""
        if name in SEQUENCES:
            hint = "make sequences of images (--dataset NAME:rows), save sequences with their lengths, or "
        use = f"--model {name} is not made for samples of shape {in_shape}: {hint}use"
        raise UserError(f"{use} --model psnet, or --model custom with the layers in the configuration file")
    raise UserError(f"--model {name!r} is unknown: choose one of {', '.join(MODELS)}")


def _built_in(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    widths: Sequence[int] = (),
    blocks: Sequence[int] = (),
    batch_norm: bool = False,
) -> Network | None:
    """Build a network with fixed layers, see `make_network`; return None if none suits samples of this shape."""
    finish = _normalized if batch_norm else list
    if name == "mlp":
        return build(name, in_shape, finish(_mlp(widths or (1024, 1024), classes, in_shape)), classes)
    size = in_shape[1:] if len(in_shape) == 3 else ()
    if name == "resnet" and size and size[0] == size[1]:
        channels = tuple(widths or (16, 32))
        counts = tuple(blocks or (3,) * len(channels))
        if len(channels) != len(counts) or min((*channels, *counts)) < 1:
            raise UserError(
                f"--widths {' '.join(map(str, channels))} --blocks {' '.join(map(str, counts))}: --model resnet needs "
                "as many numbers of channels as of blocks, all above 0"
            )
        if size[0] >> (len(channels) - 1) < 1:
            raise UserError(f"--widths: {len(channels)} sections halve images of {size[0]} pixels too often; use fewer")
        return build(name, in_shape, _resnet(channels, counts, classes, size[0]), classes)
    if name in ("psnet", "psnet-24", "psnet-35"):
        if size == (28, 28):
            convolutions, widths = (
                [psnet_conv(40, 5), psnet_conv(3 * classes, 5)],
                (35 if name == "psnet-35" else 24, 15),
            )
            return build(name, in_shape, finish(psnet(convolutions, widths, classes)), classes)
        if size == (32, 32) and name == "psnet":
            # The network for CIFAR-10, also for grey images.
            convolutions = [psnet_conv(60, 5), psnet_conv(3 * classes, 5)]
            return build(name, in_shape, finish(psnet(convolutions, (35, 15), classes)), classes)
        if name == "psnet":
            return build(name, in_shape, finish(fitted_psnet(in_shape, classes)), classes)
    if name == "lenet" and size in ((28, 28), (32, 32)):
        return build(name, in_shape, finish(_lenet((120, 84) if size == (28, 28) else (200, 100), classes)), classes)
    return None
