"""Redis as an enemy: what stands in the streams was changed, removed, repeated,
moved or forged. Nothing of that is ever applied, each kind is counted and logged
with its reason, and what was lost comes from the mail stores.

Entries are forged with the implementation that also makes the test vectors, with
the nodes' real keys where a signature must be right."""

import base64
import contextlib
import glob
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
import time

import pytest

from cluster import Cluster, mail, wait_for

_spec = importlib.util.spec_from_file_location(
    "make_vectors", os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                 "../vectors/make-vectors.py"))
vectors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vectors)

SHARDS = 4
LARGEST_ID = "18446744073709551615-18446744073709551615"
# what the nodes say about what they refuse
REFUSED = (r"is refused \(", r"are only counted\)")


# ---- Redis, binary-safe

class Resp:
    """A connection to the cluster's Redis, for what redis-cli cannot pass."""

    def __init__(self, cluster):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(cluster.redis.socket)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()
        self.socket.close()

    def __call__(self, *args):
        args = [a if isinstance(a, bytes) else str(a).encode() for a in args]
        self.socket.sendall(b"*%d\r\n" % len(args) + b"".join(
            b"$%d\r\n%s\r\n" % (len(a), a) for a in args))
        return self.reply()

    def reply(self):
        line = self.file.readline()[:-2]
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return None if rest == b"-1" else \
                self.file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else \
                [self.reply() for _ in range(int(rest))]
        assert kind != b"-", rest
        return int(rest) if kind == b":" else rest


def stream(redis, key):
    """[(ID, entry)] of a stream"""
    return [(id_.decode(), fields[1])
            for id_, fields in redis("XRANGE", key, "-", "+")]


def since(redis, key, id_):
    """What was added after the ID"""
    return [(i, entry) for i, entry in stream(redis, key) if parse_id(i) > id_]


def rewrite(redis, key, entries):
    redis("DEL", key)
    for id_, entry in entries:
        redis("XADD", key, id_, "e", entry)


def append(redis, key, *entries):
    """Put entries behind the last one, as close as possible."""
    for entry in entries:
        generation, seq = last_id(redis, key)
        redis("XADD", key, "%d-%d" % (generation, seq + 1), "e", entry)


def last_id(redis, key):
    info = redis("XINFO", "STREAM", key)
    return parse_id(info[info.index(b"last-generated-id") + 1].decode())


def parse_id(id_):
    return tuple(map(int, id_.split("-")))


def log_key(user, node=None):
    return "dovetail:log:%s:%d" % ((node or user.primary).name, shard(user))


def shard(user):
    return int.from_bytes(vectors.blake2b(str(user).encode())[:8],
                          "big") % SHARDS


# ---- forging

def node_key(node):
    with open(os.path.join(node.key_dir, node.name + ".key")) as f:
        return vectors.Node(node.name, seed=base64.b64decode(
            f.read().split()[-1]))


def subscription(user, name="forged"):
    """A change that would show: as an entry's payload"""
    return vectors.bstr(vectors.list_(vectors.SUBSCRIBE, name=name,
                                      user=str(user))[0])


def forge(user, origin, recipients, ahead=50, **kw):
    """An entry for the user's shard, numbered as one that follows later."""
    with Resp(user.cluster) as redis:
        generation, seq = last_id(redis, log_key(user))
    kw.setdefault("shard", shard(user))
    kw.setdefault("generation", generation)
    kw.setdefault("seq", seq + ahead)
    kw.setdefault("prev", b"\x11" * 32)
    payload = kw.pop("payload", subscription(user))
    return vectors.Entry(origin, recipients, payload, **kw)


def flips(data):
    """Copies with one bit flipped: in each byte one"""
    return [data[:pos] + bytes([data[pos] ^ 1 << pos % 8]) + data[pos + 1:]
            for pos in range(len(data))]


def forge_report(origin, recipients, position, **kw):
    """origin has everything up to the position."""
    now = kw.setdefault("time", int(time.time() * 1000000))
    payload = kw.pop("payload", None) or vectors.ack(*position, now, 1)[0]
    kw.setdefault("kind", 2)
    return vectors.Entry(origin, list(recipients), payload, **kw).bytes


def assert_not_applied(user, name="forged"):
    for node in user.cluster.nodes:
        if node.running():
            assert name not in user.subscriptions(node)
            assert name not in user.mailboxes(node)


