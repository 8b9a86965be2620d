"""Checks of a whole checkpoint: its digest, its objects and its texts.

Another process opens a stranger's file with HDF5 first, see psmpi.files.examiner. It visits every object, every chunk
and every text that is read later.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import h5py

from psmpi.checkpoint.contents import TABLES, TEXTS, Contents, read_contents
from psmpi.checkpoint.format import check_file, open_file
from psmpi.checkpoint.network import network_in
from psmpi.config import from_toml, parse_toml
from psmpi.errors import DamagedError, UserError
from psmpi.files import examiner
from psmpi.files.hdf5 import DEFLATE, FLETCHER, SHUFFLE, ForeignError, check_stored, chunks_of, filters_of, is_hard
from psmpi.files.packed import Unpacker
from psmpi.nn.layers import LAYERS
from psmpi.registry import own_alone

# Filters that a data set may have, in their order.
FILTERS: tuple[list[int], ...] = ([], [FLETCHER], [SHUFFLE, DEFLATE], [SHUFFLE, DEFLATE, FLETCHER])


def validate(path: Path) -> Contents:
    """Check the whole file and return its contents. Errors as in `check_file` and `read_contents`.

    A file that has not changed since the last call is not checked again.
    """
    try:
        now = path.stat()
    except OSError:
        return _validate(path, ())
    return _validate(path, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))


@lru_cache(maxsize=2)
def _validate(path: Path, state: tuple[int, ...]) -> Contents:
    """As `validate`, cached. state: size, times and inode of the file, which change with it."""
    check_file(path)
    examiner.examine("psmpi.checkpoint.soundness:check_inside", path)
    contents = read_contents(path)
    if _has_other_layers(contents):
        # The other process knows psmpi's layers alone, and has looked at all else.
        _check_network(path, contents)
    return contents


def check_inside(path: Path) -> None:
    """Raise DamagedError for a file with a correct digest whose objects are not exactly those that psmpi writes."""
    nbytes = path.stat().st_size
    try:
        with open_file(path) as file:
            objects = _objects(file, nbytes)
            groups = {name for name, item in objects.items() if isinstance(item, h5py.Group)}
            contents = read_contents(path)
            tensors = _check_tensors(contents, objects)
            _check_tables(objects)
            known = {*TEXTS, *tensors}
            tables = tuple(f"{group}/" for group in TABLES)
            unknown = [
                name for name in objects if name not in known and name not in groups and not name.startswith(tables)
            ]
            if unknown:
                raise ForeignError(f": {unknown[0]} is not part of the format of checkpoints")
    except ForeignError as error:
        raise DamagedError(f"checkpoint {path}{error}; use another one") from None
    except (DamagedError, UserError, MemoryError):
        raise
    # h5py raises various errors for headers and links that are damaged or unknown.
    except Exception as error:
        raise DamagedError(f"checkpoint {path} cannot be read ({repr(error)[:200]}); use another one") from None
    with own_alone():
        _check_network(path, contents)


def _objects(file: h5py.File, nbytes: int) -> dict[str, h5py.Group | h5py.Dataset]:
    """Groups and data sets of a file by path; ForeignError for links, other objects, and one with two names."""
    objects: dict[str, h5py.Group | h5py.Dataset] = {}
    addresses, waiting, total = {h5py.h5o.get_info(file.id).addr}, [("", file)], 0
    while waiting:
        path, group = waiting.pop()
        for name in list(group):
            full = f"{path}{name}"
            if not is_hard(group, name):
                raise ForeignError(f": {full} is a link, which may lead to another file")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in addresses or not isinstance(item, h5py.Group | h5py.Dataset):
                raise ForeignError(f": {full} is another name of an object, or no data")
            addresses.add(address)
            objects[full] = item
            if isinstance(item, h5py.Group):
                waiting.append((f"{full}/", item))
            else:
                total += _check_dataset(full, item, nbytes)
    if total > nbytes:
        raise ForeignError(f" has {total:,} bytes of data sets in a file of {nbytes:,}")
    return objects


def _check_dataset(path: str, dataset: h5py.Dataset, nbytes: int) -> int:
    """Bytes of a data set in the file; ForeignError for a data set that psmpi would not write."""
    try:
        check_stored(dataset, nbytes)
        dtype = dataset.dtype
        if h5py.check_string_dtype(dtype) is not None:
            if dtype.itemsize > nbytes or dataset.shape != (1,) or path not in TEXTS:
                raise ForeignError("is a text in a wrong place, or of a wrong length")
        elif dtype.kind not in "fiu" or dtype.itemsize > 8:
            raise ForeignError(f"holds {dtype}, and no numbers")
        filters = filters_of(dataset)
        if filters not in FILTERS:
            raise ForeignError(f"has the filters {filters}")
        if DEFLATE in filters:
            unpacker = Unpacker(dataset)
            for chunk in chunks_of(dataset):
                unpacker.chunk(chunk.offset)
    except OSError as error:
        raise ForeignError(f": {path}: {error}") from None
    except ForeignError as error:
        raise ForeignError(f": {path} {error}") from None
    return int(dataset.id.get_storage_size())


def _check_tensors(contents: Contents, objects: dict[str, h5py.Group | h5py.Dataset]) -> set[str]:
    """Check that all tensors exist in their shapes, and in one dtype, except those of spaces; return their paths."""
    dtypes, paths = set(), set()
    if not contents.tensors():
        raise ForeignError(" has no weights")
    for vector in ["weights", *contents.vectors, *contents.spaces]:
        for tensor in contents.tensors(vector):
            name, space = f"{contents.group(vector)}/{tensor.name}", vector in contents.spaces
            dataset = objects.get(name)
            paths.add(name)
            has = f"is {dataset.dtype} {dataset.shape}" if isinstance(dataset, h5py.Dataset) else "is missing"
            if isinstance(dataset, h5py.Dataset) and dataset.shape == tensor.shape:
                if space:
                    continue
                if dataset.dtype in ("f4", "f8"):
                    dtypes.add(dataset.dtype)
                    if len(dtypes) == 1:
                        continue
            wanted = "numbers" if space else "float"
            raise ForeignError(f": {name} {has}, its layout says {tensor.shape}, {wanted}")
    return paths


def _check_tables(objects: dict[str, h5py.Group | h5py.Dataset]) -> None:
    for group in TABLES:
        tables = {name: item for name, item in objects.items() if name.startswith(f"{group}/")}
        for name, table in tables.items():
            if not isinstance(table, h5py.Dataset):
                raise ForeignError(f": {name} is no table")
        rows = {table.shape[:1] for table in tables.values()}
        if len(rows) > 1 or () in rows:
            raise ForeignError(f": its tables in /{group} are not of one length")


def _has_other_layers(contents: Contents) -> bool:
    """Whether the tables of layers in the configuration name types that are not psmpi's."""

    def named(tables: Any) -> Iterator[Any]:
        for table in tables if isinstance(tables, list) else ():
            if isinstance(table, dict):
                yield table.get("type")
                yield from named(table.get("layers"))

    model = parse_toml(contents.config).get("model")
    types = named(model.get("layers")) if isinstance(model, dict) else ()
    return any(str(kind) not in LAYERS.own for kind in types)


def _check_network(path: Path, contents: Contents) -> None:
    """Raise DamagedError if the configuration describes another network than the layout."""
    try:
        model = from_toml(contents.config, str(path), foreign=True).model
    except UserError:
        # The training method is not installed here; the code that needs the configuration reports this.
        return
    # Each class has a score, and each score at least one unit, except that two classes may share one score.
    most = max(2, *(p.units for p in contents.layout.parameters))
    if contents.layout.classes > most:
        raise DamagedError(
            f"checkpoint {path} has {contents.layout.classes:,} classes, and {most:,} units at most; use another one"
        )
    try:
        network = network_in(contents, model)
        stored, described = (
            [(p.name, p.shape, p.units) for p in layout.parameters] for layout in (contents.layout, network.layout())
        )
    except UserError:
        # This process does not know a kind of layer.
        return
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedError(
            f"checkpoint {path}: its configuration describes no network ({repr(error)[:200]}); use another one"
        ) from None
    if stored != described:
        sizes = (sum(prod(shape) for _, shape, _ in parameters) for parameters in (described, stored))
        raise DamagedError(
            "checkpoint {}: its configuration describes a network of {:,} weights, its layout one of {:,}, or of other "
            "names; use another one".format(path, *sizes)
        )
