"""Checkpoints that are written by ranks with any boxes and read by ranks with other boxes."""

import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.partitions import layouts, ownerships
from helpers.runs import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psmpi import checkpoint
from psmpi.checkpoint.build import build
from psmpi.checkpoint.format import seal
from psmpi.checkpoint.parallel import parts_of, values_of
from psmpi.checkpoint.selection import find_boxes, find_parts, read_runs
from psmpi.checkpoint.tensors import make_tensors
from psmpi.comm.control import Control
from psmpi.errors import UserError
from psmpi.layout import Box, Ownership, Parameter, Runs, TableRows, make_layout, plain_layout, restrict
from psmpi.nn.zoo import make_network
from psmpi.testing import run_ranks


class AtOnce:
    """A spool that runs its jobs at once in this process; `puts` counts its writes."""

    puts = 0

    def __init__(self, lock=None):
        self.process = None

    def open(self, place):
        place.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, elements, at):
        AtOnce.puts += 1
        data = memoryview(elements).cast("B")
        assert os.pwrite(self.file.fileno(), data, at) == len(data)

    def submit(self, job):
        build(json.loads(json.dumps(job)), self.file.fileno())
        self.file.close()

    def free(self):
        pass


def save(out, contents, shards, vectors, spaces=None, rows=None, tables=None, gzip=0):
    """Write full `vectors` from ranks that own `shards` and `spaces`; return the path and each rank's sent messages."""
    spaces = spaces or {}

    def work(world):
        rank = world.rank
        control = Control(world)
        writer = checkpoint.Writer(control, contents, shards, out, spaces=spaces, rows=rows, gzip=gzip)
        shares = {name: restrict(w, spaces.get(name, shards)[rank]) for name, w in vectors.items()}
        own_rows = {name: table[list(rows.of[rank])] for name, table in (tables or {}).items()}
        writer.write(shares, {}, checkpoint.Progress(step=1), own_rows)
        assert writer.errors == []
        return control.comm.sent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psmpi.checkpoint.writer.Spool", AtOnce)
        sent = run_ranks(len(shards), work)
    return checkpoint.available(out)[0], sent


