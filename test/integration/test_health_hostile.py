"""dovetail-health and those who mean it harm: on each listener, all at once."""

import contextlib
import random
import resource
import socket
import time

import pytest

from cluster import Cluster, stat_fields, wait_for
from test_health import FAST, connect, metrics, policy, state, wait_ok

# one that may be asked by anybody, and what it is asked
QUESTIONS = {
    "policy": b"request=smtpd_access_policy\nrecipient=x\n\n",
    "exim": b"somebody@example.org\n",
    "agent": b"",
    "socketmap": b"25:dovetail jane@example.net,",
    "http": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "admin": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "health": b"\0\0\0\3\x11\1\0",
}
LISTENERS = list(QUESTIONS)


@pytest.fixture(scope="module")
def cluster():
    with Cluster(["sdbox", "sdbox"], settings=FAST) as cluster:
        yield cluster


@pytest.fixture
def a(cluster):
    wait_ok(cluster.a)
    return cluster.a


def knock(node, listener):
    """A connection; the listener's queue may be full for a moment."""
    def try_it():
        with contextlib.suppress(BlockingIOError):
            return connect(node, listener, 60)
    return wait_for(try_it, "a connection to " + listener)


def asks(node):
    """Somebody who means well gets an answer, and soon."""
    start = time.monotonic()
    assert policy(node) == "DUNNO"
    assert state(node) == "ok"
    assert time.monotonic() - start < 2


def memory(pid):
    """Resident, in bytes."""
    return int(stat_fields(pid)[21]) * resource.getpagesize()


def test_thousands_are_silent(a):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)),
                                                hard))
    pid, = a.pids("dovetail-health")
    before, size = metrics(a), memory(pid)
    with contextlib.ExitStack() as stack:
        for i in range(3000):
            stack.enter_context(knock(a, LISTENERS[i % len(LISTENERS)]))
            if i % 500 == 0:
                asks(a)
        asks(a)
        after = metrics(a)
        for name, count in (("connections", 2500), ("connections_closed",
                                                    1500)):
            name = "dovetail_health_%s_total" % name
            assert after[name] - before[name] >= count
        print("memory: %d KiB for 1000 connections" %
              ((memory(pid) - size) // 1024))
        assert memory(pid) - size < 100 * 1024 * 1024
    wait_ok(a)
    assert a.pids("dovetail-health") == [pid]


def test_slow_writers(a):
    """A byte now and then, and at last none: each has some seconds for a request
    (HTTP: a minute), and no more."""
    slow = {}
    with contextlib.ExitStack() as stack:
        for listener, question in QUESTIONS.items():
            if listener != "agent":
                slow[listener] = stack.enter_context(knock(a, listener))
        start = time.monotonic()
        sent = 0
        while slow:
            assert time.monotonic() - start < 150, slow.keys()
            for listener, s in list(slow.items()):
                s.settimeout(0)
                # never to the end of the request
                question = QUESTIONS[listener][:-1]
                with contextlib.suppress(BlockingIOError):
                    try:
                        if sent < len(question):
                            s.send(question[sent:sent + 1])
                        if s.recv(1000) == b"":
                            del slow[listener]
                    except ConnectionError:
                        del slow[listener]
            sent += 1
            asks(a)
            time.sleep(0.5)
        print("all were closed after %d s" % (time.monotonic() - start))


@pytest.mark.parametrize("listener", LISTENERS)
def test_deaf(a, listener):
    """Questions without end, and no answer is ever read."""
    pid, = a.pids("dovetail-health")
    size = memory(pid)
    question = (QUESTIONS[listener] or b"x") * 50
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            s = stack.enter_context(knock(a, listener))
            s.settimeout(0)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                for _ in range(2000):
                    s.send(question)
        asks(a)
        assert memory(pid) - size < 50 * 1024 * 1024
    assert a.pids("dovetail-health") == [pid]


@pytest.mark.parametrize("listener", LISTENERS)
def test_rubbish(a, listener):
    """Whatever is said, in whatever pieces."""
    pid, = a.pids("dovetail-health")
    chance = random.Random("dovetail" + listener)
    question = QUESTIONS[listener] or b"agent\n"
    for _ in range(300):
        kind = chance.randrange(4)
        if kind == 0:
            data = chance.randbytes(chance.randrange(1, 5000))
        elif kind == 1:
            data = bytearray(question * chance.randrange(1, 5))
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        elif kind == 2:
            data = question[:-1] + chance.choice([b"x", b"\0", b"\xff"]) * \
                chance.choice([1, 1000, 70000, 600000])
        else:
            data = question * chance.randrange(1, 300) + b"\0"
        with knock(a, listener) as s, contextlib.suppress(
                ConnectionError, BrokenPipeError):
            s.settimeout(20)
            cut = chance.randrange(len(data) + 1)
            for part in (data[:cut], data[cut:]):
                # it may have had enough, or answer more than we read
                s.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    s.sendall(part)
            if chance.randrange(2):
                s.shutdown(socket.SHUT_WR)
                s.settimeout(20)
                while s.recv(65536):
                    pass
    asks(a)
    assert a.pids("dovetail-health") == [pid]
