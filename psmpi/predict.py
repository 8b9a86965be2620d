"""Predictions, and how good they are, from a checkpoint: `python -m psmpi.predict`, also under mpirun."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from psmpi.errors import counted
from psmpi.output import Screen, complain, tell

# Classes whose confusion is a table; of more it is a list of pairs, of which so many are shown.
TABLE, SHOWN = 40, 10


@dataclass(frozen=True)
class Options:
    """Predict the classes of a data set's samples, or in a regression their values, from a checkpoint.

    Every rank reads the weights of some classes' subnetworks alone; more ranks than classes share the samples.
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """Checkpoint file, or a run directory for its newest one."""
    dataset: str = ""
    """digits, mnist, cifar10, or an .npz or .h5 file with x and perhaps y; the one of the training if not given."""
    data_dir: str = ""
    """Folder that holds the data set's files; the one of the training if not given."""
    split: Literal["test", "train", "all"] = "test"
    """Which samples; all: every sample x of a file of your own, which then needs no labels."""
    out: str = ""
    """File for predictions and scores, .csv or .npz."""
    calibrate: int = 0
    """Of networks with batch normalization: how many samples of the training split's give the statistics for all
    predictions; 0: those of the predicted samples themselves, about 1,000 at a time, as tests in training do."""
    threads: int = 0
    """Threads a rank; 0: the host's cores over its ranks, at least 1."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error."""
    from psmpi.comm.world import run

    return run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    from psmpi.comm.control import Control
    from psmpi.comm.world import start

    world = start()
    control = Control(world)
    text, status = "", 0
    if world.rank == 0:
        from psmpi.command import parsed

        try:
            text = json.dumps(vars(_settle(parsed(Options, argv, "predict"))))
        except SystemExit as end:
            status = 1 if end.code else 0
    text, status = json.loads(control.share(json.dumps([text, status])))
    if text:
        _predict(world, control, Options(**json.loads(text)))
    return int(status)


def _settle(options: Options) -> Options:
    """Names of files that exist, after a look at the checkpoint whole. UserError where something does not fit."""
    from dataclasses import replace

    from psmpi import checkpoint
    from psmpi.config import from_toml
    from psmpi.data import Identity, differences, identify, open_dataset
    from psmpi.errors import UserError, expanded

    if options.out and Path(options.out).suffix not in (".csv", ".npz"):
        raise UserError(f"--out {options.out}: expected a name that ends in .csv or .npz")
    if options.calibrate < 0 or options.calibrate == 1:
        raise UserError(f"--calibrate {options.calibrate}: expected 0, or a number of samples from 2 up")
    if not 0 <= options.threads <= 1024:
        raise UserError(f"--threads {options.threads}: expected 0 to 1024")
    path = checkpoint.newest(expanded(options.checkpoint, "checkpoint"))
    contents = checkpoint.validate(path)
    trained = from_toml(contents.config, str(path), foreign=True).data
    # A file that has moved has its name.
    moved = options.data_dir and Path(trained.dataset).is_absolute()
    name = Path(trained.dataset).name if moved else trained.dataset
    same = not options.dataset or Path(options.dataset).absolute() == Path(trained.dataset).absolute()
    if contents.data and same:
        found: list[str] = []
        try:
            here = identify(open_dataset(name, options.data_dir or trained.data_dir, trained.split_seed))
            found = differences(Identity.of(contents.data), here)
        except UserError as error:
            if not options.dataset:
                raise
            # All samples of a file need no targets, as those of a training do.
            if options.split == "all":
                print(
                    f"note: {name} cannot be compared with what checkpoint {path} was trained on: {error}",
                    file=sys.stderr,
                )
        changed = f"{name} is not what checkpoint {path} was trained on any more: in the checkpoint {'; '.join(found)}"
        if found and not options.dataset:
            raise UserError(f"{changed}: bring that back, or name the file with --dataset to predict what it holds now")
        if found:
            print(f"note: {changed}", file=sys.stderr)
    return replace(
        options,
        checkpoint=str(path),
        dataset=options.dataset or name,
        data_dir=options.data_dir or trained.data_dir,
    )


