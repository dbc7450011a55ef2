"""The service dovetail-queue alone, under a private Dovecot that runs nothing
else: a client that speaks its frames, a real Redis, and a peer (b) whose
reports are sealed by the other implementation of test/vectors.

DOVETAIL_TEST_LIBEXEC names the directory of the executable."""

import contextlib
import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time

import pytest

import cluster
import lines
from cluster import wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location(
    "make_vectors", os.path.join(HERE, "..", "vectors", "make-vectors.py"))
vectors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vectors)

num, bstr = vectors.num, vectors.bstr
HELLO, MARK, CLEAN, SWEEP, CHANGE, POSITION_GET, CHECK, STATUS_GET, REPORT, \
    SWEPT, JOB, JOB_RESULT, JOB_PROGRESS, JOB_DONE = range(1, 15)
WELCOME, REPLY, POSITION, STATUS, WORK, JOB_START, JOB_END, \
    JOB_PAUSE = range(65, 73)
MAIL, WORKER, ADMIN = range(3)
LOCAL, QUEUED, APPLIED = range(3)
OK, UNAVAILABLE, NOT_APPLIED, REFUSED = range(4)

A, B = vectors.Node("a"), vectors.Node("b")

CONF = """{versions}
base_dir = {base_dir}
state_dir = {dir}/state
log_path = {dir}/log
protocols =
ssl = no
default_vsz_limit = {vsz}
{conf}
{settings}
service dovetail-queue {{
  executable = {libexec}/dovetail-queue
  user = root
  process_min_avail = 1
  process_limit = 1
  client_limit = 1000
  {forever}
  unix_listener dovetail-queue {{
    mode = 0666
  }}
}}
"""


def frame(kind, *payload):
    data = b"".join(payload)
    return struct.pack(">IB", len(data) + 1, kind) + data


class Reader:
    """The primitives of dovetail-wire.h."""

    def __init__(self, data):
        self.data, self.pos = data, 0

    def take(self, size):
        assert self.pos + size <= len(self.data)
        self.pos += size
        return self.data[self.pos - size:self.pos]

    def num(self):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7f) << shift
            shift += 7
            if byte < 0x80:
                return value

    def str(self):
        return self.take(self.num()).decode()


class Client:
    def __init__(self, path, kind=MAIL, slot=None, slots=None):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(cluster.PATIENCE)
        self.sock.connect(path)
        self.buf = b""
        self.tag = 0
        self.replies = {}
        worker = num(slot) + num(slots) if kind == WORKER else b""
        self.send(HELLO, num(1), num(os.getpid()), bytes([kind]), worker)
        kind, r = self.read()
        assert kind == WELCOME and r.num() == 1 and r.str() == "a"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.sock.close()

    def send(self, kind, *payload):
        self.sock.sendall(frame(kind, *payload))

    def read(self, timeout=None):
        """The next frame: its type and a Reader; None when none comes."""
        while len(self.buf) < 4 or \
                len(self.buf) < 4 + struct.unpack(">I", self.buf[:4])[0]:
            if timeout is not None and not select.select(
                    [self.sock], [], [], timeout)[0]:
                return None
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.buf += data
        size = 4 + struct.unpack(">I", self.buf[:4])[0]
        data, self.buf = self.buf[:size], self.buf[size:]
        return data[4], Reader(data[5:])

    def begin(self, change, level=QUEUED):
        """Hand over a change; returns its tag."""
        self.tag += 1
        self.send(CHANGE, num(self.tag), bytes([level]), change)
        return self.tag

    def reply(self, tag, timeout=None):
        """(code, text), or None when none comes in time."""
        while tag not in self.replies:
            got = self.read(timeout)
            if got is None:
                return None
            kind, r = got
            assert kind == REPLY
            t = r.num()
            self.replies[t] = (r.take(1)[0], r.str())
        return self.replies.pop(tag)

    def change(self, change, level=QUEUED):
        return self.reply(self.begin(change, level))[0]

    def check(self, level=QUEUED):
        self.tag += 1
        self.send(CHECK, num(self.tag), bytes([level]))
        return self.reply(self.tag)

    def position(self, guid, index_id=5, user="alice"):
        self.tag += 1
        self.send(POSITION_GET, num(self.tag), bstr(user), guid,
                  num(index_id))
        kind, r = self.read()
        assert kind == POSITION and r.num() == self.tag
        return r.num(), r.num()

    def status(self):
        self.tag += 1
        self.send(STATUS_GET, num(self.tag))
        kind, r = self.read()
        assert kind == STATUS and r.num() == self.tag
        rows = [{r.str(): r.str() for _ in range(r.num())}
                for _ in range(r.num())]
        assert r.pos == len(r.data)
        return {row["direction"]: row for row in rows}

    def work(self, timeout=cluster.PATIENCE):
        """The user that is to be swept, None when there is none."""
        got = self.read(timeout)
        if got is None:
            return None
        assert got[0] == WORK
        return got[1].str()