# ---- what the administrator sees

def status(node, direction, peer="-"):
    rows = json.loads(node.doveadm("-f", "json", "dovetail", "status"))
    for row in rows:
        if row["direction"] == direction and row["peer"] in (peer, ""):
            return row
    raise AssertionError(rows)


def reasons(node, peer):
    """{reason: how often} of what the node refused in the peer's log"""
    text = status(node, "from", peer)["rejected_reasons"]
    return {word.split("=")[0]: int(word.split("=")[1])
            for word in text.split() if "=" in word}


def wait_reasons(node, peer, wanted):
    def seen():
        found = reasons(node, peer)
        return all(found.get(reason, 0) >= count
                   for reason, count in wanted.items()) and found
    try:
        return wait_for(seen, "reasons")
    except AssertionError:
        raise AssertionError("%s instead of %s" % (reasons(node, peer),
                                                   wanted))


def wait_confirmed(cluster):
    """b's reports get through to a."""
    wait_for(lambda: status(cluster.a, "to", "b")["entries"] == "0",
             "reports of b", 30)


def new_log(node):
    return node.log_text()[node.log_offset:]


def assert_logged_once(node, key, *wanted):
    for reason in wanted:
        lines = [line for line in new_log(node).split("\n")
                 if re.search(r"Error: .*%s: .*refused \(%s\)" % (
                     re.escape(key), reason), line)]
        assert len(lines) == 1, (reason, lines)


# ---- the cluster

@pytest.fixture(scope="module")
def pair():
    with Cluster(["sdbox", "maildir"]) as cluster:
        yield cluster


@pytest.fixture
def user(pair):
    """A user who is replicated, has a folder, and of whom nothing is on its
    way."""
    for server in pair.servers:
        # an earlier test may have failed half-way
        if not server.running():
            server.start()
    user = pair.user()
    user.lmtp(mail("before"))
    with user.imap() as session:
        session.do("CREATE quiet")
    user.wait_equal()
    return user


@contextlib.contextmanager
def replica_away(user):
    """The replica does not see what happens to the streams, until the end."""
    user.replica.stop()
    yield
    user.replica.start()


@contextlib.contextmanager
def primary_away(user):
    user.primary.stop()
    yield
    user.primary.start()


def assert_goes_on(user):
    """What is done now arrives, and both sides are equal."""
    user.lmtp(mail("after"))
    user.wait_equal()
    assert any(b"after" in m.body for m in user.look().values())
    wait_for(lambda: status(user.replica, "from", user.primary.name)[
        "set_aside"] == "0", "everything that was asked for", 30)
    wait_for(lambda: status(user.replica, "from", user.primary.name)[
        "connection"] == "ok", "the status")
    wait_for(lambda: status(user.primary, "to", user.replica.name)[
        "connection"] == "ok", "the status")


# ---- forged and damaged entries

def test_the_forger_can_forge(pair, user):
    """Else the tests below would prove nothing: with the origin's key and the
    right numbers an entry is applied."""
    a, b = node_key(pair.a), node_key(pair.b)
    with primary_away(user), Resp(pair) as redis:
        append(redis, log_key(user), forge(user, a, [b], 1).bytes)
        wait_for(lambda: "forged" in user.subscriptions(), "the forgery")
    # and goes away, since the origin's next entry does not follow it
    assert_goes_on(user)
    assert_not_applied(user)


def test_every_byte_flipped(pair, user):
    pair.expect_errors(*REFUSED)
    key = log_key(user)
    with Resp(pair) as redis:
        with replica_away(user):
            before = last_id(redis, key)
            with user.imap() as session:
                session.do("CREATE flipped")
            entry = max((e for _, e in since(redis, key, before)), key=len)
            pair.a.stop()
            rewrite(redis, key, [(id_, e) for id_, e in stream(redis, key)
                                 if parse_id(id_) <= before])
            redis("XADD", key, "%d-%d" % (before[0], before[1] + 1), "x", "x")
            flipped = flips(entry)
            append(redis, key, *flipped)
        # and the one with other fields
        wait_for(lambda: status(pair.b, "from", "a")["rejected"] ==
                 str(len(flipped) + 1), "all to be counted")
        found = wait_reasons(pair.b, "a", {"bad-signature": 200,
                                           "malformed": 5, "unknown-key": 8,
                                           "version": 1})
        assert sum(found.values()) == len(flipped) + 1
        assert set(found) <= {"bad-signature", "malformed", "unknown-key",
                              "version", "oversized"}
        assert_logged_once(pair.b, key, *found)
        assert_not_applied(user, "flipped")
    pair.a.start()
    # the origin's next entry shows what is missing
    user.wait_equal(30)
    assert "flipped" in user.mailboxes()
    assert_goes_on(user)


