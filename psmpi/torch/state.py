"""Import of a `state_dict` of weights into a checkpoint that training can resume from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.arrays.settings import raised
from psmpi.checkpoint.tensors import Tensor
from psmpi.errors import UserError, expanded, nearest
from psmpi.inspect.change import put
from psmpi.inspect.opened import Opened


def import_state(state: Mapping[str, Any], checkpoint: str | PathLike[str], out: str | PathLike[str]) -> Path:
    """Write the checkpoint `out` with the weights of `state`, arrays or tensors by name; return its path.

    state: the `state_dict` of a module that `module_of` made of this checkpoint, or any mapping with the same names and
    shapes; the values are converted to the dtype of the checkpoint. Configuration and progress are those of
    `checkpoint`, a file or a run directory. The optimizer's state is left out: `psmpi train --resume OUT --out DIR`, or
    psmpi.fit(x, y, resume=OUT, out=DIR), continues the training with a new optimizer. UserError for names and shapes
    that differ, for values that are not finite, and for a checkpoint that holds only a part of a network.
    """
    with raised():
        opened = Opened(expanded(Path(checkpoint), "checkpoint"))
        if opened.contents.part is not None:
            raise UserError(
                f"{opened.path} is a part of a network: give the checkpoint that it was cut from, or put the parts "
                "together with psmpi inspect join"
            )
        values = _checked(state, opened)

        def read(vector: str, tensor: Tensor, first: int, into: npt.NDArray[Any]) -> None:
            into[...] = values[tensor.name][first : first + len(into)]

        origin = {**opened.contents.provenance, "weights_of": "a state_dict"}
        contents = replace(opened.contents, scalars={}, provenance=origin, spaces={})
        path = expanded(Path(out), "out")
        put(path, contents, ["weights"], opened.dtype, read)
        return path


def _checked(state: Mapping[str, Any], opened: Opened) -> dict[str, npt.NDArray[Any]]:
    """The values of each tensor of the checkpoint, flattened, in its dtype; UserError as in `import_state`."""
    tensors, arrays = opened.tensors, {}
    missing = [name for name in tensors if name not in state]
    more = [name for name in state if name not in tensors]
    if missing:
        meant = nearest(missing[0], more)
        hint = f" (did you mean {meant}?)" if meant else ""
        raise UserError(
            f"state has no {missing[0]}, one of {len(missing)} missing parameters of {opened.path}{hint}: give the "
            "state_dict() of psmpi.torch.module_of(checkpoint)"
        )
    if more:
        raise UserError(
            f"state has {more[0]}, one of {len(more)} parameters that {opened.path} does not have: leave them out"
        )
    for name, tensor in tensors.items():
        values = _array(state[name])
        if values.shape != tensor.shape:
            raise UserError(f"state, {name}: its shape is {values.shape}, and {tensor.shape} in {opened.path}")
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise UserError(f"state, {name}: its values ({values.dtype}) are not finite numbers: give weights")
        arrays[name] = values.astype(opened.dtype).reshape(-1)
    return arrays


def _array(value: Any) -> npt.NDArray[Any]:
    """A value as an array in host memory. Tensors become float64, since NumPy has no bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value)