class QueueNode(cluster.Daemon):
    def __init__(self, directory, redis, conf="", libexec=None, **settings):
        super().__init__()
        self.dir, self.redis = directory, redis
        self.socket = os.path.join(directory, "run", "dovetail-queue")
        self.log = os.path.join(directory, "log")
        keys = os.path.join(directory, "keys")
        for sub in ("", "state", "keys"):
            os.makedirs(os.path.join(directory, sub), exist_ok=True)
            os.chmod(os.path.join(directory, sub), 0o755)
        for name, text, mode in (("a.key", A.secret_line(), 0o600),
                                 ("a.pub", A.public_line(), 0o644),
                                 ("b.pub", B.public_line(), 0o644)):
            path = os.path.join(keys, name)
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, mode),
                      "w") as f:
                f.write(text + "\n")
        self.settings = {"dovetail_node": "a", "dovetail_primary": "a",
                         "dovetail_key_dir": keys,
                         "dovetail_state_dir": directory + "/dovetail",
                         "dovetail_peers": "b", "dovetail_redis": redis.url,
                         "dovetail_shards": "2"}
        self.settings.update(settings)
        self.line = lines.of_node(0)
        self.extra, self.libexec = conf, libexec or self.line.libexec

    def start(self, ready=True):
        with open(os.path.join(self.dir, "dovecot.conf"), "w") as f:
            f.write(CONF.format(
                dir=self.dir, base_dir=os.path.join(self.dir, "run"),
                # the address sanitizer wants all there is
                vsz="0" if "ASAN_OPTIONS" in os.environ else "1G",
                conf=self.extra, libexec=self.libexec,
                versions=self.line.versions, forever=self.line.forever,
                settings=self.line.settings(self.settings)))
        self.spawn(self.line.command("dovecot", "-F", "-c",
                                     self.dir + "/dovecot.conf"),
                   self.greets, os.path.join(self.dir, "out"))
        if ready:
            wait_for(self.ready, "the queue to be ready")

    def greets(self):
        with contextlib.suppress(OSError, EOFError):
            with self.client():
                return True

    def ready(self):
        with self.client() as client:
            return client.check()[0] == OK

    def stop(self):
        self.end(signal.SIGTERM)

    def pid(self):
        pids = [pid for pid in cluster.children(self.process.pid)
                if cluster.executable(pid) == "dovetail-queue"]
        return pids[0] if pids else None

    def kill_service(self):
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self.pid() not in (None, pid), "the next process")

    def client(self, *args, **kwargs):
        return Client(self.socket, *args, **kwargs)

    def worker(self, slot=0, slots=1):
        return self.client(WORKER, slot, slots)

    def log_text(self):
        if not os.path.exists(self.log):
            return ""
        with open(self.log, errors="replace") as f:
            return f.read()

    def marks(self):
        return sorted(os.listdir(os.path.join(self.dir, "dovetail", "queue",
                                              "dirty")))

    def entries(self, shard):
        """[(id, entry)] of a shard's stream."""
        return stream(self.redis, "dovetail:log:a:%d" % shard)


def stream(redis, key):
    """Speaks RESP itself: redis-cli does not give bytes."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(redis.socket)
        s.sendall(resp("XRANGE", key, "-", "+"))
        f = s.makefile("rb")

        def parse():
            line = f.readline()
            if line[:1] == b"*":
                return [parse() for _ in range(int(line[1:]))]
            if line[:1] == b"$":
                data = f.read(int(line[1:]) + 2)
                return data[:-2]
            return line.strip()
        return [(i.decode(), fields[1]) for i, fields in parse()]


def resp(*args):
    args = [a.encode() if isinstance(a, str) else a for a in args]
    return b"*%d\r\n" % len(args) + b"".join(
        b"$%d\r\n%s\r\n" % (len(a), a) for a in args)


def redis_do(redis, *args):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(redis.socket)
        s.sendall(resp(*args))
        return s.recv(65536)


def entry_id(entry):
    generation, seq = struct.unpack(">QQ", entry[16:32])
    return "%d-%d" % (generation, seq)


def chained(entries):
    """All signed, numbered and chained without gaps; returns their number."""
    prev = None
    for where, entry in entries:
        digest = vectors.blake2b(entry[:-64])
        A.sign.public_key().verify(entry[-64:], digest)
        assert entry_id(entry) == where
        assert prev is None or entry[48:80] == prev
        prev = digest
    return len(entries)


def shard_of(user, shards=2):
    return int.from_bytes(vectors.blake2b(user.encode())[:8], "big") % shards


GUID = bytes(range(16))


def delta(begin, end, user="alice", guid=GUID, index_id=5, body=b""):
    ops = [vectors.append(inline=body, size=len(body))] if body else []
    return vectors.mailbox(ops, user=user, guid=guid, frm=(index_id, 1, begin),
                           to=(index_id, 1, end))[0]


def snapshot(end, user="alice", guid=GUID, index_id=5):
    return vectors.mailbox(user=user, guid=guid, frm=(0, 0, 0), flags=1,
                           to=(index_id, 1, end))[0]


def report(node, shard, where, failed=(), sealer=B, ahead=0, **kw):
    """b's replica reports that it is at an ID of a shard's stream."""
    generation, seq = map(int, where.split("-"))
    payload = vectors.ack(generation, seq, int(time.time() * 1e6),
                          failed=failed, **kw)[0]
    entry = vectors.Entry(sealer, [A], payload, kind=2, shard=shard, shards=2,
                          generation=0, seq=0,
                          time=int((time.time() + ahead) * 1e6))
    redis_do(node.redis, "XADD", "dovetail:ack:a", "*", "e", entry.bytes)


@pytest.fixture(scope="module")
def directory():
    path = tempfile.mkdtemp(prefix="dovetail-queue-")
    os.chmod(path, 0o755)
    yield path
    if not os.environ.get("DOVETAIL_TEST_KEEP"):
        shutil.rmtree(path)


@pytest.fixture
def make_node(directory):
    made = []

    def make(start=True, **kwargs):
        path = os.path.join(directory, "%d" % len(os.listdir(directory)))
        redis = cluster.Redis(path + "/redis")
        made.append(redis)
        redis.start()
        node = QueueNode(path, redis, **kwargs)
        made.append(node)
        if start:
            node.start()
        return node
    yield make
    for daemon in reversed(made):
        if isinstance(daemon, QueueNode):
            if daemon.running():
                daemon.stop()
            assert not re.search("Panic|SIGSEGV|SIGABRT|AddressSanitizer",
                                 daemon.log_text()), daemon.log_text()
        else:
            daemon.close()


@pytest.fixture
def node(make_node):
    return make_node()


def test_change_is_queued(node):
    with node.client() as client:
        assert client.change(delta(40, 96)) == OK
        entries = node.entries(shard_of("alice"))
        assert chained(entries) == 1
        assert b"alice" not in entries[0][1]
        assert client.change(delta(96, 100), LOCAL) == OK
        assert chained(node.entries(shard_of("alice"))) == 2
        assert client.position(GUID) == (1, 100)
        assert client.position(GUID, 6) == (0, 0)
        assert client.position(bytes(16)) == (0, 0)


def test_known_changes_are_dropped(node):
    shard = shard_of("alice")
    with node.client() as client:
        assert client.change(delta(40, 96)) == OK
        assert client.change(delta(40, 96)) == OK
        assert client.change(delta(60, 80)) == OK
        assert chained(node.entries(shard)) == 1
        # more than is known; of another index; of another mailbox
        assert client.change(delta(40, 97)) == OK
        assert client.change(delta(40, 97, index_id=6)) == OK
        assert client.change(delta(40, 97, guid=GUID[::-1])) == OK
        assert client.change(snapshot(97)) == OK
        assert client.change(snapshot(97)) == OK
        assert chained(node.entries(shard)) == 6
        # before what is known
        assert client.change(delta(200, 300)) == OK
        assert client.change(delta(100, 250)) == OK
        assert chained(node.entries(shard)) == 8


def test_copied_mail_stores(node):
    """Two users' mailboxes may have the same GUID."""
    with node.client() as client:
        assert client.change(delta(40, 96)) == OK
        assert client.change(delta(40, 90, user="copy of alice")) == OK
        assert client.position(GUID) == (1, 96)
        assert client.position(GUID, user="copy of alice") == (1, 90)
        assert client.position(GUID, user="bob") == (0, 0)
    assert chained(node.entries(0)) + chained(node.entries(1)) == 2


