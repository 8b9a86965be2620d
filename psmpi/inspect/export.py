"""The command that writes weights in other formats: .npz, .safetensors, .onnx."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from psmpi.backend import NumpyOps
from psmpi.checkpoint import load
from psmpi.config import from_toml
from psmpi.errors import UserError
from psmpi.inspect.opened import Opened
from psmpi.nn.layers.chain import export_chain
from psmpi.nn.model import Model
from psmpi.nn.zoo import make_network

# Widely read: onnxruntime from 1.12 on, and what converts to devices' formats.
OPSET, IR_VERSION = 17, 8
TOLERANCE = 1e-5
NEEDS = "{0} export needs psmpi[export]: pip install 'psmpi[export]'"


def export(checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]], /, out: Path) -> int:
    """Write the weights for other programs: .npz or .safetensors (named tensors), or .onnx (the network itself).

    The ONNX network takes x (batch, *shape of a sample), float32, scaled as in training (pixels to 0..1), and gives raw
    scores (batch, classes). It is run with onnxruntime on random samples, and refused if it differs from psmpi's own
    scores by more than 1e-5 of the largest.

    Args:
        checkpoint: Checkpoint file or run directory; may be a part.
        out: File to write; its ending says the format.
    """
    writers: dict[str, Callable[[Opened, Path], str]] = {".npz": _npz, ".safetensors": _safetensors, ".onnx": _onnx}
    if out.suffix not in writers:
        raise UserError(f"--out {out}: expected a name that ends in {', '.join(writers)}")
    opened = Opened(checkpoint)
    try:
        said = writers[out.suffix](opened, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from None
    print(f"wrote {out}{said}")
    return 0


def _npz(opened: Opened, out: Path) -> str:
    # Tensor by tensor: np.savez would hold them all.
    with zipfile.ZipFile(out, "w") as archive:
        for tensor, values in opened.walk("weights"):
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    return ""


def _safetensors(opened: Opened, out: Path) -> str:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError(NEEDS.format("safetensors")) from None
    progress = opened.contents.progress
    tensors = {tensor.name: values for tensor, values in opened.walk("weights")}
    try:
        save_file(tensors, out, metadata={"step": str(progress.step), "config": opened.contents.config})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return ""


def make_model(opened: Opened, dtype: np.dtype) -> Model:
    """The checkpoint's network, or the subnetwork of its part, for forward calls; mean pooling is not folded."""
    contents = opened.contents
    settings = from_toml(contents.config, str(opened.path), foreign=True).model
    network = make_network(settings.model, contents.in_shape, contents.layout.classes, **settings.shape)
    layout = network.layout()
    classes = range(network.classes) if contents.part is None else contents.part
    runs = layout.part(classes)
    w = np.empty(runs.size, dtype)
    load(opened.path, layout, runs, {"weights": w}, contents.part)
    return Model(network, layout, w, None, NumpyOps(), list(classes), fold=False)


def _onnx(opened: Opened, out: Path) -> str:
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise UserError(NEEDS.format("ONNX")) from None
    model = make_model(opened, np.dtype(np.float32))
    proto = build_onnx(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((16, *model.network.in_shape), np.float32)
    theirs = session.run(None, {"x": x})[0]
    ours = model.forward(np.ascontiguousarray(x.reshape(len(x), -1).T)).scores.T
    apart = float(abs(theirs - ours).max() / max(1.0, abs(ours).max()))
    if not apart <= TOLERANCE:
        raise UserError(f"--out {out}: onnxruntime's scores differ from psmpi's by {apart:.1e}; nothing is written")
    onnx.save(proto, out)
    return f"; onnxruntime's scores differ from psmpi's by {apart:.1e} of the largest"


def build_onnx(model: Model) -> Any:
    """The forward pass of a model as an ONNX ModelProto, x (batch, *in_shape) to scores (batch, classes)."""
    from onnx import TensorProto, helper

    graph = Graph()
    graph.rename(export_chain(graph, "x", model.chain), "scores")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *model.network.in_shape])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", len(model.classes)])]
    made = helper.make_graph(graph.nodes, model.network.name, inputs, outputs, graph.weights)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="psmpi")
    proto.ir_version = IR_VERSION
    return proto


class Graph:
    """Nodes and initializers of an ONNX graph under construction, to which layers add themselves."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def rename(self, value: str, name: str) -> None:
        """Call the output of a node otherwise."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if one == value else one for one in names]

    def some(self, value: str, first: int, count: int, known: int, label: str) -> str:
        """Channels [first, first + count) of `known`."""
        if (first, count) == (0, known):
            return value
        edges = [np.array([n]) for n in (first, first + count, 1)]
        names = [self.constant(f"{label}.{k}", e) for k, e in zip(("first", "last", "axis"), edges, strict=True)]
        return self.node("Slice", [value, *names], f"{label}.seen")
