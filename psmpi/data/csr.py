"""Sparse samples in the user's files: the arrays x_data, x_indices, x_indptr and x_shape of a SciPy CSR matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psmpi.data.arrays import Header
from psmpi.data.compressed import checked
from psmpi.data.compressed_rows import CompressedRows
from psmpi.errors import UserError

# SciPy's names for the arrays of a CSR matrix; those of x are x_data and so on.
PARTS = ("data", "indices", "indptr", "shape")
CSR_KEYS = tuple(f"{key}_{part}" for key in ("x", "x_test") for part in PARTS)
SAVED = "np.savez(NAME, x_data=x.data, x_indices=x.indices, x_indptr=x.indptr, x_shape=x.shape, y=y)"


def with_compressed(path: Path, keys: list[str], headers: dict[str, Header]) -> tuple[list[str], dict[str, Header]]:
    """Names and headers of a file's arrays, with x and x_test added if the file has them as compressed rows.

    UserError for arrays that are not compressed rows, and for a file of SciPy's save_npz, which has no targets.
    """
    if "x" not in keys and {"indices", "indptr", "format"} <= set(keys):
        raise UserError(
            f"{path}: it is a matrix as scipy.sparse.save_npz writes it, without labels or values to learn: load it "
            f"with x = scipy.sparse.load_npz(NAME).tocsr() and save {SAVED}"
        )
    keys, headers = list(keys), dict(headers)
    for key in ("x", "x_test"):
        own = [f"{key}_{part}" for part in PARTS]
        missing = [name for name in own if name not in headers]
        if len(missing) == len(own):
            continue
        if missing or key in keys:
            fault = f"no array {missing[0]!r}" if missing else f"found {key} too"
            raise UserError(
                f"{path}: {fault}, beside {', '.join(name for name in own if name in headers)}: of sparse samples save "
                f"all of {', '.join(own)}, and no {key}"
            )
        headers[key] = _header(path, key, headers)
        keys.append(key)
    if "lengths" in headers and "x_data" in headers:
        raise UserError(f"{path}: found lengths beside sparse samples, which are no sequences: leave one of them out")
    return keys, headers


def _header(path: Path, key: str, headers: dict[str, Header]) -> Header:
    """Header of the samples (n, features) in the arrays of compressed rows; UserError unless these fit together."""
    data, indices, indptr, shape = (headers[f"{key}_{part}"] for part in PARTS)
    where = f"{path}, {key}"
    if shape.dtype.kind not in "iu" or shape.shape != (2,):
        raise UserError(
            f"{where}_shape is {shape.dtype} of shape {shape.shape}; expected two integers, samples and features: save "
            "x.shape"
        )
    for header, name in ((data, "data"), (indices, "indices"), (indptr, "indptr")):
        if header.dtype.kind not in ("iuf" if name == "data" else "iu") or len(header.shape) != 1:
            raise UserError(
                f"{where}_{name} is {header.dtype} of shape {header.shape}; expected a vector of "
                f"{'numbers' if name == 'data' else 'integers'}: save {SAVED}"
            )
    samples, features = (int(size) for size in shape.values())
    if indptr.shape != (samples + 1,) or samples < 1:
        raise UserError(
            f"{where}_indptr has {indptr.shape[0]:,} numbers and {key}_shape says {samples:,} samples; expected one "
            "number more than samples, and one sample at least: save the arrays of x.tocsr()"
        )
    rows = checked(where, indptr.values(), indices.values(), data.values(), features)
    source = CompressedRows(rows, where)
    return Header((samples, features), np.dtype(rows.dtype), lambda: source, rows.dense)
