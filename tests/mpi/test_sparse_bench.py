"""The measurements of sparse steps and of partitions: their reports and error messages."""

import importlib.util
import json

from helpers.runs import run


def measured(tmp_path, *words):
    status, out, err = run(1, "-m", "psmpi.bench", *words, "--json", tmp_path / "a.json")
    assert status == 0, err
    return json.loads((tmp_path / "a.json").read_text()), " ".join(out.split())


def refused(*words):
    status, _, err = run(1, "-m", "psmpi.bench", *words)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


def test_a_sparse_step_is_timed_beside_others(tmp_path):
    """The report has SciPy, whose outputs the command has compared with psmpi's."""
    for pattern in ("radix", "random"):
        words = ("--units", "64", "--depth", "3", "--fan-in", "8", "--batch-size", "20", "--rounds", "2")
        report, out = measured(tmp_path, "sparse", *words, "--pattern", pattern)
        assert {"psmpi", "SciPy"} <= report["ms"].keys() and all(len(ms) == 2 for ms in report["ms"].values())
        assert abs(report["GFLOP"] - 6e-9 * 3 * 64 * 8 * 20) < 1e-12 and "of the time of the best" in out
    assert "--depth 0" in refused("sparse", "--depth", "0")
    assert "expected radix or random" in refused("sparse", "--pattern", "full")


def test_partitions_are_counted(tmp_path):
    words = (
        "--networks",
        "slabs",
        "radix",
        "--depth",
        "3",
        "--parts",
        "2",
        "4",
        "--modes",
        "slab",
        "random",
        "layered",
    )
    rows, out = measured(tmp_path, "partition", *words)
    by_case = {(row["network"], row["parts"], row["mode"]): row for row in rows}
    assert {(name, parts) for name, parts, _ in by_case} == {(n, p) for n in ("slabs", "radix") for p in (2, 4)}
    # Between slabs all outputs of a layer go to other parts where the next layer has stride 32.
    assert by_case["radix", 4, "slab"]["words"] == 3 * 1024 + 4 * 31
    assert by_case["radix", 4, "random"]["words"] > by_case["radix", 4, "slab"]["words"]
    assert ("slabs", 2, "layered") in by_case or "psmpi[partition]" in out
    assert (importlib.util.find_spec("mtkahypar") is None) == ("psmpi[partition]" in out)
    assert "choose among slab" in refused("partition", "--modes", "spectral")
    assert "choose among radix" in refused("partition", "--networks", "mlp")
    assert "--depth 1" in refused("partition", "--depth", "1")