def bad_entries(user):
    """[(reason, entry)]"""
    cluster = user.cluster
    a, b, x = node_key(cluster.a), node_key(cluster.b), vectors.Node("x")
    good = forge(user, a, [b])

    def forged(origin=a, recipients=(b,), **kw):
        return forge(user, origin, list(recipients), **kw).bytes
    return [
        ("malformed", b""), ("malformed", b"DVTL"),
        ("malformed", b"hello, this is not an entry" * 20),
        ("malformed", good.bytes[:60]), ("malformed", good.bytes[:100]),
        ("malformed", good.bytes[:-1]), ("malformed", good.bytes + b"\0"),
        ("oversized", good.bytes + bytes(5 * 1024 * 1024)),
        ("unknown-key", forged(x)),
        ("bad-signature", forged(x, key_id=a.id)),
        ("bad-signature", forged(b, key_id=a.id)),
        ("bad-signature", good.bytes[:-64] + bytes(64)),
        ("wrong-origin", forged(b)),
        ("not-for-us", forged(recipients=[x])),
        ("undecryptable", forged(
            patch_signed=lambda d: d.__setitem__(-1, d[-1] ^ 1))),
        ("wrong-stream", forged(shard=(shard(user) + 1) % SHARDS)),
        ("wrong-stream", forged(kind=2)),
        ("stale-epoch", forged(epoch=0)),
        ("repeated", forged(ahead=0)), ("repeated", forged(generation=1)),
    ]


def test_bad_entries(pair, user):
    """Of every kind, among them entries signed with the origin's own key."""
    pair.expect_errors(*REFUSED)
    key = log_key(user)
    with Resp(pair) as redis, primary_away(user):
        with replica_away(user):
            bad = bad_entries(user)
            append(redis, key, *(entry for _, entry in bad))
            generation, seq = last_id(redis, key)
            good = forge(user, node_key(pair.a), [node_key(pair.b)]).bytes
            # fields that no dovetail writes
            for n, fields in enumerate((
                    ["f", good], ["e", good, "e", good], ["", ""],
                    ["e\0", good])):
                redis("XADD", key, "%d-%d" % (generation, seq + 1 + n),
                      *fields)
        wanted = {"malformed": 4}
        for reason, _ in bad:
            wanted[reason] = wanted.get(reason, 0) + 1
        assert wait_reasons(pair.b, "a", wanted) == wanted
        assert status(pair.b, "from", "a")["rejected"] == \
            str(sum(wanted.values()))
        assert_logged_once(pair.b, key, *wanted)
        assert_not_applied(user)
    assert_goes_on(user)
    assert_not_applied(user)


def test_newer_format(pair, user):
    """Properly signed or not: nobody can say. The log waits, and goes on with
    the first entry of the known format."""
    pair.expect_errors(*REFUSED)
    key, a, b = log_key(user), node_key(pair.a), node_key(pair.b)

    def version(data):
        data[4] = 2
    with Resp(pair) as redis, primary_away(user):
        with replica_away(user):
            newer = forge(user, a, [b], 1, patch=version)
            append(redis, key, newer.bytes)
        wait_reasons(pair.b, "a", {"version": 1})
        assert "newer format" in status(pair.b, "from", "a")["connection"]
        assert_logged_once(pair.b, key, "version")
        append(redis, key, b"DVTL\x03 of another age")
        wait_reasons(pair.b, "a", {"version": 2})
        assert_not_applied(user)
        # after a restart it waits at the same place
        pair.b.restart()
        wait_reasons(pair.b, "a", {"version": 2})
        assert "newer format" in status(pair.b, "from", "a")["connection"]
    assert_goes_on(user)
    assert_not_applied(user)


