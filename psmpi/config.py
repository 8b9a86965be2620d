"""What a run is told: one tree of dataclasses; the command line, the TOML file and the help are made from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
from tyro.conf import Suppress, arg

from psmpi.errors import UserError
from psmpi.nn.losses import LOSSES

if TYPE_CHECKING:
    LossName = str
else:
    # The registry's names, for the command line, TOML files and the help.
    LossName = Literal[tuple(LOSSES)]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Data:
    """What is learnt from, and in which order."""

    dataset: str = "digits"
    """digits (embedded), mnist, cifar10, or the path of an .npz or .h5 file with x and y: integers are classes,
    floating point numbers the values of a regression."""
    data_dir: str = "data"
    """Folder that holds the data set's files."""
    batch_size: int = 100
    """Samples in a minibatch, over all replica rows."""
    shuffle: bool = True
    """A new order of the samples each epoch, a function of (seed, epoch) alone; else the file's order."""


@dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    model: Literal["psnet", "psnet-24", "psnet-35", "lenet", "mlp", "resnet", "custom"] = "psnet"
    """Built-in network, or custom: described by [[model.layers]] tables in the configuration file."""
    widths: tuple[int, ...] = ()
    """Hidden widths of mlp, 1024 1024 if not given; channels of resnet's sections, 16 32 if not given."""
    blocks: tuple[int, ...] = ()
    """Residual blocks of each of resnet's sections; 3 if not given."""
    batch_norm: bool = False
    """Batch normalization before each activation and of the scores, instead of biases; statistics are always those of
    the minibatch, in evaluations of about 1,000 samples."""
    layers: Annotated[tuple[dict[str, Any], ...], Suppress] = ()
    init: Literal["xavier", "he", "pytorch"] = "xavier"
    """Initial weights: uniform, Xavier, He, or within 1 / sqrt(inputs) as PyTorch's."""
    init_gain: float = 4.0
    """Factor on the Xavier weights of layers followed by the logistic sigmoid, whose slope at 0 is 1/4."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights and arithmetic."""

    @property
    def shape(self) -> dict[str, Any]:
        """What says the layers of the network called `model`."""
        return {name: getattr(self, name) for name in ("widths", "layers", "blocks", "batch_norm")}


@dataclass(frozen=True)
class LossSettings:
    """The loss."""

    loss: Annotated[LossName, arg(help="; ".join(f"{name}: {loss.formula}" for name, loss in LOSSES.items()))] = "psl"
    kappa: float = 1.0
    """Factor on the score differences of losses over pairs of classes."""
    exp_clip: str = "auto"
    """Exponent from which psl goes on as its tangent: auto (where the dtype overflows), a number, or off (an error)."""


@dataclass(frozen=True)
class Parallel:
    """Who computes and holds what."""

    method: Literal["psl", "data_parallel", "local_sgd", "dfa", "ist", "sil"] = "psl"
    """Training method: psl, the partially-separable loss, each rank its part of the network; data_parallel, each rank
    the whole network and a slice of each minibatch; local_sgd, so, but ranks step alone and average now and then; dfa,
    direct feedback alignment, each rank some layers, which learn from the error of the scores alone; ist, independent
    subnets, each worker a random part of all layers, new each round; sil, synthetic intermediate labels, each rank some
    layers, which learn random vectors that stand for the classes."""
    partition: Literal["scores", "pairs"] = "scores"
    """What a worker owns: the subnetwork of some scores, or the element losses of some pairs of classes."""
    placement: Literal["master", "owner"] = "master"
    """Who steps a worker's private weights: the masters, or the worker that owns them. ist: who holds the network, the
    masters or all ranks."""
    masters: int = 1
    """Ranks, from rank 0 on, that share the weights and the optimizer state."""
    colocate: bool = False
    """Masters are workers too."""
    replicas: int = 0
    """Rows of workers that split each minibatch; 0: as few as give every worker work."""
    backend: Literal["auto", "numpy", "compiled", "cupy"] = "auto"
    """What computes: NumPy, kernels in C, or a GPU through CuPy. auto: the last of these that is there."""
    compute: Literal["float32", "tf32", "float16", "bfloat16"] = "float32"
    """What a GPU's matrix products, and so its convolutions, compute with; weights, sums and results are float32."""
    convolution: Literal["own", "cudnn", "measured"] = "own"
    """A GPU's convolutions: psmpi's own; cuDNN's, where it has them and their values agree; or the faster ones of these
    by a measurement, which may choose, and so round, differently from run to run."""
    cuda_graphs: bool = True
    """Record a step's work on the GPU once and play it back."""
    gpu_aware: bool = False
    """Hand GPU memory to MPI, which has to be GPU-aware; else what is sent goes through pinned host memory."""
    nccl: bool = False
    """Exchange the scores of a row, and sum over replicas, by NCCL; needs a GPU a rank."""
    threads: int = 0
    """Threads a rank, of linear algebra and of the kernels; 0: the host's cores over its ranks, at least 1."""


