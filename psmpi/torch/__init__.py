"""Networks between psmpi and PyTorch: `module_of` a checkpoint, and `import_state` back into one.

Parameters have the same names and shapes in both: the keys of a `state_dict` are the names in a checkpoint. The import
needs no PyTorch.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from psmpi.arrays.fitted import Fitted, load
from psmpi.arrays.settings import raised
from psmpi.errors import UserError
from psmpi.torch.state import import_state

if TYPE_CHECKING:
    from psmpi.torch.modules import Scores

__all__ = ["import_state", "module_of"]


def module_of(checkpoint: str | PathLike[str] | Fitted) -> Scores:
    """The network of a checkpoint, a run directory or `psmpi.Fitted` as a torch.nn.Module, with its weights.

    It takes x (batch, *shape of a sample), floats as the training saw them (pixels in 0..1), and gives raw scores
    (batch, classes), or the values of a regression. Of sequences it takes x (batch, steps, features), or tokens int64
    (batch, steps), and lengths (batch,), all steps if not given; scores of each step are (batch, steps, classes). Batch
    normalization takes the statistics of the minibatch, in evaluations too. UserError names layers that it has none
    for.
    """
    try:
        from psmpi.torch.modules import Scores
    except ImportError:
        raise UserError("psmpi.torch.module_of needs PyTorch: pip install 'psmpi[torch]'") from None
    fitted = checkpoint if isinstance(checkpoint, Fitted) else load(checkpoint)
    with raised():
        made = Scores(fitted.network)
    return made.filled(fitted.weights)
