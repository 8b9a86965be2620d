"""Hosts with slow links between them, made of network namespaces of this one (Linux, root, iproute2)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from psmpi.bench.carrier import Carrier
from psmpi.errors import UserError

# Nothing goes through shared memory, everything through the hosts' own interface.
ENVIRONMENT = {
    "MPIR_CVAR_NOLOCAL": "1",
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "eth0",
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
}
# Mbit/s that packets with a delay can have: a thread carries each of them.
FASTEST = 100.0
# The address of host k is this and k + 1.
NETWORK = "10.77.0."


def check_hosts(rates: Sequence[float], delay_ms: float) -> None:
    """UserError where hosts with links of such rates (Mbit/s) and such a delay cannot be made here."""
    if any(not 0 <= rate <= 1e6 for rate in rates):
        raise UserError(f"--rates {' '.join(map(str, rates))}: expected numbers from 0 to 1e6")
    if not 0 <= delay_ms <= 1e4:
        raise UserError(f"--delay-ms {delay_ms:g}: expected a number from 0 to 1e4")
    if delay_ms and not all(0 < rate <= FASTEST for rate in rates):
        raise UserError(
            f"--delay-ms {delay_ms:g} needs links of up to {FASTEST:g} Mbit/s: give --rates, none of them 0"
        )
    if not any(rates):
        return
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise UserError(
            "a limited rate needs network namespaces: root, and Debian's iproute2 (ip and tc); use --rates 0 for this "
            "machine as it is"
        )


def _do(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(command)}: no end within 60 s; use --rates 0") from None
    if done.returncode:
        raise UserError(
            f"{' '.join(command)}: {done.stderr.strip()}: this machine's kernel makes no such network; use --rates 0"
        )


@contextmanager
def slow_hosts(count: int, megabits: float, burst: str = "64kb", delay_ms: float = 0.0) -> Iterator[list[str]]:
    """`count` namespaces, their names, each linked to one switch at so many Mbit/s both ways; none for 0 Mbit/s.

    burst: what a link that was idle lets through at once. delay_ms: by so much later packets arrive; then there are no
    bursts. The namespaces are removed at the end.
    """
    if not megabits:
        yield []
        return
    check_hosts([megabits], delay_ms)
    hub = f"psmpi{os.getpid()}"
    names = [f"{hub}-{k}" for k in range(count)]
    made: list[str] = []
    carrier = Carrier(megabits * 1e6 / 8, delay_ms / 1e3)
    # As after Ctrl-C, nothing is left behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in (hub, *names):
            made.append(name)
            _do("ip", "netns", "add", name)
        if delay_ms:
            _link_far(names, carrier)
            carrier.start()
        else:
            _link(hub, names, ("root", "tbf", "rate", f"{megabits}mbit", "burst", burst, "latency", "100ms"))
        for k, name in enumerate(names):
            _do("ip", "-n", name, "address", "add", f"{NETWORK}{k + 1}/24", "dev", "eth0")
            _do("ip", "-n", name, "link", "set", "eth0", "up")
            _do("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        carrier.close()
        # With a namespace goes what is in it.
        for name in made:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60)
        signal.signal(signal.SIGTERM, before)


def _link(hub: str, names: list[str], limit: tuple[str, ...]) -> None:
    """Give each namespace an interface eth0, all of them on a switch, with a limit of what each sends and receives."""
    _do("ip", "-n", hub, "link", "add", "switch", "type", "bridge")
    _do("ip", "-n", hub, "link", "set", "switch", "up")
    for k, name in enumerate(names):
        port = f"port{k}"
        _do("ip", "link", "add", port, "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", name)
        _do("ip", "-n", hub, "link", "set", port, "master", "switch", "up")
        _do("tc", "-n", hub, "qdisc", "add", "dev", port, *limit)
        _do("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)


def _link_far(names: list[str], carrier: Carrier) -> None:
    """Give each namespace an interface eth0 whose packets a carrier takes."""
    for k, name in enumerate(names):
        device = f"t{os.getpid()}x{k}"
        carrier.add(device, f"{NETWORK}{k + 1}")
        # A window of TCP waits in the device.
        _do("ip", "link", "set", device, "txqueuelen", "20000", "netns", name)
        _do("ip", "-n", name, "link", "set", device, "name", "eth0")


def wrapper(names: list[str]) -> list[str]:
    """The words before a rank's command that run it on the host of its number."""
    # MPICH's launcher says it so; it talks to its ranks by what they inherit, which no namespace cuts.
    return ["sh", "-c", f'exec ip netns exec {names[0].rpartition("-")[0]}-$PMI_RANK "$@"', "rank"]