def test_newer_format_among_ours(pair, user):
    """One that is not the origin's stops nothing and needs no repair."""
    pair.expect_errors(*REFUSED)
    key = log_key(user)
    with Resp(pair) as redis:
        with replica_away(user):
            user.lmtp(mail("one"))
            pair.a.stop()
            entries = stream(redis, key)
            pair.a.start()
            generation, seq = parse_id(entries[-1][0])
            rewrite(redis, key, entries[:-1] + [
                ("%d-%d" % (generation, seq), b"DVTL\xff"),
                ("%d-%d" % (generation, seq + 1), entries[-1][1])])
        found = wait_reasons(pair.b, "a", {"version": 1})
    assert_goes_on(user)
    assert found == {"version": 1}


# ---- entries in another place

def test_repeated(pair, user):
    """Under a new ID, which is the only way Redis takes an entry twice."""
    pair.expect_errors(*REFUSED)
    key = log_key(user)
    with Resp(pair) as redis:
        with user.imap() as session:
            session.do("CREATE once")
            again = stream(redis, key)
            session.do("DELETE once")
        user.wait_equal()
        append(redis, key, *(e for _, e in again))
    wait_reasons(pair.b, "a", {"repeated": len(again)})
    assert_logged_once(pair.b, key, "repeated")
    assert_not_applied(user, "once")
    assert_goes_on(user)
    assert_not_applied(user, "once")


def test_swapped(pair, user):
    pair.expect_errors(*REFUSED)
    key = log_key(user)
    with Resp(pair) as redis:
        with replica_away(user):
            before = last_id(redis, key)
            with user.imap() as session:
                session.do("CREATE first")
                session.do("CREATE second")
                session.append("quiet", mail("swapped"))
            entries = stream(redis, key)
            new = [n for n, (id_, _) in enumerate(entries)
                   if parse_id(id_) > before]
            bodies = [entries[n][1] for n in reversed(new)]
            assert len(bodies) >= 3
            for n, body in zip(new, bodies):
                entries[n] = (entries[n][0], body)
            rewrite(redis, key, entries)
        wait_reasons(pair.b, "a", {"repeated": 2, "gap": 1})
    user.wait_equal(30)
    assert_goes_on(user)


def test_moved_to_other_streams(pair, user):
    """To another shard's, and to that of another node."""
    pair.expect_errors(*REFUSED)
    other = "dovetail:log:a:%d" % ((shard(user) + 1) % SHARDS)
    theirs = "dovetail:log:b:%d" % shard(user)
    with Resp(pair) as redis:
        with user.imap() as session:
            session.do("CREATE moved")
            entries = [e for _, e in stream(redis, log_key(user))]
            session.do("DELETE moved")
        user.wait_equal()
        for key in (other, theirs):
            generation = last_id(redis, key)[0] if redis("EXISTS", key) else 1
            redis("XADD", key, "%d-0" % (generation + 1), "e", entries[-1])
        wait_reasons(pair.b, "a", {"wrong-stream": 1})
        wait_reasons(pair.a, "b", {"wrong-origin": 1})
        # a service that starts would read them once more
        for key in (other, theirs):
            redis("XDEL", key, *[id_ for id_, e in stream(redis, key)
                                 if e == entries[-1]])
    assert_logged_once(pair.b, other, "wrong-stream")
    assert_logged_once(pair.a, theirs, "wrong-origin")
    assert_not_applied(user, "moved")
    assert_goes_on(user)
    # b has something to say, too
    back = pair.user(pair.b)
    back.lmtp(mail("from b"))
    back.wait_equal()


def test_removed_peer(new_cluster):
    """A peer that was is a stranger, in its own place and in others'."""
    cluster = new_cluster(["sdbox"] * 3)
    cluster.expect_errors(*REFUSED)
    user = cluster.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    cluster.c.stop()
    cluster.nodes.remove(cluster.c)
    for node in cluster.nodes:
        os.unlink(os.path.join(node.key_dir, "c.pub"))
        node.restart()
    user.wait_equal()
    b, c = node_key(cluster.b), node_key(cluster.c)
    key = log_key(user)
    with Resp(cluster) as redis:
        for ahead, kw in enumerate(({}, {"key_id": node_key(cluster.a).id})):
            append(redis, key, forge(user, c, [b], ahead + 50, **kw).bytes)
        redis("XADD", "dovetail:log:c:%d" % shard(user), "9999999999-1", "e",
              forge(user, c, [b], generation=9999999999, seq=1).bytes)
    wait_reasons(cluster.b, "a", {"unknown-key": 1, "bad-signature": 1})
    assert_goes_on(user)
    assert_not_applied(user)
    cluster.c.close()


