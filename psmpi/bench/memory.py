"""Measure the memory that the ranks of a training hold, and compare it with the least that they need."""

from __future__ import annotations

import json as jsonlib
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.output import Screen, tell

if TYPE_CHECKING:
    from psmpi.config import Config

KINDS = ("weights", "gradients", "optimizer", "curvature", "activations", "buffers", "samples")


def memory(config: Config, json: bool = False) -> int:
    """Count the bytes that each rank holds after a few steps, beside the need of its part of the network.

    Run it on as many ranks as the training has. `needed` follows from the network, the roles and the minibatch; `held`
    is the sum of the arrays; `traced` is the total that Python and NumPy have allocated for the run.

    Args:
        json: Print JSON.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.comm.control import Control
    from psmpi.comm.world import host, start
    from psmpi.data import Batch, open_dataset
    from psmpi.errors import UserError
    from psmpi.nn.zoo import make_network
    from psmpi.registry import find_method
    from psmpi.training.context import Context
    from psmpi.training.loop import plan_steps

    if config.parallel.method != "psl":
        raise UserError(
            "bench memory supports --method psl only; for --method "
            f"{config.parallel.method} see the placement table of psmpi.train, with the bytes that each rank holds"
        )
    world = start()
    control = Control(world)
    model = config.model
    dataset = open_dataset(*config.data.source)
    network = make_network(
        model.model, dataset.shape, dataset.outputs, **model.shape, by_step=dataset.train.by_step, task=dataset.task
    )
    kind: Any = find_method(config.parallel.method)
    kind.check(world.size, network, dataset, config)
    batches, steps, rate = plan_steps(dataset, config)
    ranks, cores = host(world)
    threads = config.parallel.threads or max(1, cores // ranks)
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        tracemalloc.start()
        method = kind(Context(world, network, dataset, config, ops))
        for step in range(min(2, steps, batches.steps_per_epoch)):
            method.step(Batch(batches.ids(0, step)), rate(step))
        method.test()
        traced = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    held, needed = method.memory(), dict(kind.needed(world.size, network, dataset, config)[world.rank])
    if method.newton is not None and method.newton.elements is not None:
        # Only the curvature pairs are needed; element gradients and index arrays come on top in `held`.
        numbers = 2 * config.optimization.memory * int(method.newton.elements.restriction.sizes.sum())
        needed["curvature"] = method.dtype.itemsize * numbers
    own = [float(t.get(kind, 0)) for t in (held, needed) for kind in KINDS]
    everyone = control.rows(np.array([*own, float(traced)]))
    if world.rank == 0:
        roles = ["worker" if w is not None else "master" for w in method.roles.workers]
        count = len(KINDS)
        rows = [
            {
                "rank": rank,
                "role": roles[rank],
                "held": dict(zip(KINDS, map(int, row[:count]), strict=True)),
                "needed": dict(zip(KINDS, map(int, row[count:-1]), strict=True)),
                "traced": int(row[-1]),
            }
            for rank, row in enumerate(everyone)
        ]
        if json:
            tell(jsonlib.dumps(rows))
        else:
            _show(rows)
    return 0


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="bytes held, and needed", title_justify="left")
    table.add_column("rank")
    for name in (*KINDS, "all", "traced", "traced / needed"):
        table.add_column(name, justify="right")
    for row in rows:
        held, needed = row["held"], row["needed"]
        cells = [f"{held[kind]:,}\n{needed[kind]:,}" for kind in KINDS]
        all_held, all_needed = sum(held.values()), sum(needed.values())
        ratio = f"{row['traced'] / all_needed:.3f}" if all_needed else "-"
        table.add_row(
            f"{row['rank']} {row['role']}", *cells, f"{all_held:,}\n{all_needed:,}", f"{row['traced']:,}", ratio
        )
    Screen().print(table)
