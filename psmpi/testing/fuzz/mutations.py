"""Random changes of bytes and of plain data (JSON, TOML)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator

# Numbers at the limits of integer types and of float64's exact integers.
NUMBERS = (
    0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1,
    2**63, 2**64 - 1, 2**64, 10**18, -(2**31), -(2**63),
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *NUMBERS, 0.5, -0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"), True, False, None, "", "0",
    "a", "\x1b[31mred\x1b[0m", "\x00", "../../etc/passwd", "é" * 50, "x" * 5000, [], {}, [[]], [0], [1, 2], [None],
    {"a": 1},
)  # fmt: skip


def mutate(rng: Rng, data: bytes) -> bytes:
    """Apply 1 to 7 random changes: flipped bits, other bytes or numbers, moved, doubled or removed blocks, a cut."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 8))):
        if not changed:
            changed += bytes(8)
        at = int(rng.integers(len(changed)))
        kind = int(rng.integers(8))
        size = int(min(len(changed) - at, 2 ** rng.integers(0, 9)))
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at] = int(rng.integers(256))
        elif kind == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            number = int(NUMBERS[rng.integers(len(NUMBERS))]) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, "little" if rng.random() < 0.7 else "big")
        elif kind == 3:
            del changed[at : at + size]
        elif kind == 4:
            changed[at:at] = changed[at : at + size]
        elif kind == 5:
            changed[at : at + size] = bytes(rng.integers(0, 256, size, np.uint8))
        elif kind == 6:
            to = int(rng.integers(len(changed)))
            changed[to : to + size] = changed[at : at + size]
        elif kind == 7 and rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_near(rng: Rng, data: bytes, places: list[tuple[int, int]]) -> bytes:
    """Change 1 to 4 bits or numbers in one of the ranges [first, last) of `places`. The length stays the same."""
    changed = bytearray(data)
    first, last = places[rng.integers(len(places))]
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(first, max(first + 1, last)))
        if at >= len(changed):
            continue
        if rng.random() < 0.5:
            changed[at] ^= 1 << int(rng.integers(8))
        else:
            width = int(rng.choice([1, 2, 4, 8]))
            number = int(NUMBERS[rng.integers(len(NUMBERS))]) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, "little")[: len(changed) - at]
    return bytes(changed)


def mutate_plain(rng: Rng, value: Any) -> Any:
    """A copy of a JSON value with one or two changes: an entry replaced, removed, doubled, or renamed."""
    places: list[Callable[[], None]] = []
    copy = json.loads(json.dumps(value))

    def walk(node: Any) -> None:
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, one in items:
            places.append(lambda node=node, key=key: _change(rng, node, key))  # type: ignore[misc]
            if isinstance(one, dict | list):
                walk(one)

    if not isinstance(copy, dict | list) or not copy or rng.random() < 0.02:
        return VALUES[rng.integers(len(VALUES))]
    walk(copy)
    for _ in range(int(rng.integers(1, 3))):
        places[rng.integers(len(places))]()
    return copy


def _change(rng: Rng, node: Any, key: Any) -> None:
    kind = rng.random()
    if isinstance(node, list) and not 0 <= key < len(node):
        return
    if isinstance(node, dict) and key not in node:
        return
    if kind < 0.6:
        old = node[key]
        if type(old) in (int, float) and rng.random() < 0.4:
            node[key] = old + int(rng.integers(-2, 3)) if rng.random() < 0.5 else old * int(rng.choice([-1, 2, 1000]))
        else:
            node[key] = VALUES[rng.integers(len(VALUES))]
    elif kind < 0.75:
        del node[key]
    elif isinstance(node, list):
        node.insert(key, node[key])
    elif kind < 0.9:
        node[f"{key}_"] = node.pop(key)
    else:
        node[str(VALUES[rng.integers(len(VALUES))])[:40]] = node[key]


def spelled(rng: Rng, value: Any) -> str:
    """JSON text of a value; sometimes with changed bytes, or nested as deep as the parser's limit or deeper."""
    text = json.dumps(value)
    if rng.random() < 0.05:
        return mutate(rng, text.encode()).decode("utf-8", "replace")
    if rng.random() < 0.01:
        depth = int(rng.choice([50, 990, 5000]))
        return "[" * depth + text + "]" * depth
    return text
