"""Measure how long a checkpoint pauses training, and how fast it is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from psmpi.comm.control import Control
from psmpi.errors import UserError
from psmpi.output import tell

# Classes and layers of the network, whose weights are equal private blocks, one for each class, as in psl.
CLASSES, LAYERS = 10, 8


def checkpoint(
    megabytes: int = 1000,
    classes: int = 0,
    repeats: int = 5,
    placement: str = "master",
    folder: str = "",
    gzip: int = 0,
    json: bool = False,
) -> int:
    """Measure the speed of checkpoints, and the pause that one puts into training.

    Adam's arithmetic on the shards stands for the training between two checkpoints. The pause is compared with a copy
    of the same bytes in memory. The time until a checkpoint is on disk is compared with that of a plain file of the
    same bytes in the same folder, written and synced just before. Runs on one process or under mpirun.

    Args:
        megabytes: Size of the weights and Adam's two moments together, in MB.
        classes: Classes of a single dense layer, whose features follow from --megabytes. 0: ten classes with private
            layers.
        repeats: Checkpoints to write, after one to warm up.
        placement: Placement of the weights: master or owner.
        folder: Folder for the checkpoints. If not given: the system's folder for temporary files.
        gzip: Compression level, 0 to 9.
        json: Print JSON.
    """
    from psmpi.comm.world import start

    if megabytes < 1 or repeats < 1 or classes < 0 or placement not in ("master", "owner"):
        raise UserError(
            "checkpoint: expected --megabytes and --repeats from 1 up, --classes from 0 up, and --placement master or "
            "owner"
        )
    world = start()
    place = ""
    if world.rank == 0:
        try:
            place = tempfile.mkdtemp(prefix="psmpi-bench-", dir=folder or None)
        except OSError as error:
            raise UserError(f"--folder {folder}: {error.strerror}") from None
    try:
        figures = _measure(world, Path(place), megabytes, classes, repeats, placement, gzip)
    finally:
        if place:
            shutil.rmtree(place, ignore_errors=True)
    if world.rank == 0:
        _show(figures, json)
    return 0


def _measure(
    world: Any, place: Path, megabytes: int, classes: int, repeats: int, placement: str, gzip: int
) -> dict[str, float | int | str]:
    from psmpi.checkpoint import Contents, Progress, Writer
    from psmpi.layout import assign_roles

    network = _network(megabytes, classes)
    layout = network.layout()
    shards = assign_roles(layout, world.size, placement=placement, colocate=world.size == 1).shards
    size = shards[world.rank].size
    rng = np.random.default_rng(world.rank)
    vectors = {name: rng.random(size, np.float32) for name in ("weights", "m", "v")}
    control = Control(world)
    writer = Writer(control, Contents("", network.in_shape, layout), shards, place, keep=1, gzip=gzip)

    copies = []
    for _ in range(3):
        start = time.perf_counter()
        for vector in vectors.values():
            vector.copy()
        copies.append(time.perf_counter() - start)
    undisturbed, beside, pauses, whole, plain = [], [], [], [], []
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(repeats + 1):
        undisturbed += [_step(control, vectors) for _ in range(5)]
        plain.append(_plain_file(place, 3 * 4 * layout.size) if world.rank == 0 else 0.0)
        control.wait_for_all()
        before, start = writer.pause, time.perf_counter()
        writer.write(vectors, {}, Progress(step=number + 1))
        pause, busy = writer.pause - before, []
        while True:
            busy.append(_step(control, vectors))
            # Only rank 0 knows whether the checkpoint is written, but all ranks must take the same number of steps.
            if not control.share_flag(world.rank == 0 and writer.busy):
                break
        if number:
            pauses.append(pause)
            whole.append(time.perf_counter() - start)
            beside += busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written_by = 0.0
    if world.rank == 0:
        assert writer.spool.process is not None
        written_by = _peak(writer.spool.process.pid)
        writer.close()
        for trouble in writer.troubles():
            raise UserError(trouble)
    return {
        "megabytes": 3 * 4 * layout.size / 1e6,
        "ranks": world.size,
        "placement": placement,
        "copy_seconds": median(copies),
        "pause_seconds": median(pauses),
        "pause_least": min(pauses),
        "pause_most": max(pauses),
        "written_seconds": median(whole),
        "plain_seconds": median(plain[1:]),
        "speed": median(b / a for a, b in zip(whole, plain[1:], strict=True)),
        "step_seconds": median(undisturbed),
        "step_beside_seconds": median(beside),
        "extra_megabytes": (peak - held) * 1024 / 1e6,
        "writer_megabytes": written_by,
    }


def _network(megabytes: int, classes: int) -> Any:
    """A network of `megabytes` MB, with Adam's two moments: one layer of `classes` classes, or private layers for 0."""
    from psmpi.nn.network import build

    if classes:
        features = max(1, round(megabytes * 1e6 / (3 * 4 * classes)) - 1)
        return build("bench", (features,), [{"type": "dense", "units": classes}], classes)
    width = max(1, round((megabytes * 1e6 / (3 * 4 * LAYERS * CLASSES)) ** 0.5))
    kind = {"type": "separable_dense", "groups": CLASSES}
    tables = [*({**kind, "units": CLASSES * width} for _ in range(LAYERS)), {**kind, "units": CLASSES}]
    return build("bench", (CLASSES * width,), tables, CLASSES)


def _plain_file(place: Path, nbytes: int) -> float:
    """Seconds to write a file of `nbytes` bytes, 4 MiB at a time, and to sync it."""
    start, path = time.perf_counter(), place / "plain"
    block = memoryview(np.random.default_rng(0).bytes(1 << 22))
    with path.open("wb", buffering=0) as file:
        while nbytes:
            nbytes -= file.write(block[:nbytes])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def _peak(process: int) -> float:
    """The largest memory in MB that another process has held, from Linux's /proc; 0 without it."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _step(control: Control, vectors: dict[str, np.ndarray]) -> float:
    """Seconds of an optimizer step on this rank's shard, in pieces that fit the cache; collective."""
    start = time.perf_counter()
    w, m, v = vectors["weights"], vectors["m"], vectors["v"]
    for a in range(0, len(w), 1 << 16):
        piece = slice(a, a + (1 << 16))
        m[piece] *= np.float32(0.9)
        v[piece] *= np.float32(0.999)
        w[piece] -= np.float32(1e-3) * m[piece]
    control.wait_for_all()
    return time.perf_counter() - start


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        tell(json.dumps(figures))
        return
    pause, copy = figures["pause_seconds"], figures["copy_seconds"]
    ratio = f" (ratio {pause / copy:.1f})" if copy > 1e-3 else ""
    tell(
        f"checkpoint of {figures['megabytes']:.0f} MB, {figures['ranks']} rank(s), placement {figures['placement']}\n"
        f"training waits     {pause:.2f} s ({figures['pause_least']:.2f} to {figures['pause_most']:.2f})\n"
        f"copy in memory     {copy:.2f} s on rank 0{ratio}\n"
        f"written after      {figures['written_seconds']:.2f} s; a plain file of the same bytes, synced, takes "
        f"{figures['plain_seconds']:.2f} s: {100 * figures['speed']:.0f} % of its speed\n"
        f"optimizer step     {1e3 * figures['step_seconds']:.0f} ms alone, "
        f"{1e3 * figures['step_beside_seconds']:.0f} ms beside the writing\n"
        f"extra memory       {figures['extra_megabytes']:.1f} MB on rank 0, "
        f"{figures['writer_megabytes']:.0f} MB in the process that writes"
    )
