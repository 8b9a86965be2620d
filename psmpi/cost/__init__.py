"""The predicted cost of a step: each rank's part is rehearsed alone, and the messages of all ranks are simulated.

A rehearsal runs the method's own code on one rank after the other, so that its computing, memory and messages are
defined once. A network is described by measured times of messages, or by latency and bandwidth.
"""

from psmpi.cost.link import Link, Network
from psmpi.cost.program import Call, Program
from psmpi.cost.rehearsal import Rehearsal, rehearse
from psmpi.cost.schedule import Schedule, make_schedule
from psmpi.cost.simulate import simulate

__all__ = [
    "Call",
    "Link",
    "Network",
    "Program",
    "Rehearsal",
    "Schedule",
    "make_schedule",
    "rehearse",
    "simulate",
]