def test_known_changes_wait_for_the_first(node):
    with node.client() as first, node.client() as second:
        node.redis.pause()
        tags = [(first, first.begin(delta(1, 10))),
                (second, second.begin(delta(1, 10))),
                (second, second.begin(delta(10, 20))),
                (first, first.begin(delta(10, 20)))]
        assert first.reply(tags[0][1], 0.3) is None
        node.redis.resume()
        for client, tag in tags:
            assert client.reply(tag)[0] == OK
    # the first alone, if the service was fast; the others as a group
    assert chained(node.entries(shard_of("alice"))) <= 2


def test_groups(node):
    """Many clients, each with many changes, order kept per client."""
    clients = [node.client() for _ in range(8)]
    tags = [[client.begin(delta(i, i + 1, user="user%d" % n,
                                guid=bytes([n + 1]) * 16, body=b"x" * 2000))
             for i in range(1, 200)] for n, client in enumerate(clients)]
    for client, wanted in zip(clients, tags):
        for tag in wanted:
            assert client.reply(tag)[0] == OK
        client.close()
    count = sum(chained(node.entries(shard)) for shard in range(2))
    assert 0 < count < 8 * 199


def test_large_change(node):
    with node.client() as client:
        big = delta(1, 2, body=b"y" * 4000000)
        assert client.change(big) == OK
        assert client.change(delta(2, 3, body=b"z" * 300000)) == OK
        assert client.reply(client.begin(
            delta(1, 2, body=b"y" * (4 * 1024 * 1024 - 10)))) == (
                REFUSED, "The change is too large")
    assert chained(node.entries(shard_of("alice"))) == 2


def test_nonsense(node):
    with node.client() as client:
        assert client.change(b"\x07rubbish") == REFUSED
        assert client.change(delta(1, 2, user="")) == REFUSED
        assert client.change(delta(1, 2), 3) == REFUSED
        assert client.change(delta(1, 2)) == OK
    for data in (b"GET / HTTP/1.0\r\n\r\n", frame(CHANGE, b"\x01\x01"),
                 frame(99), b"\0\0\0\0", frame(HELLO, num(2), num(1), b"\0")):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(cluster.PATIENCE)
            s.connect(node.socket)
            s.sendall(data)
            assert s.recv(100) == b""
    with node.client() as client:
        client.send(WELCOME)
        with pytest.raises((EOFError, ConnectionError)):
            client.read()


def test_byte_by_byte(node):
    with node.client() as client:
        for byte in frame(CHANGE, num(7), b"\1", delta(1, 2)):
            client.sock.sendall(bytes([byte]))
            time.sleep(0.0005)
        assert client.reply(7)[0] == OK


def test_system_users_speak_for_themselves(node):
    import pwd
    user = pwd.getpwnam("daemon")
    pid = os.fork()
    if pid == 0:
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
        with node.client() as client:
            good = client.change(delta(1, 2, user="daemon")) == OK and \
                client.change(delta(1, 2, user="root")) == REFUSED and \
                client.change(delta(1, 2, user="nosuchuser")) == REFUSED
            client.send(SWEEP, bstr("root"))
            client.send(MARK, bstr("root"))
            client.send(MARK, bstr("daemon"))
            good = good and client.check()[0] == OK
        with contextlib.suppress(OSError, EOFError):
            node.worker()
            good = False
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    wait_for(lambda: node.marks() == ["daemon"], "the mark")


# ---- Redis comes and goes ----

def test_redis_restarts(node):
    shard = shard_of("alice")
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        node.redis.stop()
        # Those who come at once wait and see; later ones do not.
        start = time.monotonic()
        tag = client.begin(delta(2, 3))
        assert client.reply(tag)[0] == UNAVAILABLE
        assert time.monotonic() - start < 1.8
        start = time.monotonic()
        assert client.change(delta(3, 4)) == UNAVAILABLE
        assert time.monotonic() - start < 0.2
        assert client.check()[0] == UNAVAILABLE
        assert client.position(GUID) == (0, 0)
        # what is stored, is stored
        assert client.change(delta(1, 2)) == OK
        assert node.marks() == ["alice"]
        assert client.status()["self"]["dirty_users"] == "1"
        node.redis.start()
        wait_for(node.ready, "the queue to be ready")
        assert client.change(delta(1, 4)) == OK
        assert client.position(GUID) == (1, 4)
    assert chained(node.entries(shard)) == 2


def test_redis_restarts_without_a_word(make_node):
    """One line when Redis goes, one when it is back, whatever the number of
    connections; and nothing about logs in which nothing ever stood."""
    node = make_node(dovetail_shards="8")
    for n in range(1, 3):
        node.redis.stop()
        with node.client() as client:
            wait_for(lambda: client.check()[0] == UNAVAILABLE, "the loss")
            node.redis.wipe()
            node.redis.start()
            wait_for(node.ready, "the queue to be ready")
            wait_for(lambda: node.log_text().count("Info: redis(") == n,
                     "both connections")
    lines = [line for line in node.log_text().splitlines()
             if "dovetail-queue" in line]
    assert [re.search("(Error|Info|Warning): redis", line)[1]
            for line in lines] == ["Error", "Info"] * 2


def test_redis_restarts_quickly(node):
    """Nobody notices, if it takes less than a second."""
    shard = shard_of("alice")
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        node.redis.kill()
        tag = client.begin(delta(2, 3))
        node.redis.start()
        assert client.reply(tag)[0] == OK
    assert chained(node.entries(shard)) == 2