def _predict(world: Any, control: Any, options: Options) -> None:
    import numpy as np
    from threadpoolctl import threadpool_limits

    from psmpi import checkpoint
    from psmpi.backend import make_backend
    from psmpi.comm.world import host, local_rank
    from psmpi.config import from_toml
    from psmpi.data import open_split
    from psmpi.errors import UserError
    from psmpi.nn.zoo import make_network
    from psmpi.training.predictor import Predictor, calibrate, calibration_notes, calibration_split

    path = Path(options.checkpoint)
    contents = checkpoint.read_contents(path)
    trained = from_toml(contents.config, str(path), foreign=True)
    model = trained.model
    split = open_split(options.dataset, options.data_dir, options.split, trained.data.split_seed, predicted=True)
    _check_data(world, control, options, contents, split)
    network = make_network(model.model, contents.in_shape, contents.layout.classes, **model.shape)
    if split.shape != contents.in_shape:
        raise UserError(
            f"{options.dataset} has samples of shape {split.shape}, checkpoint {path} was trained on "
            f"{contents.in_shape}: give the data set that fits with --dataset"
        )
    targets = split.targets if split.task == "regression" or split.labels.max(initial=-1) >= 0 else None
    if targets is not None and split.task != contents.task:
        has, learnt = (
            "integers, which are labels" if split.task == "classes" else "floating point numbers, which are values",
            "values" if split.task == "classes" else "classes",
        )
        raise UserError(
            f"{options.dataset} has {has}, and checkpoint {path} predicts {learnt}: give the data set that fits with "
            "--dataset"
        )
    if targets is not None and split.task == "regression" and targets.shape[1] != network.classes:
        raise UserError(
            f"{options.dataset} has {targets.shape[1]} values a sample, checkpoint {path} predicts {network.classes}: "
            "give the data set that fits with --dataset"
        )
    if split.task == "classes" and split.labels.max(initial=-1) >= network.classes:
        raise UserError(
            f"{options.dataset} has the label {split.labels.max()}, checkpoint {path} knows the classes "
            f"0-{network.classes - 1}: give the data set that fits with --dataset"
        )
    if options.calibrate and not network.normalized:
        raise UserError(f"--calibrate: --model {network.name} has no batch normalization; leave the option out")
    if network.normalized and not options.calibrate:
        if split.n < 2:
            raise UserError(
                f"--model {network.name} normalizes over minibatches, and a single sample is none: add --calibrate "
                "10000"
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
    with threadpool_limits(threads):
        # Whatever computed in training: it may not be there.
        ops = make_backend("auto", threads)
        predictor = Predictor(world, control, network, layout, classes, np.dtype(model.dtype), ops)
        checkpoint.load(path, layout, predictor.part, {"weights": predictor.w}, contents.part)
        if options.calibrate:
            stored = Path(trained.data.dataset)
            moved = stored.is_absolute() and not stored.is_file() and stored.name == Path(options.dataset).name
            here = moved or options.dataset == trained.data.dataset
            where = (options.dataset, options.data_dir) if here else ("", "")
            share = (local_rank(world), ranks)
            known = calibration_split(trained.data, *where, contents, path, share)
            for note in calibration_notes(options.calibrate, known.n) if world.rank == 0 else ():
                complain(note)
            calibrate(predictor.model, known, options.calibrate, predictor.dtype)
        scores = predictor.run(split)
    if scores is not None and contents.task == "regression":
        _report_values(options, targets, scores, list(classes))
    elif scores is not None:
        _report(options, split.labels, scores, list(classes), network.classes)


def _check_data(world: Any, control: Any, options: Options, contents: Any, split: Any) -> None:
    """UserError where ranks have other samples than rank 0; a warning where they look as if of another scale."""
    import socket
    from dataclasses import asdict

    from psmpi.comm.world import host, local_rank
    from psmpi.data import Identity, SplitIdentity, identify_split, other_scale, split_differences
    from psmpi.errors import UserError

    # Rank 0 looks at all samples, the ranks of a host at them between them.
    share = (local_rank(world), host(world)[0])
    here = identify_split(split, share if world.rank else (0, 1))
    kind = {"train": "training", "all": "given"}.get(options.split, "test")
    targets = "values" if split.task == "regression" else "labels"
    for rank, text in enumerate(control.collect_texts(json.dumps([socket.gethostname(), asdict(here)]), most=2000)):
        at, theirs = json.loads(text)
        found = split_differences(here, SplitIdentity(**theirs), kind, targets)
        if found:
            raise UserError(
                f"the samples of {options.dataset} on rank {rank}, host {at}, are not those of rank 0: here "
                f"{'; '.join(found)}: give all hosts the same files"
            )
    if world.rank == 0 and contents.data:
        trained = Identity.of(contents.data).train
        if other_scale(trained, here):
            print(
                f"warning: the samples of {options.dataset} have scaled values up to {here.most:.4g} ({here.dtype}), "
                f"those trained on up to {trained.most:.4g} ({trained.dtype}): bring them to one scale",
                file=sys.stderr,
            )


def _report_values(options: Options, targets: Any, values: Any, outputs: list[int]) -> None:
    """Write and print predicted values (n, outputs) beside the targets (n, all outputs), if these are known."""
    import numpy as np

    found: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "dataset": options.dataset,
        "split": options.split,
        "samples": len(values),
        "outputs": outputs,
    }
    columns = {f"value_{k}": values[:, at] for at, k in enumerate(outputs)}
    arrays = {"values": values, "outputs": np.array(outputs)}
    if targets is not None:
        wanted = targets[:, outputs]
        found["rmse"] = float(np.sqrt(np.mean((values - wanted) ** 2)))
        columns = {f"target_{k}": wanted[:, at] for at, k in enumerate(outputs)} | columns
        arrays["targets"] = wanted
    if options.out:
        rows = ([k, *(repr(float(v)) for v in row)] for k, row in enumerate(zip(*columns.values(), strict=True)))
        _save(Path(options.out), arrays, ["sample", *columns], rows)
    if options.json:
        tell(json.dumps(found))
        return
    tell(f"{found['checkpoint']}: {counted(found['samples'], 'sample')} of {found['dataset']} ({found['split']})")
    tell(f"RMSE {found['rmse']:.5g}" if "rmse" in found else "values predicted; no RMSE (it needs targets y)")


