"""The command that shows the last operations of stalled ranks, and the options of the watch."""

import json
import random

import pytest
from helpers.runs import run

from psmpi.comm.watch.flight import Flight
from psmpi.comm.watch.stalls import to_table
from psmpi.comm.watch.watch import FLIGHTS, write_flights
from psmpi.config import Config, check, from_toml, to_toml, without_anew
from psmpi.testing import run_program


def table(rank, state, seconds, *rows, calls):
    """A line of the file, made by hand: operations of the group of ranks 0 and 1."""
    return {
        "rank": rank, "host": "node", "state": state, "seconds": seconds, "count": len(rows), "step": 3,
        "doing": "Bcast", "process": "",
        "groups": [["world 1 ranks 0-1", [[0, 1]], calls]], "operations": list(rows), "warn": 60.0, "written": 2e9,
    }  # fmt: skip


BCAST = ["Bcast", 0, 1, 0, 4096, 2, 1.9e9, 1.9e9 + 0.25]
BARRIER = ["Barrier", 0, 2, -1, 0, 3, 1.9e9 + 1, 0.0]


@pytest.fixture
def folder(tmp_path):
    write_flights(tmp_path, [
        table(0, "waiting", 99.0, BCAST, BARRIER, calls=2), table(1, "computing", 98.0, BCAST, calls=1)
    ])  # fmt: skip
    return tmp_path


def test_the_table_and_the_missing_call(folder):
    status, out, err = run(1, "-m", "psmpi.inspect", "flight", folder)
    assert status == 0 and not err
    assert "rank 0 on node: waiting for 99.0 s, step 3, 2 operations" in out
    assert "Bcast with root 0, call 1 among ranks 0-1 (world)" in out and "250.000" in out and "goes on" in out
    assert "rank 1 on node computes since" in out and "4.1 kB" in out
    assert "missing: Barrier, call 2 among ranks 0-1 (world): not made by rank 1" in out


def test_the_newest_operations_are_shown(folder):
    for last, shown in ((0, 0), (1, 1), (7, 2)):
        status, out, _ = run(1, "-m", "psmpi.inspect", "flight", folder / FLIGHTS, "--last", last, "--json")
        report = json.loads(out)
        assert status == 0 and len(report["ranks"][0]["operations"]) == shown
    assert [operation["name"] for operation in report["ranks"][0]["operations"]] == ["Bcast", "Barrier"]
    assert report["finding"][0].startswith("no progress for 98 s: rank 1 on node computes")


def test_what_cannot_be_shown_is_said_in_a_line(folder):
    content = (folder / FLIGHTS).read_text()
    assert "expected 0 or a number" in run(1, "-m", "psmpi.inspect", "flight", folder, "--last", "-1")[2]
    for text in (
        "", "{", "[]", '{"rank": 0}', content.splitlines()[1], content.replace("computing", "asleep"), content[:-40],
        "\0", "[" * 9999, content.replace("1900000000.0", "1e300"), content.replace("2000000000.0", "NaN"),
        content.replace('"peer"', "1").replace("[[0, 1]]", "[[0, 0]]").replace(', 0, 4096', ", 5, 4096"),
    ):  # fmt: skip
        (folder / FLIGHTS).write_text(text)
        status, _, err = run(1, "-m", "psmpi.inspect", "flight", folder)
        assert status == 1 and "holds no operations of ranks" in err and "Traceback" not in err, text
    (folder / FLIGHTS).write_bytes(b"\xff\xfe")
    assert "holds no operations" in run(1, "-m", "psmpi.inspect", "flight", folder)[2]
    (folder / FLIGHTS).unlink()
    status, _, err = run(1, "-m", "psmpi.inspect", "flight", folder)
    assert status == 1 and "is written when ranks stand still for --stall-warn seconds" in err


def test_altered_files_end_in_a_line(folder):
    """A file with any byte changed is shown or refused."""
    content, rng = (folder / FLIGHTS).read_bytes(), random.Random(3)
    for _ in range(60):
        at = rng.randrange(len(content))
        (folder / FLIGHTS).write_bytes(content[:at] + bytes([rng.randrange(32, 127)]) + content[at + 1 :])
        status, _, err = run(1, "-m", "psmpi.inspect", "flight", folder)
        assert status in (0, 1) and "Traceback" not in err


def test_a_table_holds_what_was_recorded():
    flight = Flight()
    with flight.task("reading"):
        pass
    row = to_table(flight, 4, "node")
    assert row["rank"] == 4 and row["count"] == 1 and row["operations"][0][0] == "reading"
    assert dict(zip(row["fields"], row["operations"][0], strict=True))["ended"] > 1.5e9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--stall-warn", "-1"), "--stall-warn -1: expected 0 or a number of seconds"),
        (("--stall-abort", "-3"), "--stall-abort -3: expected 0"),
        (("--stall-warn", "nan"), "--stall-warn nan: expected a finite number"),
        (("--stall-warn", "60", "--stall-abort", "60"), "--stall-abort 60 is to be more than --stall-warn 60"),
        (("--stall-warn", "3600",), "--stall-abort 1800 is to be more than --stall-warn 3600"),
    ],
)  # fmt: skip
def test_times_that_make_no_sense_are_refused(options, said):
    status, _, err = run(1, "-m", "psmpi.train", *options)
    assert status == 1 and said in err


def test_times_are_of_each_start(train, tmp_path):
    options = ("--epochs", "1", "--batch-size", "500")
    first = train(2, *options, "--stall-warn", "7", "--stall-abort", "0")
    saved = from_toml((first.out / "config.toml").read_text(), "config.toml").run
    assert (saved.stall_warn, saved.stall_abort) == (60.0, 1800.0)
    resumed = run_program(
        2, "psmpi.train", ["--out", first.out, "--resume", "auto", "--epochs", "2", "--stall-warn", "9"], cwd=tmp_path
    )
    assert resumed.status == 0 and "stall" not in resumed.stdout + resumed.stderr


def test_all_times_and_none_are_settings():
    for warn, abort in ((0.0, 1800.0), (0.0, 0.0), (60.0, 0.0), (0.5, 0.75)):
        text = to_toml(Config()).replace("stall_warn = 60.0", f"stall_warn = {warn}")
        config = from_toml(text.replace("stall_abort = 1800.0", f"stall_abort = {abort}"), "here")
        check(config)
        assert (config.run.stall_warn, config.run.stall_abort) == (warn, abort)
        assert without_anew(config).run == Config().run
