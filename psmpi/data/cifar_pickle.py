"""The Python version of CIFAR-10. Its files are pickles, which can run code; the unpickler here runs none.

The unpickler resolves only the few names that a pickled dict of arrays, lists and strings needs.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from psmpi.data.files import reading
from psmpi.data.rows import InPieces, some_rows
from psmpi.errors import UserError
from psmpi.files import examiner

# Most operations of a pickle; a batch of 10,000 images has some tens of thousands.
OPERATIONS = 500_000


def _encode(text: str, encoding: str) -> bytes:
    """Replacement of _codecs.encode, by which Python 3 pickles bytes at low protocols."""
    # Other codecs decompress or import modules, and no pickled array needs them.
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
    return text.encode("latin-1")


class _Dtype:
    """Replacement of numpy.dtype, since NumPy does not check a pickled state, which can make it read wrong memory."""

    def __init__(self, code: Any = "", *options: Any) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        """Ignore the state: byte order and alignment do not matter for uint8."""


class _Array:
    """Replacement of numpy.ndarray. It keeps the pickled state of an array, which `values` checks."""

    state: Any = None

    def __init__(self, *options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __str__(self) -> str:
        """Text for messages, such as "int64 array of shape (1, 2)"."""
        match self.state:
            case (int(), tuple() as shape, _Dtype() as dtype, int(), _):
                is_number = re.fullmatch("b1|[iu][1248]|f[248]", dtype.code)
                plain = len(shape) <= 8 and all(type(size) is int and abs(size) < 2**63 for size in shape)
                return f"{np.dtype(dtype.code) if is_number else 'odd'} array of shape {shape if plain else 'unknown'}"
        return "damaged array"

    def values(self, features: int) -> npt.NDArray[np.uint8] | None:
        """The values (n, features) uint8; None if the state is not that of such an array."""
        match self.state:
            case (int(), (int(n), int(width)), _Dtype(code="u1"), int(fortran), bytes(raw)):
                if width == features and n >= 0 and len(raw) == n * features:
                    flat = np.frombuffer(raw, np.uint8)
                    return flat.reshape((n, features), order="F" if fortran else "C")
        return None


def _reconstruct(*options: Any) -> _Array:
    """Replacement of NumPy's function of that name, by which pickles make arrays without values."""
    return _Array()


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed") from None


def _check_memory(content: bytes) -> None:
    """Raise UnpicklingError for a pickle that would take much memory for its size: too many or misnumbered objects.

    A single wrong bit can make such a pickle.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        # An object of one byte in the file may take a hundred in memory.
        if count > OPERATIONS:
            raise pickle.UnpicklingError(f"it has more than {OPERATIONS:,} operations")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and cast(int, argument) > count:
            raise pickle.UnpicklingError(f"it numbers an object {argument} that is the {count}th at most")


def _load(path: Path) -> Any:
    """Unpickle dicts, lists, strings, numbers and arrays from `path`; UserError for any other object."""
    with reading(path):
        content = path.read_bytes()
        try:
            _check_memory(content)
            return _RestrictedUnpickler(BytesIO(content), encoding="bytes").load()
        # A damaged pickle can raise almost anything, depending on where it is damaged.
        except Exception as error:
            raise UserError(
                f"{path}: refused or damaged pickle ({type(error).__name__}: {error}); expected a CIFAR-10 "
                "batch, a dict of labels and an array; fetch the binary version of the data set instead"
            ) from error


def _images(path: Path, pixels: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    batch = _load(path)
    if not isinstance(batch, dict):
        raise UserError(f"{path}: found a pickled {type(batch).__name__}, expected a dict; fetch it again")
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if data is None or labels is None:
        names = [str(key)[:40] for key in batch if isinstance(key, str | bytes)][:10]
        raise UserError(f"{path}: found the keys {names}, expected data and labels; fetch it again")
    values = data.values(pixels) if isinstance(data, _Array) else None
    if values is None:
        described = data if isinstance(data, _Array) else type(data).__name__
        raise UserError(f"{path}: data is a {described}, expected uint8 (n, {pixels}); fetch the file again")
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise UserError(f"{path}: the labels are no list of integers; fetch the file again")
    if len(labels) != len(values) or not labels:
        raise UserError(
            f"{path}: {len(values)} images and {len(labels)} labels; expected as many of the one as of the "
            "other, and at least one; fetch the file again"
        )
    # A pickled integer may be too large for int64, and would raise OverflowError; 99 is out of range as well.
    return values, np.array([label if 0 <= label < 99 else 99 for label in labels], np.int64)


def check_inside(path: Path, pixels: int) -> None:
    """Raise UserError unless a batch is sound; called in a process that may use any time and memory."""
    _images(path, pixels)


@dataclass(frozen=True, eq=False)
class PickleRows(InPieces):
    """Rows of one pickled batch. Each read loads the whole file, since the format has no access by rows."""

    path: Path
    n: int
    features: int

    @classmethod
    def open(cls, path: Path, features: int) -> tuple[PickleRows, npt.NDArray[np.int64]]:
        """Open a batch; return its rows and its labels, (n,) int64. UserError unless the file is sound.

        Another process unpickles the file first, see psmpi.files.examiner.
        """
        with reading(path), path.open("rb"):
            examiner.examine("psmpi.data.cifar_pickle:check_inside", path, pixels=features)
        labels = _images(path, features)[1]
        return cls(path, len(labels), features), labels

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def pieces(self, rows: npt.NDArray[np.int64], features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        data = _images(self.path, self.features)[0]
        if len(data) != self.n:
            raise UserError(f"{self.path}: the file has changed since it was opened; start again")
        yield 0, data[rows]

    def glance(self, count: int) -> npt.NDArray[Any]:
        return some_rows(self, self.features, count)
