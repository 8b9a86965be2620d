"""The cost model: collectives as messages, hand-computed times of small schedules, rehearsals against real ranks."""

import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

pytest.importorskip("mpi4py.MPI")

from helpers.paths import TESTS

from psmpi.backend import NumpyOps
from psmpi.bench.__main__ import main as bench
from psmpi.bench.step import Tracing
from psmpi.comm.watch.flight import recorded
from psmpi.config import check
from psmpi.cost import Call, Link, Network, Program, make_schedule, rehearse, simulate
from psmpi.cost.alone import Alone, Notebook
from psmpi.cost.collectives import rounds
from psmpi.cost.link import load, save
from psmpi.cost.rehearsal import WARM, blank
from psmpi.cost.simulate import Times
from psmpi.data import Batch, Minibatches, open_dataset
from psmpi.data.rows import ArrayRows
from psmpi.errors import UserError
from psmpi.nn.zoo import make_network
from psmpi.plan import main as plan
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

SIZES = [*range(1, 10), 12, 16, 31]
FLAT = ("Bcast", "Reduce", "Allreduce", "Barrier")
RUNS = ("Scatterv", "Gatherv", "Allgatherv", "Reduce_scatter")
# A latency of 1 s, and 1 GB/s.
SLOW = Link.of(1.0, 1e9)


def all_rounds(name, size, root, nbytes):
    """The rounds of all ranks, each computed from the sizes that the rank knows."""
    by_rank = []
    for rank in range(size):
        all_sizes = [nbytes] * size
        sizes = [nbytes] if name in FLAT or (name in RUNS[:2] and rank != root) else all_sizes
        by_rank.append(rounds(name, size, rank, root, sizes))
    return by_rank


@pytest.mark.parametrize("nbytes", [8, 3000, 100_000, 4_000_000])
@pytest.mark.parametrize("name", [*FLAT, *RUNS])
def test_what_one_rank_sends_the_other_receives(name, nbytes):
    for size in SIZES:
        for root in {0, size - 1} if name in ("Bcast", "Reduce", *RUNS[:2]) else {0}:
            sent, received = defaultdict(list), defaultdict(list)
            for rank, steps in enumerate(all_rounds(name, size, root, nbytes)):
                for part in (part for messages in steps for part in messages):
                    pair = (rank, part.peer) if part.out else (part.peer, rank)
                    (sent if part.out else received)[pair].append((part.nbytes, part.pieces))
            assert sent == received, (size, root)


@pytest.mark.parametrize("nbytes", [64, 1 << 20])
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_bytes_of_collectives_are_those_of_their_algorithms(size, nbytes):
    """The bytes on a power of two of ranks are those of Thakur, Rabenseifner and Gropp (2005), table of costs."""

    def sent(name, root=0):
        return [
            sum(p.nbytes for messages in steps for p in messages if p.out)
            for steps in all_rounds(name, size, root, nbytes)
        ]

    ring = 2 * nbytes * (size - 1) // size
    # A ring needs an element of 8 bytes for each rank.
    assert sent("Allreduce") == [ring if nbytes >= 8 * size else nbytes * (size.bit_length() - 1)] * size
    assert sent("Allgatherv") == [nbytes * (size - 1)] * size
    assert sent("Reduce_scatter") == [nbytes * (size - 1)] * size
    assert sum(sent("Bcast")) >= nbytes * (size - 1) and sum(sent("Reduce")) >= nbytes * (size - 1)
    assert sum(sent("Gatherv")) == sum(sent("Scatterv")) == nbytes * (size - 1)


def test_unknown_collectives_are_named():
    with pytest.raises(ValueError, match="no rounds are known of Scan"):
        rounds("Scan", 4, 0, 0, [8])


def program(*calls, rest=0.0):
    return Program(list(calls), [len(calls)], [rest])


def call(name, size, *, seconds=0.0, peer=-1, nbytes=(0,), number=0):
    return Call(seconds, name, "world", tuple(range(size)), number, peer, tuple(nbytes))


