"""Settings of every run, in tables; those of single training methods stand beside the methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress, arg

from psmpi.config.ranges import Choices, Least, OneOf
from psmpi.data.text import CONTEXT
from psmpi.nn.losses import LOSSES, formulas
from psmpi.optim import OPTIMIZERS, Hyper, NewtonSettings, ScheduleSettings, optimizer_names, optimizer_summaries
from psmpi.registry import DEFAULT, summaries
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


@dataclass(frozen=True)
class Data:
    """The samples and their order."""

    dataset: Annotated[str, arg(metavar="NAME")] = "digits"
    """Name of a data set, or path of a file.

    digits: 1,797 images of 8 x 8 pixels in 10 classes, embedded in psmpi
    mnist: images of digits, 28 x 28 pixels, 10 classes; files in --data-dir
    cifar10: colour images, 32 x 32 pixels, 10 classes; files in --data-dir
    peaks: points of a plane in 5 classes, generated
    characters: images of 48 characters, drawn with 16 x 16 pixels; characters:32 has 32 x 32
    adding: numbers, two of which are to be added; adding:100 has sequences of 100 steps
    copying: ten symbols to repeat after a pause; copying:100 has a pause of 100 steps
    repeat_copy: letters to repeat up to 3 times; repeat_copy:10 has up to 10 letters
    modular_addition: sums of two numbers modulo 97; modular_addition:31, modulo 31
    sparse: sparse samples in two classes, generated; sparse:5000 has 5,000 features
    ratings: entries of a matrix of low rank, generated; ratings:5000 has 5,000 rows
    FILE.npz: arrays x and y, and perhaps x_test and y_test; y of integers, strings or truth values are classes, y of
        floating point numbers the values of a regression; with an array lengths samples are sequences (samples, steps,
        features) or tokens (samples, steps)
    FILE.h5: the same arrays in an HDF5 file
    x.npy: array x, with y.npy beside it
    FILE.csv: table with a line for each sample, see --label
    FILE.svm: sparse samples as index:value, also FILE.libsvm; test samples in FILE.svm.t
    FILE.txt: text, whose characters are predicted one by one
    NAME:rows: images as sequences of their rows; NAME:pixels, of their pixels
    """
    context: Annotated[int, Least(1)] = CONTEXT
    """Characters of a window of a text. The network predicts each character from those before it in its window."""
    label: Annotated[str, arg(metavar="COLUMN")] = ""
    """Column with a table's labels, by name or number. If not given: label, class, target or y, else the last one.
    Names are those of the first line; numbers begin at 1."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Axes of images in a file of your own.

    nchw: samples, channels, rows, columns
    nhwc: samples, rows, columns, channels
    """
    data_dir: Annotated[str, arg(metavar="FOLDER")] = "data"
    """Folder of the data set's files."""
    split_seed: Annotated[int, Least(-1)] = 0
    """Seed for drawing the test samples of a file without x_test and y_test: a fifth of each class. -1 takes every
    fifth sample of the file."""
    validation: float = 0.0
    """Share of training samples to hold out. Held-out samples are drawn with --split-seed and tested after each epoch
    in place of the test samples, which then stay unused. 0 holds out none."""
    augment: Annotated[tuple[str, ...], arg(metavar="NAME")] = ()
    """Random changes of images, such as flip crop:4. They depend on seed, epoch and sample only, and apply to training.

    flip: mirror half of the images left to right
    shift:N: move images by up to N pixels; zeros come in
    crop:N: move images by up to N pixels; mirrored pixels come in
    """
    data_memory: Annotated[str, arg(metavar="BYTES")] = ""
    """Bytes of samples that a rank keeps in memory, such as 500M or 2G. A rank reads the other samples from the file
    for each minibatch (.npy, HDF5, or .npz without compression). If not given: all samples of the rank."""
    batch_size: Annotated[Count, Least(1)] = NOT_GIVEN
    """Samples of a minibatch. If not given: 32 or 100. It is 100 from 10,000 training samples on. All replicas share
    each minibatch."""
    allow_external: bool = False
    """Let an HDF5 file refer to arrays in other files (links, virtual data sets). Use it for files of your own only."""
    shuffle: bool = True
    """Draw a new order of the samples each epoch, by seed and epoch. Without it, the order is the file's."""

    @property
    def source(self) -> tuple[str, str, int, int, str, bool, bool, float]:
        """The arguments of `psmpi.data.open_dataset`."""
        where = (self.dataset, self.data_dir, self.split_seed, self.context)
        return *where, self.label, self.allow_external, self.layout == "nhwc", self.validation


@dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    model: Literal[
        "psnet", "psnet-24", "psnet-35", "lenet", "linear", "mlp", "head", "resnet", "deep", "deep-conv", "radix",
        "rnn", "gru", "lstm", "transformer", "factors", "slabs", "custom",
    ] = "psnet"  # fmt: skip
    """Built-in network, or custom.

    psnet: layers that all classes share, then layers of each class
    psnet-24: psnet for 28 x 28 images, 24 and 15 units a class
    psnet-35: psnet for 28 x 28 images, 35 and 15 units a class
    lenet: LeNet-5, for images of 28 x 28 or 32 x 32 pixels
    linear: one dense layer; a single score for two classes
    mlp: dense layers with ReLU (--widths)
    head: trunk, then a row of weights a class, for many classes
    resnet: residual network (--widths, --blocks), square images
    deep: dense residual layers of one width (--depth)
    deep-conv: convolutional residual layers (--depth), images
    radix: sparse layers of 32 inputs a unit (--depth, --widths)
    rnn: recurrent layers, for sequences
    gru: gated recurrent units, for sequences
    lstm: long short-term memory layers, for sequences
    transformer: attention to earlier steps, for sequences
    factors: matrix factorization (--dataset ratings)
    slabs: layers cut into domains with halos (--domains, --halo)
    custom: layers of your own: [[model.layers]] in --config FILE
    """
    widths: tuple[int, ...] = ()
    """Units, or channels, of the hidden layers. The list has each model's default in parentheses.

    mlp: units of each hidden layer (1024 1024)
    head: units of each layer of the trunk (512 128)
    resnet: channels of each section (16 32)
    deep: units of every layer (16)
    deep-conv: channels of every layer (4)
    radix: units of every layer (1024)
    rnn: units of each layer (128 128)
    gru: units of each layer (128 128)
    lstm: units of each layer (128 128)
    transformer: width of the vectors, and of the hidden layers (64, 4 times as many)
    factors: rank of the factors (10)
    slabs: neurons of each hidden layer (256 256)
    """
    vocabulary: Annotated[int, Least(0)] = 0
    """Number of tokens, for rnn, gru, lstm, transformer and factors: samples are tokens 0 to VOCABULARY - 1, and the
    first layer has a vector for each. 0: the number of a text's or a generated task's tokens, if it has any."""
    blocks: tuple[int, ...] = ()
    """Numbers of blocks. The list has each model's default in parentheses.

    resnet: residual blocks of each section (3)
    transformer: blocks of attention and two dense layers (2)
    """
    domains: tuple[int, ...] = ()
    """Domains of each layer of slabs, along its neurons. Two numbers are rows and columns of tiles, for images whose
    hidden layers are square fields of neurons. If not given: 4."""
    halo: Annotated[int, Least(-1)] = -1
    """Neurons of each neighbouring domain that a domain of slabs sees. -1: an eighth of a domain; for flat images, one
    row."""
    heads: Annotated[int, Least(0)] = 0
    """Heads of each attention layer of transformer. 0: 4 heads."""
    depth: Annotated[int, Least(1)] = 32
    """Layers of deep, deep-conv (residual) and radix (sparse)."""
    final_time: float = 1.0
    """Final time T of deep and deep-conv, whose layers compute u + T / depth act(K u + b)."""
    activation: Literal["tanh", "relu", "sigmoid"] = "tanh"
    """Activation function of deep and deep-conv.

    tanh: hyperbolic tangent
    relu: rectified linear unit
    sigmoid: logistic sigmoid
    """
    batch_norm: bool = False
    """Batch normalization before each activation and of the scores, in place of biases. Evaluation takes the statistics
    of about 1,000 samples at a time."""
    scale: float = 0.0
    """Factor S of cosine scores of head: S times the cosine of the angle between the trunk's outputs and the class's
    row of weights. 16 to 64 suit many classes; 0: plain products. With S, the last layer of the trunk has no ReLU."""
    layers: Annotated[tuple[dict[str, Any], ...], Suppress, arg(help="Tables of the file.")] = ()
    init: Literal["xavier", "he", "pytorch"] = "xavier"
    """Distribution of the initial weights.

    xavier: uniform, by inputs and outputs (Glorot and Bengio 2010)
    he: by the inputs of each unit, for ReLU (He et al. 2015)
    pytorch: uniform within 1 / sqrt(inputs), PyTorch's default
    """
    init_gain: float = 4.0
    """Factor on the Xavier weights of layers before a logistic sigmoid, whose slope at 0 is 1/4."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights and arithmetic.

    float32: single precision
    float64: double precision
    """

    @property
    def shape(self) -> dict[str, Any]:
        """The keyword arguments that determine the layers of the network called `model`."""
        names = ("widths", "layers", "blocks", "batch_norm", "scale", "vocabulary", "heads", "domains", "halo", *DEEP)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LossSettings:
    """The loss."""

    loss: Annotated[str, OneOf(LOSSES, formulas)] = "psl"
    """Loss by scores c and label y."""
    kappa: float = 1.0
    """Factor on score differences in the losses over pairs of classes (psl, logistic, hinge)."""
    exp_clip: Annotated[str, arg(metavar="EXPONENT")] = "auto"
    """Exponent above which psl continues as its tangent: a number, or a word below.

    auto: the largest exponent that the dtype holds
    off: no tangent; an overflow ends the run
    """
    psl_weights: Literal["none", "remembered", "current"] = "none"
    """Divisor of the derivatives of each sample in psl.

    none: no divisor
    remembered: the loss of the sample when it was last visited
    current: the loss of the sample in this step, which gives cross-entropy's gradient
    """
    class_weights: Annotated[str, arg(metavar="LIST")] = ""
    """Weight of each class: balanced, or numbers (1,2.5,1). It multiplies the gradient of the loss, not the printed
    loss. Numbers follow the order of the classes or of their names.

    balanced: samples / (classes x samples of the class)
    """
    margin: float = 0.0
    """Margin M of cosine scores (--scale) on the label's score, in training only: often 0.5 for arcface, 0.35 for
    cosface. 0: no margin."""
    margin_kind: Literal["arcface", "cosface"] = "arcface"
    """Score of the label with a margin M at an angle t, with scale S.

    arcface: S cos(t + M), M in radians (Deng et al. 2019)
    cosface: S (cos(t) - M) (Wang et al. 2018)
    """