def test_redis_hangs(node):
    """An XADD without an answer: the ack timeout, not longer, and later it
    turns out to be stored."""
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        node.redis.pause()
        tags = [client.begin(delta(2, 3)), client.begin(delta(3, 4))]
        start = time.monotonic()
        assert [client.reply(tag)[0] for tag in tags] == [UNAVAILABLE] * 2
        assert 1 < time.monotonic() - start < 3.5
        assert client.change(delta(3, 4)) == UNAVAILABLE
        node.redis.resume()
        wait_for(lambda: client.check()[0] == OK, "Redis to answer")
        assert client.change(delta(1, 4)) == OK
        assert client.position(GUID) == (1, 4)
    chained(node.entries(shard_of("alice")))


def test_redis_is_lost_while_it_hangs(node):
    """The connection breaks after XADD was sent: the stream tells."""
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        node.redis.pause()
        tag = client.begin(delta(2, 3))
        time.sleep(0.2)
        node.redis.kill()
        node.redis.start()
        assert client.reply(tag)[0] == OK
        assert client.change(delta(3, 4)) == OK
    entries = node.entries(shard_of("alice"))
    assert chained(entries) == 3
    # what was never stored leaves no gap in the chain


def test_redis_forgets(node):
    shard = shard_of("alice")
    with node.client() as client:
        for i in range(1, 6):
            assert client.change(delta(i, i + 1)) == OK
        last = node.entries(shard)[-1]
        redis_do(node.redis, "FLUSHALL")
        assert client.change(delta(6, 7)) == OK
        node.redis.stop()
        node.redis.wipe()
        node.redis.start()
        wait_for(node.ready, "the queue to be ready")
        assert client.change(delta(7, 8)) == OK
    entries = node.entries(shard)
    assert chained(entries) == 1
    # a new generation, and a gap that a replica sees
    assert int(entries[0][0].split("-")[0]) > int(last[0].split("-")[0])
    assert entries[0][1][48:80] != bytes(32)
    assert "Starting a new generation" in node.log_text()


def test_somebody_writes_into_the_stream(node):
    shard = shard_of("alice")
    key = "dovetail:log:a:%d" % shard
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        generation = int(node.entries(shard)[0][0].split("-")[0])
        redis_do(node.redis, "XADD", key, "%d-7" % (generation + 1000),
                 "e", b"rubbish")
        assert client.change(delta(2, 3)) == OK
        entries = node.entries(shard)
        assert entries[-1][0] == "%d-1" % (generation + 1001)
        assert chained([entries[0], entries[-1]]) == 2
        redis_do(node.redis, "XADD", key,
                 "18446744073709551615-18446744073709551615", "e", b"x")
        assert client.change(delta(3, 4)) == OK
        assert chained(node.entries(shard)) == 1
        wait_for(lambda: "Deleting the stream" in node.log_text(), "the log")


def test_redis_refuses(node):
    shard = shard_of("alice")
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        redis_do(node.redis, "CONFIG", "SET", "maxmemory", "1")
        tag = client.begin(delta(2, 3))
        code, text = client.reply(tag)
        assert code == UNAVAILABLE and "OOM" in text
        assert client.change(delta(2, 4)) == UNAVAILABLE
        assert client.check()[0] == UNAVAILABLE
        assert "OOM" in client.status()["to"]["connection"]
        assert node.log_text().count("XADD failed") == 1
        redis_do(node.redis, "CONFIG", "SET", "maxmemory", "0")
        assert client.change(delta(2, 4)) == OK
        assert client.check()[0] == OK
    assert chained(node.entries(shard)) == 2


def test_redis_absent_at_start(make_node):
    node = make_node(start=False)
    node.redis.stop()
    node.start(ready=False)
    with node.client() as client:
        wait_for(lambda: client.change(delta(1, 2)) == UNAVAILABLE, "an answer")
        node.redis.start()
        wait_for(lambda: client.check()[0] == OK, "Redis")
        assert client.change(delta(1, 2)) == OK


# ---- the service comes and goes ----

def test_chain_goes_on(node):
    """Restart, kill and reload of the service; each entry once."""
    shard = shard_of("alice")
    for i, restart in enumerate((node.kill_service, lambda: (
            node.stop(), node.start()), lambda: (
                os.kill(node.process.pid, signal.SIGHUP), time.sleep(1)))):
        wait_for(node.ready, "the queue to be ready")
        with node.client() as client:
            assert client.change(delta(2 * i + 1, 2 * i + 2)) == OK
            assert client.change(delta(2 * i + 2, 2 * i + 3)) == OK
        restart()
    wait_for(node.ready, "the queue to be ready")
    entries = node.entries(shard)
    # and perhaps heartbeats
    assert 6 <= chained(entries) <= 8
    assert len({e[0].split("-")[0] for e in entries}) == 1
    assert "new generation" not in node.log_text()


def test_state_is_lost(node):
    shard = shard_of("alice")
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
    node.stop()
    os.unlink(node.dir + "/dovetail/queue/log.%d" % shard)
    node.start()
    with node.client() as client:
        assert client.change(delta(2, 3)) == OK
    first, second = node.entries(shard)
    assert int(second[0].split("-")[0]) > int(first[0].split("-")[0])
    assert second[1][48:80] == bytes(32)
    assert "state of the log is lost" in node.log_text()


def test_reload_under_load(node):
    """Clients reconnect; no entry is repeated, none gets lost."""
    done = threading.Event()
    stored = []

    def write():
        i = 1
        client = None
        while not done.is_set():
            try:
                client = client or node.client()
                if client.change(delta(i, i + 1)) == OK:
                    stored.append(i)
                i += 1
            except (OSError, EOFError):
                client = None
                time.sleep(0.01)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            time.sleep(0.5)
            os.kill(node.process.pid, signal.SIGHUP)
        time.sleep(1.5)
    finally:
        done.set()
        thread.join()
    assert len(stored) > 20
    entries = node.entries(shard_of("alice"))
    chained(entries)
    assert len(entries) >= len(stored)


