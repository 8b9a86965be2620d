"""The files that measurements are asked to write, checked before they begin."""

from __future__ import annotations

from pathlib import Path

from psmpi.errors import UserError


def check_files(plot: str = "", **others: str) -> None:
    """UserError where a picture `plot`, or a file of another option by its name, could not be written in the end."""
    for option, name in {**others, "plot": plot}.items():
        if name and not Path(name).absolute().parent.is_dir():
            raise UserError(f"--{option} {name}: there is no such folder as {Path(name).parent}")
    if plot:
        if Path(plot).suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {plot}: expected a name that ends in .png, .pdf or .svg")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install 'psmpi[plot]'") from None
