"""What goes wrong while clients write.

There are two schedules, worked off at the same time: what happens to Redis and
to the way to it, and what happens to nodes and their processes. A schedule is
made of the seed alone.

A fault is a function of the Fault that happens; it returns False when there was
nothing to break.
"""

import contextlib
import os
import random
import re
import shutil
import threading
import traceback

SERVICES = ("imap", "lmtp", "dovetail-queue", "dovetail-replay")
# seconds between two faults of a schedule, at least and at most
PAUSE = (0.5, 5)


class Fault:
    """kind: its name; duration: how long it shall take, in seconds; choice: a
    number from 0 to 1 for what the fault has to choose; run: the Soak."""

    def __init__(self, kind, duration, choice, run, stopped):
        self.kind, self.duration, self.choice = kind, duration, choice
        self.run, self.stopped = run, stopped
        self.redis = run.cluster.redis

    def wait(self):
        self.stopped.wait(self.duration)

    def node(self, name):
        return getattr(self.run.cluster, name)

    def key(self, what):
        """One of Redis' keys with this in its name, or None."""
        keys = sorted(key for key in self.redis.keys() if what in key)
        return keys[int(self.choice * len(keys))] if keys else None


# -- Redis

def redis_stopped(fault):
    fault.redis.stop()
    fault.wait()
    fault.redis.start()


def redis_killed(fault):
    fault.redis.kill()
    fault.wait()
    fault.redis.start()


def redis_restarted_empty(fault):
    fault.redis.kill()
    fault.redis.wipe()
    fault.wait()
    fault.redis.start()


def redis_flushall(fault):
    fault.redis.cli("flushall")


def redis_older_snapshot(fault):
    """It begins again where it was some seconds before."""
    data = os.path.join(fault.redis.dir, "appendonlydir")
    fault.redis.pause()
    shutil.copytree(data, data + ".older")
    fault.redis.resume()
    fault.wait()
    fault.redis.kill()
    fault.redis.wipe()
    os.rename(data + ".older", data)
    fault.redis.start()


def redis_stream_trimmed(fault):
    key = fault.key(":log:")
    if key is None:
        return False
    fault.redis.cli("xtrim", key, "maxlen", str(int(fault.choice * 10)))


def redis_key_deleted(fault):
    key = fault.key(":")
    if key is None:
        return False
    fault.redis.cli("del", key)


def redis_client_kill(fault):
    fault.redis.cli("client", "kill", "type", "normal")


def redis_client_pause(fault):
    fault.redis.cli("client", "pause", str(int(fault.duration * 1000)),
                    "all" if fault.choice < 0.5 else "write")
    fault.wait()
    fault.redis.cli("client", "unpause")


def redis_no_answers(fault):
    fault.redis.pause()
    fault.wait()
    fault.redis.resume()


def redis_memory_full(fault):
    fault.redis.cli("config", "set", "maxmemory", "1")
    fault.wait()
    fault.redis.cli("config", "set", "maxmemory", "0")


def net(fault, node, how):
    link = fault.run.links[node]
    link.command(how)
    fault.wait()
    # a wire that hung may break then, or go on
    if how == "hang" and fault.choice < 0.5:
        link.command("cut")
    link.command("up")


# -- nodes and their processes

def kill(fault, node, *services):
    killed = 0
    for service in services:
        # Dovecot may have been started just now
        with contextlib.suppress(RuntimeError):
            killed += fault.node(node).kill_service(service, wait=False)
    return killed > 0


def node_killed(fault, node):
    """As by a power failure."""
    fault.node(node).kill()
    fault.wait()
    fault.node(node).start()


def node_stopped(fault, node):
    fault.node(node).stop()
    fault.wait()
    fault.node(node).start()


def node_reloaded(fault, node):
    fault.node(node).reload()


def paused(fault, node, service):
    with fault.node(node).paused(service):
        fault.wait()


