"""Command that writes weights in other formats: .npz, .safetensors, .onnx."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from psmpi.backend import NumpyOps
from psmpi.checkpoint import load
from psmpi.checkpoint.network import network_in
from psmpi.config import Config, from_toml
from psmpi.data import Split
from psmpi.errors import UserError
from psmpi.inspect.opened import Opened
from psmpi.nn.layers.chain import export_chain
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.workspace import Span
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.sequences import find_padding
from psmpi.output import complain, tell
from psmpi.training.predictor import calibrate as calibrate_model
from psmpi.training.predictor import calibration_notes, calibration_split, fetch

# Versions of ONNX that many programs read: onnxruntime from 1.12 on, and converters to formats of devices.
OPSET, IR_VERSION = 17, 8
TOLERANCE = 1e-5
SWAP = {"perm": [0, 2, 1]}
NEEDS = "{0} export needs psmpi[export]: pip install 'psmpi[export]'"


def export(
    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]],
    /,
    out: Path,
    calibrate: int = 0,
    dataset: str = "",
    data_dir: str = "",
    allow_external: bool = False,
) -> int:
    """Export the weights (.npz, .safetensors) or the network (.onnx) for other programs.

    The metadata hold the names of the classes and of a table's columns, JSON lists in the order of scores and inputs.

    The ONNX network takes x (batch, *shape of a sample), float32, scaled as in training (pixels to 0..1), and returns
    raw scores (batch, classes). For sequences it takes x (batch, steps, features), or tokens int64 (batch, steps), and
    lengths int32 (batch,); scores of each step are (batch, steps, classes). Before it is kept, onnxruntime runs it
    sample by sample and on several samples at once. It is refused if its scores differ from those of psmpi by more than
    1e-5 of the largest.

    Args:
        checkpoint: Checkpoint file, or a run directory for its newest one. It may be a part.
        out: File to write; its ending gives the format.
        calibrate: Samples of the training split that give the statistics of batch normalization, to be written with the
            weights. Such networks need them for .onnx. 0: no statistics.
        dataset: Data set of the training for --calibrate, if its file has moved.
        data_dir: Folder of the data set's files. If not given: that of the training.
        allow_external: Let the data set's arrays lie in other files, which its file names. Use it for files of your own
            only.
    """
    writers: dict[str, Callable[[Export], str]] = {".npz": _npz, ".safetensors": _safetensors, ".onnx": _onnx}
    if out.suffix not in writers:
        raise UserError(f"--out {out}: expected a name that ends in {', '.join(writers)}")
    if calibrate < 0 or calibrate == 1:
        raise UserError(f"--calibrate {calibrate}: expected 0, or a number of samples from 2 up")
    if (dataset or data_dir) and not calibrate:
        raise UserError(
            "--dataset and --data-dir are options of --calibrate, and this command has none: leave them out, or add, "
            "for instance, --calibrate 10000"
        )
    opened = Opened(checkpoint)
    trained = from_toml(opened.contents.config, str(opened.path), foreign=True)
    network = _network(opened, trained)
    if calibrate and not network.normalized:
        raise UserError(f"--calibrate: --model {network.name} has no batch normalization; leave the option out")
    model, split = None, None
    if calibrate:
        data = replace(trained.data, allow_external=allow_external)
        split = calibration_split(data, dataset, data_dir, opened.contents, opened.path)
        for note in calibration_notes(calibrate, split.n):
            complain(note)
        model = make_model(opened, np.dtype(np.float32))
        calibrate_model(model, split, calibrate, np.dtype(np.float32))
    elif network.normalized and out.suffix == ".onnx":
        raise UserError(
            f"--out {out}: --model {network.name} normalizes over minibatches, and would give a sample other scores in "
            "each: add --calibrate 10000, which fixes the statistics of so many training samples"
        )
    elif network.normalized:
        complain(
            "note: the weights alone, without the statistics of batch normalization: add --calibrate 10000 for those "
            "of so many training samples"
        )
    try:
        remark = writers[out.suffix](Export(opened, out, model, split))
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from None
    tell(f"wrote {out}{remark}")
    return 0


@dataclass(frozen=True)
class Export:
    """A checkpoint to write to `out`; with --calibrate the calibrated model and the split of its calibration."""

    opened: Opened
    out: Path
    model: Model | None = None
    split: Split | None = None

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the weights by name, and the statistics of batch normalization if the model is calibrated."""
        for tensor, values in self.opened.walk("weights"):
            yield tensor.name, values
        if self.model is not None:
            yield from self.model.statistics().items()


def _npz(export: Export) -> str:
    # Write tensor by tensor: np.savez needs all tensors in memory.
    with zipfile.ZipFile(export.out, "w") as archive:
        for name, values in export.tensors():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    return ""


def _safetensors(export: Export) -> str:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError(NEEDS.format("safetensors")) from None
    contents = export.opened.contents
    try:
        save_file(
            dict(export.tensors()),
            export.out,
            metadata={"step": str(contents.progress.step), "config": contents.config},
        )
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return ""


def _network(opened: Opened, trained: Config) -> Network:
    contents, settings = opened.contents, trained.model
    return network_in(contents, settings)


def make_model(opened: Opened, dtype: np.dtype) -> Model:
    """The checkpoint's network, or the subnetwork of its part, for forward passes; mean pooling is not folded."""
    contents = opened.contents
    network = _network(opened, from_toml(contents.config, str(opened.path), foreign=True))
    layout = network.layout()
    classes = range(network.classes) if contents.part is None else contents.part
    runs = layout.part(classes)
    w = np.empty(runs.size, dtype)
    load(opened.path, layout, runs, {"weights": w}, contents.part)
    return Model(network, layout, w, None, NumpyOps(), list(classes), fold=False)