@pytest.mark.parametrize("change, words", [
    ({"dovetail_peers": "c"}, "c.pub"),
    ({"dovetail_redis": "redis://u:p@h"}, "dovetail_redis"),
    ({"dovetail_shards": "x"}, "dovetail_shards"),
])
def test_wrong_settings(make_node, change, words):
    """Dovecot does not start, or the service says so in the log."""
    node = make_node(start=False, **change)
    said = ""
    try:
        threading.Timer(2, lambda: node.running() and
                        node.signal(signal.SIGTERM)).start()
        node.start(ready=False)
    except AssertionError as e:
        said = str(e)
    wait_for(lambda: not node.running(), "Dovecot to end")
    said += node.log_text()
    assert re.search("(Fatal|Error)[^\n]*" + words, said), said


def test_no_peers(make_node):
    node = make_node(dovetail_peers="")
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        assert client.check(APPLIED)[0] == OK
        assert "no peers" in client.status()["self"]["connection"]
    assert node.entries(shard_of("alice")) == []


def test_least_privilege(node):
    with open("/proc/%d/status" % node.pid()) as f:
        uid = re.search(r"Uid:\s+(\d+)\s+(\d+)\s+(\d+)", f.read()).groups()
    assert set(uid) == {node.line.uid("dovecot")}
    with open("/proc/%d/status" % node.pid()) as f:
        assert re.search(r"CapEff:\s+0+$", f.read(), re.M)


# ---- replicas report ----

def test_applied(node):
    shard = shard_of("alice")
    with node.client() as client:
        assert client.check(APPLIED)[0] == UNAVAILABLE
        assert client.status()["to"]["connection"] == "never seen"
        tag = client.begin(delta(1, 2), APPLIED)
        tag2 = client.begin(delta(2, 3), APPLIED)
        assert client.reply(tag, 0.3) is None
        entries = node.entries(shard)
        row = client.status()["to"]
        assert int(row["entries"]) == len(entries)
        assert int(row["bytes"]) == sum(len(e[1]) for e in entries)
        assert float(row["lag"]) > 0.2
        report(node, shard, entries[-1][0], entries=1)
        assert client.reply(tag)[0] == OK
        assert client.reply(tag2)[0] == OK
        row = client.status()["to"]
        assert row["connection"] == "ok"
        assert (row["entries"], row["lag"]) == ("0", "0.000")
        assert client.check(APPLIED)[0] == OK
        # queued already: the replica is asked again whether it could apply it
        tag = client.begin(delta(1, 2), APPLIED)
        wait_for(lambda: node.entries(shard)[-1][0] != entries[-1][0],
                 "the same change again")
        assert client.reply(tag, 0.3) is None
        report(node, shard, node.entries(shard)[-1][0], entries=2)
        assert client.reply(tag)[0] == OK
        wait_for(lambda: len(node.entries(shard)) == 1, "trimming")


def test_not_applied(node):
    shard = shard_of("alice")
    with node.client() as client:
        tags = [client.begin(delta(1, 2), APPLIED)]
        wait_for(lambda: node.entries(shard), "the first entry")
        where = node.entries(shard)[-1][0]
        generation, seq = map(int, where.split("-"))
        report(node, shard, where, failed=[(generation, seq, 0)],
               last_error="Disk full")
        assert client.reply(tags[0]) == (NOT_APPLIED, "Disk full")
        row = client.status()["to"]
        assert row["error"] == "Disk full"


def test_false_reports(node):
    shard = shard_of("alice")
    stranger = vectors.Node("x")
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
        assert client.change(delta(2, 3)) == OK
        entries = node.entries(shard)
        report(node, shard, entries[-1][0], sealer=stranger)
        report(node, shard, entries[-1][0], sealer=A)
        # what was never sent
        generation = int(entries[0][0].split("-")[0])
        report(node, shard, "%d-99" % generation)
        for _ in range(3):
            redis_do(node.redis, "XADD", "dovetail:ack:a", "*", "e", b"junk")
        redis_do(node.redis, "XADD", "dovetail:ack:a", "*", "f", b"junk")
        # an old report, again, after a newer one
        report(node, shard, entries[0][0])
        old = stream(node.redis, "dovetail:ack:a")[-1][1]
        report(node, shard, entries[1][0], rejected=4)
        redis_do(node.redis, "XADD", "dovetail:ack:a", "*", "e", old)
        wait_for(lambda: client.status()["to"]["entries"] == "0", "the report")
        time.sleep(0.2)
        row = client.status()
        assert row["to"]["entries"] == "0"
        assert row["to"]["rejected"] == "5"
        assert int(row["self"]["rejected"]) == 5
        assert len(re.findall("is refused .more of", node.log_text())) == 4
        assert len(node.entries(shard)) >= 1


def test_clock_of_a_replica_was_ahead(node):
    shard = shard_of("alice")
    with node.client() as client:
        for i in range(1, 4):
            assert client.change(delta(i, i + 1)) == OK
        entries = node.entries(shard)
        for n, ahead in enumerate((0, 3600, 0)):
            report(node, shard, entries[n][0], ahead=ahead)
            wait_for(lambda: client.status()["to"]["position"].split()[
                shard] == entries[n][0], "report %d" % n)


def test_full_queue(make_node):
    node = make_node(dovetail_queue_max_size="16M")
    shard = shard_of("alice")
    with node.client() as client, node.worker() as worker:
        for i in range(1, 100):
            code = client.change(delta(i, i + 1, body=b"x" * 500000))
            if code != OK:
                break
        assert code == UNAVAILABLE and 30 < i < 40
        assert client.check()[0] == UNAVAILABLE
        assert client.status()["to"]["connection"] == "the queue is full"
        # nobody is swept into a full queue
        assert worker.work(0.5) is None
        report(node, shard, node.entries(shard)[-1][0])
        assert worker.work() == "alice"
        assert client.change(delta(i, i + 1)) == OK
        assert len(node.entries(shard)) < 5


def test_backlog_after_restart(node):
    shard = shard_of("alice")
    with node.client() as client:
        for i in range(1, 50):
            assert client.change(delta(i, i + 1, body=b"x" * 1000)) == OK
        before = client.status()["to"]
    node.stop()
    node.start()
    with node.client() as client:
        after = client.status()["to"]
        assert int(after["entries"]) == int(before["entries"])
        assert int(after["bytes"]) == pytest.approx(int(before["bytes"]),
                                                    rel=0.5)
        assert float(after["lag"]) > 0
        middle = node.entries(shard)[24][0]
        report(node, shard, middle)
        wait_for(lambda: client.status()["to"]["entries"] == "24", "the report")