@dataclass(frozen=True)
class Replicated:
    """Methods in which every rank has the whole network (data_parallel, local_sgd)."""

    allreduce: Literal["auto", "mpi", "ring", "doubling", "halving"] = "auto"
    """What sums gradients, or averages weights, over ranks: MPI's choice, or messages of psmpi's own. auto: a ring for
    large pieces between hosts, else MPI's choice."""
    bucket_megabytes: float = 25.0
    """Size of the pieces in which a gradient is summed, the first one a 25th of it."""
    overlap: bool = True
    """Begin to sum a piece as soon as backward has filled it (on the host; not by doubling and halving)."""
    compression: Literal["none", "float16", "topk", "dgc", "sign", "qsgd", "powersgd"] = "none"
    """What data_parallel sends of a gradient: all; half the bits; the largest components, plain or summed up with
    --momentum (dgc); a bit each; random multiples of a fraction of the norm; two thin matrices for each matrix."""
    error_feedback: bool = True
    """Remember what compression left out, and add it to the next gradient."""
    density: float = 0.01
    """Share of the components that topk and dgc send."""
    powersgd_rank: int = 2
    """Columns of powersgd's matrices."""
    qsgd_levels: int = 15
    """Multiples that qsgd rounds to, 1 to 127."""
    local_steps: int = 20
    """Steps of a rank alone between two averages in local_sgd, or in a round of ist, which also ends with an epoch, at
    a checkpoint and at --max-steps."""
    outer_lr: float = 1.0
    """Learning rate of local_sgd's outer optimizer; 1 without momentum is the mean. DiLoCo: 0.7."""
    outer_momentum: float = 0.0
    """Nesterov momentum of local_sgd's outer optimizer. DiLoCo: 0.9."""


@dataclass(frozen=True)
class Alignment:
    """Direct feedback alignment (dfa)."""

    feedback: Literal["normal", "uniform", "shared"] = "normal"
    """Random matrices that bring the error to hidden layers: normal, uniform (Noekland), or rows of one (Launay)."""
    feedback_seed: int = 0
    """Seed of these matrices."""
    feedback_scale: float = 1.0
    """Factor of these matrices: in effect one of the hidden layers' learning rate."""


@dataclass(frozen=True)
class SubnetSettings:
    """Independent subnets (ist)."""

    deal: Literal["units", "blocks"] = "units"
    """What is dealt to the workers each round: neurons and channels of each layer, or residual blocks (ResIST)."""
    strata: bool = False
    """Deal out each of as many equal groups of units as there are workers on its own: equal messages."""
    subnet_seed: int = 0
    """Seed of what is dealt to whom."""
    min_blocks: int = 1
    """Residual blocks of a worker at least; where there are fewer, workers share some, and these are averaged."""
    optimizer_state: Literal["reset", "travel"] = "reset"
    """A fresh optimizer each round, or its state goes with the weights, of Adam with a count of each one's steps."""


