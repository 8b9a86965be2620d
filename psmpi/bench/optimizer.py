"""Measure the parts of the time of a partitioned quasi-Newton step."""

from __future__ import annotations

import json as jsonlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.errors import UserError
from psmpi.optim.curvature import RULES
from psmpi.output import Screen, tell

if TYPE_CHECKING:
    from psmpi.config import Config

# Parts of a step, which are the columns of the table.
PARTS = ("gradients", "values", "products", "pairs", "communication")
STEPS = 30


def optimizer(config: Config, json: bool = False) -> int:
    """Time the parts of a partitioned quasi-Newton step: median of 30, 10th and 90th percentile.

    Run it on as many ranks as the training has. `gradients` are those of the elements before and after the step,
    `values` the loss at trial lengths, `products` those of conjugate gradients on the elements, `pairs` the update of
    the elements' matrices. `communication` is the exchange of slices and sums of scalars, with the wait for other
    ranks.

    Args:
        json: Print JSON.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.world import start
    from psmpi.data import Batch
    from psmpi.training.context import Context

    if config.optimization.optimizer not in RULES:
        raise UserError(
            f"--optimizer {config.optimization.optimizer} has no partitioned matrix: use {', '.join(RULES)} with "
            "--partition pairs; the others' steps are a gradient (python -m psmpi.bench compute) and one pass over w"
        )
    world = start()
    control = Control(world)
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    # Number of warm-up steps: enough for every element to have all its curvature pairs.
    first = config.optimization.memory + 1
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        method = kind(Context(world, network, dataset, config, ops))
        watch = Stopwatch()
        newton = method.newton
        if newton.elements is not None:
            watch.follow(newton.elements, "gradients", "gradients")
            watch.follow(newton.elements, "value", "values")
        watch.follow(newton.operators, "restricted_product", "products")
        watch.follow(newton.operators, "push", "pairs")
        for name in ("forward", "backward"):
            watch.follow(method.exchange, name, "communication")
        watch.follow(method.world, "agree", "communication")
        rows, counts, sent = [], [], []
        for step in range(first + STEPS):
            scalars, before, begin = dict(method.scalars), method.counter.sent, time.perf_counter()
            watch.seconds = dict.fromkeys(PARTS, 0.0)
            method.step(Batch(batches.ids(*divmod(step, batches.steps_per_epoch))), rate(0))
            if step >= first:
                rows.append([time.perf_counter() - begin, *watch.seconds.values()])
                counts.append([method.scalars[name] - scalars[name] for name in ("products", "trials")])
                sent.append(method.counter.sent - before)
    everyone = control.rows(np.array(rows) * 1e3)
    held = control.rows(np.array([float(sum(method.memory().values())), float(np.mean(sent))]))
    if world.rank == 0:
        table = [
            {
                "rank": rank,
                "elements": len(method.state.rows.of[rank]),
                "step": dict(
                    zip(("low", "median", "high"), np.percentile(times[:, 0], (10, 50, 90)).tolist(), strict=True)
                ),
                **dict(zip(PARTS, np.median(times[:, 1:], axis=0).tolist(), strict=True)),
                "bytes_sent": int(held[rank, 1]),
                "memory": int(held[rank, 0]),
            }
            for rank, times in enumerate(everyone)
        ]
        products, trials = np.mean(counts, axis=0).tolist()
        if json:
            tell(jsonlib.dumps({"ranks": table, "products": products, "trials": trials, "backend": ops.description}))
        else:
            _show(config, table, products, trials, ops.description, threads)
    return 0


class Stopwatch:
    """Adds up the seconds of calls of some methods, by part of the step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def follow(self, owner: Any, name: str, part: str) -> None:
        """Add the time of the calls of a method `name` of the object `owner` to a part of the step."""
        inner = getattr(owner, name)

        def outer(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, outer)


def _show(
    config: Config, rows: list[dict[str, Any]], products: float, trials: float, backend: str, threads: int
) -> None:
    from rich.table import Table

    o = config.optimization
    merged = "merged pairs" if o.merge_pairs else "ordered elements"
    table = Table(
        title=f"milliseconds a step: {o.optimizer}, {merged}, b = {config.data.batch_size}", title_justify="left"
    )
    for name in ("rank", "elements", "step (10 %, 90 %)", *PARTS, "rest", "sent", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        step = row["step"]
        rest = step["median"] - sum(row[part] for part in PARTS)
        table.add_row(
            str(row["rank"]),
            str(row["elements"]),
            f"{step['median']:.1f} ({step['low']:.1f}, {step['high']:.1f})",
            *(f"{row[part]:.1f}" for part in PARTS),
            f"{rest:.1f}",
            f"{row['bytes_sent'] / 1e6:.2f} MB",
            f"{row['memory'] / 1e6:.0f} MB",
        )
    console = Screen()
    console.print(table)
    console.tell(
        f"{products:.1f} products and {trials:.1f} trial lengths a step; {backend}, {threads} thread(s) a rank"
    )