# ---- entries that are not there

@pytest.mark.parametrize("where", ["middle", "tail", "all"])
def test_removed(pair, user, where):
    """A folder that was created, and mail in a folder that nobody touches again,
    come all the same."""
    key = log_key(user)
    with Resp(pair) as redis:
        with replica_away(user):
            before = last_id(redis, key)
            with user.imap() as session:
                session.do("CREATE lost")
                session.do("SUBSCRIBE lost")
                session.append("quiet", mail("lost mail"))
            lost = [id_ for id_, _ in since(redis, key, before)]
            if where == "middle":
                user.lmtp(mail("not lost"))
            if where == "all":
                redis("DEL", key)
            else:
                redis("XDEL", key, *lost)
        begin = time.monotonic()
        user.wait_equal(30)
    assert time.monotonic() - begin < 12
    assert "lost" in user.mailboxes() and "lost" in user.subscriptions()
    assert len(user.look("quiet")) == 1
    assert wait_reasons(pair.b, "a", {"gap": 1}) == {"gap": 1}
    assert_goes_on(user)


def test_removed_while_both_are_stopped_in_between(pair, user):
    """The question for what is missing survives that the asker and the asked
    end."""
    key = log_key(user)
    others = [pair.user() for _ in range(3)]
    with Resp(pair) as redis:
        with replica_away(user):
            for other in [user] + others:
                with other.imap() as session:
                    session.do("CREATE lost")
                    session.append("lost", mail("lost mail"))
            pair.a.stop()
            for n in range(SHARDS):
                redis("DEL", "dovetail:log:a:%d" % n)
        pair.a.start()
        pair.b.wait_log("Asking a for the state of all users")
        pair.b.kill_service("dovetail-replay")
        pair.a.kill_service("dovetail-replay")
        pair.expect_errors("killed with signal 9", "dovetail-replay")
    for other in [user] + others:
        other.wait_equal(40)
    assert_goes_on(user)


def test_tail_removed_while_running(pair, user):
    """The replica is there and reads, and yet never sees the entry."""
    key = log_key(user)
    with Resp(pair) as redis:
        workers = pair.b.pids("dovetail-replay")
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            before = last_id(redis, key)
            with user.imap() as session:
                session.do("CREATE lost")
            redis("XDEL", key, *[id_ for id_, _ in since(redis, key, before)])
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
    wait_for(lambda: "lost" in user.mailboxes(), "the folder", 12)
    assert_goes_on(user)


def test_live_changes_go_on_while_gaps_are_filled(pair, user):
    """Entries vanish all the time."""
    # a tree that was read before a mailbox was made, and comes after it: it is
    # empty, and is made again
    pair.expect_errors("box.* is no longer at the primary")
    key = log_key(user)
    with Resp(pair) as redis, user.imap() as session:
        for n in range(30):
            session.append("INBOX", mail("mail %d" % n))
            session.do("CREATE box%d" % n)
            if n % 3 == 0:
                ids = [id_ for id_, _ in stream(redis, key)]
                redis("XDEL", key, *ids[-2:])
    user.wait_equal(40)
    assert_goes_on(user)


# ---- IDs and keys

@pytest.mark.parametrize("id_", [LARGEST_ID, "%d-7" % (1 << 62),
                                 "%d-7" % (1 << 61)])
def test_garbage_id(pair, user, id_):
    """An ID behind which there is no room for the honest ones."""
    pair.expect_errors(*REFUSED, "there is no room", "last possible ID")
    with Resp(pair) as redis:
        redis("XADD", log_key(user), id_, "e", "garbage")
        redis("XADD", "dovetail:ack:a", id_, "e", "garbage")
    wait_reasons(pair.b, "a", {"malformed": 1})
    with user.imap() as session:
        session.do("CREATE behind")
    user.wait_equal(30)
    assert_goes_on(user)
    # reports get through as well
    wait_confirmed(pair)
    with Resp(pair) as redis:
        redis("DEL", log_key(user), "dovetail:ack:a")
    assert_goes_on(user)


