"""Count the bytes that each rank sends, receives and holds in a few steps of psl on random images; print JSON."""

import argparse
import hashlib
import json
import sys
import tracemalloc
from dataclasses import replace

import numpy as np

from psmpi.backend import make_backend
from psmpi.comm.watch.flight import bare
from psmpi.comm.world import start
from psmpi.config import Config, from_table
from psmpi.data import Batch, Dataset, Split
from psmpi.data.rows import ArrayRows
from psmpi.data.split import frozen
from psmpi.methods.psl.plan import Settings
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.training.context import Context
from psmpi.training.masters import Masters


def parse(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("network")
    parser.add_argument("--placement", default="master")
    parser.add_argument("--partition", default="scores")
    parser.add_argument("--masters", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--scaling", default="none")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--trace-step", action="store_true")
    return parser.parse_args(words)


def random_split(shape, n=200):
    """A split of `n` random samples with equally frequent classes."""
    values = np.random.default_rng(0).integers(0, 256, (n, int(np.prod(shape))), np.uint8)
    return Split(frozen(np.arange(n) % 10), shape, 1 / 255, ArrayRows(values))


def count(world, words):
    """Train some steps; return on rank 0 the bytes that each rank sent, received and held, and None elsewhere."""
    options = parse(words)
    shape = {"mnist": (1, 28, 28), "cifar": (3, 32, 32), "wide": (20,)}[options.network]
    if options.network == "wide":
        layers = [{"type": "dense", "units": 100}, {"type": "sigmoid"}]
        for units in (5000, 5000):
            layers += [{"type": "separable_dense", "units": units, "groups": 10}, {"type": "sigmoid"}]
        layers += [{"type": "separable_dense", "units": 10, "groups": 10}]
        network = build("wide", shape, layers, 10)
    else:
        network = make_network("psnet", shape, 10)
    numbers = {"data": {"batch_size": 100}, "optimization": {"lr": 0.001}, "run": {"epochs": 10}}
    base = from_table(numbers, Config(), "counts")
    config = replace(
        base, optimization=replace(base.optimization, optimizer=options.optimizer, scaling=options.scaling)
    )
    config = config.changed(Settings, partition=options.partition, replicas=options.replicas)
    config = config.changed(Masters, placement=options.placement, masters=options.masters)
    dataset = Dataset(name="made", outputs=10, shape=shape, train=random_split(shape), test=random_split(shape))
    if options.trace:
        tracemalloc.start()
    method = find_method("psl")(Context(world, network, dataset, config, make_backend("numpy")))
    calls = dict.fromkeys(("forward", "backward", "agree"), 0)

    def counted(owner, name):
        """Count the calls of a method of an object."""
        inner = getattr(owner, name)

        def outer(*arguments):
            calls[name] += 1
            return inner(*arguments)

        setattr(owner, name, outer)

    for owner, name in ((method.exchange, "forward"), (method.exchange, "backward"), (method.world, "agree")):
        counted(owner, name)
    # The counter counts the transfers of a step, and no sums of control data.
    before = method.counter.sent, method.counter.received
    for _ in range(options.steps):
        method.step(Batch(np.arange(100)), 1e-3)
    sent, received = method.counter.sent - before[0], method.counter.received - before[1]
    peak = tracemalloc.get_traced_memory()[1] if options.trace else 0
    step_peak = 0
    if options.trace_step:
        tracemalloc.start()
        method.step(Batch(np.arange(100)), 1e-3)
        tracemalloc.reset_peak()
        bytes_before = tracemalloc.get_traced_memory()[0]
        method.step(Batch(np.arange(100)), 1e-3)
        step_peak = tracemalloc.get_traced_memory()[1] - bytes_before
    arrays = [method.w_part, method.g_part, *method.optimizer.vectors.values()]
    if method.exchange.inside is None:
        arrays += [method.w, method.g]
    private = hashlib.sha256(method.w.tobytes()).hexdigest() if world.rank else ""
    figures = {
        "sent": sent, "received": received, "vectors": sum(a.nbytes for a in arrays), "peak": peak, "private": private
    }  # fmt: skip
    figures_by_rank = bare(world).gather(figures)
    if world.rank == 0:
        table = {key: [row[key] for row in figures_by_rank] for key in figures}
        own_counts = {"calls": calls, **{name: method.scalars.get(name, 0) for name in ("products", "trials")}}
        return {**table, "size": method.layout.size, "step_peak": step_peak, **own_counts}
    return None


if __name__ == "__main__":
    counts = count(start(), sys.argv[1:])
    if counts is not None:
        print(json.dumps(counts))
