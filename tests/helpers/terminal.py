"""Programs on a pseudo-terminal of their own, as a person sees them, whose keys can be pressed."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

# What makes the terminal that of the session, so that its keys send signals.
TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
CTRL_C = b"\x03"
# Variables by which a launcher makes itself known.
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "SLURM_")


def on_terminal(words, cwd, *, keys=(), columns=80, timeout=90, **environ):
    """The status of a command, and the bytes that it and its children print on a terminal.

    keys: (text, what is typed so many seconds after that text is seen, behind the one before, seconds) in turn.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    known = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS) and k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-c", TAKE, *map(str, words)]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env={**known, **environ}, start_new_session=True
    )
    os.close(theirs)
    found, at, waiting, end = b"", 0, list(keys), time.monotonic() + timeout
    try:
        while select.select([ours], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                found += os.read(ours, 65536)
            except OSError:
                break
            while waiting and (seen := re.search(waiting[0][0], found[at:])):
                at += seen.end()
                _, typed, seconds = waiting.pop(0)
                time.sleep(seconds)
                os.write(ours, typed)
        return process.wait(max(1.0, end - time.monotonic())), found
    finally:
        process.kill()
        os.close(ours)


def lines(raw):
    """What lines a terminal was given, without escape codes, and without what was written over by the next one."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
