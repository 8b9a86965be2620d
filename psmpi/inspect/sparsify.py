"""The command that prunes dense layers of a trained network to sparse ones, by the magnitude of weights."""

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
    # The same layers in the same order, some of another kind and so with other numbers.
    pruned = build(CUSTOM, contents.in_shape, tables, classes, contents.by_step)
    sources = {
        parameter.name: (old.name, own.name)
        for old, new in zip(network.walk(), pruned.walk(), strict=True)
        for own, parameter in zip(old.parameters(), new.parameters(), strict=True)
    }
    kept = {name: _numbers(pattern) for name, pattern in patterns.items()}

    def read(vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        layer, name = sources[tensor.name]
        if layer not in kept or not name.endswith(".weight"):
            opened.fill(vector, name, first, into)
            return
        numbers = kept[layer][first : first + len(into)]
        run = np.empty(int(numbers[-1] - numbers[0]) + 1, into.dtype)
        opened.fill(vector, name, int(numbers[0]), run)
        np.take(run, numbers - numbers[0], out=into)

    model = NetworkSettings(
        model="custom", layers=tuple(tables), init=settings.init, init_gain=settings.init_gain, dtype=settings.dtype
    )
    origin = {**contents.provenance, "sparsified_from": str(opened.path), "sparsity": f"{sparsity} ({scope})"}
    made = replace(
        contents, config=to_toml(replace(trained, model=model)), layout=pruned.layout(), scalars={}, spaces={},
        own=frozenset(), provenance=origin,
    )  # fmt: skip
    for name, pattern in patterns.items():
        tell(f"{name}: {pattern.size:,} of {pattern.rows * pattern.inputs:,} weights, {_share(pattern):.2%}")
    write(out, made, ["weights"], opened.dtype, read)
    return 0


def _share(pattern: Pattern) -> float:
    return pattern.size / (pattern.rows * pattern.inputs)


def _numbers(pattern: Pattern) -> np.ndarray:
    """(entries,) int64: the number of each entry in the dense matrix, increasing."""
    found: np.ndarray = pattern.row_numbers.astype(np.int64) * pattern.inputs + pattern.columns
    return found


def _chosen(network: Network, names: Sequence[str]) -> list[Layer]:
    """The layers that are pruned; UserError where one of those named is none that can be."""
    dense = [one for one in network.walk() if type(one) is Dense and one.groups == 1 and len(one.in_shape) == 1]
    known = {one.name: one for one in dense}
    for name in names:
        if name not in known:
            raise UserError(
                f"sparsify --layers {name}: choose among {', '.join(known) or 'none'}, the dense layers of --model "
                f"{network.name} without groups that are not of the steps of sequences"
            )
    found: list[Layer] = [one for one in dense if (one.name in names if names else one is not network.layers[-1])]
    if not found:
        raise UserError(f"sparsify: --model {network.name} has no dense layer to prune before that of scores")
    return found


def _kept(sparsity: float, size: int) -> int:
    """How many of so many weights stay."""
    return round((1 - sparsity) * size)


def _patterns(opened: Opened, layers: Sequence[Layer], sparsity: float, scope: str) -> dict[str, Pattern]:
    """The weights that stay, by layer; UserError where of one none would."""
    sizes = [np.abs(opened.read("weights", opened.tensors[f"{one.name}.weight"])) for one in layers]
    groups = [sizes] if scope == "global" else [[one] for one in sizes]
    masks: list[np.ndarray] = []
    for group in groups:
        every = np.concatenate([one.reshape(-1) for one in group])
        keep = np.zeros(every.size, bool)
        # Of equal ones the first stay.
        keep[np.argsort(-every, kind="stable")[: _kept(sparsity, every.size)]] = True
        edges = np.cumsum([one.size for one in group])[:-1]
        masks += [part.reshape(one.shape) for part, one in zip(np.split(keep, edges), group, strict=True)]
    found = {}
    for layer, mask in zip(layers, masks, strict=True):
        if not mask.any():
            # Of each layer alone some would stay.
            some = scope == "global" and _kept(sparsity, min(one.size for one in sizes)) > 0
            raise UserError(
                f"sparsify --sparsity {sparsity} would leave none of the {mask.size:,} weights of {layer.name}: use "
                f"less{', or --scope layer' if some else ''}"
            )
        starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
        found[layer.name] = Pattern.of(starts, np.nonzero(mask)[1], mask.shape[1])
    return found


def _with_sparse(network: Network, patterns: Mapping[str, Pattern]) -> list[LayerTable]:
    """The tables of a network, with sparse layers in the place of those that have a pattern."""
    leaves = iter([one for one in network.walk() if type(one) is Dense])

    def changed(table: Mapping[str, Any]) -> LayerTable:
        if "layers" in table:
            return {**table, "layers": [changed(one) for one in table["layers"]]}
        if table["type"] not in ("dense", "separable_dense"):
            return dict(table)
        name = next(leaves).name
        if name not in patterns:
            return dict(table)
        return {**table, "type": "sparse", "pattern": patterns[name].packed()}

    return [changed(one) for one in network.tables]
