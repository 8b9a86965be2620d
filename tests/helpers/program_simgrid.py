"""Replay a schedule in the GOAL format by SimGrid: program_simgrid.py FILE LATENCY BANDWIDTH; prints its seconds.

Every rank has a host, whose link of LATENCY / 2 seconds and BANDWIDTH bytes a second each way leads to a switch; ranks
make their tasks in the order of the file, each after those that it requires. Needs SimGrid's Python bindings alone.
"""

import sys
from collections import defaultdict

from simgrid import Actor, Comm, Engine, LinkInRoute, NetZone, Semaphore, this_actor


def read(path):
    """Of each rank its tasks: kind, nanoseconds or bytes, other rank, tag, and the tasks before."""
    ranks = []
    with open(path) as lines:
        for line in lines:
            words = line.replace(":", " ").split()
            if words[0] == "rank":
                ranks.append([])
            elif len(words) > 1 and words[1] == "calc":
                ranks[-1].append(("calc", int(words[2]), -1, "", []))
            elif len(words) > 1 and words[1] in ("send", "recv"):
                ranks[-1].append((words[1], int(words[2][:-1]), int(words[4]), words[6], []))
            elif len(words) > 1 and words[1] == "requires":
                ranks[-1][int(words[0][1:])][-1].append(int(words[2][1:]))
    return ranks


def named(ranks):
    """For each message task the name of its mailbox: the k-th of a tag from one rank to another is the k-th there."""
    found = []
    for rank, tasks in enumerate(ranks):
        counts = defaultdict(int)
        names = {}
        for number, (kind, _, peer, tag, _) in enumerate(tasks):
            if kind != "calc":
                pair = (rank, peer) if kind == "send" else (peer, rank)
                names[number] = f"{pair[0]} {pair[1]} {tag} {counts[kind, pair, tag]}"
                counts[kind, pair, tag] += 1
        found.append(names)
    return found


def work(rank, tasks, names, hosts, left, flows):
    """An actor's part. left: semaphores of messages, released as these leave; flows: what is under way, by name."""
    coming = set()

    def wait(one):
        if one in coming:
            coming.remove(one)
            left[names[one]].acquire()
            flows[names[one]].wait()

    for number, (kind, size, peer, _, before) in enumerate(tasks):
        for one in before:
            wait(one)
        if kind == "calc":
            if size:
                this_actor.sleep_for(size * 1e-9)
        elif kind == "send":
            # As between hosts by TCP, it does not wait for its receiver.
            flows[names[number]] = Comm.sendto_async(hosts[rank], hosts[peer], size)
            left[names[number]].release()
        else:
            coming.add(number)
    for one in list(coming):
        wait(one)


def main():
    path, latency, bandwidth = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    # Links as they are told, without what protocols take of them.
    plain = ("network/model:CM02", "network/TCP-gamma:0", "network/crosstraffic:0")
    engine = Engine([sys.argv[0], *(f"--cfg={one}" for one in plain), "--log=root.t:error"])
    ranks = read(path)
    zone = NetZone.create_star_zone("cluster")
    hosts = []
    for rank in range(len(ranks)):
        host = zone.create_host(f"host {rank}", 1e9).seal()
        out, into = (
            LinkInRoute(zone.create_link(f"{way} {rank}", bandwidth).set_latency(latency / 2).seal())
            for way in ("out", "into")
        )
        zone.add_route(host.netpoint, None, None, None, [out], False)
        zone.add_route(None, host.netpoint, None, None, [into], False)
        hosts.append(host)
    zone.seal()
    names = named(ranks)
    left = {
        name: Semaphore(0)
        for tasks, own in zip(ranks, names, strict=True)
        for number, name in own.items()
        if tasks[number][0] == "send"
    }
    flows = {}
    for rank, tasks in enumerate(ranks):
        Actor.create(f"rank {rank}", hosts[rank], work, rank, tasks, names[rank], hosts, left, flows)
    engine.run()
    print(Engine.clock)


if __name__ == "__main__":
    main()
