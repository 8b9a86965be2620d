"""Run programs on a pseudo-terminal, and type keys."""

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

# A program that makes the terminal its controlling terminal, so that keys send signals, and then runs its arguments.
TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
CTRL_C = b"\x03"
# Prefixes of the environment variables that launchers of MPI set.
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "SLURM_")


def on_terminal(words, cwd, *, keys=(), columns=80, timeout=90, **environ):
    """Run a command on a terminal; return its status, and the bytes that it and its children print.

    keys: a sequence of (text, keys, seconds). `keys` are typed `seconds` seconds after the output matches the regular
    expression `text`, from the end of the previous entry's match on.
    """
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS) and k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-c", TAKE, *map(str, words)]
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=cwd,
        env={**variables, **environ},
        start_new_session=True,
    )
    os.close(terminal)
    output, at, waiting, end = b"", 0, list(keys), time.monotonic() + timeout
    try:
        while select.select([master], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                output += os.read(master, 65536)
            except OSError:
                break
            while waiting and (match := re.search(waiting[0][0], output[at:])):
                at += match.end()
                _, typed, seconds = waiting.pop(0)
                time.sleep(seconds)
                os.write(master, typed)
        return process.wait(max(1.0, end - time.monotonic())), output
    finally:
        process.kill()
        os.close(master)


def lines(raw):
    """The non-empty lines of terminal output, without escape codes; a carriage return also ends a line."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
