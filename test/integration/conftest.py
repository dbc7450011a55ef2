"""What every integration test gets: clusters that are ended, and logs that
are read. A test fails when a node logs an error that it did not expect."""

import os
import re
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import cluster as clusters  # noqa: E402

# A replica that deletes a mailbox because the primary's tree lacks it, where
# nobody deleted one, is an error, however calmly it says so.
# And so is memory that a process has not given back at its end.
ERROR = re.compile(r"(Panic|Fatal|Error): |no longer at the primary, deleting|"
                   r"Warning: Leaked .*dovetail")
# Dovecot's statistics have five seconds to answer a process that starts; on a
# machine that stands still for that long they do not, and nobody minds.
STATISTICS = re.compile(r"stats-writer.*: Timeout waiting for handshake response")
NOISE = re.compile(r"imap-login: |Disconnected: |: Disconnect from ")


def new_lines(node):
    try:
        return node.log_text()[node.log_offset:].splitlines()
    except FileNotFoundError:
        # its cluster could not be started
        return []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """A failed test shows what the nodes logged meanwhile."""
    report = (yield).get_result()
    if report.failed:
        for cluster in clusters.live:
            for node in cluster.nodes:
                report.sections.append((
                    "log of node %s (%s)" % (node.name, node.log),
                    "\n".join([line for line in new_lines(node)
                               if not NOISE.search(line)][-60:])))


@pytest.fixture(autouse=True)
def logs():
    """Judges the logs; set up first, so torn down after the test's own
    clusters have ended."""
    for cluster in clusters.live:
        cluster.expected = []
        for node in cluster.nodes:
            node.log_offset = len(node.log_text())
    yield
    for cluster in clusters.live:
        for node in cluster.nodes:
            node.wait_killed()
    unexpected = [
        "node %s: %s" % (node.name, line)
        for cluster in clusters.live for node in cluster.nodes
        for line in new_lines(node) if ERROR.search(line) and
        not STATISTICS.search(line) and
        not any(re.search(regex, line) for regex in cluster.expected)]
    for cluster in list(clusters.live):
        if all(node.final_log is not None for node in cluster.nodes):
            clusters.live.remove(cluster)
    assert not unexpected, "unexpected errors:\n" + "\n".join(unexpected)


@pytest.fixture
def new_cluster():
    """Make a cluster for one test: new_cluster(formats, ...)."""
    made = []

    def make(*args, **kwargs):
        made.append(clusters.Cluster(*args, **kwargs))
        return made[-1]
    yield make
    for cluster in made:
        cluster.close()


FORMAT_PAIRS = [("sdbox", "sdbox"), ("mdbox", "mdbox"),
                ("maildir", "maildir"), ("maildir", "sdbox"),
                ("sdbox", "mdbox"), ("mdbox", "maildir")]


@pytest.fixture(scope="session", params=FORMAT_PAIRS, ids="-".join)
def pair(request):
    """A primary and a replica, one cluster per pair of formats for all tests
    that ask for it."""
    with clusters.Cluster(request.param) as cluster:
        yield cluster


@pytest.fixture
def user(pair):
    """A fresh user of the pair."""
    return pair.user()
