"""Sparse layers: patterns, their files, and products against SciPy's."""

import zipfile
from contextlib import suppress

import numpy as np
import pytest
from helpers.sparse_products import index_of, some_pattern
from scipy import sparse

from psmpi.backend import CompiledOps, NumpyOps, compiled
from psmpi.errors import UserError
from psmpi.layout import Pattern, radix_pattern, radix_strides, random_pattern, unpack
from psmpi.nn.layers.pattern_file import read_pattern, with_patterns
from psmpi.nn.layers.sparse import Sparse
from psmpi.nn.model import Model
from psmpi.nn.network import Network, build

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
TOLERANCE = {F32: 1e-5, F64: 1e-12}


def backends():
    return [
        NumpyOps(),
        *(CompiledOps(level, threads) for level in range(1, compiled.level() + 1) for threads in (1, 3)),
    ]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8, 16, 21, 33, 64, 100])
def test_products_are_those_of_scipy(batch, bias, dtype, monkeypatch):
    monkeypatch.setattr("psmpi.backend.compiled.sparse.WORK", 1)
    monkeypatch.setattr("psmpi.backend.reference.sparse.TERMS", 100)
    rng, pattern = np.random.default_rng(0), some_pattern(23, 17, 0.3)
    index, size = index_of(pattern, rng, bias)
    w, x, dy = (rng.standard_normal(shape).astype(dtype) for shape in (size, (17, batch), (23, batch)))
    entries = index.places[pattern.row_numbers] + np.arange(pattern.size) - pattern.starts[pattern.row_numbers]
    matrix = sparse.csr_array((w[entries], pattern.columns, pattern.starts), (23, 17))
    y = matrix @ x + (w[index.biases][:, None] if bias else 0)
    g = np.full(size, 7, dtype)
    g[entries] = (dy @ x.T)[pattern.row_numbers, pattern.columns]
    if bias:
        g[index.biases] = dy.sum(axis=1)
    for ops in backends():
        product = ops.sparse_product(index, dtype)
        own_y, dx, own_g = np.full_like(y, np.nan), np.full_like(x, np.nan), np.full(size, 7, dtype)
        product.forward(w, x, own_y)
        product.backward(w, x, dy, dx, own_g)
        for actual, expected in ((own_y, y), (dx, matrix.T @ dy), (own_g, g)):
            assert abs(actual - expected).max() <= TOLERANCE[dtype] * abs(expected).max()
        only_dx, only_g = np.full_like(x, np.nan), np.full(size, 7, dtype)
        product.backward(w, x, dy, only_dx, None)
        product.backward(w, x, dy, None, only_g)
        assert np.array_equal(only_dx, dx) and np.array_equal(only_g, own_g)


@pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")
def test_any_number_of_threads_gives_the_same_bits_and_wrong_arrays_are_refused(monkeypatch):
    monkeypatch.setattr("psmpi.backend.compiled.sparse.WORK", 1)
    rng, pattern = np.random.default_rng(0), some_pattern(40, 50, 0.2)
    index, size = index_of(pattern, rng, True)
    w, x, dy = (rng.standard_normal(shape).astype(F32) for shape in (size, (50, 9), (40, 9)))
    results = []
    for threads in (1, 2, 5):
        product = CompiledOps(threads=threads).sparse_product(index, F32)
        arrays = np.empty_like(dy), np.empty_like(x), np.zeros_like(w)
        product.forward(w, x, arrays[0])
        product.backward(w, x, dy, *arrays[1:])
        results.append(arrays)
        with pytest.raises(ValueError, match="cannot be multiplied"):
            product.forward(w, x[1:], arrays[0])
    assert all(np.array_equal(a, b) for repeated in results[1:] for a, b in zip(results[0], repeated, strict=True))


def test_a_radix_layer_is_the_sum_of_powers_of_a_cyclic_permutation():
    permutation = np.roll(np.eye(12, dtype=int), 1, axis=1)
    for stride, radix in ((1, 3), (3, 2), (6, 2)):
        power = np.linalg.matrix_power(permutation, stride)
        expected = np.kron(np.ones((2, 2), int), sum(np.linalg.matrix_power(power, j) for j in range(radix)))
        pattern, dense = radix_pattern(24, radix, stride, 2), np.zeros((24, 24), int)
        dense[pattern.row_numbers, pattern.columns] = 1
        assert np.array_equal(dense, expected) and pattern.size == expected.sum()
    # A system joins each input to each output by exactly one path.
    paths = np.eye(1024, dtype=int)
    assert radix_strides(1024, 32) == [1, 32] and radix_strides(64, 4) == [1, 4, 16]
    for stride in radix_strides(1024, 32):
        pattern = radix_pattern(1024, 32, stride)
        layer = sparse.csr_array((np.ones(pattern.size, int), pattern.columns, pattern.starts), (1024, 1024))
        paths = layer @ paths
    assert (paths == 1).all()


