"""Checks of one-sided windows on ranks that are threads or processes. A check returns figures for a test to compare."""

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

from psmpi.backend import CompiledOps
from psmpi.comm.group import Counter
from psmpi.comm.watch.flight import bare
from psmpi.comm.windows import windows_of
from psmpi.comm.world import start
from psmpi.methods.hogwild.clocks import Tickets, Turns

ELEMENTS, TIMES = 1003, 200


def edges_of(world, n=ELEMENTS):
    return [n * rank // world.size for rank in range(world.size + 1)]


def sums(world):
    """Add ones to all elements and to some, from every rank.

    Return the fault of the windows, and for each dtype whether the values read and the rank's own values are right.
    """
    checks = [windows_of(world).fault()]
    for name in ("int64", "float32", "float64"):
        window = windows_of(world).sharded(edges_of(world), np.dtype(name), Counter())
        strided = np.arange(world.rank, ELEMENTS, 7)
        for _ in range(TIMES):
            window.add(np.ones(ELEMENTS, name))
            window.add_at(strided, np.ones(len(strided), name))
        window.flush()
        world.Barrier()
        values, expected = np.empty(ELEMENTS, name), np.full(ELEMENTS, TIMES * world.size)
        window.read(values)
        for rank in range(world.size):
            expected[rank::7] += TIMES
        own_values = np.empty(len(strided), name)
        window.read_at(strided, own_values)
        checks.append(bool((values == expected).all() and (own_values == expected[strided]).all()))
        window.sync()
        own = slice(*edges_of(world)[world.rank : world.rank + 2])
        checks.append(bool((window.own == expected[own]).all()))
        world.Barrier()
        window.free()
    return checks


def shared(world, times=20_000):
    """Increment 16 shared elements; return the expected sum, the sum by atomic additions, and that by plain stores."""
    ops, ones, results = CompiledOps(), np.ones(16), [16 * times * world.size]
    for atomic in (True, False):
        memory = windows_of(world).memory(128)
        values = memory.bytes.view(np.float64)
        world.Barrier()
        for _ in range(times):
            ops.add_shared(values, ones, 1.0, atomic)
        memory.sync()
        world.Barrier()
        memory.sync()
        results.append(float(values.sum()))
        world.Barrier()
        del values
        memory.free()
    return results


def tickets(world, count=100):
    """Take minibatches by tickets; return the numbers that all ranks took before and after a restart, each sorted."""
    turns, own = Tickets(world.rank, world.size, windows_of(world).counters(1), world), []
    for turn in range(count):
        if turns.takes(turn):
            own.append(turn)
            turns.end()
    world.Barrier()
    turns.restart(count + 5, world.Barrier)
    later = [turn for turn in range(count + 5, count + 20) if turns.takes(turn) and not turns.end()]
    turns_by_rank = bare(world).allgather([own, later])
    turns.counters.free()
    return sorted(t for one, _ in turns_by_rank for t in one), sorted(t for _, one in turns_by_rank for t in one)


def bounded(world, bound, rounds=25):
    """Run ranks that sleep, rank 1 longest, with bounded staleness.

    Return the largest lead of a rank at the start of a turn, the largest difference of clocks, and the largest number
    of values in which a rank missed updates that the bound promises.
    """
    windows = windows_of(world)
    turns = Turns(world.rank, world.size, bound, windows.counters(world.size), world)
    window = windows.sharded(edges_of(world, world.size), np.dtype(np.int64), Counter())
    rng, values, own = random.Random(world.rank), np.empty(world.size, np.int64), np.zeros(world.size, np.int64)
    own[world.rank] = 1
    difference = missed = 0
    for clock in range(rounds):
        turns.begin()
        window.read(values)
        expected = np.full(world.size, max(0, clock - bound))
        expected[world.rank] = clock
        missed += int((values < expected).sum())
        time.sleep(rng.random() * 1e-3 + 2e-3 * (world.rank == 1))
        window.add(own)
        window.flush()
        turns.end()
        turns.counters.read(turns.clocks)
        difference = max(difference, int(turns.clocks.max() - turns.clocks.min()))
    world.Barrier()
    figures_by_rank = bare(world).allgather([turns.lead, difference, missed])
    window.free()
    turns.counters.free()
    return [max(column) for column in zip(*figures_by_rank, strict=True)]


def cycles(world, times=100):
    """Allocate and free windows `times` times; return the growth of this process in MB after the first fifth."""
    before = 0
    for k in range(times):
        windows = windows_of(world)
        memory, counters = windows.memory(1 << 20), windows.counters(3)
        window = windows.sharded(edges_of(world, 100_000), np.dtype(np.float32), Counter())
        memory.bytes[world.rank] = 1
        window.add(np.ones(100_000, np.float32))
        counters.count(0)
        window.flush()
        world.Barrier()
        window.free()
        memory.free()
        counters.free()
        if k == times // 5:
            before = resident()
    return (resident() - before) / 1e6


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def stopped(world, bound, folder, seconds=20.0):
    """Count turns and write the counts to files, while the test stops the process of a rank.

    Return the shared count, and the sum of the ranks' own counts. bound: a negative number is no bound.
    """
    bound = None if bound < 0 else bound
    windows = windows_of(world)
    turns = Turns(world.rank, world.size, bound, windows.counters(world.size), world)
    total = windows.counters(1)
    own, end = Path(folder, f"count-{world.rank}"), time.monotonic() + seconds
    Path(folder, f"pid-{world.rank}").write_text(str(os.getpid()))
    while not Path(folder, "end").exists() and time.monotonic() < end:
        if bound is not None:
            turns.counters.read(turns.clocks)
            if turns.clock - turns.clocks.min() > bound:
                time.sleep(1e-3)
                continue
        turns.begin()
        total.count(0)
        turns.end()
        own.with_suffix(".new").write_text(str(turns.clock))
        own.with_suffix(".new").rename(own)
        time.sleep(1e-3)
    world.Barrier()
    counts = total.count(0, 0), sum(bare(world).allgather(turns.clock))
    turns.counters.free()
    total.free()
    return counts


CHECKS = {check.__name__: check for check in (sums, shared, tickets, bounded, cycles, stopped)}

if __name__ == "__main__":
    world = start()
    figures = CHECKS[sys.argv[1]](world, *map(json.loads, sys.argv[2:]))
    if world.rank == 0:
        print(json.dumps(figures))
