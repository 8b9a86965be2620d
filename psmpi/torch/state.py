"""Weights from a `state_dict` into a checkpoint from which training goes on."""

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
    """Write the checkpoint `out` with the weights of `state`, arrays or tensors by name; its path.

    state: the `state_dict` of a module that `module_of` made of this checkpoint, or any mapping with its names and
    shapes. Configuration and progress are those of `checkpoint`, a file or a run directory; the optimizer's state is
    left out, so that `psmpi train --resume OUT --out DIR`, or psmpi.fit(x, y, resume=OUT, out=DIR), trains on with a
    fresh one. UserError for names, shapes and numbers that do not fit.
    """
    with raised():
        opened = Opened(expanded(Path(checkpoint), "checkpoint"))
        if opened.contents.part is not None:
            raise UserError(
                f"{opened.path} is a part of a network: give the checkpoint that it is cut from, or put parts together "
                "with psmpi inspect join"
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
    """The flattened values of each tensor of the checkpoint, of its dtype."""
    known, found = opened.tensors, {}
    missing = [name for name in known if name not in state]
    more = [name for name in state if name not in known]
    if missing:
        meant = nearest(missing[0], more)
        hint = f"; did you mean {meant}?" if meant else ""
        raise UserError(
            f"state has no {missing[0]}, one of {len(missing)} missing parameters of {opened.path}{hint} Give the "
            "state_dict() of psmpi.torch.module_of(checkpoint)"
        )
    if more:
        raise UserError(f"state has {more[0]}, which {opened.path} has not: leave it out ({len(more)} of such names)")
    for name, tensor in known.items():
        values = _array(state[name])
        if values.shape != tensor.shape:
            raise UserError(f"state, {name}: shape {values.shape}, in {opened.path} it is {tensor.shape}")
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise UserError(f"state, {name}: {values.dtype} with values that are not finite numbers: give weights")
        found[name] = values.astype(opened.dtype).reshape(-1)
    return found


def _array(value: Any) -> npt.NDArray[Any]:
    """A tensor's values in host memory; of bfloat16, which NumPy has not, as float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value)
