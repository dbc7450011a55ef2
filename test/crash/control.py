"""Steps of a node's processes, counted and interrupted by steps.c, which is
preloaded into them: this is the program's side of the shared file."""

import mmap
import os
import struct
import subprocess
import threading
import time

import cluster as clusters

SERVICES = ("imap", "lmtp", "doveadm", "dovetail-queue", "dovetail-replay")
PIDS = 32768
TRACE_SIZE = 256 * 1024
# as in steps.c
COUNT, SELF, NODE, TORN = range(4)
MODES = {"self": SELF, "node": NODE, "torn": TORN}
MODE, SERVICE, K, QUEUE_DELAY, HIT, STEPS = range(6)
HEARD = STEPS + len(SERVICES)
SERVICE_OF = HEARD + PIDS
TRACE_USED = SERVICE_OF + PIDS
SIZE = (TRACE_USED + 1) * 4 + TRACE_SIZE


def build_library(directory):
    """Returns its path. It is to be read by all users."""
    path = os.path.join(directory, "steps.so")
    source = os.path.join(os.path.dirname(__file__), "steps.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-W", "-Werror",
                    "-o", path, source, "-ldl"], check=True)
    os.chmod(path, 0o755)
    return path


class Control:
    """Of one node, which has to be started after this."""

    def __init__(self, node, library):
        self.node = node
        self.killer = None
        path = os.path.join(node.dir, "steps")
        with open(path, "wb") as f:
            f.truncate(SIZE)
        os.chmod(path, 0o666)
        with open(path, "r+b") as f:
            self.map = mmap.mmap(f.fileno(), SIZE)
        self.environment = {"LD_PRELOAD": library, "DOVETAIL_CRASH": path,
                            "DOVETAIL_CRASH_DIR": node.dir}
        pairs = self.environment.items()
        if node.line.is_24:
            node.extra_conf += "import_environment {\n%s}\n" % "".join(
                "  %s = %s\n" % pair for pair in pairs)
        else:
            node.extra_conf += "import_environment = TZ %s\n" % " ".join(
                "%s=%s" % pair for pair in pairs)

    def get(self, index, count=1):
        values = struct.unpack_from("=%dI" % count, self.map, index * 4)
        return values if count > 1 else values[0]

    def set(self, index, *values):
        struct.pack_into("=%dI" % len(values), self.map, index * 4, *values)

    def steps(self):
        """{service: number since arm()}"""
        return dict(zip(SERVICES, self.get(STEPS, len(SERVICES))))

    def arm(self, mode=COUNT, service="imap", k=0, queue_delay_msecs=0):
        self.set(MODE, COUNT)
        self.set(TRACE_USED, 0)
        self.set(STEPS, *[0] * len(SERVICES))
        self.set(HIT, 0)
        self.set(QUEUE_DELAY, queue_delay_msecs)
        self.set(SERVICE, SERVICES.index(service))
        self.set(K, k)
        self.set(MODE, mode)
        if mode == NODE:
            self.killer = threading.Thread(target=self.kill_node)
            self.killer.start()

    def kill_node(self):
        """Those that do a step stand still when one was hit; the others get no
        last word either."""
        while self.get(MODE) == NODE and not self.hit:
            time.sleep(0.001)
        if self.hit:
            self.node.kill()

    def settle(self):
        """What was hit is dead."""
        if self.get(MODE) == NODE and self.hit:
            self.killer.join()
            # to be started again
            self.set(MODE, COUNT)

    def disarm(self):
        self.settle()
        self.set(MODE, COUNT)
        self.set(QUEUE_DELAY, 0)
        if self.killer:
            self.killer.join()
            self.killer = None

    @property
    def hit(self):
        """The pid of the process that killed, or 0."""
        return self.get(HIT)

    def trace(self):
        """A line per step: "service[pid] call what"."""
        begin = (TRACE_USED + 1) * 4
        end = begin + min(self.get(TRACE_USED), TRACE_SIZE)
        return self.map[begin:end].decode(errors="replace").splitlines()

    def last_steps(self, count):
        """Of the process that was hit. The trace's lines are in the order of
        their ends."""
        return [line for line in self.trace() if "[%d]" % self.hit in line][
            -count:] if self.hit else []

    def heard(self, service):
        """The living processes of a service that Dovecot's master has heard of:
        if others die it takes the service for broken, and waits before it
        starts the next one."""
        number = SERVICES.index(service)
        return [pid for pid in filter(None, self.get(HEARD, PIDS))
                if self.get(SERVICE_OF + pid % PIDS) == number and
                clusters.executable(pid) == service]


def wait_quiet(controls, seconds=0.08, timeout=30):
    """Until no node has done a step for some time."""
    def now():
        return [control.get(STEPS, len(SERVICES)) for control in controls]

    deadline = time.monotonic() + timeout
    before, since = now(), time.monotonic()
    while time.monotonic() - since < seconds:
        if time.monotonic() > deadline:
            raise AssertionError("the nodes do not come to rest")
        time.sleep(0.01)
        if now() != before:
            before, since = now(), time.monotonic()
