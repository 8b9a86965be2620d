"""Settings of one layer, as in [[model.layers]] of a configuration file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from psmpi.errors import UserError, nearest

Shape = tuple[int, ...]


class Table:
    """Settings of a layer of type `kind`, taken one by one; `where` names the layer in errors (UserError).

    settings: settings that have not been taken yet; read: function that reads a list of tables for inputs of a shape,
    and returns the layers and the shape of their outputs.
    """

    def __init__(
        self,
        kind: str,
        settings: dict[str, Any],
        where: str,
        read: Callable[[Any, Shape], tuple[tuple[Any, ...], Shape]],
    ):
        self.kind, self.settings, self.where, self.read = kind, settings, where, read
        # Names of the settings in the table, and names that the layer has asked for.
        self.given, self.asked_for = set(settings), {"type"}

    def take(self, key: str, default: Any = None) -> Any:
        """Return a setting of any type; raise UserError if it is missing and has no default."""
        self.asked_for.add(key)
        if key not in self.settings and default is None:
            similar = nearest(key, self.settings) or next((k for k in self.settings if nearest(k, [key])), "")
            instead = f", and has {similar!r}" if similar else ""
            raise UserError(f"{self.where}: a {self.kind} layer needs {key!r}{instead}")
        return self.settings.pop(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a setting that must be a whole number above 0."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {key} = {value!r}; expected a whole number above 0")
        return value

    def flag(self, key: str) -> bool:
        """Return a setting that must be true or false; the default is true."""
        value = self.take(key, True)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r}; expected true or false")
        return value

    def above_0(self, key: str) -> float:
        """Return a setting that must be a number above 0, up to 1e6."""
        value: Any = self.take(key)
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value <= 1e6:
            raise UserError(f"{self.where}: {key} = {value!r}; expected a number above 0")
        return float(value)

    def image(self, shape: Shape) -> tuple[int, int, int]:
        """Return the shape of the layer's input; raise UserError unless it is (channels, height, width)."""
        if len(shape) != 3:
            raise UserError(
                f"{self.where}: {self.kind} needs (channels, height, width), but its input has shape {shape}"
            )
        return shape[0], shape[1], shape[2]

    def sequence(self, shape: Shape) -> tuple[int, int]:
        """Return the shape of the layer's input; raise UserError unless it is (features, steps)."""
        if len(shape) != 2:
            raise UserError(
                f"{self.where}: {self.kind} needs a sequence (features, steps), but its input has shape {shape}: turn "
                "images into sequences with --dataset NAME:rows or NAME:pixels, and save sequences with their lengths"
            )
        return shape[0], shape[1]

    def no_sequence(self, shape: Shape) -> None:
        """Raise UserError if the layer's input is a sequence, because the layer would mix its steps."""
        if len(shape) == 2:
            raise UserError(
                f"{self.where}: {self.kind} would normalize over the steps of sequences, which may be of different "
                "lengths: use layer_norm, which normalizes each step, or put it after a layer that ends sequences "
                "(last, flatten)"
            )

    def flat(self, shape: Shape) -> None:
        """Raise UserError unless the layer's input is (features,)."""
        if len(shape) != 1:
            raise UserError(
                f"{self.where}: {self.kind} needs a flat input, but its input has shape {shape}: add a flatten layer "
                "before it"
            )

    def layers(self, key: str, shape: Shape) -> tuple[tuple[Any, ...], Shape]:
        """Return the layers of a list of tables, for inputs of `shape`, and the shape of their outputs."""
        return self.read(self.take(key), shape)

    def finish(self) -> None:
        """Raise UserError for settings that the layer has not taken."""
        if self.settings:
            unknown = ", ".join(self.settings)
            # A setting of the table is no likely correction of another one.
            similar = nearest(next(iter(self.settings)), sorted(self.asked_for - self.given))
            hint = f"; did you mean {similar}?" if similar else f"; it has {', '.join(sorted(self.asked_for))}"
            raise UserError(f"{self.where}: unknown setting(s) {unknown} for a {self.kind} layer{hint}")


def similar_layer(name: str, known: Iterable[str]) -> str:
    """Return the layer type in `known` that someone may mean by `name`; "" if none is similar.

    Arguments behind the name (conv:8:3), case, hyphens, underscores and a dimension (2d) do not count.
    """
    plain_names = {_plain(one): one for one in known}
    plain = _plain(re.split(r"[^\w-]", name, maxsplit=1)[0])
    # Names in other libraries, and words of which psmpi's names are no spelling.
    plain = {"linear": "dense", "fc": "dense", "avgpool": "meanpool", "averagepool": "meanpool"}.get(plain, plain)
    if plain in plain_names:
        return plain_names[plain]
    return next((plain_names[one] for one in get_close_matches(plain, plain_names, 1, 0.7)), "")


def _plain(name: str) -> str:
    return re.sub(r"(?<=\D)[123]d$", "", name.lower().replace("-", "").replace("_", ""))
