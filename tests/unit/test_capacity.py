"""Trainings that need more memory than a host has are refused before they start, with advice that fits."""

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.runs import run, usual_config

from psmpi.backend import NumpyOps
from psmpi.comm import memory
from psmpi.comm.control import Control
from psmpi.comm.memory import Limit, limits
from psmpi.data import Batch, Dataset, Split
from psmpi.data.rows import ArrayRows
from psmpi.data.split import frozen
from psmpi.errors import UserError
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing.world import run_ranks
from psmpi.training import capacity
from psmpi.training.capacity import Candidate, check_capacity, find_rooms
from psmpi.training.context import Context
from psmpi.training.masters import Masters

CLASSES, GB = 400_000, 10**9


def problem(method="psl", model="head", classes=CLASSES, widths=(128,), **masters):
    """A method, a network (by default one of very many classes), a data set that is never read, and a configuration."""
    splits = [Split(frozen(np.arange(n) % classes), (128,), 1.0, Samples) for n in (400, 100)]
    dataset = Dataset("mine", classes, (128,), *splits)
    config = usual_config()
    config = replace(
        config, model=replace(config.model, model=model, widths=widths),
        parallel=replace(config.parallel, method=method), objective=replace(config.objective, loss="nll"),
    ).changed(Masters, **masters)  # fmt: skip
    return find_method(method), make_network(model, dataset.shape, classes, **config.model.shape), dataset, config


class Samples:
    dtype = np.dtype(np.float32)

    @staticmethod
    def taken(rows):
        return None


def refusal(ranks, kind, network, dataset, config, nbytes, each):
    """The error of a training on hosts of `nbytes` with `each` ranks each, or "" if the training is allowed."""

    def work(world):
        host = world.rank // each
        own = [Limit(f"key {host}", f"host n{host}", nbytes)]
        check_capacity(Control(world), kind, network, dataset, config, own)
        # An error on rank 0 ends the other ranks here.
        world.Barrier()

    try:
        run_ranks(ranks, work)
    except UserError as error:
        return str(error)
    return ""


def total(kind, network, dataset, config, ranks):
    return [sum(need.values()) for need in kind.needed(ranks, network, dataset, config)]


TRUNK, HEAD = 4 * 129 * 128, 4 * 129 * CLASSES


def test_what_a_head_needs_is_told_with_what_would_do():
    """A master needs weights, a gradient and two vectors of Adam, a worker weights and a gradient of its part."""
    kind, *setup = problem()
    needs = kind.needed(3, *setup)
    assert needs[0] == {"weights": TRUNK + HEAD, "gradients": TRUNK + HEAD, "optimizer": 2 * (TRUNK + HEAD)}
    for need in needs[1:]:
        assert need["weights"] == need["gradients"] == TRUNK + HEAD // 2 and need["optimizer"] == 0
        assert need["samples"] == 500 * (4 * 128 + 8) + 100 * 4 * 128 and need["activations"] + need["buffers"] < 1e6
    message = refusal(3, kind, *setup, GB, 3)
    assert message.startswith("host n0 has 1.00 GB of memory left, and this training needs 1.24 GB there at least: ")
    assert "0.83 GB on rank 0 (optimizer 0.41 GB, weights 0.21 GB, gradients 0.21 GB), 0.21 GB on rank 1 (" in message
    assert message.endswith("; use --placement owner or start 1 rank")
    assert not refusal(3, *problem(placement="owner"), GB, 3) and not refusal(1, *problem(), GB, 3)


@pytest.mark.parametrize(
    ("ranks", "each"), [(3, 1), (3, 2), *(pytest.param(1, each, marks=pytest.mark.slow) for each in (1, 2))]
)
def test_the_least_number_of_ranks_that_is_told_fits_and_one_less_does_not(ranks, each):
    setup = problem(placement="owner", colocate=True)
    room = 100_000_000
    message = refusal(ranks, *setup, room, each)
    # The advice counts hosts with as many ranks as the one that lacks memory.
    each = min(each, ranks)
    where = "each on a host" if each == 1 else "2 on each host"
    advised = int(re.search(rf"; start (\d+) ranks, {where} with as much memory$", message)[1])
    assert not refusal(advised, *setup, room, each) and refusal(advised - 1, *setup, room, each)
    assert advised >= 4 * HEAD / (room / each)


