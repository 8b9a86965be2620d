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
from psmpi.nn.linear import Segment
from psmpi.nn.model import Model, Step
from psmpi.nn.network import Activation, Conv, Join, Pad, Pool
from psmpi.nn.normalization import EPS
from psmpi.nn.zoo import make_network

# Widely read: onnxruntime from 1.12 on, and what converts to devices' formats.
OPSET, IR_VERSION = 17, 8
TOLERANCE = 1e-5
ACTIVATIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}
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
    settings = from_toml(contents.config, str(opened.path)).model
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
    ours = model.forward(np.ascontiguousarray(x.reshape(len(x), -1).T)).T
    apart = float(abs(theirs - ours).max() / max(1.0, abs(ours).max()))
    if not apart <= TOLERANCE:
        raise UserError(f"--out {out}: onnxruntime's scores differ from psmpi's by {apart:.1e}; nothing is written")
    onnx.save(proto, out)
    return f"; onnxruntime's scores differ from psmpi's by {apart:.1e} of the largest"


def build_onnx(model: Model) -> Any:
    """The forward pass of a model as an ONNX ModelProto, x (batch, *in_shape) to scores (batch, classes)."""
    from onnx import TensorProto, helper

    graph = _Graph()
    value, values = "x", ["x"]
    for number, step in enumerate(model.steps):
        name = "scores" if number == len(model.steps) - 1 else None
        past = values[step.partner] if step.kind == "join" else ""
        value = graph.step(step, value, model, name if step.activation == "identity" else None, past)
        if step.activation != "identity":
            value = graph.node(ACTIVATIONS[step.activation], [value], name or f"{value}.{step.activation}")
        values.append(value)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *model.network.in_shape])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", len(model.classes)])]
    made = helper.make_graph(graph.nodes, model.network.name, inputs, outputs, graph.weights)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="psmpi")
    proto.ir_version = IR_VERSION
    return proto


class _Graph:
    """Nodes and initializers of an ONNX graph under construction."""

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

    def step(self, step: Step, value: str, model: Model, name: str | None, past: str) -> str:
        """Add a layer, `past` being what went past it; returns the name of its output."""
        name = name or f"{getattr(step.spec, 'name', step.kind)}.{step.kind}.{len(self.nodes)}"
        if step.kind == "linear":
            return self.linear(step, value, model, name)
        if step.kind == "flatten":
            return self.node("Flatten", [value], name, axis=1)
        if step.kind == "activation":
            assert isinstance(step.spec, Activation)
            return self.node(ACTIVATIONS[step.spec.kind], [value], name)
        if step.kind == "norm":
            return self.normalization(step, value, name)
        if step.kind == "pad":
            assert isinstance(step.spec, Pad)
            margins = self.constant(f"{name}.margins", np.array([0, 0, 1, 1] * 2) * step.spec.size)
            return self.node("Pad", [value, margins], name)
        if step.kind == "fork":
            return self.node("Identity", [value], name)
        if step.kind == "join":
            assert isinstance(step.spec, Join)
            scale = self.constant(f"{name}.scale", np.array(step.spec.scale, np.float32))
            return self.node("Add", [self.node("Mul", [value, scale], f"{name}.scaled"), past], name)
        assert isinstance(step.spec, Pool)
        size = [step.spec.size] * 2
        kind = "AveragePool" if step.spec.kind == "mean" else "MaxPool"
        return self.node(kind, [value], name, kernel_shape=size, strides=size)

    def normalization(self, step: Step, value: str, name: str) -> str:
        """With the minibatch's statistics, as psmpi has it: ONNX's own operator would take stored ones."""
        assert step.norm is not None
        axes = [0, *range(2, len(step.shape) + 1)]
        mean = self.node("ReduceMean", [value], f"{name}.mean", axes=axes)
        apart = self.node("Sub", [value, mean], f"{name}.apart")
        square = self.node("Mul", [apart, apart], f"{name}.square")
        variance = self.node("ReduceMean", [square], f"{name}.variance", axes=axes)
        eps = self.constant(f"{name}.eps", np.array(EPS, np.float32))
        deviation = self.node("Sqrt", [self.node("Add", [variance, eps], f"{name}.sum")], f"{name}.deviation")
        normal = self.node("Div", [apart, deviation], f"{name}.normal")
        shape = (-1, *(1,) * (len(step.shape) - 1))
        gamma, beta = (np.concatenate([pair[k] for pair in step.norm.w]).reshape(shape) for k in (0, 1))
        scaled = self.node("Mul", [normal, self.constant(f"{name}.gamma", gamma)], f"{name}.scaled")
        return self.node("Add", [scaled, self.constant(f"{name}.beta", beta)], name)

    def linear(self, step: Step, value: str, model: Model, name: str) -> str:
        """Stripes of units that see the same number of inputs are one grouped convolution, 1 x 1 for dense layers."""
        assert step.linear is not None
        layer, segments = step.linear.layer, step.linear.segments
        image = (layer.kernel, layer.kernel) if isinstance(layer, Conv) else (1, 1)
        dense = not isinstance(layer, Conv)
        if dense:
            axes = self.constant(f"{name}.image", np.array([0, -1, 1, 1]))
            value = self.node("Reshape", [value, axes], f"{name}.in")
        outputs = []
        for k, (s, (w, b)) in enumerate(zip(segments, step.linear.w, strict=True)):
            grouped = s.count == 1 or s.source_step == s.n_in or s.source_step == 0
            for j, (part, first) in enumerate([(slice(0, s.count), s.source)] if grouped else _stripes(s)):
                label = f"{layer.name}.{k}.{j}" if len(segments) > 1 or not grouped else layer.name
                weights, biases = w[part], b[part]
                groups = 1 if not grouped or s.source_step == 0 else s.count
                kernels = weights.reshape(-1, s.n_in, *image)
                seen = self.some(value, first, groups * s.n_in, step.linear.inputs, label)
                inputs = [
                    seen,
                    self.constant(f"{label}.weight", kernels),
                    self.constant(f"{label}.bias", biases.reshape(-1)),
                ]
                outputs.append(self.node("Conv", inputs, f"{label}.out.{len(self.nodes)}", group=groups))
        value = outputs[0] if len(outputs) == 1 else self.node("Concat", outputs, f"{name}.joined", axis=1)
        if dense:
            axes = self.constant(f"{name}.flat", np.array([0, -1]))
            return self.node("Reshape", [value, axes], name)
        return value if value == name else self.node("Identity", [value], name)

    def some(self, value: str, first: int, count: int, known: int, label: str) -> str:
        """Channels [first, first + count) of `known`."""
        if (first, count) == (0, known):
            return value
        edges = [np.array([n]) for n in (first, first + count, 1)]
        names = [self.constant(f"{label}.{k}", e) for k, e in zip(("first", "last", "axis"), edges, strict=True)]
        return self.node("Slice", [value, *names], f"{label}.seen")


def _stripes(s: Segment) -> list[tuple[slice, int]]:
    return [(slice(k, k + 1), s.source + k * s.source_step) for k in range(s.count)]