@pytest.mark.parametrize("id_", [LARGEST_ID, "%d-7" % (1 << 61)])
def test_hidden_end(pair, user, id_):
    """Nothing stands there, and still Redis takes nothing below."""
    pair.expect_errors(*REFUSED, "there is no room", "last possible ID",
                       "Cannot acknowledge")
    with Resp(pair) as redis:
        redis("XSETID", log_key(user), id_)
        redis("XSETID", "dovetail:ack:a", id_)
        user.lmtp(mail("one"))
        user.wait_equal(30)
        assert_goes_on(user)
        wait_confirmed(pair)
        redis("DEL", log_key(user))
    assert_goes_on(user)


def test_other_types(pair, user):
    """Streams that are strings now."""
    pair.expect_errors(*REFUSED, "in (its|the) place", "WRONGTYPE",
                       "Cannot acknowledge")
    other = next(u for u in iter(pair.user, None) if shard(u) != shard(user))
    with Resp(pair) as redis:
        for key in (log_key(user), "dovetail:ack:a"):
            redis("DEL", key)
            redis("SET", key, "not a stream")
    # nothing of a user of another shard is held up
    begin = time.monotonic()
    other.lmtp(mail("meanwhile"))
    other.wait_equal()
    assert time.monotonic() - begin < 5
    user.lmtp(mail("one"))
    with user.imap() as session:
        session.do("CREATE two")
    user.wait_equal(30)
    assert_goes_on(user)
    wait_confirmed(pair)


def test_other_type_stays(pair, user):
    """... and the one whose stream it is cannot help, since it is away."""
    pair.expect_errors(*REFUSED, "in (its|the) place", "WRONGTYPE",
                       "Cannot acknowledge")
    key = log_key(user)
    back = pair.user(pair.b)
    with Resp(pair) as redis, primary_away(user):
        redis("DEL", key)
        redis("SET", key, "not a stream")
        wait_for(lambda: "not a stream" in status(
            pair.b, "from", "a")["connection"], "the status", 30)
        assert re.search(r"Error: .*%s: Redis has a string in the place" % key,
                         new_log(pair.b))
    back.lmtp(mail("of b"))
    back.wait_equal()
    assert_goes_on(user)


# ---- all of Redis

def test_flushall_while_running(pair, user):
    users = [user] + [pair.user() for _ in range(5)]
    with Resp(pair) as redis:
        for n in range(20):
            for other in users:
                other.lmtp(mail("mail %d" % n))
            with user.imap() as session:
                session.do("CREATE box%d" % n)
            if n % 4 == 3:
                redis("FLUSHALL")
    for other in users:
        other.wait_equal(40)
    assert_goes_on(user)


def test_older_snapshot(pair, user):
    """Redis comes back with the memory of yesterday."""
    pair.expect_errors(*REFUSED, "(?i)redis")
    saved = pair.redis.dir + ".saved"
    directory = os.path.join(pair.redis.dir, "appendonlydir")
    pair.redis.stop()
    shutil.copytree(directory, saved)
    pair.redis.start()
    try:
        with user.imap() as session:
            session.do("CREATE later")
            session.append("later", mail("later"))
        user.wait_equal()
        pair.redis.stop()
        # the last things before it went, which the replica has not
        user.lmtp(mail("at the end"))
        shutil.rmtree(directory)
        shutil.copytree(saved, directory)
        pair.redis.start()
    finally:
        shutil.rmtree(saved)
    user.wait_equal(30)
    assert "later" in user.mailboxes()
    assert_goes_on(user)


# ---- the replicas' reports