@dataclass(frozen=True)
class Synthetic:
    """Synthetic intermediate labels (sil)."""

    parts: int = 0
    """Runs of layers that are trained apart, the ranks a divisor or a multiple of them; 0: as many as ranks, and 2 at
    least where there are two layers."""
    labels: Literal["uniform", "gaussian", "sign", "orthogonal"] = "uniform"
    """Law of the vectors that stand for the classes: U(0, 1), N(0, 1), -1 or 1, or orthogonal to each other."""
    labels_seed: int = 0
    """Seed of these vectors."""
    labels_scale: float = 1.0
    """Factor of these vectors, the paper's kappa; the loss is divided by its square."""
    hand_over: Literal["stored", "recompute", "stale", "labels"] = "stored"
    """What a part learns from. One part after the other: stored, the outputs of the finished part before, kept in
    memory; recompute, these anew for each minibatch. All at once: stale, the outputs that the part before had at the
    end of the epoch before; labels, its labels with noise."""
    labels_noise: float = 0.1
    """Standard deviation of the noise of --hand-over labels, over --labels-scale."""
    part_epochs: tuple[int, ...] = ()
    """Epochs of each part, one after the other; equal shares if not given."""
    recovery_epochs: int = 0
    """How many of the --epochs, at the end, train all parts together as one network."""


@dataclass(frozen=True)
class Optimization:
    """The optimizer and its learning rate."""

    optimizer: Literal[
        "sgd",
        "momentum",
        "nesterov",
        "adam",
        "adamw",
        "rmsprop",
        "lbfgs",
        "lbfgs-tr",
        "lsr1-tr",
        "plbfgs",
        "plsr1",
        "plse",
    ] = "adam"
    """Update rule; lbfgs has a line search, lbfgs-tr and lsr1-tr a trust region; plbfgs, plsr1 and plse are partitioned
    quasi-Newton methods, for --partition pairs."""
    lr: float = 1e-3
    """Learning rate (lbfgs: length of its first trial step, 1 is usual; other quasi-Newton methods have none)."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    """Course of the learning rate; cosine falls from --lr to --min-lr over all --epochs."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0, before the schedule."""
    step_size: int = 0
    """Steps after which the `step` schedule multiplies the learning rate by gamma."""
    gamma: float = 0.1
    """Factor of the `step` schedule."""
    min_lr: float = 0.0
    """Learning rate at the end of the `cosine` schedule."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping. (Not used by the quasi-Newton methods, which keep their
    steps in bounds themselves.)"""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient; decoupled in adamw."""
    momentum: float = 0.9
    """Momentum of momentum, nesterov and --extrapolation constant."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment, and of --scaling moments."""
    eps: float = 1e-8
    """Added to the root in adam, adamw, rmsprop and --scaling moments."""
    alpha: float = 0.99
    """Decay of rmsprop's mean square."""
    history: int = 10
    """Pairs that lbfgs, lbfgs-tr and lsr1-tr remember."""
    max_evals: int = 20
    """Function evaluations of the line search of lbfgs at most."""
    globalization: Literal["trust-region", "line-search"] = "line-search"
    """What keeps partitioned quasi-Newton steps from being too long."""
    line_search: Literal["basic", "backtracking"] = "basic"
    """Of --globalization line-search. basic: lengthens a step that is good as it is, by 3/2 as long as the loss falls,
    whatever --sigma says; backtracking: only shortens."""
    extrapolation: Literal["none", "constant", "adaptive"] = "none"
    """Nesterov's extrapolation of partitioned quasi-Newton steps, by --momentum or adaptive."""
    memory: int = 5
    """Pairs that each element remembers."""
    merge_pairs: bool = False
    """One element for a pair of classes, not one for each of its two orders: half the memory."""
    initial: Literal["scaled", "identity"] = "scaled"
    """What an element's matrix starts from before its pairs: y^T y / s^T y times the identity, or the identity."""
    curvature: Literal["absolute", "relative"] = "absolute"
    """Test of s^T y in plbfgs and plse: above the rounding of the dtype, or above 1e-8 ||s|| ||y||."""
    damping: bool = False
    """Powell's damping of pairs of negative curvature, in plbfgs."""
    sigma: float = 0.0
    """Multiple of the identity that is added to the sum of the elements' matrices: more of it, shorter steps. It rises
    as a --schedule makes the learning rate fall."""
    scaling: Literal["none", "moments"] = "none"
    """Variables of partitioned quasi-Newton steps: the weights, or these times the fourth root of their gradients' mean
    squares (by --beta2, as in Adam), which makes the matrices start from a diagonal."""
    cg_tolerance: float = 1e-2
    """Residual, relative to the gradient, at which conjugate gradients end."""
    cg_iterations: int = 30
    """Products with the partitioned matrix in a step at most."""


