"""The settings of one layer, as a configuration file's [[model.layers]] has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psmpi.errors import UserError, nearest

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
        # Settings that were given, and those that the layer has.
        self.given, self.known = set(settings), {"type"}

    def take(self, key: str, default: Any = None) -> Any:
        """A setting of any type, which has to be there unless there is a default."""
        self.known.add(key)
        if key not in self.settings and default is None:
            meant = nearest(key, self.settings) or next((k for k in self.settings if nearest(k, [key])), "")
            instead = f", and has {meant!r}" if meant else ""
            raise UserError(f"{self.where}: a {self.kind} layer needs {key!r}{instead}")
        return self.settings.pop(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {key} = {value!r}; expected a whole number above 0")
        return value

    def flag(self, key: str) -> bool:
        """True or false; true where it is not there."""
        value = self.take(key, True)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r}; expected true or false")
        return value

    def above_0(self, key: str) -> float:
        """A number above 0, up to 1e6."""
        value: Any = self.take(key)
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value <= 1e6:
            raise UserError(f"{self.where}: {key} = {value!r}; expected a number above 0")
        return float(value)

    def image(self, shape: Shape) -> tuple[int, int, int]:
        """The shape of the layer's input, which has to be (channels, height, width)."""
        if len(shape) != 3:
            raise UserError(f"{self.where}: {self.kind} needs (channels, height, width), its input has shape {shape}")
        return shape[0], shape[1], shape[2]

    def sequence(self, shape: Shape) -> tuple[int, int]:
        """The shape of the layer's input, which has to be (features, steps)."""
        if len(shape) != 2:
            raise UserError(
                f"{self.where}: {self.kind} needs a sequence (features, steps), its input has shape {shape}: of images "
                "make sequences with --dataset NAME:rows or NAME:pixels, and save sequences with their lengths"
            )
        return shape[0], shape[1]

    def no_sequence(self, shape: Shape) -> None:
        """UserError where the layer's input is a sequence, whose steps it would mix."""
        if len(shape) == 2:
            raise UserError(
                f"{self.where}: {self.kind} would normalize over the steps of sequences, which may be of different "
                "lengths: use layer_norm, which takes each step alone, or put it behind a layer that ends them (last, "
                "flatten)"
            )

    def flat(self, shape: Shape) -> None:
        """UserError unless the layer's input is (features,)."""
        if len(shape) != 1:
            raise UserError(
                f"{self.where}: {self.kind} needs a flat input, its input has shape {shape}; add a flatten layer before"
            )

    def layers(self, key: str, shape: Shape) -> tuple[tuple[Any, ...], Shape]:
        """The layers of a list of tables, for inputs of `shape`, and the shape of their outputs."""
        return self.read(self.take(key), shape)

    def finish(self) -> None:
        """UserError where settings are left that the layer does not have."""
        if self.settings:
            left = ", ".join(self.settings)
            # One may be meant by the first that is not given too.
            meant = nearest(next(iter(self.settings)), sorted(self.known - self.given))
            hint = f"; did you mean {meant}?" if meant else f"; it has {', '.join(sorted(self.known))}"
            raise UserError(f"{self.where}: unknown setting(s) {left} for a {self.kind} layer{hint}")