def test_heartbeat(node):
    with node.client() as client:
        assert client.change(delta(1, 2)) == OK
    shard = shard_of("alice")
    report(node, shard, node.entries(shard)[-1][0])
    wait_for(lambda: len(node.entries(shard)) == 2, "a heartbeat", 12)
    chained(node.entries(shard))


# ---- dirty users ----

def test_sweep(node):
    with node.worker() as worker, node.client() as client:
        client.send(SWEEP, bstr("alice"))
        assert worker.work() == "alice"
        assert node.marks() == ["alice"]
        # again while being swept: one more time, later
        client.send(SWEEP, bstr("alice"))
        assert worker.work(0.3) is None
        worker.send(SWEPT, bstr("alice"), b"\1")
        assert worker.work() == "alice"
        worker.send(SWEPT, bstr("alice"), b"\1")
        wait_for(lambda: client.status()["self"]["dirty_users"] == "0",
                 "the user to be clean")
        assert worker.work(0.3) is None
        # the mark goes at the end, if not before
        node.stop()
        assert node.marks() == []


def test_marks(node):
    odd = "%/.ü\t" + "x" * 10
    long = "l" * 300
    with node.worker() as worker:
        with node.client() as client:
            for user in ("clean", "marked", odd, long):
                client.send(MARK, bstr(user))
            client.send(CLEAN, bstr("clean"))
            wait_for(lambda: len(node.marks()) == 4, "the marks")
            assert worker.work(0.3) is None
        users = set()
        for _ in range(3):
            users.add(worker.work())
        assert users == {"marked", odd, long}
        assert worker.work(0.3) is None
    # The worker has gone without an answer; a mark outlives the service.
    node.kill_service()
    wait_for(node.ready, "the queue to be ready")
    with node.worker() as worker:
        users = {worker.work() for _ in range(4)}
        assert users == {"clean", "marked", odd, long}
        for user in users:
            worker.send(SWEPT, bstr(user), b"\1")
        wait_for(lambda: worker.check()[0] == OK, "an answer")
    node.stop()
    assert node.marks() == []


def test_failed_sweep_is_tried_again(node):
    with node.worker() as worker, node.client() as client:
        client.send(SWEEP, bstr("alice"))
        assert worker.work() == "alice"
        start = time.monotonic()
        worker.send(SWEPT, bstr("alice"), b"\0")
        assert worker.work() == "alice"
        assert 4 < time.monotonic() - start < 7


def test_workers_share(node):
    users = ["user%d" % i for i in range(40)]
    with node.worker(0, 2) as w0, node.worker(1, 2) as w1, \
            node.client() as client:
        for user in users:
            client.send(SWEEP, bstr(user))
        for slot, worker in enumerate((w0, w1)):
            mine = [u for u in users if shard_of(u) == slot]
            got = [worker.work() for _ in range(4)]
            # not more at a time
            assert worker.work(0.3) is None
            while got:
                user = got.pop(0)
                mine.remove(user)
                # its changes do not wait for its own sweep
                worker.send(CHANGE, num(1), b"\1",
                            delta(1, 2, user=user, guid=user.encode()
                                  .ljust(16, b"\0")))
                while True:
                    kind, r = worker.read()
                    if kind == REPLY:
                        break
                    got.append(r.str())
                worker.send(SWEPT, bstr(user), b"\1")
                more = worker.work(0.3 if len(mine) <= len(got) else None)
                if more is not None:
                    got.append(more)
            assert mine == []


def test_client_leaves_too_early(node):
    """ack=local: it did not wait. What it handed over is queued all the same,
    and nobody has to look for it."""
    with node.worker() as worker:
        node.redis.pause()
        with node.client() as client:
            client.begin(delta(1, 2), LOCAL)
            time.sleep(0.1)
        time.sleep(0.3)
        node.redis.resume()
        wait_for(lambda: node.entries(shard_of("alice")), "the entry")
        assert chained(node.entries(shard_of("alice"))) == 1
        # later than a client that left marked would be swept
        assert worker.work(2) is None


def test_reports_of_workers(node):
    with node.worker(0, 2) as w0, node.worker(1, 2) as w1:
        for shard, worker in enumerate((w0, w1)):
            fields = {"peer": "b", "shard": str(shard), "connection": "ok",
                      "position": "1-2", "lag": "0.01%d" % shard,
                      "entries": "5", "rejected": "2",
                      "rejected_reasons": "gap=%d malformed=1" % (shard + 1),
                      "set_aside": "1", "error": "",
                      "applied_time": "1700000000"}
            worker.send(REPORT, num(1), num(len(fields)), b"".join(
                bstr(k) + bstr(v) for k, v in fields.items()))
            assert worker.check()[0] == OK
        row = w0.status()["from"]
        assert row["connection"] == "ok"
        assert row["lag"] == "0.011"
        assert (row["entries"], row["rejected"], row["set_aside"]) == (
            "10", "4", "2")
        assert row["rejected_reasons"] == "gap=3 malformed=2"
        assert row["applied"] == "2023-11-14T22:13:20.000Z"
    with node.client() as client:
        wait_for(lambda: client.status()["from"]["connection"] ==
                 "no replay worker", "the workers to be forgotten")


# ---- jobs ----

def job(users="*", flags=0, rate=0, resume=0):
    return bytes([flags]) + bstr(users) + num(rate) + bytes([resume])


def started(worker):
    """What a worker is to do: its id and the job."""
    kind, r = worker.read()
    assert kind == JOB_START
    return r.num(), r.data[r.pos:]


def ended(worker):
    """The id of a job that is over, and whether it was complete."""
    kind, r = worker.read()
    assert kind == JOB_END
    return r.num(), bool(r.take(1)[0])


def done(end=0, text=""):
    return bytes([end]) + bstr(text)


def forwarded(admin):
    """What the administrator gets: type, tag, slot, the rest."""
    kind, r = admin.read()
    return kind, r.num(), r.num(), r.data[r.pos:]