def small(patch, chunk=8):
    """Shrink chunks, messages and slabs, so that small tensors have several."""
    for name in ("format.CHUNK", "selection.CHUNK", "build.CHUNK", "collect.BUFFER"):
        patch.setattr(f"psmpi.checkpoint.{name}", chunk)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_boxes_are_written_and_any_others_read(data):
    """Weights, an optimizer vector, integers of another layout and tables are read back bit for bit."""
    layout, other_layout = data.draw(layouts()), data.draw(layouts())
    ranks, readers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    shards, tiles = data.draw(ownerships(layout, ranks)), data.draw(ownerships(other_layout, ranks))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    vectors = {name: rng.random(layout.size, np.float32) for name in ("weights", "m")}
    vectors["cuts"] = rng.integers(0, 99, other_layout.size)
    numbers = rng.permutation(5).tolist()
    edges = [k * 5 // ranks for k in range(ranks + 1)]
    rows = TableRows(tuple(tuple(numbers[a:b]) for a, b in pairwise(edges)))
    tables = {"classes": rng.integers(0, 9, (5, 2)), "gram": rng.random((5, 3, 3))}
    contents = checkpoint.Contents("seed = 1", (1,), layout, spaces={"cuts": other_layout})
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        small(patch)
        path, _ = save(
            Path(folder),
            contents,
            shards,
            vectors,
            {"cuts": tiles},
            rows,
            tables,
            gzip=data.draw(st.sampled_from([0, 3])),
        )
        read = checkpoint.validate(path)
        assert read.layout == layout and read.spaces == {"cuts": other_layout} and read.vectors == {"m"}
        for runs in data.draw(ownerships(layout, readers)):
            loaded = {name: np.full(runs.size, np.nan, np.float32) for name in ("weights", "m")}
            checkpoint.load(path, layout, runs, loaded)
            assert all(np.array_equal(loaded[name], restrict(vectors[name], runs)) for name in loaded)
        for runs in data.draw(ownerships(other_layout, readers)):
            cuts = np.full(runs.size, -1)
            checkpoint.load_space(path, "cuts", other_layout, runs, cuts)
            assert np.array_equal(cuts, restrict(vectors["cuts"], runs))
        loaded_tables = {name: np.zeros_like(table) for name, table in tables.items()}
        assert checkpoint.load_tables(path, loaded_tables, TableRows((tuple(range(5)),)), 0)
        assert all(np.array_equal(loaded_tables[name], tables[name]) for name in tables)


@given(st.data())
def test_ranks_that_write_together_write_every_element_once(data):
    layout = data.draw(layouts())
    shards = data.draw(ownerships(layout, data.draw(st.integers(1, 4))))
    w = np.arange(layout.size)
    with pytest.MonkeyPatch.context() as patch:
        small(patch, data.draw(st.sampled_from([2, 8, 1 << 18])))
        for tensor in make_tensors(layout):
            written, count = np.full(tensor.shape, -1), np.zeros(tensor.shape, int)
            for rank, parts in enumerate(parts_of(tensor, shards)):
                for part in parts:
                    written[part.selection] = values_of(part, restrict(w, shards[rank])).reshape(part.shape)
                    count[part.selection] += 1
            assert (count == 1).all()
            for first, last, offset in tensor.spans:
                assert np.array_equal(written.ravel()[first:last], w[offset : offset + last - first])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_are_the_elements_they_are_found_for(shape, data):
    size = int(np.prod(shape))
    edges = sorted(data.draw(st.sets(st.integers(0, size), max_size=8)))
    edges = np.array(edges[: len(edges) // 2 * 2]).reshape(-1, 2)
    count, expected = np.zeros(shape, int), np.zeros(size, int)
    for first, last in edges:
        expected[first:last] += 1
    for box in find_boxes(shape, edges[:, 0], edges[:, 1]):
        count[tuple(slice(*r) for r in box)] += 1
    assert np.array_equal(count.ravel(), expected)


def test_a_tile_is_one_box():
    shape = (10, 20, 6)
    for ranges in [
        ((0, 10), (5, 9), (0, 6)),
        ((2, 7), (3, 20), (1, 5)),
        ((4, 5), (0, 20), (0, 6)),
        ((0, 10),) * 2 + ((2, 4),),
    ]:
        elements = np.arange(1200).reshape(shape)[tuple(slice(*r) for r in ranges)].ravel()
        assert find_boxes(shape, elements, elements + 1) == [ranges]


def test_a_row_that_has_fewer_columns_than_the_one_above_is_a_box_of_its_own():
    boxes = find_boxes((2, 5), np.array([0, 3, 8]), np.array([1, 4, 9]))
    assert sorted(boxes) == [((0, 1), (0, 1)), ((0, 1), (3, 4)), ((1, 2), (3, 4))]


def counted(monkeypatch):
    """Record each HDF5 call that reads."""
    reads = []
    direct, get = h5py.Dataset.read_direct, h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "read_direct", lambda self, *a: reads.append("direct") or direct(self, *a))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, *a: reads.append("copied") or get(self, *a))
    return reads


def test_columns_are_few_messages_and_few_reads(tmp_path, monkeypatch):
    """A rank with some columns of a thousand rows sends one message, and reads one HDF5 selection a tensor."""
    layout = plain_layout({"a.weight": (1000, 50), "b.weight": (10, 300, 9)})
    columns, tiles = Ownership.tiles(layout, (1, 5)), Ownership.tiles(layout, (2, 2))
    assert len(columns[3].starts) > 1000
    w = np.random.default_rng(0).random(layout.size)
    AtOnce.puts = 0
    path, sent = save(tmp_path, checkpoint.Contents("", (1,), layout), columns, {"weights": w})
    # Five shares, and the map of their runs.
    assert sent == [0, 1, 1, 1, 1] and AtOnce.puts == 5 + 1
    for ownership in (tiles, columns):
        reads = counted(monkeypatch)
        for runs in ownership:
            loaded = np.empty(runs.size)
            checkpoint.load(path, layout, runs, {"weights": loaded})
            assert np.array_equal(loaded, restrict(w, runs))
        assert reads == ["direct"] * len(ownership) * len(layout.parameters)
        monkeypatch.undo()


@pytest.mark.parametrize(("shape", "chunks"), [((100, 6), (8, 6)), ((3, 40, 6), (1, 8, 6)), ((700,), (48,))])
def test_what_must_move_is_read_in_slabs_of_whole_chunks(shape, chunks, monkeypatch):
    """Elements are read in reverse order, without the first ten."""
    small(monkeypatch, 60)
    first = np.arange(10, np.prod(shape))
    for part in find_parts(shape, chunks, first, first + 1, first[::-1]):
        assert np.prod(part.shape) <= 60 and part.run is None
        cut = next(axis for axis, (a, b) in enumerate(part.ranges) if b - a > 1)
        # Except where the elements begin: at column 4 of row 1, so at row 2, or at element 10.
        edges = {*part.ranges[cut]} - {4, 2, 10, shape[cut]}
        assert all(edge % chunks[cut] == 0 for edge in edges)


def test_ten_thousand_pieces_of_a_tensor_are_one_read(tmp_path, monkeypatch):
    """The rows lie one by one in the flat vector, as the units of classes do."""
    file = h5py.File(tmp_path / "x.h5", "w")
    values = np.random.default_rng(0).random((10_000, 12))
    dataset = file.create_dataset("x", data=values, chunks=(5000, 12), fletcher32=True)
    order = np.random.default_rng(1).permutation(10_000)
    first, into = 12 * np.arange(10_000), np.empty(120_000)
    reads = counted(monkeypatch)
    read_runs(dataset, first, first + 12, 12 * order, into)
    assert np.array_equal(into.reshape(-1, 12)[order], values) and reads == ["copied"]


def test_other_tensors_than_weights_are_kept_beside_them(tmp_path):
    """A synthesizer's weights are tiled over four ranks, and one rank has an integer pattern."""
    layout, grid = (
        plain_layout({"dense1.weight": (6, 4)}),
        Ownership.tiles(plain_layout({"dense1.weight": (6, 4)}), (4,)),
    )
    dni, pattern = plain_layout({"cut1.weight": (8, 9), "cut1.bias": (8,)}), plain_layout({"mask": (7,)})
    contents = checkpoint.Contents("seed = 1", (4,), layout, spaces={"dni": dni, "pattern": pattern})
    tiles = Ownership.tiles(dni, (2, 2))
    pattern_owner = Ownership((Runs(), Runs(), pattern.runs_of(Box("mask")), Runs()))
    rng = np.random.default_rng(0)
    vectors = {
        "weights": rng.random(24, np.float32),
        "dni": rng.random(dni.size),
        "pattern": np.arange(7, dtype=np.int16),
    }
    path, _ = save(tmp_path, contents, grid, vectors, {"dni": tiles, "pattern": pattern_owner})
    with h5py.File(path) as file:
        assert np.array_equal(file["dni/cut1.weight"][...], vectors["dni"][:72].reshape(8, 9))
        assert np.array_equal(file["dni/cut1.bias"][...], vectors["dni"][72:])
        assert file["dni/cut1.bias"].dtype == "f8" and file["weights/dense1.weight"].dtype == "f4"
        assert file["pattern/mask"].dtype == "i2" and file["pattern/mask"][...].tolist() == [*range(7)]
    for ownership in (Ownership.tiles(dni, (1, 3)), Ownership.tiles(dni, (1,))):
        for runs in ownership:
            loaded = np.empty(runs.size)
            checkpoint.load_space(path, "dni", dni, runs, loaded)
            assert np.array_equal(loaded, restrict(vectors["dni"], runs))


@pytest.mark.parametrize("name", ["weights", "optimizer", "rank", "elements", "layout", "a/b", ""])
def test_names_of_spaces_are_free_ones(name):
    with pytest.raises(ValueError, match="cannot name tensors of a checkpoint"):
        checkpoint.Contents("", (1,), plain_layout({"w": (3,)}), spaces={name: plain_layout({"w": (3,)})})


def test_what_nobody_holds_cannot_be_written(tmp_path):
    layout = plain_layout({"w": (3, 4)})
    shards = Ownership((layout.runs_of(Box("w", ((0, 2),))), Runs()))
    with pytest.raises(ValueError, match="4 of 12 elements belong to no rank"):
        save(tmp_path, checkpoint.Contents("", (1,), layout), shards, {"weights": np.zeros(12)})


def inspect(*arguments):
    status, out, err = run(1, "-m", "psmpi.inspect", *arguments)
    assert status == 0, err
    return out


def test_the_tools_know_other_tensors_and_tables_of_ranks(tmp_path):
    network = make_network("mlp", (4,), 3, widths=(5,))
    layout, dni = network.layout(), plain_layout({"cut1.weight": (6, 4)})
    config = '[model]\nmodel = "mlp"\nwidths = [5]\n'
    contents = checkpoint.Contents(config, (4,), layout, spaces={"dni": dni})
    rows, rng = TableRows.one_each(2), np.random.default_rng(0)
    paths, numbers = [], np.arange(24)
    for name in "ab":
        vectors = {"weights": rng.random(layout.size), "dni": numbers}
        shards, tiles = Ownership.tiles(layout, (2,)), Ownership.tiles(dni, (1, 2))
        path, _ = save(tmp_path / name, contents, shards, vectors, {"dni": tiles}, rows, {"left": rng.random((2, 7))})
        paths.append(path)
        numbers = numbers + 1
    shown = json.loads(inspect("show", paths[0], "--json"))
    assert shown["tensors"]["dni"][0] == {
        "name": "cut1.weight", "shape": [6, 4], "dtype": "int64", "bytes": 192,
        "norm": pytest.approx(np.linalg.norm(np.arange(24))),
    }  # fmt: skip
    assert (
        shown["rank"] == [{"name": "left", "shape": [2, 7], "dtype": "float64", "bytes": 112}] and not shown["elements"]
    )
    text = inspect("show", paths[0])
    assert "rank  2 ranks, 0.1 kB" in text and "left  float64 2 x 7" in text and "dni  1 tensor," in text
    (row,) = json.loads(inspect("stats", paths[0], "--vector", "dni", "--json"))["tensors"]
    assert (row["count"], row["mean"], row["most"]) == (24, 11.5, 23)
    differences = {row["name"]: row for row in json.loads(inspect("diff", *paths, "--json"))["tensors"]}
    assert differences["dni/cut1.weight"]["largest"] == 1 and differences["rank/left"]["distance"] > 0
    assert "whole" in inspect("verify", paths[0])
    inspect("cut", paths[0], "--classes", "0", "1", "2", "--out", tmp_path / "part.h5")
    inspect("join", tmp_path / "part.h5", "--out", tmp_path / "again.h5")
    inspect("average", *paths, "--out", tmp_path / "mean.h5")
    for name in ("part", "again", "mean"):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            assert "weights" in file and not {"dni", "rank"} & set(file)
        assert not checkpoint.validate(tmp_path / f"{name}.h5").spaces
    with h5py.File(tmp_path / "again.h5") as again, h5py.File(paths[0]) as first:
        assert all(np.array_equal(again["weights"][name], first["weights"][name]) for name in first["weights"])


def test_a_space_that_is_not_what_its_layout_says_is_damage(tmp_path):
    layout, dni = plain_layout({"w": (3,)}), plain_layout({"cut1.weight": (6, 4)})
    contents = checkpoint.Contents("seed = 1", (4,), layout, spaces={"dni": dni})
    vectors = {"weights": np.zeros(3), "dni": np.zeros(24)}
    path, _ = save(tmp_path, contents, Ownership.tiles(layout, (2,)), vectors, {"dni": Ownership.tiles(dni, (2,))})
    with h5py.File(path, "r+") as file:
        del file["dni/cut1.weight"]
        file["dni/cut1.weight"] = np.zeros((4, 6))
    seal(path)
    with pytest.raises(UserError, match=r"dni/cut1.weight is float64 \(4, 6\), its layout says \(6, 4\)"):
        checkpoint.validate(path)


def test_a_writer_has_owners_of_every_space(tmp_path):
    layout, dni = plain_layout({"w": (3,)}), plain_layout({"cut1.weight": (6, 4)})
    contents = checkpoint.Contents("seed = 1", (4,), layout, spaces={"dni": dni})
    with pytest.raises(ValueError, match=r"the contents have \['dni'\]"):
        save(tmp_path, contents, Ownership.tiles(layout, (1,)), {"weights": np.zeros(3)})


def test_a_tensor_has_its_units_in_their_order():
    # The unit in the middle is used by both classes: its block comes first in the flat vector.
    uses = [[(0, 1, frozenset({0})), (1, 2, frozenset({0, 1})), (2, 3, frozenset({1}))]]
    layout = make_layout([Parameter("weight", (3, 2), 3)], uses, 2)
    (full,), (part,) = make_tensors(layout), make_tensors(layout, [1])
    assert full.spans == ((0, 2, 2), (2, 4, 0), (4, 6, 4))
    assert part.shape == (2, 2) and part.spans == ((0, 2, 0), (2, 4, 4))
