"""The measurements of sparse steps and of partitions: what they say, and what they refuse."""

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
    """SciPy is there; its outputs have been compared with psmpi's."""
    for pattern in ("radix", "random"):
        words = ("--units", "64", "--depth", "3", "--fan-in", "8", "--batch-size", "20", "--rounds", "2")
        found, out = measured(tmp_path, "sparse", *words, "--pattern", pattern)
        assert {"psmpi", "SciPy"} <= found["ms"].keys() and all(len(ms) == 2 for ms in found["ms"].values())
        assert abs(found["GFLOP"] - 6e-9 * 3 * 64 * 8 * 20) < 1e-12 and "of the time of the best" in out
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
    found = {(row["network"], row["parts"], row["mode"]): row for row in rows}
    assert {(name, parts) for name, parts, _ in found} == {(n, p) for n in ("slabs", "radix") for p in (2, 4)}
    # Between slabs of neurons of one weight: all of a layer goes to the others where the next one is of stride 32.
    assert found["radix", 4, "slab"]["words"] == 3 * 1024 + 4 * 31
    assert found["radix", 4, "random"]["words"] > found["radix", 4, "slab"]["words"]
    assert ("slabs", 2, "layered") in found or "psmpi[partition]" in out
    assert (importlib.util.find_spec("mtkahypar") is None) == ("psmpi[partition]" in out)
    assert "choose among slab" in refused("partition", "--modes", "spectral")
    assert "choose among radix" in refused("partition", "--networks", "mlp")
    assert "--depth 1" in refused("partition", "--depth", "1")