def unused_of_loss(given: LossSettings) -> set[str]:
    """The names of the settings that the loss does not use."""
    return {"kappa", "exp_clip", "psl_weights"} - set(LOSSES.find(given.loss).settings)


@dataclass(frozen=True)
class Parallel:
    """Method and machine."""

    method: Annotated[str, arg(metavar="NAME"), Choices(summaries)] = DEFAULT
    """Training method."""
    backend: Literal["auto", "numpy", "compiled", "cupy"] = "auto"
    """Backend.

    auto: the last one below that is available
    numpy: NumPy
    compiled: kernels in C
    cupy: kernels on a GPU, by CuPy
    """
    compute: Literal["float32", "tf32", "float16", "bfloat16"] = "float32"
    """Arithmetic of matrix products and convolutions on a GPU. Weights, sums and results are float32.

    float32: single precision
    tf32: TensorFloat-32
    float16: half precision
    bfloat16: brain floating point
    """
    convolution: Literal["own", "cudnn", "measured"] = "own"
    """Convolutions on a GPU.

    own: the kernels of psmpi
    cudnn: cuDNN's, where it has them and their values agree
    measured: the faster of both by a measurement; the choice, and so the rounding, may differ between runs
    """
    cuda_graphs: bool = True
    """Record the GPU work of a step once and replay it (CUDA graphs)."""
    gpu_aware: bool = False
    """Hand GPU memory to MPI, which must be GPU-aware. Without it, messages pass through pinned host memory."""
    nccl: bool = False
    """Use NCCL for sums over the ranks of a row and over replicas. Needs a GPU for each rank."""
    threads: Annotated[int, Least(0)] = 0
    """Threads of each rank; 0: cores / ranks. Cores and ranks are those of the host; each rank has at least 1
    thread."""


@dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer and its learning rate."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS, optimizer_summaries, optimizer_names)] = "adam"
    """Update rule."""
    lr: Rate = NOT_GIVEN
    """Learning rate. If not given: fits optimizer and network. For lbfgs it is the length of the first trial step;
    other quasi-Newton methods have none."""
    clip: float = 1.0
    """Largest global norm of the gradient, 0 for no clipping. Quasi-Newton methods bound their steps themselves and do
    not use it."""


@dataclass(frozen=True)
class Optimization(NewtonSettings, Hyper, ScheduleSettings, OptimizerChoice):
    """The optimizer and its learning rate."""


@dataclass(frozen=True)
class Run:
    """Length of the run, and its files."""

    epochs: Annotated[Count, Least(1)] = NOT_GIVEN
    """Passes over the samples. If not given: fits the data. That is 2,700 steps, but from 10 to 200 epochs."""
    max_steps: Annotated[int, Least(0)] = 0
    """Step of the run at which this start stops, 0 for no limit."""
    seed: Annotated[int, Least(0)] = 0
    """Seed of initial weights and sample order."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """Reaction to a loss or gradient that is not finite.

    stop: end the run, and print where it happened
    skip: leave the step out, up to 10 steps in a row
    rollback: return to the last checkpoint or the start and halve the learning rate, up to 3 times an epoch
    """
    out: Annotated[str, arg(metavar="FOLDER")] = ""
    """Run directory. If not given: a new folder in runs/."""
    resume: Annotated[str, arg(metavar="FILE")] = ""
    """Checkpoint to continue from, or auto for the newest. The run keeps its settings, except those given anew.

    auto: the newest checkpoint of --out; a fresh start if there is none
    """
    new_data: bool = False
    """Continue from the checkpoint with other data than before, from the beginning of an epoch."""
    track: tuple[TrackerName, ...] = ()
    """Further records of the metrics.

    tensorboard: event files in the folder tensorboard of the run directory
    mlflow: a run of MLflow, see --track-dir
    """
    track_dir: Annotated[str, arg(metavar="FOLDER")] = ""
    """Folder of MLflow's runs, or sqlite:///FILE. If not given: MLFLOW_TRACKING_URI, else mlruns."""
    stall_warn: float = 60.0
    """Seconds without progress of the ranks before a warning names the rank that the others wait for. 0: no watch."""
    stall_abort: float = 1800.0
    """Seconds without progress of the ranks before the job ends and prints the Python stacks of all ranks. 0: never."""
    patience: Annotated[int, Least(0)] = 0
    """Epochs without progress after which training ends; 0: after all --epochs. Progress is a better value of
    --monitor."""
    monitor: Literal["loss", "accuracy", "top5", "rmse", "train_loss"] = "loss"
    """Measure of --patience and --keep-best, on the validation samples, or on the test samples where there are none.

    loss: mean loss
    accuracy: share of correct classes
    top5: share of samples with the label among the five highest scores
    rmse: root of the mean square error
    train_loss: mean loss of training
    """
    keep_best: bool = False
    """Keep the epoch with the best --monitor as best.h5."""
    checkpoint_every: Annotated[int, Least(0)] = 0
    """Steps between checkpoints; 0: those of an epoch."""
    checkpoint_keep: Annotated[int, Least(0)] = 3
    """Newest checkpoints to keep, 0 for all."""
    checkpoint_gzip: int = 0
    """Compression level of checkpoints, 0 (none) to 9."""
    checkpoint_parallel: bool = False
    """Write each checkpoint from all ranks at once, while training waits. Needs an h5py built with parallel HDF5."""
    save_signal: Literal["USR1", "USR2", "URG", "XCPU"] = "USR1"
    """Signal that saves and stops the run after the next step, with exit status 85, as SIGTERM, SIGINT and SIGHUP do.
    Batch systems send it before their time limit (sbatch --signal=USR1@120).

    USR1: SIGUSR1
    USR2: SIGUSR2
    URG: SIGURG
    XCPU: SIGXCPU
    """
