"""Graphs of agents, and the weights of averages over neighbours: pure functions of names, numbers and seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from psmpi.errors import UserError, expanded

# Keys of the draws of graphs, and of their active edges, which separate them from other draws from a seed.
GRAPH, ACTIVE = 0x67726170, 0x65646765
KINDS = "ring, grid, exponential, complete, erdos:P with a probability P, or a file"
# Most edges, or agents, that an error names.
NAMED = 5

Edge = tuple[int, int]


@dataclass(frozen=True)
class Graph:
    """Agents 0 .. count - 1 and the links between them: (a, b) with a < b, used in both directions.

    probability: of a link to work in an iteration. Draws depend on `seed` and the iteration, so all ranks draw alike.
    """

    count: int
    links: tuple[Edge, ...]
    probability: float = 1.0
    seed: int = 0

    def active(self, iteration: int) -> tuple[Edge, ...]:
        """Return the links that work in an iteration."""
        if self.probability >= 1:
            return self.links
        draws = np.random.default_rng([self.seed, ACTIVE, iteration]).random(len(self.links))
        return tuple(link for link, draw in zip(self.links, draws, strict=True) if draw < self.probability)

    @cached_property
    def gap(self) -> float:
        """The spectral gap of all links' weights, 1 minus the second largest |eigenvalue|: how fast agents agree."""
        if self.count == 1:
            return 1.0
        sizes = np.sort(np.abs(np.linalg.eigvalsh(weights(self.count, self.links))))
        return float(max(0.0, 1 - sizes[-2]))

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """The number of links of each agent."""
        return tuple(np.bincount(np.array(self.links, int).reshape(-1), minlength=self.count).tolist())


def weights(count: int, links: Iterable[Edge]) -> np.ndarray:
    """Return the Metropolis weights (count, count) float64: symmetric, not negative, rows and columns sum to 1.

    c_ij = 1 / (1 + max(d_i, d_j)) on a link, with the degrees d; the rest of a row is the agent's own (Xiao, Boyd and
    Lall, 2005).
    """
    pairs = np.array(sorted(set(links)), int).reshape(-1, 2)
    degrees = np.bincount(pairs.reshape(-1), minlength=count)
    matrix = np.zeros((count, count))
    a, b = pairs.T
    matrix[a, b] = matrix[b, a] = 1 / (1 + np.maximum(degrees[a], degrees[b]))
    matrix[np.diag_indices(count)] = 1 - matrix.sum(axis=1)
    return matrix


def both(links: Iterable[Edge]) -> list[Edge]:
    """Return the links as edges in both directions."""
    return [edge for a, b in links for edge in ((a, b), (b, a))]


def make_graph(name: str, count: int, seed: int, probability: float = 1.0) -> Graph:
    """Return the graph `name` of `count` agents; raise UserError for an unknown name, or an unconnected graph."""
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
            f"--graph {name}: the graph of {count} agents is not connected: it falls into {len(parts)} parts, one of "
            f"them the agent(s) {shown}: add links, or use --graph ring"
        )
    return Graph(count, plain, probability, seed)


def _grid(count: int) -> set[Edge]:
    """Return the links of a grid of rows and columns, as nearly square as the divisors of `count` allow."""
    rows = max(d for d in range(1, int(count**0.5) + 1) if count % d == 0)
    columns = count // rows
    across = {(k, k + 1) for k in range(count) if (k + 1) % columns}
    return across | {(k, k + columns) for k in range(count - columns)}


def _erdos(name: str, count: int, seed: int) -> set[Edge]:
    """Return each pair with the probability in `name`; draw again until the graph is connected."""
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
    """Return the links of a text file, "A B" a line; # begins a comment."""
    path = expanded(name, "--graph")
    if not name or path.is_dir():
        raise UserError(f"--graph {name!r}: neither a graph nor a file: expected {KINDS}")
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"--graph {name}: neither a graph nor a file: expected {KINDS}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--graph {name}: cannot be read ({error}): expected lines of two agents' numbers") from None
    links: set[Edge] = set()
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
        links.add((a, b))
    ways = [(a, b) for a, b in sorted(links) if (b, a) in links]
    single = [(a, b) for a, b in sorted(links) if (b, a) not in links]
    if ways and single:
        shown = ", ".join(f"{a} {b}" for a, b in single[:NAMED])
        raise UserError(
            f"--graph {name}: the file has some links both ways, and others one way only ({shown}): messages go both "
            "ways over a link; give each link once, or all both ways"
        )
    return links


def components(count: int, links: Iterable[Edge]) -> list[list[int]]:
    """Return the connected components of a graph, each as increasing agents."""
    near: list[set[int]] = [set() for _ in range(count)]
    for a, b in links:
        near[a].add(b)
        near[b].add(a)
    left, parts = set(range(count)), []
    while left:
        part, edge = set(), {min(left)}
        while edge:
            part |= edge
            edge = set().union(*(near[k] for k in edge)) - part
        parts.append(sorted(part))
        left -= part
    return parts