def test_where_neither_is_enough_both_are_told(monkeypatch):
    """A master of all weights fits no host: workers must own their weights, and there must be more workers."""
    monkeypatch.setattr(capacity, "MOST", 32)
    message = refusal(2, *problem(), 200_000_000, 1)
    ranks, words = re.search(
        r"; start (\d+) ranks, each on a host with as much memory, and use (.*)$", message
    ).groups()
    assert words == "--placement owner --colocate"
    assert not refusal(int(ranks), *problem(placement="owner", colocate=True), 200_000_000, 1)
    message = refusal(2, *problem(masters=2, colocate=True), 200_000_000, 1)
    assert message.endswith("use --placement owner --colocate in place of --masters 2 --colocate")


def test_where_nothing_is_enough_that_is_told():
    message = refusal(3, *problem("data_parallel"), 100_000_000, 1)
    assert message.endswith("; use hosts with more memory, a smaller network, or a smaller --batch-size")


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("method", ["psl", "data_parallel", "local_sgd", "dfa", "ist", "sil"])
def test_every_method_is_refused_where_a_byte_is_lacking_and_not_where_none_is(method, ranks):
    setup = problem(method, "mlp", 1000, (200, 200))
    setup = setup if method != "psl" or ranks == 1 else problem(method, "head", 1000, (200, 200))
    kind, network, dataset, config = setup
    kind.check(ranks, network, dataset, config)
    needed = total(*setup, ranks)
    assert min(needed) > 4 * 200 * 201
    for per_host in {1, ranks}:
        host_bytes = max(sum(needed[k : k + per_host]) for k in range(0, ranks, per_host))
        assert not refusal(ranks, *setup, host_bytes, per_host)
        assert "of memory left, and this training needs" in refusal(ranks, *setup, host_bytes - 1, per_host)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["psl", "data_parallel", "local_sgd", "dfa", "ist", "sil"])
def test_with_many_classes_what_is_needed_is_most_of_what_is_held(method, ranks):
    """The estimate is at most what each rank holds, and at least 40 % of the sum over ranks."""
    # Subnets of very many classes take long to plan.
    model, classes = "head" if method == "psl" else "mlp", 150 if method == "ist" else 3000
    kind, network, dataset, config = problem(method, model, classes, (60, 60))
    values = np.zeros((400, 128), np.float32)
    splits = [replace(split, source=ArrayRows(values[: split.n])) for split in (dataset.train, dataset.test)]
    dataset = Dataset("mine", classes, (128,), *splits)

    def work(world):
        trained = kind(Context(world, network, dataset, config, NumpyOps()))
        trained.step(Batch(np.arange(100)), 0.001)
        trained.test()
        return sum(trained.memory().values())

    held, needed = run_ranks(ranks, work), total(kind, network, dataset, config, ranks)
    assert all(need <= have for need, have in zip(needed, held, strict=True)), (needed, held)
    assert sum(needed) >= 0.4 * sum(held), (needed, held)


