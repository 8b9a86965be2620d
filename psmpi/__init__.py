"""Training of partitioned neural networks over MPI: the loss is a sum of element losses, each rank computes its own.

From Python: `psmpi.fit(x, y)` trains on arrays, `psmpi.load(run)` gives a network that predicts.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psmpi.arrays.fitted import Fitted, load
    from psmpi.arrays.fitting import Training, fit
    from psmpi.errors import UserError

__version__ = "0.3.0"
__all__ = ["Fitted", "Training", "UserError", "__version__", "fit", "load"]

# The modules that have these names, imported when one is asked for.
_PLACES = {
    "Fitted": "psmpi.arrays.fitted",
    "Training": "psmpi.arrays.fitting",
    "UserError": "psmpi.errors",
    "fit": "psmpi.arrays.fitting",
    "load": "psmpi.arrays.fitted",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