def step(programs, link, hosts=None):
    hosts = tuple(range(len(programs))) if hosts is None else hosts
    return simulate(make_schedule(programs), Network(hosts, Link.of(1e-9, 1e15), link)).step()


def test_a_message_takes_its_latency_and_its_bytes():
    sender = program(call("Send", 2, seconds=2.0, peer=1, nbytes=[10**9]))
    receiver = program(call("Recv", 2, peer=0, nbytes=[10**9]), rest=3.0)
    assert step([sender, receiver], SLOW) == pytest.approx(2 + 1 + 1 + 3)
    # Ranks of one host have another link.
    assert step([sender, receiver], SLOW, (0, 0)) == pytest.approx(5, rel=1e-5)


def test_long_messages_wait_for_who_receives_them_and_short_ones_do_not():
    """Long messages wait within a host; between hosts no message waits."""
    for nbytes, hosts, expected in ((10**9, (0, 0), 5 + 1 + 1), (8, (0, 0), 5), (10**9, (0, 1), 5), (8, (0, 1), 5)):
        sender = program(call("Send", 2, peer=1, nbytes=[nbytes]))
        receiver = program(call("Recv", 2, seconds=5.0, peer=0, nbytes=[nbytes]))
        times = simulate(make_schedule([sender, receiver]), Network(hosts, SLOW, SLOW))
        assert times.step() == pytest.approx(expected)


def test_several_senders_share_the_link_of_who_receives():
    workers = [program(call("Gatherv", 4, peer=0, nbytes=[10**9])) for _ in range(3)]
    root = program(call("Gatherv", 4, peer=0, nbytes=[0, 10**9, 10**9, 10**9]))
    assert step([root, *workers], SLOW) == pytest.approx(1 + 3)


def test_a_broadcast_goes_down_a_tree():
    for size, levels in ((2, 1), (4, 2), (7, 2), (8, 3), (31, 4), (32, 5)):
        programs = [program(call("Bcast", size, peer=0, nbytes=[100])) for _ in range(size)]
        assert step(programs, SLOW) == pytest.approx(levels, rel=1e-5)


def test_what_is_begun_goes_on_beside_computing():
    def sender(seconds):
        begun = call("Isend", 2, peer=1, nbytes=[10**9])
        return program(begun, call("Wait", 2, seconds=seconds, number=0))

    receiver = program(call("Recv", 2, peer=0, nbytes=[10**9]))
    assert step([sender(0.5), receiver], SLOW) == pytest.approx(2)
    assert step([sender(7.0), receiver], SLOW) == pytest.approx(7)


def test_steps_follow_each_other():
    """The first step is left out: a rank may go on while other ranks finish that step."""
    allreduce = call("Allreduce", 2, seconds=1.0, nbytes=[8], number=1)
    several = Program([allreduce, allreduce, allreduce], [1, 2, 3], [0.5, 0.5, 0.5])
    assert step([several, several], SLOW) == pytest.approx(1 + 1 + 0.5)


def test_a_step_of_several_is_the_mean_of_whole_periods():
    """The first period is left out: no step precedes its first step."""
    times = Times([[1.0, 5.0, 6.0, 10.0], [2.0, 4.0, 7.0, 9.0]], [0.0, 0.0])
    assert times.step(2) == (10 - 5) / 2 and times.step() == (10 - 2) / 3 and times.step(4) == 10 / 4


def test_ranks_alone_know_who_is_on_their_host():
    world = Alone(Notebook(), "world", range(4), 2, (0, 0, 1, 1))
    local = world.Split_type(0)
    assert (local.ranks, local.rank, local.size) == ((2, 3), 0, 2)
    assert world.Create_group(world.group.Incl([1, 2])).rank == 1


def test_a_message_that_nobody_sends_is_told():
    waiting, silent = program(call("Recv", 2, peer=1, nbytes=[8])), program(rest=1.0)
    with pytest.raises(ValueError, match="rank 0 waits for a message"):
        step([waiting, silent], SLOW)


