"""Networks of very many classes are described by ranges of classes, with the same results as unit by unit."""

import json
import tracemalloc
from itertools import pairwise

import h5py
import numpy as np
import pytest
from helpers.by_unit import blocks_by_unit, weights_by_unit
from helpers.layer_examples import NETWORKS, conv, dense, make, separable, unbiased
from helpers.partitions import layouts, ownerships
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from psmpi import checkpoint
from psmpi.backend import NumpyOps
from psmpi.checkpoint import Contents
from psmpi.checkpoint import build as building
from psmpi.checkpoint.build import SpoolSource, write_file
from psmpi.checkpoint.collect import Records
from psmpi.checkpoint.format import as_data, seal
from psmpi.checkpoint.tensors import make_tensors
from psmpi.errors import UserError
from psmpi.files.fletcher import fletcher32
from psmpi.layout import Classes, Each, Layout, Runs, assign_roles, copy_runs, plan_moves, restrict
from psmpi.nn.init import initial_weights
from psmpi.nn.layers.linear import LinearPart
from psmpi.nn.layers.segments import Segment
from psmpi.nn.layers.segments import _merge as merge
from psmpi.nn.layers.uses import joined
from psmpi.nn.model import Model
from psmpi.nn.network import build

FEATURES = 64


def many(classes):
    return build("net", (FEATURES,), [dense(classes)], classes)


def spelled_out(layout):
    """The same layout with an object for each block of each class."""
    return Layout(layout.parameters, layout.blocks, layout.classes)


@st.composite
def networks(draw):
    """Networks whose groups fit those of the next layer, cut them, or tie the classes."""
    classes = draw(st.integers(1, 9))
    shape, layers = (draw(st.integers(1, 40)),), []
    if draw(st.booleans()):
        shape, layers = (1, 4, 4), [*conv(draw(st.integers(1, 7)), 2), {"type": "flatten"}]
    for _ in range(draw(st.integers(0, 3))):
        groups = draw(st.sampled_from([1, 2, 3, classes, classes, 2 * classes]))
        units = groups * draw(st.integers(1, 3))
        table = dense(units) if groups == 1 else separable(units, groups)
        layers += [table if draw(st.booleans()) else unbiased(table)]
        if draw(st.booleans()):
            layers += [{"type": "group_norm", "groups": draw(st.sampled_from([1, groups, units]))}]
    divisors = [n for n in range(2, classes + 1) if classes % n == 0]
    last = separable(classes, draw(st.sampled_from(divisors))) if divisors and draw(st.booleans()) else dense(classes)
    layers += [last if draw(st.booleans()) else unbiased(last)]
    try:
        return build("net", shape, layers, classes)
    except UserError:
        assume(False)
        raise


def singles(uses):
    """Yield the runs of `uses` with an object for each single class."""
    for first, last, users in uses:
        if isinstance(users, Classes):
            yield first, last, users
            continue
        share = (last - first) // users.count
        for k in range(users.count):
            c = users.first + k
            yield first + k * share, first + (k + 1) * share, Classes(((c, c + 1),))


def plain(block):
    pieces = tuple((p.parameter, p.first, p.last, p.offset) for p in block.pieces)
    return set(block.classes), block.start, block.stop, pieces


@settings(max_examples=40)
@given(networks(), st.data())
def test_layouts_are_those_that_units_one_by_one_have(network, data):
    layout, blocks = network.layout(), blocks_by_unit(network)
    assert [plain(block) for block in layout.blocks] == blocks
    chosen = data.draw(st.sets(st.integers(0, network.classes - 1)))
    expected = Runs.union((start, stop) for classes, start, stop, _ in blocks if classes & chosen)
    assert layout.part(chosen) == expected and layout.part(Classes.of(chosen)) == expected
    names = [p.name for p in layout.parameters]
    named = data.draw(st.sets(st.sampled_from(names)))
    pieces = [
        (offset, (last - first) * layout.parameters[k].unit_size)
        for *_, parts in blocks
        for k, first, last, offset in parts
        if names[k] in named
    ]
    assert layout.runs_of_parameters(named) == Runs.union((offset, offset + size) for offset, size in pieces)


