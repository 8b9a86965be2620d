"""Images of 48 characters at any resolution, drawn with matplotlib's fonts each time they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psmpi.data.files import rows_per_chunk
from psmpi.data.rows import InPieces, Rows, some_rows
from psmpi.data.split import Dataset, Split, frozen
from psmpi.errors import UserError

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-=*/%&#@?!$"
SIDE, LEAST, MOST = 16, 8, 4096
# Variations of a character for training, fewer if the images would take more than BYTES; half as many for testing.
VARIATIONS, BYTES = 40, 256 << 20
MOST_VARIATIONS = 10_000
# Fonts of matplotlib that have all characters, one of each family first.
FONTS = (
    "DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "DejaVuSansMono", "cmss10", "cmtt10",
    "DejaVuSans-Bold", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10", "DejaVuSansMono-Bold",
    "DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneralItalic", "DejaVuSansMono-Oblique",
    "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta", "DejaVuSansMono-BoldOblique",
)  # fmt: skip
# Smallest size of a character, largest slant and largest shift; size and shift in units of an image's side.
SMALLEST, SLANT, SHIFT = 0.75, 0.15, 0.06
# Number of levels of the noise, of 256.
NOISE = 32
# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x63686172


class Outline(NamedTuple):
    """Curves of a character in units of the font's size. codes: kinds of the points, as in matplotlib's Path.

    The origin is the middle of the character's width and of the height of an H.
    """

    points: npt.NDArray[np.float64]
    codes: npt.NDArray[np.uint8]


def open_characters(number: str, seed: int) -> Dataset:
    """Images (1, side, side) uint8 of 48 characters, each in equally many variations; other variations for testing.

    number: SIDE or SIDExVARIATIONS; "" for the defaults. A variation has one of the fonts, which are the same in
    training and testing; its size, slant, place and noise are drawn from `seed`. UserError for other numbers and
    without matplotlib.
    """
    side, count = _numbers(number)
    faces = outlines()
    train, test = (_split(part, many, side, max(seed, 0), faces) for part, many in enumerate((count, -(-count // 2))))
    return Dataset("characters" + (f":{number}" if number else ""), len(CHARACTERS), train.shape, train, test)


def _numbers(number: str) -> tuple[int, int]:
    """Side of the images, and number of variations of each character."""
    side, times, count = (number or str(SIDE)).partition("x")
    if not _within(side, LEAST, MOST) or (times and not _within(count, 1, MOST_VARIATIONS)):
        raise UserError(
            f"--dataset characters:{number}: expected characters:SIDE with SIDE from {LEAST} to {MOST} pixels, "
            f"characters:SIDExVARIATIONS with up to {MOST_VARIATIONS} images of each character, or characters alone"
        )
    fits = BYTES // (len(CHARACTERS) * int(side) ** 2)
    return int(side), int(count) if times else max(1, min(VARIATIONS, fits))


def _within(text: str, least: int, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9 and least <= int(text) <= most


def _split(part: int, count: int, side: int, seed: int, faces: tuple[tuple[Outline, ...], ...]) -> Split:
    labels = np.arange(count * len(CHARACTERS)) % len(CHARACTERS)
    return Split(frozen(labels), (1, side, side), 1 / 255, Drawings(part, count, side, seed, faces))


@cache
def outlines() -> tuple[tuple[Outline, ...], ...]:
    """Outlines of all characters in each of FONTS; UserError without matplotlib or one of these fonts."""
    try:
        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font
    except ImportError:
        raise UserError("--dataset characters is drawn with matplotlib's fonts: pip install 'psmpi[plot]'") from None
    faces = []
    for name in FONTS:
        path = Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
        if not path.is_file():
            raise UserError(
                f"--dataset characters: matplotlib has no font {path}: install its newest version, pip install -U "
                "matplotlib"
            )
        font = FT2Font(str(path))
        font.set_size(100, 72)
        faces.append(tuple(_outline(font, character) for character in CHARACTERS))
    return tuple(faces)


def _outline(font: Any, character: str) -> Outline:
    points, codes = _path(font, character)
    heights = _path(font, "H")[0][:, 1]
    middle = (points[:, 0].min() + points[:, 0].max()) / 2, (heights.min() + heights.max()) / 2
    return Outline((points - middle) / 100, codes)


def _path(font: Any, character: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    from matplotlib import ft2font

    # matplotlib before 3.10 takes numbers as flags; 2 is FreeType's FT_LOAD_NO_HINTING.
    flags = ft2font.LoadFlags.NO_HINTING if hasattr(ft2font, "LoadFlags") else 2
    font.load_char(ord(character), flags=flags)
    points, codes = font.get_path()
    return np.asarray(points, np.float64), np.asarray(codes, np.uint8)


@dataclass(frozen=True, eq=False)
class Drawings(InPieces):
    """Images of characters, drawn when they are read: sample k is character k mod 48 in variation k div 48.

    part: 0 for training, 1 for testing; count: variations of each character.
    """

    part: int
    count: int
    side: int
    seed: int
    faces: tuple[tuple[Outline, ...], ...]

    @property
    def n(self) -> int:
        return self.count * len(CHARACTERS)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    @property
    def card(self) -> bytes:
        """Text that the images follow from, see RowSource: the numbers, and a digest of the outlines."""
        digest = hashlib.sha256()
        for face in self.faces:
            for outline in face:
                digest.update(np.round(outline.points * 1e6).astype("<i8").tobytes())
        return f"characters {self.part} {self.count} {self.side} {self.seed} {digest.hexdigest()}".encode()

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        from matplotlib.backends.backend_agg import RendererAgg

        step = rows_per_chunk(features)
        renderer: Any = RendererAgg(self.side, self.side, 72)  # type: ignore[no-untyped-call]
        for i in range(0, len(rows), step):
            images = np.empty((min(step, len(rows) - i), features), np.uint8)
            for image, row in zip(images, rows[i : i + step], strict=True):
                self._draw(renderer, int(row), image.reshape(self.side, self.side))
            yield i, images

    def _draw(self, renderer: Any, row: int, out: npt.NDArray[np.uint8]) -> None:
        """Draw sample `row` into `out` (side, side), white on black."""
        from matplotlib.path import Path as Curves
        from matplotlib.transforms import Affine2D

        variation, character = divmod(row, len(CHARACTERS))
        sequence = np.random.SeedSequence([self.seed, _TAG, self.part, variation, character])
        rng = np.random.Generator(np.random.Philox(sequence))
        size, slant, right, up = rng.uniform((SMALLEST, -SLANT, -SHIFT, -SHIFT), (1, SLANT, SHIFT, SHIFT))
        points, codes = self.faces[variation % len(self.faces)][character]
        across = points[:, 0] + slant * points[:, 1]
        placed = np.column_stack([across * size + 0.5 + right, points[:, 1] * size + 0.5 + up]) * self.side
        renderer.clear()
        context = renderer.new_gc()
        context.set_linewidth(0)
        context.set_snap(False)
        renderer.draw_path(context, Curves(placed, codes), Affine2D(), (1.0, 1.0, 1.0))
        ink = np.asarray(renderer.buffer_rgba())[..., 3]
        # Scale the levels down, so that their sums with the noise stay below 256.
        np.subtract(ink, ink // (256 // NOISE), out=out)
        out += rng.integers(0, NOISE, out.shape, np.uint8)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return some_rows(self, self.side**2, count)

    def place(self, row: int) -> str:
        return f"characters: sample {row}"
