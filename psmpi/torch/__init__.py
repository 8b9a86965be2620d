"""Exchange of networks with PyTorch: `module_of` makes a module of a checkpoint, `import_state` imports its weights.

Parameters have the same names and shapes in both: the keys of a `state_dict` are the names in a checkpoint.
`import_state` needs no PyTorch.
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
    """The network of a checkpoint, a run directory or a `psmpi.Fitted` as a torch.nn.Module, with its weights.

    The module takes x (batch, *shape of a sample), floats scaled as in the training (pixels in 0..1), and returns raw
    scores (batch, classes), or the values of a regression. For sequences it takes x (batch, steps, features), or tokens
    int64 (batch, steps), and lengths (batch,), all steps if not given; scores of each step are (batch, steps, classes).
    Batch normalization uses the statistics of the minibatch, in `eval` mode too. The weights have the dtype of the
    training. UserError if PyTorch is missing, if the checkpoint cannot be read, or for a kind of layer that psmpi.torch
    does not have.
    """
    try:
        from psmpi.torch.modules import Scores
    except ImportError:
        raise UserError("psmpi.torch.module_of needs PyTorch: pip install 'psmpi[torch]'") from None
    fitted = checkpoint if isinstance(checkpoint, Fitted) else load(checkpoint)
    with raised():
        module = Scores(fitted.network)
    return module.filled(fitted.weights)
