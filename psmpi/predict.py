"""Predictions from a checkpoint, with their scores: `python -m psmpi.predict`, also under mpirun.

With --prompt the network continues a text instead, on one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from psmpi.output import complain, printable


@dataclass(frozen=True)
class Options:
    """Predict classes, or the values of a regression, for the samples of a data set from a checkpoint.

    Every rank reads the weights of some classes' subnetworks only. If there are more ranks than classes, the ranks
    share the samples. With --prompt and a network that was trained on a text, print the prompt and its continuation, on
    one process.
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """Checkpoint file, or a run directory for its newest one."""
    dataset: str = ""
    """Data set, or a file, as in psmpi train; labels are optional. A text needs characters that were trained on. If not
    given: that of the training."""
    data_dir: str = ""
    """Folder of the data set's files. If not given: that of the training."""
    label: str = ""
    """Column of a table's labels, by name, or by number from 1. If not given: that of the training."""
    layout: Literal["", "nchw", "nhwc"] = ""
    """Axes of images in a file of your own. If not given: those of the training.

    nchw: samples, channels, rows, columns
    nhwc: samples, rows, columns, channels
    """
    allow_external: bool = False
    """Let an HDF5 file refer to arrays in other files. Use it for files of your own only."""
    split: Literal["test", "train", "validation", "all"] = "test"
    """Samples to predict.

    test: the test samples
    train: the training samples
    validation: those that --validation of the training held out
    all: every sample x of a file of your own, which needs no labels
    """
    out: str = ""
    """File for predictions and scores: .csv or .npz."""
    calibrate: int = 0
    """Samples of the training split that give the statistics of batch normalization for all predictions. 0: those of
    the predicted samples, about 1,000 at a time, as in the tests of a training."""
    prompt: str = ""
    """Text to continue, of characters that were trained on."""
    characters: int = 200
    """Characters to add to the prompt."""
    temperature: float = 1.0
    """Divisor of the scores before a character is drawn from their softmax. 0: always the most probable character."""
    seed: int = 0
    """Seed of the drawn characters."""
    threads: int = 0
    """Threads of each rank; 0: cores / ranks of the host, at least 1."""
    json: bool = False
    """Print JSON in place of tables."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error."""
    from psmpi.comm.world import run
    from psmpi.command import answer_help, parsed
    from psmpi.config.help import wants_help

    words = sys.argv[1:] if argv is None else argv
    if wants_help(words):
        return answer_help(lambda: parsed(Options, words, "predict"))
    return run(lambda: _main(words))


def _main(argv: list[str]) -> int:
    from psmpi.comm.control import Control
    from psmpi.comm.world import start

    world = start()
    control = Control(world)
    text, status = "", 0
    if world.rank == 0:
        from psmpi.command import parsed
        from psmpi.config import given_names

        try:
            options = parsed(Options, argv, "predict")
            option_names = given_names(argv, file=False)
            continues = "prompt" in option_names
            _check_options(options, option_names)
            text = json.dumps(vars(_settle_prompt(options, world.size) if continues else _settle(options)))
        except SystemExit as end:
            status = 1 if end.code else 0
    text, status = json.loads(control.share(json.dumps([text, status])))
    if text:
        options = Options(**json.loads(text))
        if options.prompt:
            _continue(options)
        else:
            _predict(world, control, options)
    return int(status)


# Options that apply only to predictions of samples, and only to the continuation of a text.
OF_SAMPLES = ("allow_external", "dataset", "data_dir", "label", "layout", "split", "out", "calibrate", "json")
OF_TEXT = ("characters", "temperature", "seed")


def _check_options(options: Options, option_names: Collection[str]) -> None:
    """UserError for a value out of range, and for one of the given `option_names` that does not apply."""
    from psmpi.config import option
    from psmpi.errors import UserError

    if not 0 <= options.threads <= 1024:
        raise UserError(f"--threads {options.threads}: expected 0 to 1024")
    if "prompt" not in option_names:
        for name in OF_TEXT:
            if name in option_names:
                raise UserError(
                    f"{option(name)} applies to the continuation of a text: add --prompt TEXT, or leave it out"
                )
        return
    for name in OF_SAMPLES:
        if name in option_names:
            raise UserError(
                f"{option(name)} applies to predictions of samples, and --prompt continues a text: leave out one of "
                "them"
            )
    if not options.prompt:
        raise UserError("--prompt is empty: give one character or more for the network to continue")
    if options.characters < 1:
        raise UserError(f"--characters {options.characters}: expected a whole number from 1 up")
    if not 0 <= options.temperature < inf:
        raise UserError(f"--temperature {options.temperature}: expected 0, or a finite number above it")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected a whole number from 0 up")


def _settle_prompt(options: Options, ranks: int) -> Options:
    """Check the checkpoint and the prompt; return the options with the checkpoint's path.

    UserError if the checkpoint is damaged or its network cannot continue the prompt.
    """
    from dataclasses import replace

    from psmpi import checkpoint
    from psmpi.errors import UserError, expanded
    from psmpi.training.continuation import check_text

    if ranks > 1:
        raise UserError(f"--prompt continues a text on one process, and there are {ranks} ranks: leave mpirun out")
    path = checkpoint.newest(expanded(options.checkpoint, "checkpoint"))
    check_text(checkpoint.validate(path), path, options.prompt)
    return replace(options, checkpoint=str(path))


