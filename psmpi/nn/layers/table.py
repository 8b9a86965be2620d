"""The settings of one layer, as a configuration file's [[model.layers]] has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psmpi.errors import UserError

Shape = tuple[int, ...]


class Table:
    """Settings of a layer of type `kind`, taken one by one; `where` names the layer in errors (UserError).

    settings: what has not been taken yet; read: reads a list of tables for inputs of a shape, and returns the layers
    and the shape of their outputs.
    """

    def __init__(
        self,
        kind: str,
        settings: dict[str, Any],
        where: str,
        read: Callable[[Any, Shape], tuple[tuple[Any, ...], Shape]],
    ):
        self.kind, self.settings, self.where, self.read = kind, settings, where, read

    def take(self, key: str) -> Any:
        """A setting that has to be there, of any type."""
        if key not in self.settings:
            raise UserError(f"{self.where}: a {self.kind} layer needs {key!r}")
        return self.settings.pop(key)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.take(key) if default is None else self.settings.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {key} = {value!r}; expected a whole number above 0")
        return value

    def flag(self, key: str) -> bool:
        """True or false; true where it is not there."""
        value = self.settings.pop(key, True)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r}; expected true or false")
        return value

    def image(self, shape: Shape) -> tuple[int, int, int]:
        """The shape of the layer's input, which has to be (channels, height, width)."""
        if len(shape) != 3:
            raise UserError(f"{self.where}: {self.kind} needs (channels, height, width), its input has shape {shape}")
        return shape[0], shape[1], shape[2]

    def layers(self, key: str, shape: Shape) -> tuple[tuple[Any, ...], Shape]:
        """The layers of a list of tables, for inputs of `shape`, and the shape of their outputs."""
        return self.read(self.take(key), shape)

    def finish(self) -> None:
        """UserError where settings are left that the layer does not have."""
        if self.settings:
            left = ", ".join(self.settings)
            raise UserError(f"{self.where}: unknown setting(s) {left} for a {self.kind} layer")