@dataclass(frozen=True)
class Run:
    """How long, and what is written where."""

    epochs: int = 10
    """Passes over the training samples."""
    max_steps: int = 0
    """Stop after this many steps in all; 0: no such limit."""
    seed: int = 0
    """Seed of the initial weights and of the order of the samples."""
    out: str = ""
    """Run directory; a new folder under runs/ if not given."""
    resume: str = ""
    """Checkpoint to go on from: its path, or auto for the newest one in the run directory (a fresh start if none)."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: at the end of each epoch."""
    checkpoint_keep: int = 3
    """Newest checkpoints to keep; 0: all."""
    checkpoint_gzip: int = 0
    """Compression of checkpoints: 0 (none) to 9."""
    checkpoint_parallel: bool = False
    """All ranks write the checkpoint together, while training waits; needs an h5py built with parallel HDF5."""


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    data: Data = field(default_factory=Data)
    model: NetworkSettings = field(default_factory=NetworkSettings)
    objective: LossSettings = field(default_factory=LossSettings)
    parallel: Parallel = field(default_factory=Parallel)
    replicated: Replicated = field(default_factory=Replicated)
    alignment: Alignment = field(default_factory=Alignment)
    subnets: SubnetSettings = field(default_factory=SubnetSettings)
    synthetic: Synthetic = field(default_factory=Synthetic)
    optimization: Optimization = field(default_factory=Optimization)
    run: Run = field(default_factory=Run)
    config: Annotated[str, arg(metavar="FILE.toml")] = ""
    """TOML file with any of these settings, in tables named as the groups here; the command line goes before it."""