def test_bad_reports(pair, user):
    """Nobody but the replica itself says what the replica has."""
    pair.expect_errors(*REFUSED)
    a, b, x = node_key(pair.a), node_key(pair.b), vectors.Node("x")
    key = "dovetail:ack:a"
    with Resp(pair) as redis:
        with replica_away(user):
            user.lmtp(mail("not confirmed"))
            generation, seq = last_id(redis, log_key(user))
            now = int(time.time() * 1000000) + 10 ** 6
            payload = vectors.ack(generation, seq, now, 1)[0]

            def ack(origin=b, recipients=(a,), position=(generation, seq),
                    **kw):
                kw.setdefault("shard", shard(user))
                return forge_report(origin, recipients, position, time=now,
                                    **kw)
            good = ack()
            bad = flips(good) + [
                b"", good[:-1], good + b"\0", bytes(6 * 1024 * 1024),
                ack(x), ack(x, key_id=b.id), ack(a), ack(kind=1),
                ack(recipients=[x]), ack(shard=200, shards=201),
                ack(payload=payload[:-1]), b"DVTL\x09",
                # it confirms what was never sent
                ack(position=(generation, seq + 1000)),
                ack(position=(2 ** 64 - 1, 1))]
            # what was said before
            old = [e for _, e in stream(redis, key)]
            for entry in bad + old:
                redis("XADD", key, "*", "e", entry)
            redis("XADD", key, "*", "f", good)
            redis("XADD", key, "*", "e", "", "g", "")

            def counted():
                return int(status(pair.a, "self")["rejected"]) + \
                    int(status(pair.a, "to", "b")["rejected"]) >= len(bad)
            wait_for(counted, "bad reports to be counted")
            assert int(status(pair.a, "to", "b")["entries"]) > 0
            text = new_log(pair.a)
            lines = re.findall(r"Error: .*Report .* is refused.*", text)
            assert 5 <= len(lines) < 30, lines
            # still there for the replica
            assert parse_id(stream(redis, log_key(user))[-1][0]) >= \
                (generation, seq)
    assert_goes_on(user)
    wait_confirmed(pair)


def test_report_of_the_replica_counts(pair, user):
    """... and with its key the forger can speak for it."""
    a, b = node_key(pair.a), node_key(pair.b)
    with Resp(pair) as redis:
        with replica_away(user):
            user.lmtp(mail("not confirmed"))
            wait_for(lambda: int(status(pair.a, "to", "b")["entries"]) > 0,
                     "the entry")
            for n in range(SHARDS):
                if not redis("EXISTS", "dovetail:log:a:%d" % n):
                    continue
                position = last_id(redis, "dovetail:log:a:%d" % n)
                redis("XADD", "dovetail:ack:a", "*", "e", forge_report(
                    b, [a], position, shard=n))
            wait_for(lambda: int(status(pair.a, "to", "b")["entries"]) <= 1,
                     "the forged report")
    # the replica corrects it
    assert_goes_on(user)


# ---- what Redis can read

def test_nothing_readable(new_cluster):
    words = ["someuser", "Ordnername", "Betreffzeile", "Nachrichtentext",
             "Schluesselwort", "boxofnobody"]
    cluster = new_cluster(["sdbox", "sdbox"])
    user = cluster.user(name="someuser@example.com")
    with user.imap() as session:
        session.do("CREATE Ordnername")
        session.append("Ordnername", mail("Nachrichtentext",
                                          subject="Betreffzeile"))
        session.append("INBOX", mail("Nachrichtentext", 200000,
                                     subject="Betreffzeile"))
        session.select("Ordnername")
        session.do("STORE 1 +FLAGS (Schluesselwort)")
        session.do("CREATE boxofnobody")
        session.do("RENAME boxofnobody Ordnername/boxofnobody")
    user.wait_equal()
    with Resp(cluster) as redis:
        memory = b"".join(
            key + b"\n" + b"\n".join(e for _, e in stream(redis, key))
            for key in redis("KEYS", "*"))
    files = b""
    for path in glob.glob(os.path.join(cluster.redis.dir, "appendonlydir",
                                       "*")):
        with open(path, "rb") as f:
            files += f.read()
    for data in (memory, files):
        assert data.count(b"DVTL\x01") >= 4
        for word in words:
            for coded in (word.encode(), word.lower().encode(),
                          base64.b64encode(word.encode())[:-4]):
                assert coded not in data, word


# ---- in the middle of the line

