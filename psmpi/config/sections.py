"""Settings of every run, in tables; those of single training methods stand beside the methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress, arg

from psmpi.config.ranges import Least, OneOf
from psmpi.data.text import CONTEXT
from psmpi.nn.losses import LOSSES
from psmpi.optim import OPTIMIZERS, Hyper, NewtonSettings, ScheduleSettings, optimizer_names
from psmpi.registry import DEFAULT
from psmpi.track import TRACKERS

if TYPE_CHECKING:
    TrackerName = str
    # None until the usual number is in its place, before anything is made of it.
    Count = int
    Rate = float
else:
    Count, Rate = int | None, float | None
    # The registry's names, for the command line, TOML files and the help.
    TrackerName = Literal[tuple(TRACKERS)]

NOT_GIVEN: Any = None
# Settings of deep and deep-conv alone.
DEEP = ("depth", "final_time", "activation")
FITTED = arg(help_behavior_hint="(default: fits the data)")


@dataclass(frozen=True)
class Data:
    """What is learnt from, and in which order."""

    dataset: str = "digits"
    """digits (embedded), peaks (generated: points in a plane), mnist, cifar10, characters (drawn: images of 48, 16
    pixels wide, or as many as characters:32 says), or the path of an .npz or .h5 file with x and y: integers, strings
    and truth values are classes, floating point numbers the values of a regression. x.npy beside y.npy, and a table
    .csv, are such files too. With an array lengths in the file samples are sequences
    (samples, steps, features), or tokens (samples, steps); NAME:rows and NAME:pixels make sequences of images. A .svm
    or .libsvm file has sparse samples, index:value, test samples in FILE.svm.t. A .txt file is a text, whose characters
    are predicted one by one. Generated tasks of sequences: adding, copying, repeat_copy, modular_addition, or with a
    size copying:100. Others: sparse (two classes) and ratings (the values of a matrix), or with so many features, or
    rows, sparse:5000."""
    context: Annotated[int, Least(1)] = CONTEXT
    """Characters of a window of a text, each of which is to be predicted from those before it in its window."""
    label: str = ""
    """Column of the labels of a table, by its name in the first line or its number from 1; if not given the one called
    label, class, target or y, else the last."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Axes of images in a file of your own: channels before rows and columns, or channels last."""
    data_dir: str = "data"
    """Folder that holds the data set's files."""
    split_seed: Annotated[int, Least(-1)] = 0
    """Seed of the test samples of a file without x_test and y_test, a fifth of each class; -1: every fifth sample of
    the file."""
    validation: float = 0.0
    """Share of the training samples, drawn with the split seed, that are left out of training and tested after each
    epoch in the place of the test samples, which nothing looks at then; 0: none."""
    augment: tuple[str, ...] = ()
    """Changes of the training images in each epoch: flip (mirrors half of them left to right), and shift:N (moves
    them by up to N pixels, zeros beyond) or crop:N (the same, mirror images beyond). A function of (seed, epoch,
    sample) alone."""
    data_memory: str = ""
    """Bytes of samples that a rank keeps in memory, as 500M or 2G; others are read from their file, .npy, HDF5 or an
    .npz without compression, for each minibatch. If not given, all that the rank trains on and tests."""
    batch_size: Annotated[Count, Least(1), FITTED] = NOT_GIVEN
    """Samples in a minibatch, over all replica rows; if not given 32, from 10,000 training samples on 100."""
    allow_external: bool = False
    """Let arrays of an HDF5 file lie in other files, which it names (links, virtual data sets): for files of your own
    alone."""
    shuffle: bool = True
    """A new order of the samples each epoch, a function of (seed, epoch) alone; else the file's order."""

    @property
    def source(self) -> tuple[str, str, int, int, str, bool, bool, float]:
        """What opens the data set, see `psmpi.data.open_dataset`."""
        where = (self.dataset, self.data_dir, self.split_seed, self.context)
        return *where, self.label, self.allow_external, self.layout == "nhwc", self.validation


@dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    model: Literal[
        "psnet", "psnet-24", "psnet-35", "lenet", "linear", "mlp", "head", "resnet", "deep", "deep-conv", "radix",
        "rnn", "gru", "lstm", "transformer", "factors", "slabs", "custom",
    ] = "psnet"  # fmt: skip
    """Built-in network, or custom: described by [[model.layers]] tables in the configuration file. psnet: partitioned
    by classes, for samples of any shape. linear: one dense
    layer, with one score for two classes (--loss logistic, or hinge, a support vector machine). head: for very many
    classes, a trunk (--widths, or such tables) that every worker computes and rows of weights, one a class. deep and
    deep-conv: many residual layers of one width (--depth, --final-time, --activation). radix: many sparse layers of one
    width (--depth), 32 connections a unit, with ReLU and He's initial weights. rnn, gru, lstm: recurrent layers for
    sequences. transformer: attention to the steps before, for sequences. factors: a vector of each row and column of a
    matrix, whose products are its entries (--dataset ratings). slabs: layers cut into domains that see their
    own neurons and a halo of their neighbours' (--domains, --halo)."""
    widths: tuple[int, ...] = ()
    """Hidden widths of mlp, 1024 1024 if not given, of head's trunk, 512 128, and of recurrent layers, 128 128;
    channels of resnet's sections, 16 32; the width of deep, 16, of radix, 1024, and the channels of deep-conv, 4; of
    transformer the width of its vectors, 64, and of its hidden layers, 4 times that; neurons of slabs' layers, 256
    256; of factors the rank, 10."""
    vocabulary: Annotated[int, Least(0)] = 0
    """Of rnn, gru, lstm, transformer and factors: samples are tokens 0 to VOCABULARY - 1, each of which has a vector,
    of the first width; if not given those of a text or of a generated task that has tokens."""
    blocks: tuple[int, ...] = ()
    """Residual blocks of each of resnet's sections, 3 if not given; of transformer, each of attention and two dense
    layers, 2."""
    domains: tuple[int, ...] = ()
    """Domains that each layer of slabs is cut into along its neurons, 4 if not given; two numbers: rows and columns of
    tiles, of images whose hidden layers are square fields of neurons."""
    halo: Annotated[int, Least(-1)] = -1
    """Neurons of each neighbouring domain that one of slabs sees; -1: an eighth of a domain, of flat images a row."""
    heads: Annotated[int, Least(0)] = 0
    """Heads of each attention layer of transformer; 0: 4."""
    depth: Annotated[int, Least(1)] = 32
    """Residual layers of deep and deep-conv, sparse ones of radix."""
    final_time: float = 1.0
    """What the step sizes of their residual layers come to: a layer is u + final_time / depth times act(K u + b)."""
    activation: Literal["tanh", "relu", "sigmoid"] = "tanh"
    """Function of deep and deep-conv."""
    batch_norm: bool = False
    """Batch normalization before each activation and of the scores, instead of biases; statistics are always those of
    the minibatch, in evaluations of about 1,000 samples."""
    scale: float = 0.0
    """Scores of head that are this times the cosine of the angle between the trunk's outputs and the class's row of
    weights, 16 to 64 for many classes; 0: products, of any length. The last of the widths then has no ReLU."""
    layers: Annotated[tuple[dict[str, Any], ...], Suppress, arg(help="Tables of the file.")] = ()
    init: Literal["xavier", "he", "pytorch"] = "xavier"
    """Initial weights: uniform, Xavier, He, or within 1 / sqrt(inputs) as PyTorch's."""
    init_gain: float = 4.0
    """Factor on the Xavier weights of layers followed by the logistic sigmoid, whose slope at 0 is 1/4."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights and arithmetic."""

    @property
    def shape(self) -> dict[str, Any]:
        """What says the layers of the network called `model`."""
        names = ("widths", "layers", "blocks", "batch_norm", "scale", "vocabulary", "heads", "domains", "halo", *DEEP)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LossSettings:
    """The loss."""

    # Its help is made with the names, see `psmpi.config.choices`.
    loss: Annotated[str, OneOf(LOSSES)] = "psl"
    kappa: float = 1.0
    """Factor on the score differences of losses over pairs of classes."""
    exp_clip: str = "auto"
    """Exponent from which psl goes on as its tangent: auto (where the dtype overflows), a number, or off (an error)."""
    psl_weights: Literal["none", "remembered", "current"] = "none"
    """What psl divides a sample's derivatives by: nothing, its own loss when the sample was last seen, or its loss in
    this step, which makes it cross-entropy."""
    class_weights: str = ""
    """Factors on the gradient of each sample's loss, by its class: balanced, samples over classes times the
    samples of the class, or a number above 0 for each class, separated by commas, in the order of the classes or of
    their names; if not given nothing. Losses that are printed are those without."""
    margin: float = 0.0
    """With --scale, what training alone takes off the label's score: an angle in radians that is added to its own
    (arcface, often 0.5), or a number subtracted from its cosine (cosface, often 0.35)."""
    margin_kind: Literal["arcface", "cosface"] = "arcface"
    """What the margin is: S cos(angle + M), or S (cos(angle) - M)."""