def test_job_of_all_users(node):
    with node.worker(0, 2) as w0, node.worker(1, 2) as w1, \
            node.client(ADMIN) as admin:
        admin.send(JOB, num(7), job("*", 5, 1001))
        ids = set()
        for worker in w0, w1:
            number, what = started(worker)
            ids.add(number)
            # half of the rate each
            assert what == job("*", 5, 500)
        assert len(ids) == 1
        w1.send(JOB_RESULT, num(number), b"whatever it is")
        assert forwarded(admin) == (JOB_RESULT, 7, 1, b"whatever it is")
        w0.send(JOB_PROGRESS, num(number), b"\0\1\2")
        assert forwarded(admin) == (JOB_PROGRESS, 7, 0, b"\0\1\2")
        # unknown ids are nobody's
        w0.send(JOB_RESULT, num(number + 1), b"nothing")
        w0.send(JOB_DONE, num(number), done())
        assert forwarded(admin) == (JOB_DONE, 7, 0, done())
        # and neither is what comes after the end
        w0.send(JOB_RESULT, num(number), b"late")
        w1.send(JOB_DONE, num(number), done())
        assert forwarded(admin) == (JOB_DONE, 7, 1, done())
        assert admin.reply(7) == (OK, "")
        assert ended(w0) == ended(w1) == (number, True)
        # the next one
        admin.send(JOB, num(8), job())
        assert started(w0)[0] != number
        assert started(w1)[1] == job()


@pytest.mark.parametrize("user", ["alice", "bob", "carol"])
def test_job_of_one_user(node, user):
    with node.worker(0, 2) as w0, node.worker(1, 2) as w1, \
            node.client(ADMIN) as admin:
        admin.send(JOB, num(1), job(user))
        worker, other = (w0, w1) if shard_of(user) == 0 else (w1, w0)
        number, what = started(worker)
        assert what == job(user)
        worker.send(JOB_DONE, num(number), done(2, "who?"))
        assert forwarded(admin) == (JOB_DONE, 1, shard_of(user),
                                    done(2, "who?"))
        assert admin.reply(1) == (OK, "")
        assert ended(worker) == (number, False)
        assert other.read(0.2) is None


def test_jobs_side_by_side(node):
    with node.worker() as worker, node.client(ADMIN) as one, \
            node.client(ADMIN) as two:
        one.send(JOB, num(1), job("alice"))
        two.send(JOB, num(1), job("bob"))
        numbers = {what: number for number, what in
                   (started(worker), started(worker))}
        one.send(JOB, num(2), job())
        code, text = one.reply(2)
        assert code == UNAVAILABLE and "at a time" in text
        worker.send(JOB_RESULT, num(numbers[job("bob")]), b"b")
        assert forwarded(two) == (JOB_RESULT, 1, 0, b"b")
        worker.send(JOB_RESULT, num(numbers[job("alice")]), b"a")
        assert forwarded(one) == (JOB_RESULT, 1, 0, b"a")


def test_job_without_workers(node):
    with node.client(ADMIN) as admin:
        admin.send(JOB, num(1), job())
        code, text = admin.reply(1)
        assert code == UNAVAILABLE and "dovetail-replay" in text
        with node.worker(0, 2) as worker:
            admin.send(JOB, num(2), job())
            code, text = admin.reply(2)
            assert code == UNAVAILABLE and "shard 1" in text
            assert worker.read(0.2) is None


def test_job_without_peers(make_node):
    with make_node(dovetail_peers="").client(ADMIN) as admin:
        admin.send(JOB, num(1), job())
        code, text = admin.reply(1)
        assert code == UNAVAILABLE and "dovetail_peers" in text


