"""HDF5 files with missing values: never written, or in other files that are missing."""

from __future__ import annotations

import fcntl
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from psmpi.data import open_dataset, open_split
from psmpi.errors import UserError

# Virtual arrays and links to other files are read only on request, for the user's own files.
opened = partial(open_dataset, external=True)
KEYS = ("x", "y", "x_test", "y_test")
RNG = np.random.default_rng(0)
X, Y = RNG.random((20, 3)).astype(np.float32), np.arange(20) % 4
ARRAYS = {"x": X, "y": Y, "x_test": X + 1, "y_test": Y[::-1].copy()}


def refused(path: Path, *fragments: str) -> None:
    for opening in (lambda: opened(str(path), None), lambda: open_split(str(path), None, "all", external=True)):
        with pytest.raises(UserError) as caught:
            opening()
        for fragment in (str(path), *fragments):
            assert fragment in str(caught.value)


def write(path: Path, leave_out: str = "", **arrays: Any) -> h5py.File:
    file = h5py.File(path, "w")
    for key, values in {**ARRAYS, **arrays}.items():
        if key != leave_out:
            file[key] = values
    return file


def virtual(file: h5py.File, key: str, parts: dict[str, int], total: int, inner: str = "part") -> None:
    """Create `key` as a virtual array of the arrays `inner` of other files; parts: {file name: rows}."""
    shape = ARRAYS[key].shape[1:]
    layout, first = h5py.VirtualLayout((total, *shape), ARRAYS[key].dtype), 0
    for name, rows in parts.items():
        layout[first : first + rows] = h5py.VirtualSource(name, inner, (rows, *shape), ARRAYS[key].dtype)
        first += rows
    file.create_virtual_dataset(key, layout)


