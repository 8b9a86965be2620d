"""Short messages between the watches of ranks, beside MPI: datagrams, or files where no datagram arrives.

Each message ends in a code made with the token of the job; messages with another code are dropped unread.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from psmpi.files.whole import written

MAGIC = b"psw1"
HEAD = struct.Struct("!4sBII")
CODE = 16
# Kinds of messages: a rank looks for a monitor, and is answered; it tells what it does, and that it leaves; a monitor
# asks for a flight, for stacks, and for the end, with the answers to the first two.
HELLO, ANSWER, BEAT, BYE, ASK, FLIGHT, DUMP, DUMPED, END = range(1, 10)
# Bytes of the longest datagram.
LONGEST = 60_000

Address = tuple[str, int]


class Message(NamedTuple):
    """A message from one rank to another."""

    kind: int
    sender: int
    to: int
    body: bytes


def pack(message: Message, token: bytes) -> bytes:
    """The bytes of a message."""
    data = HEAD.pack(MAGIC, message.kind, message.sender, message.to) + message.body
    return data + hmac.digest(token, data, "sha256")[:CODE]


def unpack(data: bytes, token: bytes, size: int) -> Message | None:
    """Parse a message; None for bytes that are no message from a rank of this job of `size` ranks."""
    if not HEAD.size + CODE <= len(data) <= LONGEST + HEAD.size + CODE:
        return None
    content, code = data[:-CODE], data[-CODE:]
    if not hmac.compare_digest(code, hmac.digest(token, content, "sha256")[:CODE]):
        return None
    magic, kind, sender, to = HEAD.unpack_from(content)
    if magic != MAGIC or not HELLO <= kind <= END or sender >= size or to >= size:
        return None
    return Message(kind, sender, to, content[HEAD.size :])


class Datagrams:
    """A UDP socket that neither blocks nor raises. local: for messages within this host."""

    def __init__(self, local: bool = False):
        self.socket: socket.socket | None = None
        with contextlib.suppress(OSError):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                made.setblocking(False)
                made.bind(("127.0.0.1" if local else "", 0))
            except OSError:
                made.close()
                raise
            self.socket = made
        self.local = local

    @property
    def addresses(self) -> list[Address]:
        """Addresses at which other ranks may reach this socket."""
        if self.socket is None:
            return []
        port = int(self.socket.getsockname()[1])
        return [(host, port) for host in (["127.0.0.1"] if self.local else own_addresses())]

    def send(self, data: bytes, to: Address) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.sendto(data, to)

    def receive(self, most: int = 1000) -> Iterator[tuple[bytes, Address]]:
        """Messages that have arrived, at most `most`."""
        for _ in range(most if self.socket is not None else 0):
            try:
                assert self.socket is not None
                data, address = self.socket.recvfrom(LONGEST + 4096)
            except BlockingIOError:
                return
            except OSError:
                # Some systems tell of an earlier datagram here that nobody took.
                continue
            yield data, (str(address[0]), int(address[1]))

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


class Courier:
    """Messages as files in a shared folder: the newest of each kind from each rank to each other.

    A thread reads and writes them, so that a folder which does not answer blocks nothing else. clears: whether this
    rank makes the folder, and removes it at the end.
    """

    def __init__(self, folder: Path, rank: int, interval: float, clears: bool = False):
        self.folder, self.rank, self.interval, self.clears = folder, rank, interval, clears
        self.leaving: dict[str, bytes] = {}
        self.come: deque[bytes] = deque(maxlen=10_000)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"files of rank {rank}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def send(self, data: bytes, message: Message) -> None:
        """Queue a message for writing, in place of an earlier one of its kind."""
        self.leaving[f"{message.to}-{message.sender}-{message.kind}"] = data

    def receive(self) -> Iterator[bytes]:
        """Messages that have arrived; each is returned once."""
        while self.come:
            yield self.come.popleft()

    def close(self, patience: float = 2.0) -> None:
        """Write queued messages and remove unread ones, if the folder answers in time."""
        self.stopping.set()
        self.thread.join(patience)

    def _run(self) -> None:
        while not self.stopping.wait(self.interval / 2):
            self.turn()
        self.turn()
        # Others may write one more file meanwhile.
        for _ in range(10 if self.clears and not self.folder.is_symlink() else 0):
            with contextlib.suppress(OSError):
                for path in self.folder.iterdir():
                    path.unlink(missing_ok=True)
                self.folder.rmdir()
                break

    def turn(self) -> None:
        """Write and read once; symbolic links are not followed."""
        with contextlib.suppress(OSError):
            if self.folder.is_symlink():
                return
            if self.clears and not self.stopping.is_set():
                self.folder.mkdir(exist_ok=True)
        for name in list(self.leaving):
            data, path = self.leaving.pop(name), self.folder / name
            with contextlib.suppress(OSError), written(path, flushed=False) as file:
                file.write(data)
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(f"{self.rank}-*-*")):
                with path.open("rb") as file:
                    data = file.read(LONGEST + 4096)
                path.unlink()
                self.come.append(data)


def own_addresses() -> list[str]:
    """IPv4 addresses of this host: of the loopback, the host name and the interfaces."""
    addresses = {"127.0.0.1": None}
    with contextlib.suppress(OSError):
        for *_, address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_DGRAM):
            addresses.setdefault(str(address[0]))
    with contextlib.suppress(OSError, ImportError, AttributeError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            for _, name in socket.if_nameindex():
                # SIOCGIFADDR of Linux; an interface without an address is an OSError.
                with contextlib.suppress(OSError):
                    answer = fcntl.ioctl(one.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
                    addresses.setdefault(socket.inet_ntoa(answer[20:24]))
    return list(addresses)