@pytest.mark.parametrize("name", NETWORKS)
def test_layouts_of_every_kind_of_layer_are_those_of_its_units(name):
    network = make(name)
    assert [plain(block) for block in network.layout().blocks] == blocks_by_unit(network)


@settings(max_examples=30)
@given(networks(), st.data(), st.sampled_from(["xavier", "he", "pytorch"]))
def test_initial_weights_of_any_runs_are_those_of_each_unit_s_own_generator(network, data, kind):
    layout = network.layout()
    edges = st.integers(0, layout.size)
    runs = Runs.union(data.draw(st.lists(st.tuples(edges, edges), max_size=4)))
    out = np.full(runs.size, np.nan)
    initial_weights(network, layout, runs, out, seed=5, kind=kind, gain=4.0)
    assert np.array_equal(out, restrict(weights_by_unit(network, 5, kind, 4.0), runs))


@pytest.mark.parametrize("classes", [700, 3000])
def test_initial_weights_of_many_classes_are_the_same_bits(classes):
    """Weights are drawn in tiles of classes, and a shard may end inside a unit."""
    network = build("net", (30,), [dense(5), dense(classes)], classes)
    layout = network.layout()
    expected = weights_by_unit(network, 2, "xavier", 1.0)
    for runs in Runs.union([(0, layout.size)]).split(3):
        out = np.empty(runs.size, np.float32)
        initial_weights(network, layout, runs, out, seed=2)
        assert np.array_equal(out, restrict(expected, runs).astype(np.float32))


@settings(max_examples=30)
@given(networks(), st.data())
def test_subnetworks_compute_with_the_same_segments(network, data):
    """Matrix products have the same shapes as with blocks of single classes, and so the same bits."""
    layout = network.layout()
    classes = sorted(data.draw(st.sets(st.integers(0, network.classes - 1), min_size=1)))
    first = data.draw(st.integers(0, len(network.layers) - 1))
    layers = data.draw(st.sampled_from([None, (first, len(network.layers))]))
    results = []
    for variant in (layout, spelled_out(layout)):
        part = variant.part(classes)
        part = part if layers is None else part & network.runs(variant, *layers)
        model = Model(network, variant, np.zeros(part.size), np.zeros(part.size), NumpyOps(), classes, layers=layers)
        results.append(([p.segments for p in model.chain.walk() if isinstance(p, LinearPart)], model.filled()))
    assert results[0] == results[1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.booleans()), max_size=12), st.data())
def test_users_are_the_same_runs_however_they_were_put_together(units, data):
    """Runs of single classes and of pairs of classes join alike in any grouping."""
    runs, start = [], 0
    for c, count, single in units:
        runs.append((start, start + count, Each(c, c + 1) if single else Classes(((c, c + 2),))))
        start += count
    cuts = sorted(data.draw(st.sets(st.integers(0, len(runs)))))
    parts = [joined(runs[a:b]) for a, b in zip([0, *cuts], [*cuts, len(runs)], strict=True)]
    at_once = joined(runs)
    assert joined(run for part in parts for run in part) == at_once
    classes_of_units = [
        users.classes if isinstance(users, Each) else users for first, last, users in runs for _ in range(first, last)
    ]
    assert [classes for first, last, classes in singles(at_once) for _ in range(first, last)] == classes_of_units
    assert all(isinstance(users, Each) or len(users) > 1 for *_, users in at_once)