def _continue(options: Options) -> None:
    """Print the prompt and the characters that the network adds, and nothing else."""
    from itertools import islice

    from threadpoolctl import threadpool_limits

    from psmpi import checkpoint
    from psmpi.backend import make_backend
    from psmpi.output import Stream
    from psmpi.training.continuation import go_on, load_model

    path, stream = Path(options.checkpoint), Stream(sys.stdout)
    contents = checkpoint.read_contents(path)
    # The forward pass of one sample has no work for more threads.
    threads = options.threads or 1
    with threadpool_limits(threads):
        model = load_model(path, contents, make_backend("auto", threads), len(options.prompt) + options.characters)
        stream.write(options.prompt)
        following = go_on(model, contents.characters, options.prompt, options.temperature, options.seed)
        for character in islice(following, options.characters):
            stream.write(printable(character))
            stream.flush()
        stream.write("\n")
        stream.flush()


def _settle(options: Options) -> Options:
    """Check the checkpoint and the data set; return the options with the checkpoint's path and the data set's place.

    UserError if the checkpoint is damaged, or if the data set of the training has changed and --dataset is not given.
    """
    from dataclasses import replace

    from psmpi import checkpoint
    from psmpi.config import from_toml
    from psmpi.data import Identity, differences, identify, open_dataset
    from psmpi.errors import UserError, expanded

    if options.out and Path(options.out).suffix not in (".csv", ".npz"):
        raise UserError(f"--out {options.out}: expected a name that ends in .csv or .npz")
    if options.calibrate < 0 or options.calibrate == 1:
        raise UserError(f"--calibrate {options.calibrate}: expected 0, or a number of samples from 2 up")
    path = checkpoint.newest(expanded(options.checkpoint, "checkpoint"))
    contents = checkpoint.validate(path)
    trained = from_toml(contents.config, str(path), foreign=True).data
    # With --data-dir the file of the training may have moved: look for its name there.
    moved = options.data_dir and Path(trained.dataset).is_absolute()
    name, data_dir = Path(trained.dataset).name if moved else trained.dataset, options.data_dir or trained.data_dir
    same = not options.dataset or Path(options.dataset).absolute() == Path(trained.dataset).absolute()
    if contents.data and same:
        changes: list[str] = []
        try:
            own = replace(trained, dataset=name, data_dir=data_dir, allow_external=options.allow_external)
            present = identify(open_dataset(*own.source, names=contents.called).for_training())
            changes = differences(Identity.of(contents.data), present)
        except UserError as error:
            if not options.dataset:
                raise
            # --split all needs no targets in the file, which a training's data set must have.
            if options.split == "all":
                complain(f"note: {name} cannot be compared with what checkpoint {path} was trained on: {error}")
        changed = (
            f"{name} is not what checkpoint {path} was trained on any more: in the checkpoint {'; '.join(changes)}"
        )
        if changes and not options.dataset:
            raise UserError(f"{changed}: bring that back, or name the file with --dataset to predict what it holds now")
        if changes:
            complain(f"note: {changed}")
    return replace(
        options,
        checkpoint=str(path),
        dataset=options.dataset or name,
        data_dir=data_dir,
    )