def test_rows_that_are_stepped_as_they_are_made_need_no_gradient():
    """A head with --clip 0 steps the rows that its rank owns without a gradient; the loss psl needs a gradient."""
    kind, network, dataset, config = problem(placement="owner", colocate=True)
    unclipped = replace(config, optimization=replace(config.optimization, clip=0.0))
    needs, fewer = (kind.needed(2, network, dataset, configuration) for configuration in (config, unclipped))
    assert [a["gradients"] - b["gradients"] for a, b in zip(needs, fewer, strict=True)] == [HEAD // 2] * 2
    psl = replace(unclipped, objective=replace(config.objective, loss="psl"))
    assert kind.needed(2, network, dataset, psl) == needs


def test_ranks_that_know_of_no_limit_are_not_refused():
    kind, *setup = problem("data_parallel")
    assert not find_rooms([[], []])
    Candidate(kind, *setup[:2]).check(setup[2], [], 2)
    # Rank 0 knows of no limit; ranks 1 and 2 are on a host that has one.
    rooms = find_rooms([[], [("b", "host b", 1000)], [("b", "host b", 1001)]])
    assert [room.ranks for room in rooms] == [(1, 2)] and rooms[0].nbytes == 1001
    with pytest.raises(UserError, match="host b has 0"):
        Candidate(kind, *setup[:2]).check(setup[2], rooms, 3)


def test_a_training_is_refused_once_and_before_it_holds_anything(tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    np.savez(tmp_path / "many.npz", x=x, y=np.arange(60) % 30, x_test=x, y_test=np.arange(60) % 30)
    options = ("-m", "psmpi.train", "--dataset", tmp_path / "many.npz", "--model", "head", "--widths", "64", "--loss")
    options = (*options, "nll", "--max-steps", "1", "--batch-size", "10", "--out")
    monkeypatch.setattr(memory, "limits", lambda: [Limit("one", "host n1", 100_000)])
    for ranks in (1, 3):
        status, _, err = run(ranks, *options, tmp_path / "run")
        message = " ".join(err.split())
        assert status == 1 and message.count("error:") == 1 and "Traceback" not in message
        assert "host n1 has 0.10 MB of memory left, and this training needs" in message
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "limits", lambda: [Limit("one", "host n1", 10_000_000)])
    status, _, err = run(3, *options, tmp_path / "run")
    assert status == 0, err


def host(folder, groups="", available=1000, swap=0):
    """Write a folder like /proc and one for control groups; return both paths."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/sys/kernel/random").mkdir(parents=True)
    (folder / "proc/sys/kernel/random/boot_id").write_text("this-boot\n")
    lines = f"MemTotal: 9999 kB\nMemAvailable:    {available} kB\nSwapFree: {swap} kB\nHugePages_Total: 0\n"
    (folder / "proc/meminfo").write_text(lines)
    (folder / "proc/self/cgroup").write_text(groups)
    (folder / "groups").mkdir()
    return str(folder / "proc"), folder / "groups"


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def left(proc, groups):
    return [limit.nbytes for limit in limits(proc, str(groups))]


def test_limits_of_version_2_are_those_of_all_groups_around(tmp_path):
    """Memory of cached files counts as free, and swap counts as far as the group may use it."""
    proc, groups = host(tmp_path, "0::/slurm/job\n", swap=100)
    stat = "anon 3000\nfile 70000\nshmem 500\nslab 9\n"
    group(groups / "slurm/job", memory__max="50000\n", memory__stat=stat, memory__swap__max="0\n")
    group(groups / "slurm", memory__max="max\n", memory__stat=stat)
    assert left(proc, groups) == [1100 * 1024, 50000 - 3500]
    group(groups / "slurm", memory__max="60000\n", memory__swap__max="7\n")
    assert left(proc, groups) == [1100 * 1024, 50000 - 3500, 60000 - 3500 + 7]
    group(groups / "slurm/job", memory__swap__max="max\n")
    assert left(proc, groups)[1] == 50000 - 3500 + 100 * 1024
    keys = [limit.key for limit in limits(proc, str(groups))]
    assert len(set(keys)) == 3 and all(key.startswith("this-boot") for key in keys)


def test_limits_of_version_1_are_those_of_its_memory_controller(tmp_path):
    proc, groups = host(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/x\n0::/\n", swap=100)
    stat = "cache 9\nrss 1\ntotal_rss 3000\ntotal_shmem 500\n"
    group(groups / "memory/job", memory__limit_in_bytes="50000\n", memory__stat=stat)
    group(groups / "memory", memory__limit_in_bytes=f"{(1 << 63) - 4096}\n", memory__stat=stat)
    assert left(proc, groups) == [1100 * 1024, 50000 - 3500 + 100 * 1024]
    group(groups / "memory/job", memory__memsw__limit_in_bytes="50001\n")
    assert left(proc, groups)[1] == 50000 - 3500 + 1


def test_a_container_has_the_limit_of_the_root_that_it_sees(tmp_path):
    proc, groups = host(tmp_path, "0::/docker/far/away\n")
    group(groups, memory__max="5000\n", memory__stat="anon 6000\n")
    assert left(proc, groups) == [1000 * 1024, 0]


def test_nothing_is_said_where_nothing_can_be_known(tmp_path):
    assert limits(str(tmp_path / "none"), str(tmp_path)) == []
    proc, groups = host(tmp_path)
    assert left(proc, groups) == [1000 * 1024]


def test_this_host_has_some_memory():
    own_limits = limits()
    assert all(limit.nbytes > 50e6 for limit in own_limits)
    assert not own_limits or own_limits[0].nbytes < 1e15