def defaults(argv: Sequence[str]) -> Config:
    """The configuration that a command line changes: that of --config, which has to be known before the rest is read.

    UserError where that file is wrong.
    """
    path = ""
    for at, word in enumerate(argv):
        if word == "--config" and at + 1 < len(argv):
            path = argv[at + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    return read_file(path) if path else Config()


# The settings that some methods alone have: these methods, the group and the names.
OF_METHODS = (
    (("psl",), "parallel", ("partition", "replicas")),
    (("psl", "ist"), "parallel", ("placement", "masters", "colocate")),
    (
        ("data_parallel",),
        "replicated",
        ("bucket_megabytes", "overlap", "compression", "error_feedback", "density", "powersgd_rank",
         "qsgd_levels"),
    ),
    (("data_parallel", "local_sgd"), "replicated", ("allreduce",)),
    (("psl", "data_parallel", "local_sgd", "sil"), "parallel", ("nccl",)),
    (("local_sgd", "ist"), "replicated", ("local_steps",)),
    (("local_sgd",), "replicated", ("outer_lr", "outer_momentum")),
    (("dfa",), "alignment", ("feedback", "feedback_seed", "feedback_scale")),
    (("ist",), "subnets", ("deal", "strata", "subnet_seed", "min_blocks", "optimizer_state")),
    (
        ("sil",),
        "synthetic",
        ("parts", "labels", "labels_seed", "labels_scale", "hand_over", "labels_noise", "part_epochs",
         "recovery_epochs"),
    ),
)  # fmt: skip


def check(config: Config) -> None:
    """UserError for a value that no run can have, whatever its data and ranks."""
    run, method = config.run, config.parallel.method
    for methods, group, names in OF_METHODS:
        for name in names if method not in methods else ():
            if getattr(getattr(config, group), name) != getattr(getattr(Config(), group), name):
                raise UserError(
                    f"--{name.replace('_', '-')} is of --method {' and '.join(methods)}, and the method here is "
                    f"{method}: leave it out, or choose that method"
                )
    for name, value, least in (
        ("--epochs", run.epochs, 1),
        ("--max-steps", run.max_steps, 0),
        ("--checkpoint-every", run.checkpoint_every, 0),
        ("--checkpoint-keep", run.checkpoint_keep, 0),
        ("--seed", run.seed, 0),
        ("--feedback-seed", config.alignment.feedback_seed, 0),
        ("--subnet-seed", config.subnets.subnet_seed, 0),
        ("--parts", config.synthetic.parts, 0),
        ("--labels-seed", config.synthetic.labels_seed, 0),
        ("--recovery-epochs", config.synthetic.recovery_epochs, 0),
        ("--threads", config.parallel.threads, 0),
        ("--replicas", config.parallel.replicas, 0),
        ("--batch-size", config.data.batch_size, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: expected a whole number from {least} up")
    for section in (
        config.model, config.objective, config.optimization, config.replicated, config.alignment, config.synthetic
    ):  # fmt: skip
        for name, value in vars(section).items():
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a finite number")
    if not config.optimization.lr > 0:
        raise UserError(f"--lr {config.optimization.lr}: expected a number above 0")
    if not 0 < config.model.init_gain <= 1e3:
        raise UserError(f"--init-gain {config.model.init_gain}: expected a number above 0 and up to 1000")
    if config.optimization.history > 1000:
        raise UserError(f"--history {config.optimization.history}: expected 1000 pairs at most")
    if config.model.widths and config.model.model not in ("mlp", "resnet"):
        raise UserError(f"--widths are those of --model mlp and resnet; --model {config.model.model} has its own")
    if not config.optimization.clip >= 0:
        raise UserError(f"--clip {config.optimization.clip}: expected 0 (no clipping) or a number above it")
    if not 0 <= run.checkpoint_gzip <= 9:
        raise UserError(f"--checkpoint-gzip {run.checkpoint_gzip}: expected 0 (none) to 9")
    if config.parallel.compute != "float32" and config.model.dtype != "float32":
        raise UserError(
            f"--compute {config.parallel.compute} is for float32 weights, not --dtype {config.model.dtype}: leave one "
            "out"
        )
    if config.parallel.convolution != "own" and config.parallel.compute not in ("float32", "tf32"):
        raise UserError(
            f"--convolution {config.parallel.convolution} computes with float32 and tf32, not --compute "
            f"{config.parallel.compute}: leave one out"
        )
    if config.parallel.threads > 1024:
        raise UserError(f"--threads {config.parallel.threads}: expected 1024 at most")


def from_table(table: Mapping[str, Any], base: Config, where: str) -> Config:
    """`base` with the settings of a TOML table; UserError names an unknown table or setting, or one of a wrong type."""
    sections = {f.name: f for f in fields(base) if is_dataclass(getattr(base, f.name))}
    changed = {}
    for name, settings in table.items():
        if name not in sections or not isinstance(settings, Mapping):
            raise UserError(f"{where}: unknown table [{name}]; known are {', '.join(f'[{s}]' for s in sections)}")
        section = getattr(base, name)
        known = get_type_hints(type(section))
        values = {}
        for key, value in settings.items():
            if key not in known:
                raise UserError(f"{where}: unknown setting {key!r} in [{name}]; known are {', '.join(sorted(known))}")
            label = f"{where}: [{name}] {key} = {value!r}"
            if get_origin(known[key]) is Literal and value not in get_args(known[key]):
                raise UserError(f"{label}: choose one of {', '.join(get_args(known[key]))}")
            values[key] = _checked(value, getattr(section, key), label)
        changed[name] = replace(section, **values)
    return replace(base, **changed)


def _checked(value: Any, like: Any, where: str) -> Any:
    if isinstance(like, tuple):
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list")
        return tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(like):
        raise UserError(f"{where}: expected {type(like).__name__}, got {type(value).__name__}")
    return value


def read_file(path: str) -> Config:
    """The defaults with the settings of a TOML file; UserError where it cannot be read."""
    try:
        text = Path(path).read_bytes().decode()
        return from_table(tomllib.loads(text), Config(), path)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text, which read_file and from_toml read back."""
    return tomli_w.dumps({k: v for k, v in asdict(config).items() if isinstance(v, dict)})


def from_toml(text: str, where: str) -> Config:
    """The reverse of to_toml; `where` names the text in errors."""
    return from_table(tomllib.loads(text), Config(), where)