def test_random_rows_have_their_number_of_columns_and_every_column_alike_often(monkeypatch):
    pattern = random_pattern(4000, 20, 5, (0, 1))
    assert (pattern.fan_in == 5).all() and abs(pattern.fan_out - 1000).max() < 150
    assert pattern == Pattern.of(pattern.starts, pattern.columns, 20) != random_pattern(4000, 20, 5, (0, 2))
    monkeypatch.setattr("psmpi.layout.pattern.DRAWN", 100)
    random_pattern.cache_clear()
    assert random_pattern(4000, 20, 5, (0, 1)) == pattern and hash(pattern) == hash(random_pattern(4000, 20, 5, (0, 1)))


def test_patterns_of_arrays_that_make_none_are_refused():
    for starts, columns, says in (
        ([0, 2, 1, 2], [0, 1], "not decrease"),
        ([1, 2], [0, 1], "begin at 0"),
        ([0, 3], [0, 1], "number of entries, 2"),
        ([0, 0], [], "0 entries"),
        ([0, 2], [0, 3], "0 to 3; expected 0 to 2"),
        ([0, 2], [-1, 0], "from -1"),
        ([0, 1, 4], [2, 1, 0, 1], "row 1 has column 1 twice"),
        ([[0, 1]], [0], "vector"),
        ([0.0, 1.0], [0], "float64"),
    ):
        with pytest.raises(ValueError, match=says):
            Pattern.of(np.array(starts), np.array(columns, int), 3)


def test_a_pattern_packed_as_text_is_the_same_again_and_a_damaged_text_is_none():
    for pattern in (some_pattern(23, 17, 0.3), some_pattern(5, 70_000, 0.001), random_pattern(64, 64, 64, (0,))):
        text = pattern.packed()
        assert unpack(text) == pattern and text.isascii() and not set(text) & set("\"'\\\n")
        head, rows, inputs, size, numbers = text.split(":", 4)
        for wrong in (
            "",
            "csr:",
            "csr:3:4",
            f"{head}:{int(rows) + 1}:{inputs}:{size}:{numbers}",
            f"{head}:{rows}:2:{size}:{numbers}",
            f"{head}:{rows}:{inputs}:{int(size) - 1}:{numbers}",
            f"{head}:{rows}:{inputs}:{size}:{numbers[:-6]}",
            f"{head}:{rows}:{inputs}:{size}:{numbers} ",
            f"{head}:-1:{inputs}:{size}:{numbers}",
            f"{head}:{rows}:{inputs}:99999999999:{numbers}",
        ):
            with pytest.raises(ValueError):
                unpack(wrong)
        with pytest.raises(UserError, match="the pattern csr"):
            build("custom", (17,), [{"type": "sparse", "units": 4, "pattern": "csr:1:2:3:x"}], 4)


def test_a_file_of_scipy_is_a_pattern_and_a_table_that_needs_no_file(tmp_path):
    pattern = some_pattern(6, 9, 0.5)
    values = np.random.default_rng(0).standard_normal(pattern.size)
    matrix = sparse.csr_array((values, pattern.columns, pattern.starts), (6, 9))
    # Columns of a row are in any order, as SciPy's products leave them.
    for row in range(6):
        row_entries = slice(*matrix.indptr[row : row + 2])
        matrix.indices[row_entries] = matrix.indices[row_entries][::-1]
    path = str(tmp_path / "pattern.npz")
    sparse.save_npz(path, matrix)
    assert read_pattern(path) == pattern
    inner = {"type": "sparse", "units": 6, "pattern": path}
    tables = [inner, {"type": "residual", "layers": [inner]}, {"type": "tanh"}]
    packed = with_patterns(tables)
    assert packed[0] == {**inner, "pattern": pattern.packed()} == packed[1]["layers"][0] and packed[2] == {
        "type": "tanh"
    }
    assert tables[0] == inner
    for table in (inner, packed[0]):
        assert build("custom", (9,), [table], 6).layers[0].pattern == pattern
    with pytest.raises(UserError, match=r"the pattern is 6 x 9, but the layer has 7 units and 9 inputs"):
        build("custom", (9,), [{**inner, "units": 7}], 7)