# {kind: (how often, the longest duration, function, its further arguments)}
REDIS = {
    "redis-stopped": (3, 8, redis_stopped),
    "redis-killed": (3, 8, redis_killed),
    "redis-restarted-empty": (2, 3, redis_restarted_empty),
    "redis-flushall": (2, 0, redis_flushall),
    "redis-older-snapshot": (2, 12, redis_older_snapshot),
    "redis-stream-trimmed": (3, 0, redis_stream_trimmed),
    "redis-key-deleted": (1, 0, redis_key_deleted),
    "redis-client-kill": (3, 0, redis_client_kill),
    "redis-client-pause": (2, 4, redis_client_pause),
    "redis-no-answers": (3, 6, redis_no_answers),
    "redis-memory-full": (2, 6, redis_memory_full),
    "net-cut-a": (3, 8, net, "a", "cut"),
    "net-cut-b": (3, 8, net, "b", "cut"),
    "net-hang-a": (2, 8, net, "a", "hang"),
    "net-hang-b": (2, 8, net, "b", "hang"),
    "net-slow-a": (1, 6, net, "a", "slow 0.05"),
    "net-slow-b": (1, 6, net, "b", "slow 0.05"),
}
PROCESSES = {
    "kill-imap-a": (4, 0, kill, "a", "imap"),
    "kill-lmtp-a": (4, 0, kill, "a", "lmtp"),
    "kill-queue-a": (4, 0, kill, "a", "dovetail-queue"),
    "kill-replay-a": (2, 0, kill, "a", "dovetail-replay"),
    "kill-all-a": (1, 0, kill, "a", *SERVICES),
    "kill-imap-b": (1, 0, kill, "b", "imap"),
    "kill-queue-b": (2, 0, kill, "b", "dovetail-queue"),
    "kill-replay-b": (4, 0, kill, "b", "dovetail-replay"),
    "kill-all-b": (1, 0, kill, "b", *SERVICES),
    "node-a-killed": (3, 3, node_killed, "a"),
    "node-b-killed": (3, 5, node_killed, "b"),
    "node-a-stopped": (1, 3, node_stopped, "a"),
    "node-b-stopped": (2, 25, node_stopped, "b"),
    "node-a-reloaded": (1, 0, node_reloaded, "a"),
    "node-b-reloaded": (1, 0, node_reloaded, "b"),
    "queue-a-paused": (1, 4, paused, "a", "dovetail-queue"),
    "replay-b-paused": (2, 8, paused, "b", "dovetail-replay"),
}


def schedule(seed, faults, only):
    """Endless: (pause before it, kind, duration, choice)."""
    rng = random.Random("%d %s" % (seed, sorted(faults)))
    kinds = [kind for kind in faults if re.search(only, kind)]
    weights = [faults[kind][0] for kind in kinds]
    while kinds:
        kind, = rng.choices(kinds, weights)
        yield (rng.uniform(*PAUSE), kind,
               rng.uniform(0.2, 1) * faults[kind][1], rng.random())


class Injector(threading.Thread):
    """Works off a schedule until it is stopped; what is broken then is
    mended at once, and ended is set. The thread stays, as servers end with the
    one that started them (cluster.end_with_parent())."""

    def __init__(self, run, faults, only):
        super().__init__(daemon=True)
        self.run_, self.faults = run, faults
        self.schedule = schedule(run.seed, faults, only)
        self.stopped, self.ended = threading.Event(), threading.Event()
        self.error = None

    def run(self):
        self.work()
        self.ended.set()
        threading.Event().wait()

    def work(self):
        try:
            for pause, kind, duration, choice in self.schedule:
                if self.stopped.wait(pause):
                    break
                function, *arguments = self.faults[kind][2:]
                self.run_.note("fault %s %.1f s" % (kind, duration))
                if function(Fault(kind, duration, choice, self.run_,
                                  self.stopped), *arguments) is not False:
                    self.run_.faults[kind] += 1
                self.run_.note("fault %s is over" % kind)
        except Exception as e:
            self.error = e
            self.run_.note(traceback.format_exc())