def parts(folder: Path, key: str) -> dict[str, int]:
    """Write an array in two files; return {file name: rows}."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("first.h5", slice(0, 12)), ("second.h5", slice(12, 20))):
        with h5py.File(folder / name, "w") as file:
            file["part"] = ARRAYS[key][rows]
    return {"first.h5": 12, "second.h5": 8}


@pytest.mark.parametrize("key", KEYS)
def test_chunks_that_were_never_written_are_refused(tmp_path: Path, key: str) -> None:
    path, values = tmp_path / "own.h5", ARRAYS[key]
    for options in ({}, {"compression": "gzip"}, {"maxshape": (None, *values.shape[1:])}):
        with write(path, key) as file:
            file.create_dataset(key, values.shape, values.dtype, chunks=(2, *values.shape[1:]), **options)[:13] = (
                values[:13]
            )
        refused(path, f"{key} is not all there: 7 of 10 chunks were written", "write the file anew")
        with h5py.File(path, "a") as file:
            file[key][:] = values
        assert np.array_equal(opened(str(path), None).test.read(np.arange(20)), X + 1)


@pytest.mark.parametrize("key", KEYS)
def test_arrays_that_were_made_and_never_written_are_refused(tmp_path: Path, key: str) -> None:
    values = ARRAYS[key]
    for chunks, says in (
        (None, f"{key} was made and never written"),
        (values.shape, f"{key} is not all there: 0 of 1 chunks"),
    ):
        with write(tmp_path / "own.h5", key) as file:
            file.create_dataset(key, values.shape, values.dtype, chunks=chunks)
        refused(tmp_path / "own.h5", says, "zeros")


def test_zeros_that_were_written_are_samples(tmp_path: Path) -> None:
    compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    compact.set_layout(h5py.h5d.COMPACT)
    with write(tmp_path / "own.h5", "x", x_test=np.zeros_like(X)) as file:
        file.create_dataset("x", data=np.zeros_like(X), chunks=(3, 2), compression="gzip")
        del file["y_test"]
        dataset_id = h5py.h5d.create(file.id, b"y_test", h5py.h5t.NATIVE_INT64, h5py.h5s.create_simple((20,)), compact)
        h5py.Dataset(dataset_id)[...] = 0
    data = opened(str(tmp_path / "own.h5"), None)
    assert not data.train.read(np.arange(20)).any() and not data.test.labels.any()


def test_a_hundred_thousand_chunks_are_counted_quickly_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file.create_dataset("x", data=np.ones((100_000, 1), np.float32), chunks=(1, 1), maxshape=(None, 1))
        file["y"] = np.arange(100_000) % 2
    read, real = [], h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, *at: read.append(self.name) or real(self, *at))
    began = time.perf_counter()
    assert opened(str(tmp_path / "own.h5"), None).train.n == 80_000
    # 0.1 s where nothing else runs.
    assert time.perf_counter() - began < 5 and read == ["/y"]


@pytest.mark.parametrize("key", KEYS)
def test_virtual_arrays_whose_sources_are_there_are_read(tmp_path: Path, key: str) -> None:
    with write(tmp_path / "own.h5", key) as file:
        virtual(file, key, parts(tmp_path, key), 20)
    data = opened(str(tmp_path / "own.h5"), None)
    assert np.array_equal(data.train.read(np.arange(20)), X) and np.array_equal(data.train.labels, Y)
    assert np.array_equal(data.test.read(np.arange(20)), X + 1) and np.array_equal(data.test.labels, Y[::-1])


@pytest.mark.parametrize("key", KEYS)
def test_virtual_arrays_without_a_source_file_name_it(tmp_path: Path, key: str) -> None:
    with write(tmp_path / "own.h5", key) as file:
        virtual(file, key, parts(tmp_path, key), 20)
    (tmp_path / "second.h5").rename(tmp_path / "elsewhere.h5")
    refused(
        tmp_path / "own.h5", f"{key} is put together from 2 other files, and second.h5 is not there", "bring it back"
    )
    (tmp_path / "first.h5").unlink()
    refused(tmp_path / "own.h5", "first.h5 (and 1 more) is not there")


def test_virtual_sources_are_looked_for_where_hdf5_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute_parts = {str(tmp_path / "far" / name): rows for name, rows in parts(tmp_path / "far", "x").items()}
    (tmp_path / "near").mkdir()
    for folder, names in (("near", parts(tmp_path / "far", "x")), ("far", absolute_parts)):
        with write(tmp_path / folder / "own.h5", "x") as file:
            virtual(file, "x", names, 20)
    rows = np.arange(20)
    # Sources are found by an absolute name or, if that file is missing, by its last part beside the virtual file.
    assert np.array_equal(opened(str(tmp_path / "far" / "own.h5"), None).train.read(rows), X)
    (tmp_path / "far").rename(tmp_path / "moved")
    assert np.array_equal(opened(str(tmp_path / "moved" / "own.h5"), None).train.read(rows), X)
    near = tmp_path / "near" / "own.h5"
    refused(near, "first.h5 (and 1 more)", "HDF5_VDS_PREFIX")
    monkeypatch.setenv("HDF5_VDS_PREFIX", str(tmp_path / "moved"))
    assert np.array_equal(opened(str(near), None).train.read(rows), X)
    monkeypatch.delenv("HDF5_VDS_PREFIX")
    monkeypatch.chdir(tmp_path / "moved")
    assert np.array_equal(opened(str(near), None).train.read(rows), X)


def test_virtual_sources_that_lack_something_are_named(tmp_path: Path) -> None:
    path, names = tmp_path / "own.h5", parts(tmp_path, "x")
    with write(path, "x") as file:
        virtual(file, "x", names, 21)
    refused(path, "which have 60 of its 63 values")
    with write(path, "x") as file:
        virtual(file, "x", names, 20)
    with h5py.File(tmp_path / "second.h5", "w") as file:
        file["part"] = X[12:19]
    refused(path, "takes more from part in", "second.h5", "(7, 3)")
    with h5py.File(tmp_path / "second.h5", "w") as file:
        file.create_dataset("part", (8, 3), np.float32)
    with pytest.raises(UserError, match=r"second\.h5: part was made and never written"):
        opened(str(path), None)
    with h5py.File(tmp_path / "second.h5", "w") as file:
        file["other"] = X[12:]
    refused(path, "second.h5 has no array part")


def test_virtual_arrays_of_parts_of_arrays_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["all"] = np.hstack([X, X])
    layout = h5py.VirtualLayout((20, 3), np.float32)
    layout[::2] = h5py.VirtualSource(tmp_path / "wide.h5", "all", (20, 6), np.float32)[::2, 3:]
    layout[1::2] = h5py.VirtualSource("wide.h5", "all", (20, 6), np.float32)[1::2, :3]
    with write(tmp_path / "own.h5", "x") as file:
        file.create_virtual_dataset("x", layout)
    assert np.array_equal(opened(str(tmp_path / "own.h5"), None).train.read(np.arange(20)), X)
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["all"] = np.hstack([X, X])[:19]
    refused(tmp_path / "own.h5", "takes more from all", "(19, 6)")


def growing(file: h5py.File, key: str, sources: dict[str, Any], step: int = 1) -> None:
    """Create `key` as a virtual array of arrays of any length; the k-th has every `step`-th row from row k on."""
    end, shape = h5py.h5s.UNLIMITED, ARRAYS[key].shape[1:]
    layout = h5py.VirtualLayout((20, *shape), ARRAYS[key].dtype, maxshape=(None, *shape))
    for k, (name, values) in enumerate(sources.items()):
        with h5py.File(Path(file.filename).parent / name, "w") as source_file:
            source_file.create_dataset("part", data=values, maxshape=(None, *shape), chunks=True)
        source = h5py.VirtualSource(name, "part", values.shape, values.dtype, maxshape=(None, *shape))
        layout[k:end:step] = source[0:end]
    file.create_virtual_dataset(key, layout)


def numbered(file: h5py.File, key: str, pattern: str, rows: int, inner: bytes = b"part") -> None:
    """Create `key` as a virtual array of all arrays of `rows` rows that match a pattern."""
    shape, dtype = ARRAYS[key].shape[1:], h5py.h5t.py_create(ARRAYS[key].dtype, logical=True)
    properties, ones = h5py.h5p.create(h5py.h5p.DATASET_CREATE), (1,) * len(shape)
    space = h5py.h5s.create_simple((rows, *shape), (h5py.h5s.UNLIMITED, *shape))
    array_space = h5py.h5s.create_simple((rows, *shape), (h5py.h5s.UNLIMITED, *shape))
    space.select_hyperslab(
        (0, *(0 for _ in shape)), (h5py.h5s.UNLIMITED, *ones), stride=(rows, *ones), block=(rows, *shape)
    )
    properties.set_virtual(space, pattern.encode(), inner, h5py.h5s.create_simple((rows, *shape)))
    h5py.h5d.create(file.id, key.encode(), dtype, array_space, properties)


@pytest.mark.parametrize("key", KEYS)
def test_virtual_arrays_of_unlimited_size_are_read(tmp_path: Path, key: str) -> None:
    path, values = tmp_path / "own.h5", ARRAYS[key]
    for step in (1, 2, 3):
        with write(path, key) as file:
            growing(file, key, {f"{k}.h5": values[k::step] for k in range(step)}, step)
        data = opened(str(path), None)
        assert np.array_equal(data.train.read(np.arange(20)), X) and np.array_equal(data.test.labels, Y[::-1])
        assert np.array_equal(data.test.read(np.arange(20)), X + 1) and np.array_equal(data.train.labels, Y)
    # One source is shorter than the other sources, or was not written to its end.
    with h5py.File(tmp_path / "1.h5", "a") as file:
        file["part"].resize(5, axis=0)
    refused(path, f"{key} takes more from part in", "1.h5", "than this has, with its shape (5,")
    with h5py.File(tmp_path / "1.h5", "w") as file:
        file.create_dataset(
            "part", (7, *values.shape[1:]), values.dtype, maxshape=(None, *values.shape[1:]), chunks=True
        )
    with pytest.raises(UserError, match=r"1\.h5: part is not all there"):
        opened(str(path), None)
    (tmp_path / "1.h5").unlink()
    refused(path, f"{key} is put together from 3 other files, and 1.h5 is not there")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("pattern", ["b-%b.h5", "%b%%.h5"])
def test_virtual_arrays_of_numbered_files_are_read(tmp_path: Path, key: str, pattern: str) -> None:
    path, values = tmp_path / "own.h5", ARRAYS[key]
    names = [pattern.replace("%b", str(k)).replace("%%", "%") for k in range(4)]
    for k, name in enumerate(names):
        with h5py.File(tmp_path / name, "w") as file:
            file["part"] = values[5 * k : 5 * k + 5]
    with write(path, key) as file:
        numbered(file, key, pattern, 5)
    data = opened(str(path), None)
    assert np.array_equal(data.train.read(np.arange(20)), X) and np.array_equal(data.test.labels, Y[::-1])
    assert np.array_equal(data.test.read(np.arange(20)), X + 1) and np.array_equal(data.train.labels, Y)
    # HDF5 ends at the first file that is missing or lacks the array.
    (tmp_path / names[2]).rename(tmp_path / "gone")
    refused(path, f"{key} is put together from files named {pattern}, and ends before {names[2]}", names[3], "bring it")
    (tmp_path / names[3]).unlink()
    with pytest.raises(UserError, match="expected one label a sample" if key.startswith("x") else "10 labels in y"):
        opened(str(path), None)
    with h5py.File(tmp_path / names[2], "w") as file:
        file["other"] = values[:5]
    refused(path, f"ends before {names[2]}, which has no array part")
    for name in (names[0], names[2]):
        (tmp_path / name).unlink()
    refused(path, f"{names[0]} is not there")


def test_virtual_arrays_of_numbered_arrays_are_read(tmp_path: Path) -> None:
    """The arrays are in one other file, or in the file itself."""
    for name, place in (("other.h5", "other.h5"), ("own.h5", ".")):
        with write(tmp_path / "own.h5", "x") as file:
            numbered(file, "x", place, 10, b"%%/part-%b")
        with h5py.File(tmp_path / name, "a") as file:
            for k in range(2):
                file[f"%/part-{k}"] = X[10 * k : 10 * k + 10]
        assert np.array_equal(opened(str(tmp_path / "own.h5"), None).train.read(np.arange(20)), X)
    with h5py.File(tmp_path / "own.h5", "a") as file:
        del file["%/part-0"]
    refused(tmp_path / "own.h5", "has no array %/part-0")


def test_virtual_arrays_whose_sources_overlap_are_not_all_there(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["part"] = X[:10]
    with write(tmp_path / "own.h5", leave_out="x") as file:
        layout = h5py.VirtualLayout(X.shape, X.dtype)
        for name in ("a.h5", "b.h5"):
            layout[:10] = h5py.VirtualSource(name, "part", (10, 3))
        file.create_virtual_dataset("x", layout)
    refused(tmp_path / "own.h5", "which have 30 of its 60 values")


def test_virtual_arrays_behind_a_link_are_beside_their_own_sources(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with h5py.File(tmp_path / "sub" / "raw.h5", "w") as file:
        file["part"] = X
    with h5py.File(tmp_path / "sub" / "joined.h5", "w") as file:
        layout = h5py.VirtualLayout(X.shape, X.dtype)
        layout[:] = h5py.VirtualSource("raw.h5", "part", X.shape)
        file.create_virtual_dataset("x", layout)
    with write(tmp_path / "own.h5", leave_out="x") as file:
        file["x"] = h5py.ExternalLink("sub/joined.h5", "/x")
    split = opened(str(tmp_path / "own.h5"), None).train
    assert np.array_equal(split.read(np.arange(split.n)), X)


def test_virtual_arrays_in_a_circle_are_refused(tmp_path: Path) -> None:
    for name, source in (("own.h5", "other.h5"), ("other.h5", "own.h5")):
        with write(tmp_path / name, "x") as file:
            virtual(file, "x", {source: 20}, 20, "x")
    with pytest.raises(UserError, match=r"(own|other)\.h5: x is virtual, of virtual arrays without end"):
        opened(str(tmp_path / "own.h5"), None)


def test_a_source_that_goes_after_opening_is_told_when_it_is_read(tmp_path: Path) -> None:
    with write(tmp_path / "own.h5", "x") as file:
        virtual(file, "x", parts(tmp_path, "x"), 20)
    data = opened(str(tmp_path / "own.h5"), None)
    (tmp_path / "second.h5").unlink()
    with pytest.raises(UserError, match=r"second\.h5 is not there"):
        data.train.read([0])


@pytest.mark.parametrize("key", KEYS)
def test_raw_bytes_of_another_file_are_not_read(tmp_path: Path, key: str) -> None:
    (tmp_path / "private").write_bytes(bytes(4096))
    with write(tmp_path / "own.h5", key) as file:
        raw = [(str(tmp_path / "private"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset(key, ARRAYS[key].shape, ARRAYS[key].dtype, external=raw)
    refused(tmp_path / "own.h5", f"{key} lies in another file", "private", "h5repack")


def test_links_to_other_files_are_followed_or_named(tmp_path: Path) -> None:
    parts(tmp_path, "x")
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["part"] = X
    with write(tmp_path / "own.h5", "x") as file:
        file["x"] = h5py.ExternalLink("whole.h5", "/part")
    assert np.array_equal(opened(str(tmp_path / "own.h5"), None).train.read(np.arange(20)), X)
    (tmp_path / "whole.h5").unlink()
    refused(tmp_path / "own.h5", "x is a link to /part in whole.h5, which is not there")
    with write(tmp_path / "own.h5", "x") as file:
        file["x"] = h5py.SoftLink("/x")
    refused(tmp_path / "own.h5")


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    """The filter is optional, so that HDF5 makes the array, and the mask of the chunk says that the filter was used."""
    if h5py.h5z.filter_avail(32013):
        pytest.skip("this HDF5 has the filter zfp")
    path = tmp_path / "own.h5"
    for used, ends in ((0, "is packed"), (1, "")):
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(X.shape)
        properties.set_filter(32013, h5py.h5z.FLAG_OPTIONAL, (1, 2))
        with write(path, "x") as file:
            x = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(X.shape), properties)
            x.write_direct_chunk((0, 0), X.tobytes(), used)
        if ends:
            refused(path, "x is packed by the HDF5 filter 32013 (zfp)", "pip install hdf5plugin", "h5repack -f GZIP")
    assert np.array_equal(opened(str(path), None).train.read(np.arange(20)), X)


def test_a_file_that_is_being_written_is_told_so(tmp_path: Path) -> None:
    write(tmp_path / "own.h5").close()
    with (tmp_path / "own.h5").open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        refused(tmp_path / "own.h5", "another program has the file open for writing")
    with h5py.File(tmp_path / "live.h5", "w", libver="latest") as file:
        for key, values in ARRAYS.items():
            file[key] = values
        file.swmr_mode = True
        file.flush()
        shutil.copy(tmp_path / "live.h5", tmp_path / "copy.h5")
    refused(tmp_path / "copy.h5", "did not close it", "h5clear -s")


def test_a_wrong_checksum_of_a_chunk_is_damage(tmp_path: Path) -> None:
    with write(tmp_path / "own.h5", "x") as file:
        file.create_dataset("x", data=X, chunks=X.shape, fletcher32=True)
        offset = file["x"].id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "own.h5").read_bytes())
    content[offset + 5] ^= 4
    (tmp_path / "own.h5").write_bytes(content)
    data = opened(str(tmp_path / "own.h5"), None)
    with pytest.raises(UserError, match=r"own\.h5: the file is damaged .*filter returned failure"):
        data.train.read([0])


def test_files_that_only_repeat_themselves_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with write(tmp_path / "own.h5", "y") as file:
        file.create_dataset("y", data=np.zeros(20, np.int64), chunks=(20,), compression="gzip")
    assert opened(str(tmp_path / "own.h5"), None).outputs == 4
    monkeypatch.setattr("psmpi.data.files.UNPACKED_BYTES", 100)
    monkeypatch.setattr("psmpi.data.files.PACKED", 5)
    refused(tmp_path / "own.h5", "y: ", "bytes that would unpack to 160", "save it without compression")


def test_what_is_no_hdf5_is_called_what_it_is(tmp_path: Path) -> None:
    for content, says in (
        (b"PK\3\4" + bytes(99), "a zip file (.npz)"), (b"\x93NUMPY" + bytes(99), "a single array of NumPy (.npy)"),
        (b"", "empty"), (b"x,y\n1,2\n" * 99, "of an unknown format"), (b"MATLAB 5.0 MAT-file", "a MATLAB file"),
    ):  # fmt: skip
        (tmp_path / "own.h5").write_bytes(content)
        refused(tmp_path / "own.h5", f"it is {says}", "not an HDF5 file", "np.savez(NAME, x=samples, y=labels)")


@pytest.mark.parametrize("key", KEYS)
def test_values_that_are_stored_scaled_are_refused(tmp_path: Path, key: str) -> None:
    for name, value, fine in (("scale_factor", 0.5, 1.0), ("add_offset", -3, 0)):
        with write(tmp_path / "own.h5") as file:
            file[key].attrs[name] = value
        refused(tmp_path / "own.h5", f"{key} has the attribute {name} = {value}", "save the scaled values")
        with write(tmp_path / "own.h5") as file:
            file[key].attrs[name] = fine
        assert opened(str(tmp_path / "own.h5"), None).train.n == 20
