"""Graphs of agents and the weights with which neighbours are averaged; pure functions of names, numbers and seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from psmpi.errors import UserError, expanded

# Keeps draws of graphs, and of their active edges, apart from all else drawn from a seed.
GRAPH, ACTIVE = 0x67726170, 0x65646765
KINDS = "ring, grid, exponential, complete, erdos:P with a probability P, or a file"
# Edges of a file that errors name.
NAMED = 5

Edge = tuple[int, int]


@dataclass(frozen=True)
class Graph:
    """Agents 0 .. count - 1 and the links between them: (a, b) with a < b, which both use.

    probability: with which each link works in an iteration, by draws from `seed`, the same for whoever asks.
    """

    count: int
    links: tuple[Edge, ...]
    probability: float = 1.0
    seed: int = 0

    def active(self, iteration: int) -> tuple[Edge, ...]:
        """The links that work in an iteration."""
        if self.probability >= 1:
            return self.links
        draws = np.random.default_rng([self.seed, ACTIVE, iteration]).random(len(self.links))
        return tuple(link for link, draw in zip(self.links, draws, strict=True) if draw < self.probability)

    @cached_property
    def gap(self) -> float:
        """1 less the second largest magnitude of the eigenvalues of the weights of all links: how fast agents agree."""
        if self.count == 1:
            return 1.0
        sizes = np.sort(np.abs(np.linalg.eigvalsh(weights(self.count, self.links))))
        return float(max(0.0, 1 - sizes[-2]))

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Of each agent the number of its links."""
        return tuple(np.bincount(np.array(self.links, int).reshape(-1), minlength=self.count).tolist())


def weights(count: int, links: Iterable[Edge]) -> np.ndarray:
    """Metropolis weights (count, count) float64: symmetric, not negative, rows and columns sum to 1.

    c_ij = 1 / (1 + max(d_i, d_j)) on a link, with the degrees d; the rest of a row is the agent's own (Xiao, Boyd and
    Lall, 2005).
    """
    pairs = np.array(sorted(set(links)), int).reshape(-1, 2)
    degrees = np.bincount(pairs.reshape(-1), minlength=count)
    found = np.zeros((count, count))
    a, b = pairs.T
    found[a, b] = found[b, a] = 1 / (1 + np.maximum(degrees[a], degrees[b]))
    found[np.diag_indices(count)] = 1 - found.sum(axis=1)
    return found


def both(links: Iterable[Edge]) -> list[Edge]:
    """The links as edges both ways."""
    return [edge for a, b in links for edge in ((a, b), (b, a))]


def make_graph(name: str, count: int, seed: int, probability: float = 1.0) -> Graph:
    """The graph of so many agents called `name`; UserError where there is none, or where it is not connected."""
    if name == "ring":
        links = {(k, (k + 1) % count) for k in range(count)}
    elif name == "grid":
        links = _grid(count)
    elif name == "exponential":
        links = {(k, (k + (1 << d)) % count) for k in range(count) for d in range((count - 1).bit_length())}
    elif name == "complete":
        links = {(a, b) for b in range(count) for a in range(b)}
    elif name.startswith("erdos:"):
        links = _erdos(name, count, seed)
    else:
        links = _read(name, count)
    plain = tuple(sorted({(min(a, b), max(a, b)) for a, b in links if a != b}))
    parts = components(count, plain)
    if len(parts) > 1:
        small = min(parts, key=len)
        shown = " ".join(map(str, small[:NAMED])) + (" ..." if len(small) > NAMED else "")
        raise UserError(
            f"--graph {name}: the graph of {count} agents falls into {len(parts)} parts, one of them the agent(s) "
            f"{shown}, which never hear of the others: add links, or use --graph ring"
        )
    return Graph(count, plain, probability, seed)


def _grid(count: int) -> set[Edge]:
    """Rows and columns as nearly a square as `count` has divisors for."""
    rows = max(d for d in range(1, int(count**0.5) + 1) if count % d == 0)
    columns = count // rows
    across = {(k, k + 1) for k in range(count) if (k + 1) % columns}
    return across | {(k, k + columns) for k in range(count - columns)}


def _erdos(name: str, count: int, seed: int) -> set[Edge]:
    """Each pair with a probability, drawn again until all agents hear of each other."""
    try:
        p = float(name.removeprefix("erdos:"))
    except ValueError:
        p = -1.0
    if not 0 < p <= 1:
        raise UserError(f"--graph {name}: expected a probability above 0, up to 1, as in erdos:0.3")
    pairs = [(a, b) for b in range(count) for a in range(b)]
    for draw in range(100):
        kept = np.random.default_rng([seed, GRAPH, draw]).random(len(pairs)) < p
        links = {pair for pair, keep in zip(pairs, kept, strict=True) if keep}
        if len(components(count, links)) == 1:
            return links
    raise UserError(
        f"--graph {name}: none of 100 draws of {count} agents is connected: use a larger probability, from about "
        f"{min(1.0, np.log(max(2, count)) / count):.2g} on"
    )


def _read(name: str, count: int) -> set[Edge]:
    """The links of a text file, "A B" a line; # begins a comment."""
    path = expanded(name, "--graph")
    if not name or path.is_dir():
        raise UserError(f"--graph {name!r}: neither a graph nor a file: expected {KINDS}")
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"--graph {name}: neither a graph nor a file: expected {KINDS}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--graph {name}: cannot be read ({error}): expected lines of two agents' numbers") from None
    found: set[Edge] = set()
    for number, line in enumerate(lines, 1):
        words, where = line.partition("#")[0].split(), f"--graph {name}:{number}"
        if not words:
            continue
        try:
            a, b = map(int, words)
        except ValueError:
            raise UserError(f"{where}: {line.strip()!r}: expected two agents' numbers, such as 0 1") from None
        if not (0 <= a < count and 0 <= b < count):
            raise UserError(f"{where}: {a} {b}: agents are numbered 0 to {count - 1}; --agents says how many")
        if a == b:
            raise UserError(f"{where}: {a} {b}: an agent needs no link to itself: leave the line out")
        found.add((a, b))
    ways = [(a, b) for a, b in sorted(found) if (b, a) in found]
    single = [(a, b) for a, b in sorted(found) if (b, a) not in found]
    if ways and single:
        shown = ", ".join(f"{a} {b}" for a, b in single[:NAMED])
        raise UserError(
            f"--graph {name}: some links are there both ways, others one way only ({shown}): messages go both "
            "ways over a link; give each link once, or all both ways"
        )
    return found


def components(count: int, links: Iterable[Edge]) -> list[list[int]]:
    """The agents that hear of each other, part by part."""
    near: list[set[int]] = [set() for _ in range(count)]
    for a, b in links:
        near[a].add(b)
        near[b].add(a)
    left, found = set(range(count)), []
    while left:
        part, edge = set(), {min(left)}
        while edge:
            part |= edge
            edge = set().union(*(near[k] for k in edge)) - part
        found.append(sorted(part))
        left -= part
    return found