def test_the_set_up_has_no_objects_of_classes():
    network = many(50_000)
    layout = network.layout()
    assert len(layout.bands) == 1 and len(layout.bands[0].pieces) == 2
    assert network.score_uses() == ((0, 50_000, Each(0, 50_000)),)
    roles = assign_roles(layout, 3, placement="owner", colocate=True)
    assert [len(part.starts) for part in (*roles.parts, *roles.shards)] == [1, 1, 1, 1, 1, 1]
    assert plan_moves(roles) == () and all(isinstance(w.classes, range) for w in roles.workers)
    assert [len(tensor.stretches) for tensor in make_tensors(layout)] == [1, 1]
    assert [len(tensor.stretches) for tensor in make_tensors(layout, range(7, 9000))] == [1, 1]
    w = np.zeros(roles.parts[1].size, np.float32)
    model = Model(network, layout, w, w.copy(), NumpyOps(), roles.workers[1].classes)
    assert [len(part.segments) for part in model.parts] == [1] and len(model.filled()) == 1
    assert sum(map(len, Contents("", network.in_shape, layout).texts().values())) < 2000


def test_the_set_up_needs_no_memory_of_the_size_of_the_layer():
    """Beside 13 MB of weights there are tiles of initial weights, and a few bytes a class."""
    network = many(50_000)
    size = network.layout().size
    w, g = (np.zeros(size, np.float32) for _ in range(2))
    tracemalloc.start()
    layout = network.layout()
    initial_weights(network, layout, Runs.union([(0, size)]), w, seed=0)
    model = Model(network, layout, w, g, NumpyOps())
    tensors = make_tensors(layout)
    remaining, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(model.parts) == 1 and len(tensors) == 2
    assert w.nbytes == 13e6 and peak < 4e6 and remaining < 5e5


def test_writing_a_checkpoint_needs_no_memory_of_the_size_of_the_layer(tmp_path):
    layout = many(50_000).layout()
    w = np.arange(layout.size, dtype=np.float32)
    records = Records(assign_roles(layout, 1, colocate=True).shards, layout.size, 0)
    with (tmp_path / "spool").open("w+b") as spool:
        spool.write(w)
        spool.write(records.table)
        spool.flush()
        contents = Contents("", (FEATURES,), layout)
        tracemalloc.start()
        source = SpoolSource(spool.fileno(), contents, [("weights", "<f4", 0)], {"weights": (w.nbytes, 1)})
        write_file(tmp_path / "run" / "step-000000001.h5", contents, {"weights": w.dtype}, source.read)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert w.nbytes == 13e6 and peak < 8e6
    vector = np.empty_like(w)
    checkpoint.load(tmp_path / "run" / "step-000000001.h5", layout, Runs.union([(0, layout.size)]), {"weights": vector})
    assert np.array_equal(vector, w)


@settings(max_examples=30)
@given(st.data(), st.sampled_from([0, 64]), st.sampled_from([0, 8, 1 << 14]), st.sampled_from([16, 1 << 22]))
def test_what_ranks_have_spooled_is_read_in_the_order_of_the_tensors(tmp_path_factory, data, few, gap, read):
    """Elements are read by runs or as arrays, with or without the gaps, at once or in small pieces."""
    layout = data.draw(layouts()) if data.draw(st.booleans()) else data.draw(networks()).layout()
    ownership = data.draw(ownerships(layout, 3))
    w = np.random.default_rng(0).random(layout.size)
    records = Records(ownership, layout.size, 0)
    path = tmp_path_factory.mktemp("spool") / "spool"
    path.write_bytes(b"".join(restrict(w, runs).tobytes() for runs in records.record) + records.table.tobytes())
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as spool:
        patch.setattr(building, "FEW", few)
        patch.setattr(building, "GAP", gap)
        patch.setattr(building, "READ", read)
        maps = {"weights": (w.nbytes, records.table.shape[1])}
        source = SpoolSource(spool.fileno(), Contents("", (1,), layout), [("weights", "<f8", 0)], maps)
        for tensor in make_tensors(layout):
            first = data.draw(st.integers(0, tensor.size - 1))
            into = np.full(data.draw(st.integers(1, tensor.size - first)), np.nan)
            source.read("weights", tensor, first, into)
            expected = np.concatenate([w[offset : offset + b - a] for a, b, offset in tensor.spans])
            assert np.array_equal(into, expected[first : first + len(into)])


