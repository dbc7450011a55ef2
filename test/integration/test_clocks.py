"""A node's clock jumps, by hours, while it runs: forwards, as when it was set
at last, and backwards. (Virtual time, and many more of them: test/fixture.)"""

import os
import struct
import subprocess
import time

import pytest

from cluster import Cluster, mail
from test_faults import NO_REDIS, SETTINGS, Writer, work

HOUR = 3600
# Dovecot's own, about a clock that goes backwards. Seen once: a process of
# dovetail-replay ended with 89, and the master started another.
JUMPED = (r"Time (just )?(moved|jumped) (back|for)wards|"
          r"Fatal: master: service\(\S+\): child \d+ returned error 89 ")


class Clock:
    """Of a node that does not run yet; clock.c is preloaded into all its
    processes but Dovecot's master."""

    def __init__(self, node):
        self.path = os.path.join(node.dir, "clock")
        library = self.path + ".so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-W",
                        "-Werror", "-o", library, os.path.join(
                            os.path.dirname(__file__), "clock.c")],
                       check=True)
        os.chmod(library, 0o755)
        with open(self.path, "wb") as f:
            f.write(bytes(8))
        os.chmod(self.path, 0o644)
        pairs = [("LD_PRELOAD", library), ("DOVETAIL_CLOCK", self.path)]
        if node.line.is_24:
            node.extra_conf += "import_environment {\n%s}\n" % "".join(
                "  %s = %s\n" % pair for pair in pairs)
        else:
            node.extra_conf += "import_environment = TZ %s\n" % " ".join(
                "%s=%s" % pair for pair in pairs)

    def jump(self, seconds):
        """To so much more than the machine's, at once."""
        with open(self.path, "r+b", buffering=0) as f:
            f.write(struct.pack("=q", seconds))


@pytest.fixture(scope="module")
def pair():
    with Cluster(["sdbox", "sdbox"], SETTINGS, start=False) as cluster:
        for node in cluster.nodes:
            node.clock = Clock(node)
        cluster.start()
        yield cluster


@pytest.fixture
def user(pair):
    for node in pair.nodes:
        node.clock.jump(0)
    user = pair.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    return user


@pytest.mark.parametrize("name", ["a", "b"])
def test_clock_jumps(pair, user, name):
    """There and back again. Nobody waits for the time that is gone: neither who
    writes just then, nor what was put off before."""
    pair.expect_errors(JUMPED, NO_REDIS)
    away, other = pair.user(), pair.user()
    with Writer(user, "imap") as writer, Writer(other, "lmtp") as writer2:
        for seconds in (5 * HOUR, -5 * HOUR, 0):
            writer.wait_progress()
            writer2.wait_progress()
            pair.redis.stop()
            away.lmtp(mail("while Redis was away"))
            getattr(pair, name).clock.jump(seconds)
            writer.wait_progress(3)
            pair.redis.start()
            begin = time.monotonic()
            away.wait_equal()
            # a user of whom the replica knows nothing yet
            fresh = pair.user()
            work(fresh)
            fresh.wait_equal()
            assert time.monotonic() - begin < 15
            # what goes over the replica's answers
            pair.a.doveadm("dovetail", "verify", "-u", fresh.name)
    writer.check()
    writer2.check()