GOOD = {
    "indptr": np.array([0, 1, 2]), "indices": np.array([0, 1]), "shape": np.array([2, 2]), "format": np.array(b"csr"),
}  # fmt: skip


def test_a_file_that_has_no_pattern_is_an_error_with_its_name(tmp_path):
    cases = [
        ({"shape": np.array([2, 2, 2])}, "shape"),
        ({"shape": np.array([0, 2])}, "two numbers from 1"),
        ({"shape": np.array([2, 2**40])}, "two numbers from 1"),
        ({"shape": np.array([2.0, 2.0])}, "shape has .* float64"),
        ({"indptr": np.array([0, 1])}, "indptr has 2 numbers"),
        ({"indptr": np.array(2)}, r"indptr has the shape \(\)"),
        ({"indptr": np.array([[0, 1, 2]])}, "whole numbers in a vector"),
        ({"indptr": np.array([(0,), (1,), (2,)], "i8,")}, "whole numbers in a vector"),
        ({"indptr": np.array([0, 1, 2], "m8[s]")}, "timedelta64"),
        ({"indptr": np.array([0, 1, np.inf])}, "float64"),
        ({"indptr": np.array([0, 1, 2], np.complex64)}, "complex64"),
        ({"indices": np.array([0, 5])}, "columns go from 0 to 5"),
        ({"indices": np.zeros(100_000, int)}, "2 numbers were expected"),
        ({"indices": np.array([0.0, 1.0])}, "whole numbers"),
        ({"indices": np.array([{}, []], object)}, "type object"),
        ({"indptr": None}, "indptr"),
        ({"format": None}, "format"),
        ({"format": np.array(3)}, "format has .* int64"),
        ({"format": np.array(b"\xff")}, "ascii"),
        ({"format": np.array("csc")}, "format 'csc'"),
    ]
    path = tmp_path / "p.npz"
    np.savez(path, **GOOD)
    assert read_pattern(str(path)).size == 2
    for arrays, says in cases:
        np.savez(path, **{name: array for name, array in {**GOOD, **arrays}.items() if array is not None})
        with pytest.raises(UserError, match=says) as error:
            read_pattern(str(path))
        assert str(path) in str(error.value) and "save_npz" in str(error.value)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="zip"):
        read_pattern(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("shape.npy", b"\x93NUMPY")
    with pytest.raises(UserError):
        read_pattern(str(path))
    with pytest.raises(UserError, match="No such file"):
        read_pattern(str(tmp_path / "missing.npz"))


@pytest.mark.parametrize("kind", ["csc", "coo", "bsr", "dia"])
def test_a_matrix_that_scipy_has_not_in_compressed_rows_is_refused(kind, tmp_path):
    path = str(tmp_path / "pattern.npz")
    sparse.save_npz(path, sparse.csr_array(np.eye(6, k=1)).asformat(kind))
    with pytest.raises(UserError, match=rf"format '{kind}'.*MATRIX.tocsr\(\)"):
        read_pattern(path)


def member(header, numbers=b"", version=1):
    """The bytes of an array in a .npz file."""
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 * version, "little") + header + numbers