def unused_of_loss(given: LossSettings) -> set[str]:
    """The names of the settings that the loss does not use."""
    return {"kappa", "exp_clip", "psl_weights"} - set(LOSSES.find(given.loss).settings)


@dataclass(frozen=True)
class Parallel:
    """Method and machine."""

    method: str = DEFAULT
    """Training method."""
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
    """Make the sums of a row and of replicas by NCCL; needs a GPU a rank."""
    threads: Annotated[int, Least(0)] = 0
    """Threads a rank, of linear algebra and of the kernels; 0: the host's cores over its ranks, at least 1."""


@dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer and its learning rate."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS, optimizer_names)] = "adam"
    """Update rule; lbfgs has a line search, lbfgs-tr and lsr1-tr a trust region; plbfgs, plsr1 and plse are partitioned
    quasi-Newton methods, for --partition pairs."""
    lr: Annotated[Rate, FITTED] = NOT_GIVEN
    """Learning rate (lbfgs: length of its first trial step; other quasi-Newton methods have none). If not given, by the
    optimizer and the network: adam 0.001, on less than 10,000 samples with logistic sigmoids 0.01; see the README."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping. (Not used by the quasi-Newton methods, which keep their
    steps in bounds themselves.)"""


@dataclass(frozen=True)
class Optimization(NewtonSettings, Hyper, ScheduleSettings, OptimizerChoice):
    """The optimizer and its learning rate."""


@dataclass(frozen=True)
class Run:
    """How long, and what is written where."""

    epochs: Annotated[Count, Least(1), FITTED] = NOT_GIVEN
    """Passes over the training samples; if not given those that come to 2,700 steps, from 10 to 200."""
    max_steps: Annotated[int, Least(0)] = 0
    """Stop this start after so many steps of the run in all; 0: no such limit."""
    seed: Annotated[int, Least(0)] = 0
    """Seed of the initial weights and of the order of the samples."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or a gradient that is no finite number does. stop: ends the run, with its place; skip: leaves out
    the step, up to 10 in a row; rollback: goes back to the last checkpoint, or the start, and on with half the learning
    rate, up to 3 times in an epoch."""
    out: str = ""
    """Run directory; a new folder under runs/ if not given."""
    resume: str = ""
    """Checkpoint to go on from, with the run's own settings but for those given here: its path, or auto for the newest
    one in the run directory (a fresh start if none)."""
    new_data: bool = False
    """Go on from the checkpoint with other data than it was made with, from the beginning of an epoch."""
    track: tuple[TrackerName, ...] = ()
    """Also write the rows of metrics.jsonl for other viewers. tensorboard: into the folder tensorboard of the run
    directory; mlflow: as a run of MLflow, in a folder of its own."""
    track_dir: str = ""
    """Folder, or sqlite:///FILE, of MLflow's runs; if not given that of MLFLOW_TRACKING_URI, else mlruns."""
    stall_warn: float = 60.0
    """Seconds that ranks stand still before it is said which of them is waited for; 0: ranks are not watched."""
    stall_abort: float = 1800.0
    """Seconds that ranks stand still before the job ends, with every rank's Python stacks; 0: never."""
    patience: Annotated[int, Least(0)] = 0
    """Epochs without a better value of --monitor after which the run ends; 0: never."""
    monitor: Literal["loss", "accuracy", "top5", "rmse", "train_loss"] = "loss"
    """Measure of --patience and --keep-best: of the validation samples, or where there are none of the test samples; or
    the mean loss of training."""
    keep_best: bool = False
    """Keep the checkpoint of the epoch with the best value of --monitor, as best.h5 in the run directory."""
    checkpoint_every: Annotated[int, Least(0)] = 0
    """Steps between checkpoints; 0: at the end of each epoch."""
    checkpoint_keep: Annotated[int, Least(0)] = 3
    """Newest checkpoints to keep; 0: all."""
    checkpoint_gzip: int = 0
    """Compression of checkpoints: 0 (none) to 9."""
    checkpoint_parallel: bool = False
    """All ranks write the checkpoint together, while training waits; needs an h5py built with parallel HDF5."""
    save_signal: Literal["USR1", "USR2", "URG", "XCPU"] = "USR1"
    """Signal that stops the run after the next step, saved, with exit status 85, as SIGTERM, SIGINT and SIGHUP do; for
    the warning that a batch system gives before its time limit (sbatch --signal=USR1@120)."""