def test_job_is_not_for_everybody(node):
    import pwd
    user = pwd.getpwnam("daemon")
    with node.worker() as worker:
        pid = os.fork()
        if pid == 0:
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            with node.client(ADMIN) as admin:
                admin.send(JOB, num(1), job("daemon"))
                os._exit(0 if admin.reply(1)[0] == REFUSED else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert worker.read(0.2) is None


@pytest.mark.parametrize("data", [
    b"", num(1), num(1) + job("*")[:-1], num(1) + job("*") + b"\0",
    num(1) + job(""), num(1) + job("x", resume=1), num(1) + job("*", flags=8)])
def test_job_that_makes_no_sense(node, data):
    with node.worker() as worker:
        with node.client(ADMIN) as admin:
            admin.send(JOB, data)
            with pytest.raises((EOFError, ConnectionError)):
                admin.read()
        for client in node.client(MAIL), node.worker(1, 2):
            with client:
                client.send(JOB, num(1), job())
                with pytest.raises((EOFError, ConnectionError)):
                    client.read()
        assert worker.read(0.2) is None
        # nor does what a worker says
        worker.send(JOB_DONE, num(1), done(9))
        with pytest.raises((EOFError, ConnectionError)):
            worker.read()


def test_job_ends_with_its_administrator(node):
    with node.worker(0, 2) as w0, node.worker(1, 2) as w1:
        with node.client(ADMIN) as admin:
            admin.send(JOB, num(1), job())
            number, _ = started(w0)
            started(w1)
            w0.send(JOB_DONE, num(number), done())
            assert forwarded(admin)[0] == JOB_DONE
        assert ended(w0) == ended(w1) == (number, False)
        # what is still on its way reaches nobody
        w1.send(JOB_RESULT, num(number), b"x")
        w1.send(JOB_DONE, num(number), done())
        assert w1.check()[0] == OK


def test_job_loses_a_worker(node):
    with node.worker(0, 2) as w0, node.client(ADMIN) as admin:
        with node.worker(1, 2) as w1:
            admin.send(JOB, num(1), job())
            number, _ = started(w0)
            assert started(w1)[0] == number
        kind, tag, slot, data = forwarded(admin)
        assert (kind, tag, slot, data[0]) == (JOB_DONE, 1, 1, 1)
        assert b"dovetail-replay" in data
        w0.send(JOB_DONE, num(number), done())
        assert forwarded(admin) == (JOB_DONE, 1, 0, done())
        assert admin.reply(1) == (OK, "")
        assert ended(w0) == (number, False)


def test_job_of_one_who_does_not_read(node):
    """The worker is told to wait, and to go on."""
    with node.worker() as worker, node.client(ADMIN) as admin:
        admin.send(JOB, num(1), job())
        number, _ = started(worker)
        sent = 0
        while (got := worker.read(0)) is None:
            worker.send(JOB_RESULT, num(number), b"x" * 1000)
            sent += 1
            assert sent < 10000
        assert got[0] == JOB_PAUSE
        assert (got[1].num(), got[1].take(1)) == (number, b"\1")
        wait_for(lambda: worker.check()[0] == OK, "the queue")
        received = 0
        while True:
            got = worker.read(0)
            if got:
                assert got[0] == JOB_PAUSE
                assert (got[1].num(), got[1].take(1)) == (number, b"\0")
                break
            if admin.read(0.1):
                received += 1
        while received < sent:
            assert forwarded(admin) == (JOB_RESULT, 1, 0, b"x" * 1000)
            received += 1
        worker.send(JOB_DONE, num(number), done())
        assert forwarded(admin)[0] == JOB_DONE
        assert admin.reply(1) == (OK, "")
        assert ended(worker) == (number, True)


def test_questions_make_nobody_dirty(node):
    """What stands in no mailbox needs no sweep when it is lost."""
    verify = vectors.verify()[0]
    with node.client() as client, node.worker() as worker:
        node.redis.stop()
        wait_for(lambda: client.check()[0] == UNAVAILABLE, "the queue")
        assert client.change(verify) == UNAVAILABLE
        assert client.change(delta(1, 2, user="bob")) == UNAVAILABLE
        node.redis.start()
        assert worker.work() == "bob"
        assert worker.work(0.5) is None


# ---- clients that do not behave ----

def test_endless_reports(node):
    """What workers report has to fit into the answer to STATUS_GET."""
    long = "x" * 3000000

    def row(**fields):
        fields = {"peer": "b", **fields}
        return num(len(fields)) + b"".join(
            bstr(k) + bstr(v) for k, v in fields.items())

    with node.worker(0, 2) as w0, node.worker(1, 2) as w1:
        w0.send(REPORT, num(1), row(connection=long))
        w1.send(REPORT, num(1001), row(error=long), b"".join(
            row(rejected_reasons=" ".join(
                "%s%d-%d=1" % ("y" * 20, i, j) for j in range(15)))
            for i in range(1000)))
        for worker in w0, w1:
            assert worker.check()[0] == OK
        told = w0.status()["from"]
        assert told["connection"] == told["error"] == "x" * 500
        assert len(told["rejected_reasons"]) < 64 * 50



def test_deaf_client_ends(node):
    """It reads no answers until nobody reads it any more. Its end is noticed
    all the same."""
    with node.worker() as worker:
        with node.client() as client:
            client.send(MARK, bstr("alice"))
            while select.select([], [client.sock], [], 0.5)[1]:
                client.sock.send(frame(STATUS_GET, num(1)) * 100)
            assert worker.work(0) is None
        assert worker.work() == "alice"


def test_half_frames(node):
    """Who does not end what it began does not hold up the others for long."""
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            s = stack.enter_context(socket.socket(socket.AF_UNIX))
            s.settimeout(0.5)
            s.connect(node.socket)
            with contextlib.suppress(socket.timeout):
                s.sendall(struct.pack(">IB", 4 << 20, CHANGE) +
                          bytes(4000000))
        with node.client() as client:
            assert client.change(delta(1, 2, body=b"x" * 4000000)) == OK
    assert "others wait for that" in node.log_text()


def test_long_names(node):
    with node.client() as client:
        assert client.change(delta(1, 2, user="x" * 1024)) == OK
        assert client.change(delta(1, 2, user="x" * 1025)) == REFUSED
        client.send(MARK, bstr("x" * 1025))
        with pytest.raises((EOFError, ConnectionError)):
            client.read()


# ---- memory ----

def rss(pid):
    with open("/proc/%d/status" % pid) as f:
        return int(re.search(r"VmHWM:\s+(\d+)", f.read()).group(1)) * 1024


def test_memory_is_bounded(node):
    """No client that does not stop can fill the memory, whatever Redis does;
    100,000 changes wait for a replica."""
    def pour(count):
        with node.client() as client:
            stop = threading.Event()

            def drain():
                with contextlib.suppress(OSError, EOFError, ValueError):
                    while not stop.is_set():
                        client.read(0.1)
            reader = threading.Thread(target=drain)
            reader.start()
            with contextlib.suppress(OSError):
                for i in range(count):
                    client.sock.sendall(frame(
                        CHANGE, num(i + 1), b"\0",
                        delta(1, 2, user="u%d" % (i % 1000),
                              guid=struct.pack("<QQ", count, i),
                              body=b"x" * 100)))
            time.sleep(1)
            stop.set()
            reader.join()
    threads = [threading.Thread(target=pour, args=(25000 + n,))
               for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    node.redis.pause()
    time.sleep(1)
    node.redis.resume()
    for thread in threads:
        thread.join()
    with node.client() as client:
        wait_for(lambda: client.check()[0] == OK, "an answer")
        row = client.status()["to"]
        assert int(row["entries"]) > 10
    if "ASAN_OPTIONS" not in os.environ:
        assert rss(node.pid()) < 64 * 1024 * 1024


# ---- speed, shown with pytest -s ----

def test_speed(node):
    def percentile(values, p):
        return sorted(values)[int(len(values) * p)] * 1e6
    with node.client() as client:
        times = []
        for i in range(1, 1000):
            change = delta(i, i + 1, body=b"x" * 500)
            start = time.perf_counter()
            assert client.change(change) == OK
            times.append(time.perf_counter() - start)
    print("\nround trip p50 %.0f us, p95 %.0f us, p99 %.0f us" % (
        percentile(times, .5), percentile(times, .95), percentile(times, .99)))

    count, window = 4000, 32

    def write(n):
        with node.client() as client:
            tags = []
            for i in range(1, count):
                tags.append(client.begin(delta(
                    i, i + 1, user="s%d" % n, guid=bytes([n + 1]) * 16,
                    body=b"x" * 500)))
                if len(tags) >= window:
                    assert client.reply(tags.pop(0))[0] == OK
            for tag in tags:
                assert client.reply(tag)[0] == OK
            os._exit(0)
    start = time.perf_counter()
    pids = []
    for n in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                write(n)
            finally:
                os._exit(1)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    print("8 clients: %.0f changes/s" % (
        8 * count / (time.perf_counter() - start)))
