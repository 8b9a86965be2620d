"""Count the values that parts of sparse networks send each other, for several ways to cut them."""

from __future__ import annotations

import json as jsonlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from psmpi.bench.network import run_program
from psmpi.errors import UserError
from psmpi.layout import Pattern, measure, radix_pattern, radix_strides
from psmpi.layout import partition as cut
from psmpi.layout.partitions import MODES
from psmpi.output import Screen, check_files

# The pruned network: hidden widths, share of pruned weights, and epochs of training on the embedded digits.
WIDTHS, SPARSITY, EPOCHS = (1024, 1024, 1024), 0.95, 5
# The slabs: layers, domains, neurons of a domain, and neurons of a neighbour that a domain is connected to.
SLABS, DOMAINS, NEURONS, HALO = 8, 8, 128, 16


def partition(
    parts: tuple[int, ...] = (2, 4, 8),
    modes: tuple[str, ...] = tuple(MODES),
    networks: tuple[str, ...] = ("radix", "pruned", "slabs"),
    depth: int = 120,
    run: str = "",
    json: str = "",
) -> int:
    """Cut the neurons of sparse networks into parts, and count the values that the parts exchange.

    A value is one word a sample, forward and again backward. Inputs do not count, since each part reads its own. The
    work of a part is its number of connections; the table shows its excess over the mean, in all and for parts that
    wait for each other in each layer.

    Networks: radix has 1024 neurons a layer with 32 connections each in a mixed-radix system. pruned has the hidden
    layers of a network with 1024 units each, trained here and pruned to 5 % of its weights. slabs has 8 layers of 8
    domains of 128 neurons with a halo of 16.

    Args:
        parts: Numbers of parts.
        modes: Ways to cut: slab, contiguous, random, graph, hypergraph or layered. A way whose package is missing is
            left out with a note.
        networks: Networks: radix, pruned or slabs.
        depth: Layers of radix.
        run: Checkpoint or run directory whose sparse layers stand for pruned.
        json: File for the figures, in JSON.
    """
    for option, given, known in (("modes", modes, tuple(MODES)), ("networks", networks, ("radix", "pruned", "slabs"))):
        wrong = [name for name in given if name not in known]
        if wrong or not given:
            raise UserError(f"--{option} {' '.join(given)}: choose among {', '.join(known)}")
    if depth < 2:
        raise UserError(f"--depth {depth}: expected 2 layers or more")
    check_files(json=json)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for name in networks:
        layers = _radix(depth) if name == "radix" else _slabs() if name == "slabs" else _pruned(run)
        for count in parts:
            for mode in modes:
                begun = time.perf_counter()
                try:
                    owners = cut(layers, count, mode)
                except UserError as error:
                    if "not installed" not in str(error):
                        raise
                    missing[mode] = str(error)
                    continue
                seconds = time.perf_counter() - begun
                volumes = measure(layers, owners, count)
                rows.append(
                    {
                        "network": name,
                        "parts": count,
                        "mode": mode,
                        "words": volumes.km1,
                        "most sent": int(volumes.sends.max()),
                        "cut": volumes.edge_cut,
                        "imbalance": volumes.imbalance,
                        "layer imbalance": volumes.layer_imbalance,
                        "seconds": seconds,
                    }
                )
    _show(rows)
    for said in dict.fromkeys(missing.values()):
        Screen().print(f"note: {said}")
    if json:
        Path(json).write_text(jsonlib.dumps(rows) + "\n")
    return 0


def _radix(depth: int) -> list[Pattern]:
    strides = radix_strides(1024, 32)
    return [radix_pattern(1024, 32, strides[k % len(strides)]) for k in range(depth)]


def _slabs() -> list[Pattern]:
    width = DOMAINS * NEURONS
    domain = np.arange(width) // NEURONS
    firsts = np.maximum(0, domain * NEURONS - HALO)
    sizes = np.minimum(width, (domain + 1) * NEURONS + HALO) - firsts
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.arange(starts[-1]) + np.repeat(firsts - starts[:-1], sizes)
    return [Pattern.of(starts, columns, width)] * SLABS


def _pruned(run: str) -> list[Pattern]:
    """The patterns of the sparse layers of the checkpoint `run`, or of a network that is trained and pruned here.

    Raise UserError if the network has fewer than two sparse layers.
    """
    from psmpi.checkpoint import newest, read_contents
    from psmpi.config import from_toml
    from psmpi.nn.layers.sparse import Sparse
    from psmpi.nn.zoo import make_network

    with tempfile.TemporaryDirectory() as folder:
        path = Path(run) if run else Path(folder) / "pruned.h5"
        if not run:
            trained = str(Path(folder) / "run")
            words = ["--model", "mlp", "--widths", *map(str, WIDTHS), "--epochs", str(EPOCHS), "--loss", "nll"]
            command = [sys.executable, "-m", "psmpi.train", "--method", "data_parallel", "--dataset", "digits"]
            run_program([*command, *words, "--threads", "1", "--out", trained])
            pruning = ["sparsify", trained, "--sparsity", str(SPARSITY), "--out", str(path)]
            run_program([sys.executable, "-m", "psmpi.inspect", *pruning])
        path = newest(path)
        contents = read_contents(path)
    model = from_toml(contents.config, str(path), foreign=True).model
    network = make_network(
        model.model, contents.in_shape, contents.layout.classes, **model.shape, by_step=contents.by_step,
        task=contents.task,
    )  # fmt: skip
    patterns = [layer.pattern for layer in network.walk() if isinstance(layer, Sparse)]
    if len(patterns) < 2:
        raise UserError(
            f"--run {path}: --model {model.model} has {len(patterns)} sparse layers, but a cut needs two or more"
        )
    return patterns


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="Values that parts send each other, a sample and way", title_justify="left")
    for name in ("network", "parts", "cut by", "values", "most of a part", "work +", "by layer +", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["network"], str(row["parts"]), row["mode"], f"{row['words']:,}", f"{row['most sent']:,}",
            f"{row['imbalance']:.1%}", f"{row['layer imbalance']:.1%}", f"{row['seconds']:.2f}",
        )  # fmt: skip
    Screen().print(table)