def test_programs_of_alike_steps_have_the_medians_of_their_seconds():
    ones = [call("Bcast", 2, seconds=s, nbytes=[8], number=k) for k, s in enumerate((1.0, 9.0, 2.0))]
    several = Program(ones, [1, 2, 3], [0.1, 0.3, 0.2])
    typical = several.typical()
    assert [operation.seconds for operation in typical.calls] == [2.0] * 3 and typical.rest == [0.2] * 3
    assert Program.of(json.loads(json.dumps(several.table()))) == several
    unlike = Program([*ones[:2], call("Reduce", 2, nbytes=[8])], [1, 2, 3], [0.1, 0.3, 0.2])
    assert unlike.typical() is unlike


def test_links_are_lines_between_what_was_measured(tmp_path):
    link = Link(((0, 1.0), (100, 2.0), (1100, 3.0)))
    assert [link.seconds(n) for n in (0, 50, 100, 600, 1100, 2100)] == pytest.approx([1, 1.5, 2, 2.5, 3, 4])
    assert link.parts(1100) == pytest.approx((1.9, 1.1))
    save({"within": link}, tmp_path / "links.json")
    assert load(tmp_path / "links.json") == {"within": link}


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"within": [[0, 1]]}', '{"within": [[0, 1], [0, 2]]}', '{"within": [[0, -1], [1, 1]]}']
)
def test_files_that_hold_no_links_are_named(tmp_path, text):
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no links"):
        load(path)
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "none.json")


METHODS = {
    "psl": (3,),
    "psl --colocate --masters 2": (4,),
    "psl --placement owner --replicas 2": (4,),
    "psl --colocate --trunk split": (3,),
    "psl --partition pairs --loss nll": (),
    "psl --partition pairs": (3,),
    "psl --on-nan skip --loss nll": (3,),
    "data_parallel": (3,),
    "data_parallel --allreduce ring --bucket-megabytes 0.01": (3,),
    "data_parallel --compression powersgd": (2,),
    "bptt --dataset digits:rows --model lstm --widths 8 --unroll 3 --future synthetic": (3,),
    "bptt --dataset repeat_copy:3 --model gru --widths 8 --unroll 5 --loss nll --allreduce ring": (2,),
    "local_sgd --local-steps 2": (3,),
    "spann --model slabs --widths 24 16 --loss nll": (3,),
    "spann --model slabs --widths 36 16 --domains 2 2 --scores distributed": (4,),
    "tensor --model mlp --widths 24 16": (3,),
    "tensor --dataset digits:rows --model transformer --widths 12 --heads 2 --blocks 1 --grid 2,1,2": (4,),
    "tensor --model mlp --widths 24 16 --grid 2d --loss nll": (4,),
    "ist": (3,),
    "ist --placement owner --local-steps 3": (2,),
    "sil --parts 2": (2,),
    "dfa --model mlp --widths 12 10": (3,),
    "dni --layer-blocks 2": (2,),
    "dni --layer-blocks 2 --local-loss greedy --ahead 2": (2,),
    "layer_parallel": (2, 4),
    "layer_parallel --warm-start both --layer-replicas 2 --gamma-ddt 1e-5": (4,),
    "next --graph exponential": (3,),
    "hogwild --updates accumulate --model mlp --widths 24": (3,),
    "hogwild --dataset sparse --model linear --loss logistic --optimizer sgd": (2,),
    "wavefront --dataset digits:rows --model lstm --widths 8 8 8 8 --chunk-steps 3": (2, 4),
    "wavefront --dataset repeat_copy:3 --model gru --widths 8 8 8 --skew 1 --loss nll": (3,),
    "next --tracking minibatch --rule kgt --optimizer sgd --local-steps 3": (2,),
}
CASES = [(options, ranks) for options, some in METHODS.items() for ranks in some]
# One case of each method for the simulation; all CASES are compared with real ranks.
ALONE = {options.split()[0]: options for options, ranks in CASES}.values()