@pytest.mark.filterwarnings("ignore:Reading:UserWarning", "ignore:Data type alias:DeprecationWarning")
def test_damaged_headers_and_bytes_are_one_error(tmp_path):
    path, rng = tmp_path / "p.npz", np.random.default_rng(0)
    texts = [
        b"(" * 60, b"(" * 9000, b"[" * 60_000, b"", b"{", b"3", b"None", b"\0", b"\xff\xfe", b"'", b"{'descr': '<i8'}",
        *(
            b"{'descr': %s, 'fortran_order': %s, 'shape': %s, }" % parts
            for parts in (
                (b"'<i8'", b"False", b"(99999999999999999999,)"), (b"'<i8'", b"False", b"(-1,)"),
                (b"'<i8'", b"False", b"(9223372036854775807,)"), (b"'<i8'", b"1", b"(3,)"), (b"'<i8'", b"False", b"3"),
                (b"3", b"False", b"(3,)"), (b"[1]", b"False", b"(3,)"), (b"''", b"False", b"(3,)"),
                (b"'S0'", b"False", b"()"), (b"'<i8,(2'", b"False", b"(3,)"),
                (b"[('a', '<i8', 3, 4)]", b"False", b"(3,)"),
                (b"'S99999999999'", b"False", b"()"), (b"{}", b"False", b"(3,)"), (b"'<i8'", b"False", b"(True,)"),
            )
        ),
    ]  # fmt: skip
    np.savez(path, **GOOD)
    with zipfile.ZipFile(path) as archive:
        sound = {name: archive.read(f"{name}.npy") for name in GOOD}
    bad = [(name, member(text, bytes(24), version)) for name in GOOD for text in texts for version in (1, 2)]
    bad += [("indptr", sound["indptr"][:6] + b"\3" + sound["indptr"][7:]), ("indices", sound["indices"][:-1])]
    for name, content in bad:
        with zipfile.ZipFile(path, "w") as archive:
            for array_name, sound_content in sound.items():
                archive.writestr(f"{array_name}.npy", content if array_name == name else sound_content)
        with pytest.raises(UserError):
            read_pattern(str(path))
    np.savez_compressed(path, **GOOD)
    intact = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(500):
        wrong = intact.copy()
        wrong[rng.integers(len(wrong), size=3)] = rng.integers(256, size=3)
        path.write_bytes(wrong[: rng.integers(len(wrong) // 2, 2 * len(wrong))].tobytes())
        with suppress(UserError):
            read_pattern(str(path))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pattern": "random"}, "needs 'fan_in'"),
        ({"pattern": "random", "fan_in": 9}, "fan_in = 9 is more than the layer's 8 inputs"),
        ({"pattern": "random", "fan_in": 2, "seed": -1}, "seed = -1"),
        ({"pattern": "radix", "radix": 4, "stride": 3}, "more than once"),
        ({"pattern": "radix", "copies": 3}, "copies = 3 does not divide"),
        ({"pattern": "radix", "units": 9}, "as many inputs as units, but has 8 inputs and 9 units"),
        ({"pattern": "nearest"}, "expected \"random\""),
        ({"pattern": 3}, "pattern = 3"),
        ({}, "needs 'pattern'"),
    ],
)  # fmt: skip
def test_settings_that_make_no_layer_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        build("custom", (8,), [{"type": "sparse", "units": 8, **settings}], settings.get("units", 8))


def test_a_local_pattern_has_its_columns_in_any_order():
    """The rows of a rank over renumbered inputs compute the same as in the whole layer."""
    rng, pattern = np.random.default_rng(0), some_pattern(12, 10, 0.4)
    rows, order = np.isin(np.arange(12), [1, 4, 5, 11]), rng.permutation(10)
    own_rows, firsts = pattern.restricted(rows, np.ones(10, bool))
    local = Pattern.of(own_rows.starts, np.argsort(order)[own_rows.columns], 10)
    w = rng.standard_normal(pattern.size)
    entries = np.concatenate([np.arange(a, a + n) for a, n in zip(firsts, own_rows.fan_in, strict=True)])
    x, d, outputs, gradients = rng.standard_normal((10, 5)), rng.standard_normal((12, 5)), [], []
    for layer_pattern, weights, inputs, dy in (
        (pattern, w, x, d * rows[:, None]),
        (local, w[entries], x[order], d[rows]),
    ):
        layer = Sparse("sparse1", (10,), (layer_pattern.rows,), layer_pattern, bias=False)
        network = Network("local", (10,), (layer,))
        model = Model(network, network.layout(), weights, np.zeros_like(weights), NumpyOps())
        # The flat vector has the rows in their order.
        assert network.layout().size == layer_pattern.size
        tape, dx = model.forward(inputs), np.empty_like(inputs)
        outputs.append(tape.scores.copy())
        model.backward(tape, dy.copy(), dx=dx)
        gradients.append((model.g, dx))
    assert np.allclose(outputs[0][rows], outputs[1], rtol=1e-14)
    assert np.allclose(gradients[0][0][entries], gradients[1][0]) and np.allclose(
        gradients[0][1][order], gradients[1][1]
    )
    with pytest.raises(ValueError, match="not kept"):
        pattern.restricted(rows, np.zeros(10, bool))


def test_initial_weights_are_by_the_entries_of_rows_and_columns():
    layer = Sparse("sparse1", (17,), (23,), some_pattern(23, 17, 0.3))
    fan_in, fan_out = layer.pattern.fan_in[layer.pattern.row_numbers], layer.pattern.fan_out[layer.pattern.columns]
    for kind, widths in (
        ("he", np.sqrt(6 / fan_in)),
        ("xavier", 2 * np.sqrt(6 / (fan_in + fan_out))),
        ("pytorch", fan_in**-0.5),
    ):
        law = layer.initial(kind, 2.0)["sparse1.weight"]
        assert np.allclose(law.value * law.widths, widths)
