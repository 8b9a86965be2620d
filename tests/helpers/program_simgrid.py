"""Replay a schedule in the GOAL format with SimGrid: program_simgrid.py FILE LATENCY BANDWIDTH; print its seconds.

Every rank has a host with a link to a switch, of LATENCY / 2 seconds and BANDWIDTH bytes a second in each direction.
A rank runs its tasks in the order of the file, and a task after the tasks that it requires. The program needs SimGrid's
Python bindings and no psmpi.
"""

import sys
from collections import defaultdict

from simgrid import Actor, Comm, Engine, LinkInRoute, NetZone, Semaphore, this_actor


def read(path):
    """For each rank, the list of its tasks (kind, nanoseconds or bytes, other rank, tag, tasks that it requires)."""
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


def message_names(ranks):
    """For each rank, the names of its messages by task. The k-th send with a tag matches the k-th receive with it."""
    names_by_rank = []
    for rank, tasks in enumerate(ranks):
        counts = defaultdict(int)
        names = {}
        for number, (kind, _, peer, tag, _) in enumerate(tasks):
            if kind != "calc":
                pair = (rank, peer) if kind == "send" else (peer, rank)
                names[number] = f"{pair[0]} {pair[1]} {tag} {counts[kind, pair, tag]}"
                counts[kind, pair, tag] += 1
        names_by_rank.append(names)
    return names_by_rank


def work(rank, tasks, names, hosts, sent, flows):
    """Run the tasks of a rank, as an actor.

    sent: by name, a semaphore for each message, released when the message is sent. flows: by name, the sent messages.
    """
    receives = set()

    def wait(task):
        if task in receives:
            receives.remove(task)
            sent[names[task]].acquire()
            flows[names[task]].wait()

    for number, (kind, size, peer, _, required) in enumerate(tasks):
        for task in required:
            wait(task)
        if kind == "calc":
            if size:
                this_actor.sleep_for(size * 1e-9)
        elif kind == "send":
            # As with TCP, a send does not wait for its receiver.
            flows[names[number]] = Comm.sendto_async(hosts[rank], hosts[peer], size)
            sent[names[number]].release()
        else:
            receives.add(number)
    for task in list(receives):
        wait(task)


def main():
    path, latency, bandwidth = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    # Links have exactly this latency and bandwidth, without the overhead of protocols.
    settings = ("network/model:CM02", "network/TCP-gamma:0", "network/crosstraffic:0")
    engine = Engine([sys.argv[0], *(f"--cfg={setting}" for setting in settings), "--log=root.t:error"])
    ranks = read(path)
    zone = NetZone.create_star_zone("cluster")
    hosts = []
    for rank in range(len(ranks)):
        host = zone.create_host(f"host {rank}", 1e9).seal()
        uplink, downlink = (
            LinkInRoute(zone.create_link(f"{way} {rank}", bandwidth).set_latency(latency / 2).seal())
            for way in ("out", "into")
        )
        zone.add_route(host.netpoint, None, None, None, [uplink], False)
        zone.add_route(None, host.netpoint, None, None, [downlink], False)
        hosts.append(host)
    zone.seal()
    names = message_names(ranks)
    sent = {
        name: Semaphore(0)
        for tasks, own in zip(ranks, names, strict=True)
        for number, name in own.items()
        if tasks[number][0] == "send"
    }
    flows = {}
    for rank, tasks in enumerate(ranks):
        Actor.create(f"rank {rank}", hosts[rank], work, rank, tasks, names[rank], hosts, sent, flows)
    engine.run()
    print(Engine.clock)


if __name__ == "__main__":
    main()