def prepared(options):
    config = usual(parse(["--method", *options.split(), "--backend", "numpy", "--threads", "1"]))
    check(config, ())
    dataset = open_dataset(config.data.dataset, None)
    by_step = dataset.train.by_step
    network = make_network(config.model.model, dataset.shape, dataset.outputs, **config.model.shape, by_step=by_step)
    return config, dataset, network


@pytest.mark.parametrize(("options", "ranks"), CASES)
def test_a_rehearsal_is_what_ranks_do_together(options, ranks):
    """A rehearsal has the calls, bytes and memory of each rank in a world of threads."""
    config, dataset, network = prepared(options)
    kind = find_method(config.parallel.method)
    with threadpool_limits(1), np.errstate(all="ignore"):
        rehearsals = [
            rehearse(kind, rank, [0] * ranks, network, blank(dataset), config, NumpyOps(), 4) for rank in range(ranks)
        ]
    steps = len(rehearsals[0].program.ends)

    def work(world):
        flight = Tracing()
        method = kind(Context(recorded(world, flight), network, dataset, config, NumpyOps()))
        batches = Minibatches(dataset.train.n, config.data.batch_size, config.run.seed)
        for number in range(WARM + steps):
            if number == WARM:
                first, sent = len(flight.all), method.counter.sent
            method.step(Batch(batches.ids(0, number)), config.optimization.lr)
        calls = Counter((operation.name, operation.members, operation.nbytes) for operation in flight.operations(first))
        return calls, (method.counter.sent - sent) / steps, method.memory(), method.place()

    actual = run_ranks(ranks, work)
    for rehearsal, (calls, sent, memory, place) in zip(rehearsals, actual, strict=True):
        rank = rehearsal.rank
        rehearsed = Counter(
            (operation.name, operation.ranks) for operation in rehearsal.program.calls if operation.name != "Wait"
        )
        traced = Counter()
        for (name, group, _), count in calls.items():
            if not name.startswith("Wait"):
                traced[name, group] += count
        expanded = Counter()
        for (name, group), count in traced.items():
            for call_name in ("Isend", "Irecv") if name == "Sendrecv" else (name,):
                expanded[call_name, group] += count
        assert rehearsed == expanded, (rank, rehearsed, expanded)
        assert (rehearsal.sent, rehearsal.memory, rehearsal.place) == (sent, memory, place)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [pytest.param(*case, marks=[] if case[0] in ALONE else [pytest.mark.slow]) for case in CASES],
)
def test_rehearsals_of_all_ranks_fit_together(options, ranks):
    config, dataset, network = prepared(options)
    kind = find_method(config.parallel.method)
    with np.errstate(all="ignore"):
        rehearsals = [
            rehearse(kind, rank, range(ranks), network, blank(dataset), config, NumpyOps(), 4) for rank in range(ranks)
        ]
    schedule = make_schedule([rehearsal.program for rehearsal in rehearsals])
    times = simulate(schedule, Network(tuple(range(ranks)), SLOW, Link.of(1e-5, 1e9)))
    # A link a hundred times slower makes no step faster.
    assert simulate(schedule, Network(tuple(range(ranks)), SLOW, Link.of(1e-3, 1e7))).step() >= times.step()


