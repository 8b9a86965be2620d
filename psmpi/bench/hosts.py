"""Simulated hosts with slow links between them: network namespaces of this machine (Linux, root, iproute2)."""

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

# Environment of MPI and gloo: no shared memory, only TCP through the interface of the host.
ENVIRONMENT = {
    "MPIR_CVAR_NOLOCAL": "1",
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "eth0",
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
}
# Largest rate in Mbit/s of links with a delay, whose packets a Python thread carries.
FASTEST = 100.0
# Prefix of the hosts' addresses: host k has the number k + 1.
NETWORK = "10.77.0."


def check_hosts(rates: Sequence[float], delay_ms: float) -> None:
    """Raise UserError if hosts with links of these rates (Mbit/s) and this delay cannot be made here."""
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
            "a limited rate needs network namespaces, that is root and iproute2 (ip and tc); use --rates 0 for this "
            "machine as it is"
        )


def _do(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(command)}: not done after 60 s; use --rates 0") from None
    if done.returncode:
        raise UserError(
            f"{' '.join(command)}: {done.stderr.strip()}: this machine's kernel cannot make the network; use --rates 0"
        )


@contextmanager
def slow_hosts(count: int, megabits: float, burst: str = "64kb", delay_ms: float = 0.0) -> Iterator[list[str]]:
    """Make `count` network namespaces, linked to one switch at `megabits` Mbit/s in both directions.

    Yields their names; an empty list for 0 Mbit/s. burst: size that an idle link lets through at once. delay_ms: delay
    of packets in ms; links with a delay have no bursts. The namespaces are removed at the end. Raise UserError if they
    cannot be made.
    """
    if not megabits:
        yield []
        return
    check_hosts([megabits], delay_ms)
    hub = f"psmpi{os.getpid()}"
    names = [f"{hub}-{k}" for k in range(count)]
    made: list[str] = []
    carrier = Carrier(megabits * 1e6 / 8, delay_ms / 1e3)
    # Clean up after SIGTERM as after Ctrl-C.
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
        # Deleting a namespace deletes its interfaces.
        for name in made:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60)
        signal.signal(signal.SIGTERM, before)


def _link(hub: str, names: list[str], limit: tuple[str, ...]) -> None:
    """Give each namespace an interface eth0 on a common switch. limit: arguments of tc for both directions."""
    _do("ip", "-n", hub, "link", "add", "switch", "type", "bridge")
    _do("ip", "-n", hub, "link", "set", "switch", "up")
    for k, name in enumerate(names):
        port = f"port{k}"
        _do("ip", "link", "add", port, "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", name)
        _do("ip", "-n", hub, "link", "set", port, "master", "switch", "up")
        _do("tc", "-n", hub, "qdisc", "add", "dev", port, *limit)
        _do("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)


def _link_far(names: list[str], carrier: Carrier) -> None:
    """Give each namespace an interface eth0 whose packets go through the carrier."""
    for k, name in enumerate(names):
        device = f"t{os.getpid()}x{k}"
        carrier.add(device, f"{NETWORK}{k + 1}")
        # The queue must hold a window of TCP.
        _do("ip", "link", "set", device, "txqueuelen", "20000", "netns", name)
        _do("ip", "-n", name, "link", "set", device, "name", "eth0")


def wrapper(names: list[str]) -> list[str]:
    """The words before a command that run it, on rank k of MPICH, in the k-th namespace."""
    # MPICH's launcher sets PMI_RANK. It talks to ranks through inherited descriptors, which namespaces do not affect.
    return ["sh", "-c", f'exec ip netns exec {names[0].rpartition("-")[0]}-$PMI_RANK "$@"', "rank"]
