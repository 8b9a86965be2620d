"""Links with a delay: TUN devices, and a thread that carries packets between them (Linux, root).

Many kernels have no qdisc that delays packets (netem), but all have TUN devices.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import struct
import threading
import time
from contextlib import suppress

from psmpi.errors import UserError

DEVICES = "/dev/net/tun"
# Constants of linux/if_tun.h: the request that creates a device on a descriptor, and flags for IP packets without an
# extra header.
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
LARGEST = 65536


class Carrier:
    """Carry IPv4 packets between TUN devices, with a rate and a delay.

    Each device sends and receives at most `rate` bytes a second, and packets arrive `delay` seconds later. Packets wait
    in the device of their sender until the link is free.
    """

    def __init__(self, rate: float, delay: float):
        self.rate, self.delay = rate, delay
        self.devices: list[int] = []
        self.by_address: dict[bytes, int] = {}
        self.ending = False
        self.thread = threading.Thread(target=self._carry, daemon=True)

    def add(self, device: str, address: str) -> None:
        """Create a device that receives the packets for an IPv4 address; the caller moves it into a namespace.

        Raise UserError if the system has no TUN devices.
        """
        try:
            made = os.open(DEVICES, os.O_RDWR | os.O_NONBLOCK)
            self.devices.append(made)
            fcntl.ioctl(made, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
        except OSError as error:
            raise UserError(f"{DEVICES}: {error.strerror}: a delay needs TUN devices; use --delay-ms 0") from None
        self.by_address[bytes(map(int, address.split(".")))] = made

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Stop the thread and remove the devices."""
        self.ending = True
        if self.thread.ident is not None:
            self.thread.join()
        for device in self.devices:
            os.close(device)

    def _carry(self) -> None:
        # The times at which each device may send and receive its next packet, and the packets under way, by arrival.
        sends, receives = (dict.fromkeys(self.devices, 0.0) for _ in range(2))
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self.ending:
            now = time.monotonic()
            while under_way and under_way[0][0] <= now:
                _, _, device, packet = heapq.heappop(under_way)
                _write(device, packet)
            ready = [device for device in self.devices if sends[device] <= now]
            readable, _, _ = select.select(ready, [], [], self._patience(now, under_way, sends))
            now = time.monotonic()
            for device in readable:
                packet = _read(device)
                target = self.by_address.get(packet[16:20]) if packet[:1] >= b"\x40" and packet[:1] < b"\x50" else None
                if target is None:
                    continue
                takes = len(packet) / self.rate
                # A packet may have waited up to 2 ms for this thread: let it leave at the time it was ready.
                sends[device] = max(now - 0.002, sends[device]) + takes
                receives[target] = max(sends[device] + self.delay, receives[target] + takes)
                heapq.heappush(under_way, (receives[target], number, target, packet))
                number += 1

    def _patience(self, now: float, under_way: list[tuple[float, int, int, bytes]], sends: dict[int, float]) -> float:
        """Seconds until the next packet arrives or a device may send again, at most 0.1."""
        times = [at for at in sends.values() if at > now]
        if under_way:
            times.append(under_way[0][0])
        return min(0.1, max(0.0, min(times, default=now + 0.1) - now))


def _read(device: int) -> bytes:
    try:
        return os.read(device, LARGEST)
    except OSError:
        return b""


def _write(device: int, packet: bytes) -> None:
    # As on a real link, a packet that the device does not accept is lost.
    with suppress(OSError):
        os.write(device, packet)
