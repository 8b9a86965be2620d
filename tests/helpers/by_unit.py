"""Layouts and initial weights by their definitions, unit by unit: slow, but without psmpi's index arithmetic."""

from itertools import groupby
from math import prod
from zlib import crc32

import numpy as np

from psmpi.nn.init import initial_values
from psmpi.nn.layers.attention import Attention
from psmpi.nn.layers.binary import Binary
from psmpi.nn.layers.dot import Dot
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.group_norm import GroupNorm
from psmpi.nn.layers.layer_norm import LayerNorm
from psmpi.nn.layers.linear import Linear
from psmpi.nn.layers.recurrent import Recurrent
from psmpi.nn.layers.slab import Slab
from psmpi.nn.layers.sparse import Sparse


def _of_groups(users, size, count):
    """For each of `count` groups of `size` units, the set of classes that use any of its units."""
    return [frozenset().union(*users[k * size : (k + 1) * size]) for k in range(count)]


def _inputs(layer, users):
    """For each input unit of a layer, the set of classes that depend on it. users: such a set for each output unit."""
    if isinstance(layer, Linear):
        groups = _of_groups(users, layer.units // layer.groups, layer.groups)
        users_of_inputs = [group for group in groups for _ in range(layer.group_inputs)]
        return users_of_inputs + [frozenset()] * (layer.in_shape[0] - len(users_of_inputs))
    if isinstance(layer, Recurrent | Embedding | LayerNorm | Binary | Dot):
        return _of_groups(users, len(users), 1) * layer.in_shape[0]
    if isinstance(layer, Attention):
        return [group for group in _of_groups(users, layer.size, layer.heads) for _ in range(3 * layer.size)]
    if isinstance(layer, Sparse):
        rows, columns = layer.pattern.row_numbers, layer.pattern.columns
        return [frozenset().union(*(users[r] for r in rows[columns == c])) for c in range(layer.in_shape[0])]
    if isinstance(layer, Flatten):
        return _of_groups(users, prod(layer.in_shape[1:]), layer.in_shape[0])
    if isinstance(layer, GroupNorm):
        size = len(users) // layer.groups
        return [group for group in _of_groups(users, size, layer.groups) for _ in range(size)]
    for inner in reversed(layer.inner):
        users = _inputs(inner, users)
    return users


def _parameters(layers, users):
    """Pairs (parameter, for each of its units the set of classes that use it), in the order of the layers."""
    parameters = []
    for layer in reversed(layers):
        input_users = _inputs(layer, users)
        own_users = input_users if isinstance(layer, GroupNorm | LayerNorm) else users
        pairs = [(p, own_users) for p in layer.parameters()]
        if isinstance(layer, Recurrent | Embedding | Slab):
            pairs = [(p, _of_groups(users, len(users), 1) * p.units) for p in layer.parameters()]
        if isinstance(layer, Sparse):
            pairs[0] = pairs[0][0], [users[r] for r in layer.pattern.row_numbers]
        parameters = (_parameters(layer.inner, users) if layer.inner else pairs) + parameters
        users = input_users
    return parameters


def blocks_by_unit(network):
    """The blocks of a network as tuples (classes, start, stop, pieces).

    A piece is (number of the parameter, first unit, last unit, offset in the flat vector).
    """
    classes, members = network.classes, {}
    pairs = _parameters(network.layers, [frozenset([c]) for c in range(classes)])
    for k, (_, users) in enumerate(pairs):
        for used_by, units in groupby(range(len(users)), key=users.__getitem__):
            numbers = list(units)
            members.setdefault(used_by, []).append((k, numbers[0], numbers[-1] + 1))

    def order(used_by):
        if len(used_by) in (0, classes):
            return (0,) if used_by else (2,)
        return 1, min(used_by), max(used_by), sorted(used_by)

    blocks, offset = [], 0
    for used_by in sorted(members, key=order):
        start, pieces = offset, []
        for k, first, last in members[used_by]:
            pieces.append((k, first, last, offset))
            offset += (last - first) * pairs[k][0].unit_size
        blocks.append((used_by, start, offset, tuple(pieces)))
    return blocks


def weights_by_unit(network, seed, kind, gain):
    """The flat vector of initial weights, float64; each unit has its own random generator."""
    laws = initial_values(network, kind, gain)
    parameters = [p for p, _ in _parameters(network.layers, [frozenset()] * network.classes)]
    blocks = blocks_by_unit(network)
    vector = np.zeros(blocks[-1][2])
    for *_, pieces in blocks:
        for k, first, last, offset in pieces:
            p = parameters[k]
            for unit in range(first, last):
                law, at = laws.get(p.name), offset + (unit - first) * p.unit_size
                if law is not None and law.units is not None and unit not in range(*law.units):
                    continue
                if law is not None and law.law == "constant":
                    vector[at : at + p.unit_size] = law.value
                elif law is not None:
                    rng = np.random.default_rng([seed, crc32(p.name.encode()), unit])
                    width = 1.0 if law.widths is None else law.widths[unit]
                    vector[at : at + p.unit_size] = width * rng.uniform(-law.value, law.value, p.unit_size)
    return vector