def _report(options: Options, labels: Any, scores: Any, classes: list[int], known: int) -> None:
    import numpy as np

    predicted = np.array(classes)[scores.argmax(axis=1)] if scores.size else np.zeros(len(labels), int)
    if options.out:
        _write(Path(options.out), labels, predicted, scores, classes)
    found: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "dataset": options.dataset,
        "split": options.split,
        "samples": len(labels),
        "classes": classes,
    }
    # A part of the classes scores, and cannot choose among all.
    if len(labels) and labels.min() >= 0 and len(classes) == known:
        found["accuracy"] = float(np.count_nonzero(predicted == labels) / len(labels))
        if known <= TABLE:
            confusion = np.zeros((known, known), int)
            np.add.at(confusion, (labels, predicted), 1)
            found["confusion"] = confusion.tolist()
        else:
            found["confused"] = _confused(labels, predicted)
    if options.json:
        tell(json.dumps(found))
    else:
        _show(found)


def _confused(labels: Any, predicted: Any) -> list[list[int]]:
    """[label, prediction, samples] of what is confused, the most frequent first."""
    import numpy as np

    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    found: list[list[int]] = np.concatenate([pairs, counts[None]])[:, order].T.tolist()
    return found


def _write(path: Path, labels: Any, predicted: Any, scores: Any, classes: list[int]) -> None:
    import numpy as np

    arrays = {"predicted": predicted, "labels": labels, "scores": scores, "classes": np.array(classes)}
    rows = (
        [k, label if label >= 0 else "", choice, *(repr(float(v)) for v in row)]
        for k, (label, choice, row) in enumerate(zip(labels, predicted, scores, strict=True))
    )
    _save(path, arrays, ["sample", "label", "predicted", *(f"score_{c}" for c in classes)], rows)


def _save(path: Path, arrays: dict[str, Any], titles: list[str], rows: Iterable[list[Any]]) -> None:
    """Write arrays to an .npz file, or a table to a .csv file."""
    import numpy as np

    from psmpi.errors import UserError

    try:
        if path.suffix == ".npz":
            np.savez(path, **arrays)
            return
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(titles)
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; give the path of a file that can be written") from None


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    tell(f"{found['checkpoint']}: {counted(found['samples'], 'sample')} of {found['dataset']} ({found['split']})")
    if "accuracy" not in found:
        which = f"classes {' '.join(map(str, found['classes']))}"
        tell(f"scores of {which}; no accuracy (it needs labels, and the scores of all classes)")
        return
    tell(f"accuracy {100 * found['accuracy']:.2f} %")
    if "confused" in found:
        several, shown = found["confused"], found["confused"][:SHOWN]
        tell(f"{counted(len(several), 'pair')} of classes confused" + (", most often:" if shown else ""))
        for label, choice, count in shown:
            tell(f"  label {label} taken for {choice}: {counted(count, 'sample')}")
        return
    table = Table(title="confusion: rows are labels, columns predictions", title_justify="left")
    for name in ("label", *map(str, found["classes"]), "right"):
        table.add_column(name, justify="right")
    for label, row in enumerate(found["confusion"]):
        share = f"{100 * row[label] / sum(row):.1f} %" if sum(row) else "-"
        table.add_row(str(label), *(str(n) if n else "." for n in row), share)
    Screen().print(table)


if __name__ == "__main__":
    sys.exit(main())
