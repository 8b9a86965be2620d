"""Command that prunes dense layers of a trained network to sparse ones by the magnitude of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import arg

from psmpi.checkpoint.tensors import Tensor
from psmpi.config import from_toml, to_toml
from psmpi.config.sections import NetworkSettings
from psmpi.errors import UserError
from psmpi.inspect.change import write
from psmpi.inspect.opened import Checkpoint, Opened
from psmpi.layout import Pattern
from psmpi.nn.layers import Layer
from psmpi.nn.layers.dense import Dense
from psmpi.nn.network import CUSTOM, Network, build
from psmpi.nn.zoo import make_network
from psmpi.output import tell

LayerTable = dict[str, Any]


def sparsify(
    checkpoint: Checkpoint,
    /,
    sparsity: float,
    out: Annotated[Path, arg(aliases=["-o"])],
    scope: Literal["global", "layer"] = "global",
    layers: tuple[str, ...] = (),
) -> int:
    """Prune a network: remove the smallest weights of dense layers, which become sparse layers.

    The weights of least magnitude of all these layers together are removed (global magnitude pruning), or those of each
    layer. The other weights, biases and layers stay the same; the optimizer's state is left out. To continue the
    training: psmpi train --resume FILE --epochs N --out DIR, where N includes the past epochs.

    Args:
        checkpoint: Checkpoint file, or a run directory for its newest one. It must hold a whole network.
        sparsity: Share of the weights of these layers to remove, above 0 and below 1.
        out: File to write.
        scope: Weights that compete: global, those of all these layers, or layer, those of each layer.
        layers: Names of dense layers. If not given: all but the layer of scores.
    """
    if not 0 < sparsity < 1:
        raise UserError(f"sparsify --sparsity {sparsity}: expected a number above 0 and below 1, for instance 0.95")
    opened = Opened(checkpoint)
    contents = opened.contents
    if contents.part is not None:
        raise UserError(f"{opened.path} is a part of a network: give the checkpoint that it is cut from")
    trained = from_toml(contents.config, str(opened.path), foreign=True)
    settings, classes = trained.model, contents.layout.classes
    shape = dict(settings.shape, by_step=contents.by_step, task=contents.task)
    network = make_network(settings.model, contents.in_shape, classes, **shape)
    patterns = _patterns(opened, _chosen(network, layers), sparsity, scope)
    tables = _with_sparse(network, patterns)
    # The pruned network has the same layers in the same order; a changed layer has another number in its name.
    pruned = build(CUSTOM, contents.in_shape, tables, classes, contents.by_step)
    sources = {
        parameter.name: (old.name, own.name)
        for old, new in zip(network.walk(), pruned.walk(), strict=True)
        for own, parameter in zip(old.parameters(), new.parameters(), strict=True)
    }
    kept_numbers = {name: _numbers(pattern) for name, pattern in patterns.items()}

    def read(vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        layer, name = sources[tensor.name]
        if layer not in kept_numbers or not name.endswith(".weight"):
            opened.fill(vector, name, first, into)
            return
        numbers = kept_numbers[layer][first : first + len(into)]
        run = np.empty(int(numbers[-1] - numbers[0]) + 1, into.dtype)
        opened.fill(vector, name, int(numbers[0]), run)
        np.take(run, numbers - numbers[0], out=into)

    model = NetworkSettings(
        model="custom", layers=tuple(tables), init=settings.init, init_gain=settings.init_gain, dtype=settings.dtype
    )
    origin = {**contents.provenance, "sparsified_from": str(opened.path), "sparsity": f"{sparsity} ({scope})"}
    new_contents = replace(
        contents, config=to_toml(replace(trained, model=model)), layout=pruned.layout(), scalars={}, spaces={},
        own=frozenset(), provenance=origin,
    )  # fmt: skip
    for name, pattern in patterns.items():
        tell(f"{name}: {pattern.size:,} of {pattern.rows * pattern.inputs:,} weights, {_share(pattern):.2%}")
    write(out, new_contents, ["weights"], opened.dtype, read)
    return 0


def _share(pattern: Pattern) -> float:
    return pattern.size / (pattern.rows * pattern.inputs)


def _numbers(pattern: Pattern) -> np.ndarray:
    """Number of each entry in the flattened dense matrix, (entries,) int64, increasing."""
    numbers: np.ndarray = pattern.row_numbers.astype(np.int64) * pattern.inputs + pattern.columns
    return numbers


def _chosen(network: Network, names: Sequence[str]) -> list[Layer]:
    """Layers to prune: those in `names`, or all dense ones but the layer of scores; UserError for other layers."""
    dense = [
        layer for layer in network.walk() if type(layer) is Dense and layer.groups == 1 and len(layer.in_shape) == 1
    ]
    by_name = {layer.name: layer for layer in dense}
    for name in names:
        if name not in by_name:
            raise UserError(
                f"sparsify --layers {name}: choose among {', '.join(by_name) or 'none'}, the dense layers of --model "
                f"{network.name} without groups that are not of the steps of sequences"
            )
    chosen: list[Layer] = [
        layer for layer in dense if (layer.name in names if names else layer is not network.layers[-1])
    ]
    if not chosen:
        raise UserError(f"sparsify: --model {network.name} has no dense layer to prune before that of scores")
    return chosen


def _kept(sparsity: float, size: int) -> int:
    """Number of weights that stay, of `size`."""
    return round((1 - sparsity) * size)


def _patterns(opened: Opened, layers: Sequence[Layer], sparsity: float, scope: str) -> dict[str, Pattern]:
    """Patterns of the weights that stay, by layer; UserError if a layer would lose all of its weights."""
    sizes = [np.abs(opened.read("weights", opened.tensors[f"{layer.name}.weight"])) for layer in layers]
    groups = [sizes] if scope == "global" else [[matrix] for matrix in sizes]
    masks: list[np.ndarray] = []
    for group in groups:
        every = np.concatenate([matrix.reshape(-1) for matrix in group])
        keep = np.zeros(every.size, bool)
        # Among equal weights the first ones are kept.
        keep[np.argsort(-every, kind="stable")[: _kept(sparsity, every.size)]] = True
        edges = np.cumsum([matrix.size for matrix in group])[:-1]
        masks += [part.reshape(matrix.shape) for part, matrix in zip(np.split(keep, edges), group, strict=True)]
    patterns = {}
    for layer, mask in zip(layers, masks, strict=True):
        if not mask.any():
            # With --scope layer some weights of each layer would stay.
            some = scope == "global" and _kept(sparsity, min(matrix.size for matrix in sizes)) > 0
            raise UserError(
                f"sparsify --sparsity {sparsity} would leave none of the {mask.size:,} weights of {layer.name}: use "
                f"less{', or --scope layer' if some else ''}"
            )
        starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
        patterns[layer.name] = Pattern.of(starts, np.nonzero(mask)[1], mask.shape[1])
    return patterns


def _with_sparse(network: Network, patterns: Mapping[str, Pattern]) -> list[LayerTable]:
    """Tables of a network's layers, with sparse layers in place of the dense ones that have a pattern."""
    leaves = iter([layer for layer in network.walk() if type(layer) is Dense])

    def changed(table: Mapping[str, Any]) -> LayerTable:
        if "layers" in table:
            return {**table, "layers": [changed(inner) for inner in table["layers"]]}
        if table["type"] not in ("dense", "separable_dense"):
            return dict(table)
        name = next(leaves).name
        if name not in patterns:
            return dict(table)
        return {**table, "type": "sparse", "pattern": patterns[name].packed()}

    return [changed(table) for table in network.tables]
