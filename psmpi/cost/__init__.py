"""The cost of a step before it is made: each rank's part is rehearsed alone, and what ranks would send is simulated.

A rehearsal runs the method's own code on one rank after the other, without the others, so what it computes, keeps and
sends is not typed twice. Networks are told by what was measured of them, or by numbers.
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
