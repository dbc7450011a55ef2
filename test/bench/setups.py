"""What is compared: private servers for each contender, all running at the
same time, so that rounds can alternate between them, and their CPU time and
memory."""

import collections
import contextlib
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "integration"))
import cluster as fixture  # noqa: E402
from clients import Failed, Imap, Lmtp, message  # noqa: E402

USERS = 110
TICKS = os.sysconf("SC_CLK_TCK")

# The primary of dsync: asynchronous, so replication_sync_timeout is not set.
DSYNC_PRIMARY = """
mail_plugins = notify replication
protocol lmtp {{
  mail_plugins = notify replication sieve
}}
doveadm_password = bench
plugin {{
  mail_replica = tcp:127.0.0.1:{port}
}}
service replicator {{
  process_min_avail = 1
  unix_listener replicator-doveadm {{
    mode = 0600
  }}
}}
service aggregator {{
  fifo_listener replication-notify-fifo {{
    user = {user}
  }}
  unix_listener replication-notify {{
    user = {user}
  }}
}}
"""
DSYNC_REPLICA = """
doveadm_password = bench
service doveadm {{
  inet_listener {{
    address = 127.0.0.1
    port = {port}
  }}
}}
"""


def stat(pid):
    """CPU seconds of a process and of its children that have ended."""
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rpartition(")")[2].split()
    utime, stime, cutime, cstime = map(int, fields[11:15])
    return (utime + stime) / TICKS, (cutime + cstime) / TICKS


def cpu(cluster):
    """{(side, program): CPU seconds}, with children that have ended."""
    found = collections.Counter()
    for server, side in ((cluster.a, "primary"), (cluster.b, "replica"),
                         (cluster.redis, "redis")):
        leader = server.process.pid
        for pid in fixture.session_pids(leader):
            with contextlib.suppress(OSError):
                own, ended = stat(pid)
                # Debian's redis-server is a link to another name
            found[side, "redis-server" if side == "redis" else
                  fixture.executable(pid)] += own + ended
    return found


def redis_bytes(cluster):
    """{"input": bytes Redis got, "output": bytes it sent}"""
    info = cluster.redis.cli("info", "stats")
    return {word: int(re.search(r"total_net_%s_bytes:(\d+)" % word, info)[1])
            for word in ("input", "output")}


def peak(pid):
    """VmHWM in MB."""
    with open("/proc/%d/status" % pid) as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0


class Setup:
    """One contender: primary, replica (None for plain Dovecot), Redis."""

    def __init__(self, name, nodes=2, plugin=True, **options):
        self.name = name
        fixture.USERS = USERS
        self.cluster = fixture.Cluster(("sdbox",) * nodes, plugin=plugin,
                                       start=False, **options)
        self.primary = self.cluster.nodes[0]
        self.replica = self.cluster.nodes[1] if nodes > 1 else None
        self.unused = list(self.cluster.prepared)
        # how long the replica may still be busy when all is visible
        self.calm = 0.1
        # how many times fewer samples of the lag: they take so much longer
        self.slow = 1

    def start(self):
        self.cluster.start()
        self.make_inboxes()

    def make_inboxes(self):
        with contextlib.closing(self.lmtp()) as session:
            for user in self.unused:
                session.deliver(user, message())

    def begin(self):
        """All users have an INBOX: wait until the replica has it."""
        if self.replica:
            self.settle(self.unused, timeout=30)

    def close(self):
        self.cluster.close()

    def errors(self):
        """What the nodes logged above Info, without what we make them log:
        stopping, and dsync's mail_plugins."""
        return ["%s %s: %s" % (self.name, node.name, line)
                for node in self.cluster.nodes
                for line in node.log_text().splitlines()
                if re.search(r": (Warning|Error|Fatal|Panic): (?!Killed with "
                             "signal 15|.* Global setting mail_plugins)",
                             line)]

    # -- users and sessions

    def take(self, count):
        """Names of users that nobody used yet."""
        users, self.unused = self.unused[:count], self.unused[count:]
        assert len(users) == count
        return users

    def lmtp(self):
        return Lmtp(self.primary.lmtp_port)

    def imap(self, user, mailbox=None):
        return Imap(self.primary.imap_port, user, mailbox)

    def replica_imap(self, user, mailbox=None):
        return Imap(self.replica.imap_port, user, mailbox)

    def settle(self, users, mailboxes=("INBOX",), timeout=120):
        """Wait until the replica has as many messages as the primary, and
        has nothing to do any more."""
        if not self.replica:
            return
        for user in users:
            with contextlib.closing(self.imap(user)) as a, \
                    contextlib.closing(self.replica_imap(user)) as b:
                for mailbox in mailboxes:
                    count = a.count(mailbox)
                    b.wait(lambda: b.count(mailbox) == count,
                           "%s of %s: %d messages" % (mailbox, user, count),
                           timeout, 0.005)
        time.sleep(self.calm)

    # -- what it costs

    def masters(self):
        """{side: process whose children belong to it}"""
        found = {"primary": self.primary.process}
        if self.replica:
            found["replica"] = self.replica.process
        if self.cluster.redis:
            found["redis"] = self.cluster.redis.process
        return {side: process.pid for side, process in found.items()
                if process is not None and process.poll() is None}

    def processes(self):
        """(side, part, pid) of all that run."""
        for side, master in self.masters().items():
            for pid in [master] + fixture.children(master):
                # Debian's redis-server is a link to another name
                part = "redis-server" if side == "redis" else \
                    fixture.executable(pid)
                if part:
                    yield side, part, pid

    def cpu(self):
        """{(side, part): CPU seconds}; part "(ended)": processes that are
        gone, of whatever program."""
        found = collections.Counter()
        for side, part, pid in self.processes():
            with contextlib.suppress(OSError):
                own, ended = stat(pid)
                found[side, part] += own
                found[side, "(ended)"] += ended
        return found

    def peaks(self):
        """{(side, part): MB of its largest process}"""
        found = collections.defaultdict(float)
        for side, part, pid in self.processes():
            with contextlib.suppress(OSError):
                found[side, part] = max(found[side, part], peak(pid))
        return dict(found)


class Dsync(Setup):
    def __init__(self):
        port = fixture.free_port()
        super().__init__("dsync", plugin=False)
        self.calm = 0.8
        self.slow = 4
        self.conf = DSYNC_PRIMARY.format(port=port, user=fixture.MAIL_USER)
        self.replica.extra_conf = DSYNC_REPLICA.format(port=port)

    def start(self):
        # The INBOXes are made first and alone: when both sides make them in
        # the same second, dsync exchanges their GUIDs for ever.
        self.primary.start()
        self.make_inboxes()
        self.primary.stop()
        time.sleep(1.1)
        self.primary.extra_conf = self.conf
        self.replica.start()
        self.primary.start()


def setups(names):
    make = {
        "plain": lambda: Setup("plain", nodes=1, plugin=False),
        "dsync": Dsync,
    }
    for level in "local", "queued", "applied":
        make[level] = lambda level=level: Setup(
            level, settings={"dovetail_ack": level})
    unknown = set(names) - set(make)
    if unknown:
        raise Failed("no such contender: %s" % ", ".join(sorted(unknown)))
    return [make[name]() for name in names]
