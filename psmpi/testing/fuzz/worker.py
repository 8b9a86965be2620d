"""The process that opens file after file: `python -m psmpi.testing.fuzz.worker KIND SEED FIRST COUNT [FOLDER]`.

The process prints a line of JSON before and after each file. A file may crash it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

from psmpi.errors import UserError
from psmpi.files import examiner
from psmpi.testing.fuzz import looking
from psmpi.testing.fuzz.kinds import KINDS

# Seconds of wall time after which SIGALRM ends the process: opening a file may block for ever.
WAIT = 60
# Contents of a file that hostile HDF5 files link to, and that psmpi must not read.
PRIVATE = b"nobody else is to read this. " * 1000


def main(kind: str, seed: int, first: int, count: int, keep: str = "") -> None:
    """Make and open the files `first` to `first + count - 1` of a kind. A file depends only on (seed, kind, number).

    keep: a folder to leave the files in; empty: delete each file after its use.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Hide warnings, such as those about numbers that overflow a type.
    warnings.simplefilter("ignore")

    def say(**what: object) -> None:
        print(json.dumps(what), file=out, flush=True)

    looking.report = lambda stage: say(stage=stage)
    vars(examiner)["run_check"] = looking.look
    base = Path(keep or tempfile.mkdtemp(prefix="psmpi-fuzz-"))
    base.mkdir(parents=True, exist_ok=True)
    (base / "private.bin").write_bytes(PRIVATE)
    try:
        for number in range(first, first + count):
            folder = base / f"{kind}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            key = [seed, *kind.encode(), number]
            path = KINDS[kind].make(np.random.default_rng(key), folder)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            say(number=number, size=sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()))
            start, outcome, text = time.process_time(), "sound", ""
            signal.alarm(WAIT)
            try:
                with examiner.examined("here"):
                    KINDS[kind].use(path)
            except UserError as error:
                outcome, text = "refused", str(error)
            except BaseException:
                outcome, text = "traceback", "\n".join(traceback.format_exc().splitlines()[-12:])
            signal.alarm(0)
            seconds = time.process_time() - start
            grown = 1024 * max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            say(done=number, outcome=outcome, text=text[-2000:], seconds=seconds, grown=grown)
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not keep:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:5]]
    main(sys.argv[1], numbers[0], numbers[1], numbers[2], *sys.argv[5:])