def as_version_1(path):
    """Rewrite a file in version 1 of the format: a block for each class, with a list of classes."""
    with h5py.File(path, "r+") as file:
        layout = json.loads(file["layout"].asstr()[0])
        del file["layout"]
        blocks = []
        for b in layout["blocks"]:
            classes = [c for first, last in b["classes"] for c in range(first, last)]
            count = len(classes) if b.get("each") else 1
            step = (b["stop"] - b["start"]) // count
            for k in range(count):
                start, pieces = b["start"] + k * step, []
                for p, first, last, offset in b["pieces"]:
                    units = (last - first) // count
                    pieces.append([p, first + k * units, first + (k + 1) * units, offset + k * step])
                own = [classes[k]] if count > 1 else classes
                blocks.append({"classes": own, "start": start, "stop": start + step, "pieces": pieces})
        layout["blocks"] = blocks
        file.create_dataset("layout", data=as_data(json.dumps(layout)), chunks=(1,), fletcher32=True)
        file.attrs["format"] = 1
    seal(path)
    with path.open("r+b") as file:
        file.write(b"psmpi checkpoint 1")


def test_files_of_version_1_are_read(train, tmp_path):
    """A run that resumes from such a file has the same bits."""
    options = ("--model", "psnet", "--dtype", "float64", "--max-steps")
    straight, first = train(2, *options, "6"), train(2, *options, "3")
    path = tmp_path / "old" / "checkpoints" / first.checkpoint.name
    path.parent.mkdir(parents=True)
    path.write_bytes(first.checkpoint.read_bytes())
    as_version_1(path)
    new, old = (checkpoint.validate(file).layout for file in (first.checkpoint, path))
    assert old.blocks == new.blocks and len(old.bands) > len(new.bands)
    resumed = train(2, *options, "6", "--resume", path)
    expected, actual = straight.tensors(), resumed.tensors()
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


def fletcher_by_words(data):
    """The definition in HDF5's sources (H5_checksum_fletcher32), word by word."""
    low = high = 0
    for word in np.frombuffer(data, ">u2").tolist():
        low += word
        high += low
    return ((high % 65535 or (65535 if high else 0)) << 16) | (low % 65535 or (65535 if low else 0))


@given(st.integers(0, 3000), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 1 << 16, 2**32 - 1, None]))
def test_checksums_of_chunks_are_those_of_hdf5(count, seed, value):
    words = np.random.default_rng(seed).integers(0, 2**32, count, np.uint32) if value is None else np.full(count, value)
    words = words.astype("<u4")
    assert fletcher32(words) == fletcher_by_words(words.tobytes())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([1, 1, 2]), st.integers(0, 1), st.integers(3, 4)), max_size=12), st.data())
def test_stripes_join_alike_one_by_one_and_together(units, data):
    """Neighbours of equal steps make the same segments, whichever neighbours are joined first."""
    stripes, out, source, weight = [], 0, 0, 0
    for n, across, step in units:
        stripes.append(Segment(1, n, 2, out, source, 0, weight, 0, out, 0, 2, 2))
        out, source, weight = out + n, source + across, weight + step
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stripes)))))
    parts = [merge(stripes[a:b]) for a, b in pairwise([0, *cuts, len(stripes)])]
    assert merge([segment for part in parts for segment in part]) == merge(stripes)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=8), st.integers(1, 3), st.booleans())
def test_runs_are_copied_at_equal_and_other_distances(gaps, size, alike):
    sizes = np.array([size if alike else size + k % 2 for k in range(len(gaps))], np.int64)
    starts, places = (np.cumsum([0, *(sizes + [gap[k] for gap in gaps])])[:-1].astype(np.int64) for k in (0, 1))
    source, target = np.arange(1.0, 60.0), np.zeros(60)
    copy_runs(source, starts, target, places, sizes)
    expected = np.zeros(60)
    for a, b, n in zip(starts, places, sizes, strict=True):
        expected[b : b + n] = source[a : a + n]
    assert np.array_equal(target, expected)