class Proxy(threading.Thread):
    """Between a node and Redis: alter(data) changes what Redis answers."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        os.chmod(path, 0o777)
        self.listener.listen(50)
        self.target = None
        self.alter = None
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(self.target)
                except OSError:
                    client.close()
                    continue
                for a, b, back in ((client, server, False),
                                   (server, client, True)):
                    threading.Thread(target=self.pump, args=(a, b, back),
                                     daemon=True).start()

    def pump(self, source, sink, back):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if back and self.alter:
                    data = self.alter(data)
                sink.sendall(data)
        for s in (source, sink):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()


@pytest.fixture(scope="module")
def tapped():
    """A pair of nodes that talk to Redis through proxies of ours."""
    directory = tempfile.mkdtemp(prefix="dt-proxy-", dir="/tmp")
    os.chmod(directory, 0o755)
    proxies = {n: Proxy(os.path.join(directory, n)) for n in "ab"}
    with Cluster(["sdbox", "sdbox"], node_options={
            n: {"settings": {"dovetail_redis": "unix:%s/%s" % (directory, n)}}
            for n in "ab"}, start=False) as cluster:
        for proxy in proxies.values():
            proxy.target = cluster.redis.socket
        cluster.proxies = proxies
        cluster.start()
        yield cluster
    for proxy in proxies.values():
        proxy.close()
    shutil.rmtree(directory)


def flip_some(data, rate=0.0005, rnd=random.Random(5)):
    out = bytearray(data)
    for pos in range(len(out)):
        if rnd.random() < rate:
            out[pos] ^= 1 << rnd.randrange(8)
    return bytes(out)


ALTERED = [
    ("field-is-number", lambda d: d.replace(b"$1\r\ne\r\n", b":1\r\n")),
    ("field-is-nil", lambda d: d.replace(b"$1\r\ne\r\n", b"$-1\r\n")),
    ("field-is-list", lambda d: d.replace(b"$1\r\ne\r\n", b"*0\r\n")),
    ("fields-are-nil", lambda d: re.sub(
        rb"\*2\r\n\$1\r\ne\r\n\$\d+\r\n.*", b"$-1\r\n", d, flags=re.S)),
    ("id-is-number", lambda d: re.sub(
        rb"\$\d+\r\n\d+-\d+\r\n\*2", b":7\r\n*2", d)),
    ("id-is-rubbish", lambda d: re.sub(
        rb"\$\d+\r\n\d+-\d+\r\n\*2", b"$3\r\nx-y\r\n*2", d)),
    ("id-is-small", lambda d: re.sub(
        rb"\$\d+\r\n\d+-\d+\r\n\*2", b"$3\r\n1-1\r\n*2", d)),
    ("errors", lambda d: re.sub(rb"^\*", b"-ERR no\r\n*", d)),
    ("flipped", flip_some),
    ("cut", lambda d: d[:-1] if len(d) > 100 else d),
    ("twice", lambda d: d + d),
    ("nothing", lambda d: b"*0\r\n"),
]


@pytest.mark.parametrize("alter", ALTERED, ids=lambda a: a[0])
def test_answers_altered(tapped, alter):
    """Whatever Redis says, no process dies of it, none spins, mail is taken, and
    all is well when it speaks the truth again."""
    tapped.expect_errors("(?i)redis", *REFUSED, "XREAD", "XADD", "XTRIM",
                         "place of", "no room", "log's end", "not stored")
    user = tapped.user()
    user.lmtp(mail("before"))
    user.wait_equal(40)
    tapped.proxies["a"].alter = tapped.proxies["b"].alter = alter[1]
    before = cpu(tapped)
    begin = time.monotonic()
    try:
        for n in range(3):
            user.lmtp(mail("while %d" % n))
        with user.imap() as session:
            session.do("CREATE meanwhile")
        time.sleep(max(0, begin + 3 - time.monotonic()))
    finally:
        tapped.proxies["a"].alter = tapped.proxies["b"].alter = None
    seconds = time.monotonic() - begin
    busy = max(used - before.get(pid, used)
               for pid, used in cpu(tapped).items()) / seconds
    with user.imap() as session:
        session.do("CREATE after")
    user.wait_equal(60)
    text = "".join(map(new_log, tapped.nodes))
    assert not re.search("Panic|Fatal|killed with signal", text)
    assert busy < 0.3


def cpu(cluster):
    """{pid: seconds of CPU time} of our services"""
    seconds = {}
    for node in cluster.nodes:
        for pid in node.pids():
            with contextlib.suppress(OSError):
                with open("/proc/%d/cmdline" % pid) as f:
                    if "dovetail" not in f.read():
                        continue
                with open("/proc/%d/stat" % pid) as f:
                    fields = f.read().rpartition(")")[2].split()
                seconds[pid] = (int(fields[11]) + int(fields[12])) / \
                    os.sysconf("SC_CLK_TCK")
    return seconds