def planned(capsys, *options):
    assert plan([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_reads_no_samples(capsys, monkeypatch):
    def refused(*words):
        raise AssertionError("samples were read")

    monkeypatch.setattr(ArrayRows, "pieces", refused)
    report = planned(capsys, "--ranks", "3")
    given, *alternatives = report["plans"]
    assert report["parameters"] == sum(row["optimizes"] for row in given["ranks"])
    assert [row["role"] for row in given["ranks"]] == ["master", "worker", "worker"]
    assert "--method data_parallel" in [row["options"] for row in alternatives]
    assert all(row["ms_per_step"] > 0 for row in report["plans"])


def test_a_plan_says_what_would_be_faster(capsys):
    """On a link of one millisecond a byte, the plan with the fewest bytes is the fastest."""
    options = ("--ranks", "2", "--colocate", "--ranks-per-host", "1", "--gigabits", "8e-6")
    assert plan(list(options)) == 0
    out = capsys.readouterr().out
    assert (
        "--method psl --colocate --placement owner: a step would take 0." in out and "messages and waiting take" in out
    )
    given, *alternatives = planned(capsys, *options)["plans"]
    fastest = min(alternatives, key=lambda row: row["ms_per_step"])
    assert max(row["bytes_sent"] for row in fastest["ranks"]) == min(
        max(row["bytes_sent"] for row in candidate["ranks"]) for candidate in (given, *alternatives)
    )


def test_a_plan_of_many_ranks_shows_some(capsys):
    assert plan(["--ranks", "40", "--replicas", "4", "--batch-size", "64"]) == 0
    out = capsys.readouterr().out
    assert "and 24 more; none has more than" in out and out.count("as given") == 1


def test_a_schedule_is_written_for_simulators(capsys, tmp_path):
    path = tmp_path / "schedule.goal"
    planned(capsys, "--ranks", "3", "--no-others", "--goal", str(path))
    lines = path.read_text().splitlines()
    assert lines[0] == "num_ranks 3" and sum(line.startswith("rank ") for line in lines) == 3
    sends, receives, rank = Counter(), Counter(), -1
    for line in lines:
        words = line.split()
        if words[0] == "rank":
            rank = int(words[1])
        elif "send" in words:
            sends[rank, int(words[4]), words[2], words[6]] += 1
        elif "recv" in words:
            receives[int(words[4]), rank, words[2], words[6]] += 1
    assert sends == receives and sends


def with_simgrid():
    """A Python that has SimGrid's bindings: this one, or Debian's."""
    for python in (sys.executable, "/usr/bin/python3"):
        if (
            shutil.which(python)
            and subprocess.run([python, "-c", "import simgrid"], capture_output=True).returncode == 0
        ):
            return python
    return None


def by_simgrid(schedule, path, latency, bandwidth):
    """Seconds of a schedule by an independent simulator: flows share a link at the same time, not one after another."""
    python = with_simgrid()
    if python is None:
        pytest.skip("no SimGrid: apt-get install python3-simgrid")
    path.write_text("".join(f"{line}\n" for line in schedule.goal()))
    command = [python, TESTS / "helpers" / "program_simgrid.py", path, str(latency), str(bandwidth)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return float(process.stdout)


@pytest.mark.parametrize(
    ("name", "size", "nbytes"),
    [("Allreduce", 16, 19200), ("Allreduce", 8, 400_000), ("Reduce", 16, 400_000), ("Allgatherv", 12, 3000)],
)
def test_simgrid_says_the_same_of_a_collective(tmp_path, name, size, nbytes):
    sizes = [nbytes] * (1 if name in FLAT else size)
    programs = [program(call(name, size, peer=0, nbytes=sizes)) for _ in range(size)]
    simgrid_seconds = by_simgrid(make_schedule(programs), tmp_path / "one.goal", 2e-5, 1e7)
    assert step(programs, Link.of(2e-5, 1e7)) == pytest.approx(simgrid_seconds, rel=1e-3)


@pytest.mark.parametrize("bandwidth", [1e9, 1e7])
@pytest.mark.parametrize("options", ["psl", "psl --colocate --masters 2"])
def test_simgrid_says_the_same_of_a_training(tmp_path, options, bandwidth):
    config, dataset, network = prepared(f"{options} --batch-size 64")
    kind, ranks, latency = find_method(config.parallel.method), 24, 2e-5
    with np.errstate(all="ignore"):
        rehearsals = [
            rehearse(kind, rank, range(ranks), network, blank(dataset), config, NumpyOps(), 2) for rank in range(ranks)
        ]
    # Each step computes for 1 ms, so that the load of this machine does not matter.
    schedule = make_schedule([evened(rehearsal.program, 1e-3) for rehearsal in rehearsals])
    own = simulate(schedule, Network(tuple(range(ranks)), SLOW, Link.of(latency, bandwidth)))
    simgrid_seconds = by_simgrid(schedule, tmp_path / "training.goal", latency, bandwidth)
    assert max(ends[-1] for ends in own.ends) == pytest.approx(simgrid_seconds, rel=0.1)


def evened(program, seconds):
    """The program with `seconds` of computing a step, all of them before the step's first call."""
    calls, starts = [operation._replace(seconds=0.0) for operation in program.calls], [0, *program.ends[:-1]]
    for start in starts:
        calls[start] = calls[start]._replace(seconds=seconds)
    return Program(calls, program.ends, [0.0] * len(program.rest))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ranks", "0"), "--ranks 0: expected a whole number from 1 up"),
        (("--gigabits", "0"), "--gigabits 0: expected a number above 0"),
        (("--optimizer", "lbfgs"), "no time can be said before"),
        (("--ranks-per-host", "-1"), "--ranks-per-host -1: expected a whole number from 0 up"),
        (("--ranks", "40", "--replicas", "1"), "use --replicas"),
        (("--links", "nowhere.json"), "nowhere.json: No such file"),
        (("--goal", "no/where"), "--goal no/where: there is no such folder"),
    ],
)
def test_what_cannot_be_planned_is_told(capsys, options, said):
    assert plan(list(options)) == 1
    assert said in capsys.readouterr().err


def scaled(capsys, *options):
    assert bench(["scale", "--batch-size", "64", *options]) == 0
    return capsys.readouterr().out


def test_scaling_says_where_one_master_is_saturated(capsys, tmp_path):
    """On a slow link the messages of 1 kB of weights a worker dominate a step; on a fast link they do not."""
    path = tmp_path / "rows.json"
    out = scaled(capsys, "--ranks", "2", "4", "8", "--gigabits", "1e-3", "--json", str(path))
    assert "more than 2 ranks do not help" in out and "one master is saturated" in out
    rows = json.loads(path.read_text())["rows"]
    assert [row["ranks"] for row in rows] == [2, 4, 8] and all(row["batch"] == 64 for row in rows)
    assert all(0.5 < row["first_busy"] <= 1 for row in rows)
    assert "saturated" not in scaled(capsys, "--ranks", "2", "4", "--gigabits", "1e5", "--latency-us", "0.1")


def test_weak_scaling_has_as_many_samples_a_rank(capsys, tmp_path):
    path, picture = tmp_path / "rows.json", tmp_path / "scaling.svg"
    pytest.importorskip("matplotlib")
    scaled(capsys, "--ranks", "2", "6", "--weak", "--json", str(path), "--plot", str(picture))
    assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == [64, 192]
    assert "weak scaling" in picture.read_text()


def test_scaling_stops_where_no_more_ranks_can_be(capsys):
    out = scaled(capsys, "--ranks", "2", "64", "--replicas", "1")
    assert "on 64 ranks: 63 workers in 1 replica row" in out
    assert bench(["scale", "--ranks", "4", "2"]) == 1
    assert "growing" in capsys.readouterr().err


def test_rounds_are_rehearsed_whole(capsys):
    """The bytes of a rank a step are those of a round over its number of steps."""
    for steps in (1, 7, 20):
        report = planned(capsys, "--ranks", "3", "--method", "local_sgd", "--local-steps", str(steps), "--no-others")
        size = 4 * report["parameters"]
        assert report["plans"][0]["ranks"][0]["bytes_sent"] == pytest.approx(2 * size * 2 // 3 / steps)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nccl",), "--nccl and --gpu-aware: messages between devices are not foreseen"),
        (("--resume", "auto"), "--resume: a run that goes on is not foreseen"),
        (("--goal", "."), "--goal .: expected the name of a file, and this is a folder"),
    ],
)
def test_what_is_not_foreseen_is_told(capsys, options, said):
    assert plan([*options]) == 1
    assert said in capsys.readouterr().err


def test_links_of_one_host_are_not_those_between_hosts(capsys, tmp_path):
    save({"within": SLOW}, tmp_path / "links.json")
    assert plan(["--links", str(tmp_path / "links.json"), "--ranks", "4", "--ranks-per-host", "2"]) == 1
    assert "has no link between hosts" in capsys.readouterr().err