def _onnx(export: Export) -> str:
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise UserError(NEEDS.format("ONNX")) from None
    out, split, float32 = export.out, export.split, np.dtype(np.float32)
    model = export.model or make_model(export.opened, float32)
    proto, contents = build_onnx(model), export.opened.contents
    # The metadata tell other programs the names of scores and inputs.
    metadata = {"classes": contents.called, "columns": contents.columns}
    onnx.helper.set_model_props(proto, {key: json.dumps(names) for key, names in metadata.items() if names})
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = model.network.in_shape
    # Random samples test the network; the statistics are fixed, so samples other than those of --calibrate do too.
    x, first = np.random.default_rng(0).random((16, *shape), np.float32), model.network.layers[0]
    if isinstance(first, Embedding):
        x = np.floor(x * first.vocabulary)
    if split is not None:
        ids = np.arange(min(16, split.n)) * split.n // min(16, split.n)
        x = np.ascontiguousarray(fetch(split, ids, float32).T).reshape(-1, *shape)
    lengths = None
    if model.network.sequences:
        lengths = np.full(len(x), shape[-1], np.int32)
        if find_padding(model.network) is None:
            lengths = 1 + np.arange(len(x), dtype=np.int32) * shape[-1] // len(x)
    expected = model.forward(np.ascontiguousarray(x.reshape(len(x), -1).T), None, Span(lengths)).scores.T
    fed = onnx_inputs(model.network, x, lengths)
    batched = session.run(None, fed)[0]
    singles = [{name: values[k : k + 1] for name, values in fed.items()} for k in range(len(x))]
    single = np.concatenate([session.run(None, inputs)[0] for inputs in singles])
    if model.network.steps and lengths is not None:
        # After the end of a sequence ONNX has zeros instead of the last states.
        counted = np.arange(shape[-1]) < lengths[:, None]
        expected, batched, single = (scores[counted] for scores in (expected, batched, single))
    apart = float(max(abs(scores - expected).max() for scores in (batched, single)) / max(1.0, abs(expected).max()))
    if not apart <= TOLERANCE:
        raise UserError(f"--out {out}: onnxruntime's scores differ from psmpi's by {apart:.1e}; nothing is written")
    onnx.save(proto, out)
    return f"; onnxruntime's scores differ from psmpi's by {apart:.1e} of the largest"


def onnx_inputs(network: Network, x: np.ndarray, lengths: np.ndarray | None) -> dict[str, np.ndarray]:
    """Inputs by name of an exported network for samples x (b, *in_shape); lengths: (b,), of sequences, None: all."""
    if not network.sequences:
        return {"x": x}
    tokens = isinstance(network.layers[0], Embedding)
    turned = x[:, 0].astype(np.int64) if tokens else np.ascontiguousarray(x.transpose(0, 2, 1))
    every = np.full(len(x), network.in_shape[1])
    return {"x": turned, "lengths": (every if lengths is None else lengths).astype(np.int32)}


def build_onnx(model: Model) -> Any:
    """The forward pass of a model as an ONNX ModelProto, from x (batch, *in_shape) to scores (batch, classes).

    For sequences the inputs are x (batch, steps, features), or tokens int64 (batch, steps), and lengths int32 (batch,);
    scores of each step are (batch, steps, classes).
    """
    from onnx import TensorProto, helper

    network, count = model.network, len(model.classes)
    tokens = isinstance(network.layers[0], Embedding)
    graph, value, shape = Graph("lengths" if network.sequences else ""), "x", network.in_shape
    if network.sequences:
        features, steps = network.in_shape
        shape = (steps,) if tokens else (steps, features)
        axis = [graph.constant("x.axis", np.array([1]))] if tokens else []
        value = graph.node("Unsqueeze" if tokens else "Transpose", ["x", *axis], "x.units", **({} if tokens else SWAP))
    scores = export_chain(graph, value, model.chain)
    if network.steps:
        scores = graph.node("Transpose", [scores], "scores.steps", **SWAP)
    graph.rename(scores, "scores")
    kind = TensorProto.INT64 if tokens else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, ["batch", *shape])]
    if network.sequences:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    of_step = [network.steps] if network.steps else []
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", *of_step, count])]
    built = helper.make_graph(graph.nodes, model.network.name, inputs, outputs, graph.weights)
    proto = helper.make_model(built, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="psmpi")
    proto.ir_version = IR_VERSION
    return proto


class Graph:
    """Nodes and initializers of an ONNX graph under construction. Layers add their nodes to it.

    lengths: name of the input with the lengths of sequences; "" if samples are not sequences.
    """

    def __init__(self, lengths: str = "") -> None:
        self.lengths = lengths
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node of an ONNX operator with one output, called `name`; return that name."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add an initializer with these values; return its name."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def rename(self, value: str, name: str) -> None:
        """Rename the value `value` to `name` in all nodes."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if old == value else old for old in names]

    def some(self, value: str, first: int, count: int, channels: int, label: str) -> str:
        """Channels [first, first + count) of a value with `channels` channels; returns the name of the result."""
        if (first, count) == (0, channels):
            return value
        edges = [np.array([n]) for n in (first, first + count, 1)]
        names = [self.constant(f"{label}.{k}", e) for k, e in zip(("first", "last", "axis"), edges, strict=True)]
        return self.node("Slice", [value, *names], f"{label}.seen")