def _predict(world: Any, control: Any, options: Options) -> None:
    from contextlib import nullcontext
    from dataclasses import replace
    from math import prod

    import numpy as np
    from threadpoolctl import threadpool_limits

    from psmpi import checkpoint
    from psmpi.backend import make_backend
    from psmpi.checkpoint.network import network_in
    from psmpi.comm.world import host, local_rank
    from psmpi.config import from_toml
    from psmpi.data import Identity, open_split
    from psmpi.data.table import is_table
    from psmpi.errors import UserError
    from psmpi.files import examiner
    from psmpi.files.examiner import examined
    from psmpi.nn.metric import TOP
    from psmpi.nn.sequences import stretch
    from psmpi.training.predictions import Choices, Values, room
    from psmpi.training.predictor import Predictor, calibrate, calibration_notes, calibration_split, known_targets

    path = Path(options.checkpoint)
    contents = checkpoint.read_contents(path)
    trained = from_toml(contents.config, str(path), foreign=True)
    model = trained.model
    numbering = Identity.of(contents.data).numbering if contents.data else None
    # The training's column of labels applies to tables only.
    label = options.label or (trained.data.label if is_table(options.dataset) else "")
    data = replace(trained.data, label=label, layout=options.layout or trained.data.layout)
    data = replace(data, allow_external=options.allow_external)
    with examined("not") if local_rank(world) else nullcontext():
        split = open_split(
            options.dataset,
            options.data_dir,
            options.split,
            *data.source[2:],
            characters=contents.characters,
            predicted=True,
            numbering=numbering,
            names=contents.called,
            features=prod(contents.in_shape),
            columns=contents.columns,
        )
        other = Path(options.dataset).name != Path(trained.data.dataset).name
        if world.rank == 0 and options.split == "test" and other:
            _note_left_out(options, data.source[2:], split.n, contents)
    examiner.close()
    _check_data(world, control, options, contents, split)
    network = network_in(contents, model)
    if split.steps and split.shape != contents.in_shape and split.shape[0] == contents.in_shape[0]:
        network = stretch(network, split.steps) or network
    if split.shape != network.in_shape:
        raise UserError(
            f"{options.dataset} has samples of shape {split.shape}, checkpoint {path} was trained on "
            f"{contents.in_shape}: give the data set that fits with --dataset"
        )
    targets = known_targets(split, contents, network.classes, options.dataset, path)
    if options.calibrate and not network.normalized:
        raise UserError(f"--calibrate: --model {network.name} has no batch normalization; leave the option out")
    if network.normalized and not options.calibrate:
        if split.n < 2:
            raise UserError(
                f"--model {network.name} normalizes over minibatches, and a single sample is not enough: add "
                "--calibrate 10000"
            )
        if world.rank == 0:
            complain(
                "note: batch normalization takes the statistics of these very samples: with few of them, or of few "
                "classes, add --calibrate 10000"
            )
    layout = network.layout()
    classes = range(network.classes) if contents.part is None else contents.part
    ranks, cores = host(world)
    threads = options.threads or max(1, cores // ranks)
    first = world.rank == 0
    with threadpool_limits(threads), room(options.out if first else "") as file:
        # The backend of the training may not be available here.
        ops = make_backend("auto", threads)
        values = contents.task == "regression"
        # The tables show the TOP largest scores; a file gets all of them.
        top = 0 if values or options.out else TOP
        predictor = Predictor(world, control, network, layout, classes, np.dtype(model.dtype), ops, top)
        checkpoint.load(path, layout, predictor.part, {"weights": predictor.w}, contents.part)
        if options.calibrate:
            stored = Path(trained.data.dataset)
            moved = stored.is_absolute() and not stored.is_file() and stored.name == Path(options.dataset).name
            same_set = moved or options.dataset == trained.data.dataset
            where = (options.dataset, options.data_dir) if same_set else ("", "")
            share = (local_rank(world), ranks)
            data = replace(trained.data, allow_external=options.allow_external)
            samples = calibration_split(data, *where, contents, path, share)
            for note in calibration_notes(options.calibrate, samples.n) if world.rank == 0 else ():
                complain(note)
            calibrate(predictor.model, samples, options.calibrate, predictor.dtype)
        rest = (network.classes, split.n, predictor.dtype, file, network.steps, contents.characters, contents.called)
        of = (options, targets, classes, *rest)
        collector = (Values if values else Choices)(*of) if first else None
        predictor.run(split, collector.take if collector is not None else None)
        if collector is not None:
            collector.report()


def _note_left_out(options: Options, source: Any, predicted: int, contents: Any) -> None:
    """Print a note if a training would split these samples: only those that it would hold out are predicted."""
    from contextlib import suppress

    from psmpi.data import open_dataset
    from psmpi.errors import UserError

    with suppress(UserError):
        trained_names = {"characters": contents.characters, "names": contents.called}
        dataset = open_dataset(options.dataset, options.data_dir, *source, **trained_names)
        if dataset.held_out:
            count = dataset.train.n + dataset.test.n
            complain(
                f"note: these are the {predicted:,} of the {count:,} samples of {options.dataset} that a training of "
                "them would hold out for testing: --split all predicts all of them"
            )


def _check_data(world: Any, control: Any, options: Options, contents: Any, split: Any) -> None:
    """Raise UserError if a rank has other samples than rank 0; warn if their scale differs from the training's."""
    import socket
    from dataclasses import asdict

    from psmpi.comm.world import host, local_rank
    from psmpi.data import Identity, SplitIdentity, identify_split, other_scale, split_differences
    from psmpi.errors import UserError

    # Rank 0 reads all samples; the other ranks of a host share them.
    share = (local_rank(world), host(world)[0])
    identity = identify_split(split, share if world.rank else (0, 1))
    kind = {"train": "training", "validation": "validation", "all": "given"}.get(options.split, "test")
    targets = "values" if split.task == "regression" else "labels"
    for rank, text in enumerate(control.collect_texts(json.dumps([socket.gethostname(), asdict(identity)]), most=2000)):
        at, other_identity = json.loads(text)
        differing = split_differences(identity, SplitIdentity(**other_identity), kind, targets)
        if differing:
            raise UserError(
                f"the samples of {options.dataset} on rank {rank}, host {at}, are not those of rank 0: here "
                f"{'; '.join(differing)}: give all hosts the same files"
            )
    if world.rank == 0 and contents.data:
        trained = Identity.of(contents.data).train
        if other_scale(trained, identity):
            complain(
                f"warning: the samples of {options.dataset} have scaled values up to {identity.most:.4g} "
                f"({identity.dtype}), those of the training up to {trained.most:.4g} ({trained.dtype}): bring them to "
                "one scale"
            )


if __name__ == "__main__":
    sys.exit(main())
