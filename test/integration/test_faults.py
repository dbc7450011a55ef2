"""Redis, nodes and processes that go away, at rest and under load: mail keeps
flowing, no mail process waits longer than dovetail_ack_timeout, and what was
acknowledged stands on every node in the end."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import threading
import time

import pytest

import view
from cluster import GONE, Cluster, Refused, age, mail, send, wait_for

ACK_TIMEOUT = 1
# of a busy machine, on top of the timeout
SLACK = 1
SETTINGS = {"dovetail_ack_timeout": "%ds" % ACK_TIMEOUT}
# What may be logged as an error, and nothing else:
# by our services, that Redis is away, comes up, or does not answer
NO_REDIS = (r"dovetail-(queue|replay)\S*: Error: "
            r"(redis\(\S+\): |log \d+: Redis has not answered)")
# by Dovecot, when it ends or is reloaded under load: the userdb goes first
ENDED = (r"auth\S*: Error: stat\(\S*/auth-(dovetail-)?userdb\) failed: "
         r"No such file",
         r"Error: stats: open\(old-stats-user\) failed",
         r"Error: auth-master: userdb (lookup|list)\S* "
         r"(connect\(\S*/auth-userdb\) failed|Disconnected unexpectedly)",
         r"dovetail-replay\S*: Error: (Cannot sweep: )?Cannot open user \S+: "
         r"Internal error",
         r"lmtp\S*: Error: .*Failed to lookup user",
         r"dovetail-replay\S*: Error: (write|connect)\(\S*/dovetail-queue\) "
         r"failed: (Broken pipe|Connection re|No such file)",
         r"dovetail-replay\S*: Error: dovetail-queue closed the connection",
         r"Fatal: Error reading configuration: .*/run/config\)?.* failed",
         # 2.4, where so does each service of Dovecot's own
         r"Fatal: (Error reading configuration: )?Failed to read "
         r"configuration: fd_read\(\) failed: Connection reset",
         r"master: Error: (service\(\S+\): )+child \d+ returned error 89",
         r"Error: (net_connect_unix|connect)\(\S*/anvil\) failed",
         r"(locking failed|wait_lock_fd).*Interrupted system call")
# by Dovecot's storage, when a process died half-way through a commit, where
# it finds that and repairs it
HALF_DONE = ("dbox-Mails/u.* already exists",
             "dovecot.index reset, view is now inconsistent",
             "Deleting corrupted cache", "Corrupted dbox file",
             "mdbox map .* corrupted: map_uid=.* refcount too low",
             r"mdbox\(\S+\): Inconsistency in map index",
             # one of them was not written to its end
             r"mdbox.*: Duplicate GUID")


def killed(*services):
    """By Dovecot's master, about the processes that a test kills, and by the
    storage."""
    return HALF_DONE + (r"Fatal: master: service\((%s)\): child \d+ killed "
                        r"with signal 9$" % "|".join(services),)


SERVICES = ("dovetail-queue", "dovetail-replay", "imap", "lmtp")


@pytest.fixture(scope="module", params=["sdbox-sdbox", "maildir-mdbox"])
def pair(request):
    with Cluster(request.param.split("-"), SETTINGS) as cluster:
        yield cluster


@pytest.fixture
def user(pair):
    """A user who is replicated already."""
    for server in pair.servers:
        # an earlier test may have failed half-way
        if not server.running():
            server.start()
    user = pair.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    return user


@contextlib.contextmanager
def at_most(seconds):
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds + SLACK


def work(user, tag=""):
    """A bit of everything. Nothing may fail, or wait longer than dovetail is
    allowed to."""
    with user.imap() as session:
        def do(command, *args):
            with at_most(ACK_TIMEOUT):
                session.do(command, *args)
        do("CREATE box%s" % tag)
        do("SUBSCRIBE box%s" % tag)
        with at_most(ACK_TIMEOUT):
            session.append("INBOX", mail("one" + tag), mail("two" + tag),
                           mail("large" + tag, 300000))
        do("SELECT INBOX")
        do("STORE 1:* +FLAGS (tag%s)" % tag)
        do("COPY 2:3 box%s" % tag)
        do(r"STORE 2 +FLAGS (\Deleted)")
        do("EXPUNGE")
        do("RENAME box%s boxed%s" % (tag, tag))
    with at_most(ACK_TIMEOUT):
        user.lmtp(mail("three" + tag))


def assert_reads_fast(user):
    """On both nodes, without any waiting."""
    for node in user.cluster.nodes:
        with at_most(0), user.imap(node) as session:
            session.do('LIST "" "*"')
            session.select("INBOX", "EXAMINE")
            session.do("FETCH 1:* (FLAGS BODY.PEEK[])")


class Writer(threading.Thread):
    """Writes until it is stopped, and keeps a journal of what the server
    acknowledged. It reconnects when a server goes away, as clients do."""

    def __init__(self, user, by):
        super().__init__(daemon=True)
        self.user, self.by = user, by
        self.stopped = threading.Event()
        self.saved, self.flagged, self.expunged = set(), set(), set()
        self.session = None
        self.error = None
        self.n = 0
        # writes that the server answered with a temporary failure
        self.deferred = []

    def run(self):
        try:
            while not self.stopped.is_set():
                self.n += 1
                try:
                    getattr(self, self.by)("%s-%d" % (self.by, self.n))
                except Refused as refused:
                    self.deferred.append(str(refused))
                except GONE:
                    self.session = None
                    self.stopped.wait(0.05)
        except Exception as e:
            self.error = e

    def lmtp(self, text):
        (code, answer), = self.user.primary.lmtp(
            [self.user], mail(text)).values()
        if code == 250:
            self.saved.add(text)
        else:
            self.deferred.append(answer)
            self.stopped.wait(0.05)

    def imap(self, text):
        if self.session is None:
            self.session = self.user.imap()
            self.session.select("INBOX")
        session = self.session
        answer = session.append("INBOX", mail(text))
        self.saved.add(text)
        uid = re.search(r"APPENDUID \d+ (\d+)", answer)[1]
        session.do("NOOP")
        if self.n % 2 == 0:
            session.do(r"UID STORE %s +FLAGS (\Flagged work)" % uid)
            self.flagged.add(text)
        if self.n % 5 == 0:
            session.do(r"UID STORE %s +FLAGS (\Deleted)" % uid)
            # from here on nobody knows, until the answer comes
            self.saved.discard(text)
            self.flagged.discard(text)
            session.do("UID EXPUNGE %s" % uid)
            self.expunged.add(text)

    def wait_progress(self, count=5):
        """Until count more writes are acknowledged. (Who is killed between
        making a Maildir's dovecot-uidlist.lock and writing its PID there has
        all others wait for two minutes: Dovecot's way.)"""
        def done():
            assert self.error is None, self.error
            return len(self.saved) + len(self.expunged)
        goal = done() + count
        wait_for(lambda: done() >= goal, "%s to go on" % self.by, 150)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stopped.set()
        self.join()

    def check(self, may_defer=False):
        """All that was acknowledged stands on every node. may_defer: the
        test ended or reloaded Dovecot itself, which may have refused writes
        meanwhile; no other fault makes a write fail."""
        assert self.error is None, self.error
        assert may_defer or not self.deferred, self.deferred
        # Mail that a process of Dovecot finds in a Maildir, because the one
        # that saved it was killed, or could not lock dovecot-uidlist while
        # another one wrote, has no save date but its file's ctime, which each
        # renaming changes; a replica has what it was when it was sent.
        self.user.wait_equal(90, ignore=("saved",) if
                             self.user.primary.format == "maildir" else ())
        for node in self.user.cluster.nodes:
            there = {re.search(rb"Subject: (.*)\r\n", m.body)[1].decode(): m
                     for m in self.user.look("INBOX", node).values()}
            assert self.saved <= there.keys(), self.saved - there.keys()
            assert not self.expunged & there.keys()
            for text in self.flagged:
                assert {r"\Flagged", "work"} <= there[text].flags


# -- Redis

@pytest.mark.parametrize("end", ["stop", "kill"])
def test_redis_down_and_up(pair, user, end):
    pair.expect_errors(NO_REDIS)
    getattr(pair.redis, end)()
    try:
        work(user)
        assert_reads_fast(user)
        time_of_work = time.monotonic()
    finally:
        pair.redis.start()
    user.wait_equal()
    assert time.monotonic() - time_of_work < 15
    work(user, "again")
    user.wait_equal()


def test_there_and_back_again(pair, user):
    """What is set and taken back while nothing can be sent comes as one
    change."""
    pair.expect_errors(NO_REDIS)
    with user.imap() as session:
        session.select("INBOX")
        session.append("INBOX", mail("another"))
        session.do("NOOP")
        session.do(r"STORE 1:2 +FLAGS (stays goes \Seen)")
        user.wait_equal()
        pair.redis.stop()
        try:
            session.do("STORE 1:2 +FLAGS (comes)")
            session.do("STORE 2 -FLAGS (comes)")
            session.do("STORE 1:2 -FLAGS (stays)")
            session.do("STORE 1 +FLAGS (stays)")
            session.do(r"STORE 1:2 FLAGS (\Answered)")
            session.do(r"STORE 1 FLAGS (goes \Seen)")
            session.do(r"STORE 2 +FLAGS (\Flagged)")
            session.do(r"STORE 2 -FLAGS (\Flagged)")
        finally:
            pair.redis.start()
    user.wait_equal()
    assert user.flags() == {1: {"goes", r"\Seen"}, 2: {r"\Answered"}}


def test_redis_down_and_up_with_many_users(pair, user):
    pair.expect_errors(NO_REDIS)
    users = [pair.user() for _ in range(12)]
    pair.redis.stop()
    try:
        for other in users:
            other.lmtp(mail("while away"))
    finally:
        pair.redis.start()
    for other in users:
        other.wait_equal()
        assert len(other.look()) == 1


def test_redis_restarts_under_load(pair, user):
    pair.expect_errors(NO_REDIS)
    with Writer(user, "imap") as writer, Writer(user, "lmtp") as other:
        for end in (pair.redis.stop, pair.redis.kill, pair.redis.kill):
            writer.wait_progress()
            end()
            writer.wait_progress(2)
            pair.redis.start()
            other.wait_progress()
    writer.check()
    other.check()


def test_redis_paused(pair, user):
    """It answers nothing at all, and the connections stay open."""
    pair.expect_errors(NO_REDIS)
    pair.redis.pause()
    try:
        work(user)
        assert_reads_fast(user)
    finally:
        pair.redis.resume()
    user.wait_equal()


def test_redis_slow(pair, user):
    """It stops and goes on all the time."""
    pair.expect_errors(NO_REDIS)
    done = threading.Event()

    def stutter():
        while not done.wait(0.15):
            pair.redis.pause()
            done.wait(0.15)
            pair.redis.resume()
    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        with Writer(user, "imap") as writer:
            writer.wait_progress(30)
    finally:
        done.set()
        thread.join()
        pair.redis.resume()
    writer.check()


@pytest.mark.parametrize("when", ["at-rest", "with-changes-waiting"])
def test_redis_forgets_everything(pair, user, when):
    pair.expect_errors(NO_REDIS)
    with user.imap() as session:
        # a parent that is no mailbox must not become one
        session.do("CREATE", "parent/child")
    user.wait_equal()
    if when == "with-changes-waiting":
        pair.b.stop()
        work(user)
    pair.redis.stop()
    pair.redis.wipe()
    pair.redis.start()
    if not pair.b.running():
        pair.b.start()
    work(user, "after")
    user.wait_equal(60)


def replica_rows(pair):
    """What the replica b says about what it gets from a."""
    return [row for row in json.loads(
        pair.b.doveadm("-f", "json", "dovetail", "status"))
        if row["direction"] == "from" and row["peer"] == "a"]


def log_entries(pair):
    return {(key, entry) for key in pair.redis.keys() if ":log:a" in key
            for entry in re.findall(r"^(\d+-\d+)$", pair.redis.cli(
                "xrange", key, "-", "+"), re.M)}


def lose_a_change(pair, user, mailbox):
    """The replica never gets what is appended to the mailbox here."""
    with pair.b.paused("dovetail-replay"), user.imap() as session:
        # the answer to a question that is open already
        session.append(mailbox, mail("on its way"))
        before = log_entries(pair)
        session.append(mailbox, mail("lost on the way"))
        for key, entry in log_entries(pair) - before:
            pair.redis.cli("xdel", key, entry)


def test_what_is_lacking_is_asked_for_once(pair, user):
    """Changes that come while the answer is not there yet are no reason to
    ask again."""
    lose_a_change(pair, user, "INBOX")
    with pair.a.paused("dovetail-replay"):
        for n in range(20):
            user.lmtp(mail("after it %d" % n))
        wait_for(lambda: all(row["entries"] == "0"
                             for row in replica_rows(pair)),
                 "the replica to have seen all")
    user.wait_equal()
    log = pair.b.log_text()[pair.b.log_offset:]
    assert len(re.findall("%s: Asking a for mailbox INBOX" % user, log)) == 1


def test_what_is_lacking_is_deleted_meanwhile(pair, user):
    with user.imap() as session:
        session.do("CREATE", "folder")
    user.wait_equal()
    lose_a_change(pair, user, "folder")
    with pair.a.paused("dovetail-replay"), user.imap() as session:
        session.append("folder", mail("after it"))
        pair.b.wait_log("%s: Asking a for mailbox folder" % user)
        session.do("DELETE", "folder")
    user.wait_equal()
    wait_for(lambda: all(row["set_aside"] == "0"
                         for row in replica_rows(pair)),
             "nothing to be lacking any more")


def test_deletion_of_an_empty_folder_is_lost(pair, user):
    """The replica made the folder, and nothing else ever came for it. That
    the primary has it no more, only its tree says."""
    pair.expect_errors("Mailbox (folder|parent) is no longer at the primary")
    with user.imap() as session:
        session.do("CREATE", "folder")
        session.do("CREATE", "parent")
        session.do("CREATE", "parent/child")
        # a look at the primary's would send more of it
        wait_for(lambda: "parent/child" in user.mailboxes(), "the folders")
        with pair.b.paused("dovetail-replay"):
            # the answer to a question that is open already
            session.append("INBOX", mail("on its way"))
            before = log_entries(pair)
            session.do("DELETE", "folder")
            session.do("DELETE", "parent")
            session.do("RENAME", "parent/child", "child")
            for key, entry in log_entries(pair) - before:
                pair.redis.cli("xdel", key, entry)
        session.append("INBOX", mail("after it"))
    user.wait_equal()


def test_rename_of_a_parent_is_lost(pair, user):
    """Its child came alone, and stands where the parent has to."""
    with user.imap() as session:
        for name in ("one", "two"):
            session.do("CREATE", name)
            session.append(name, mail(name))
        user.wait_equal()
        with pair.b.paused("dovetail-replay"):
            # the answer to a question that is open already
            session.append("INBOX", mail("on its way"))
            before = log_entries(pair)
            session.do("RENAME", "one", "parent")
            lost = log_entries(pair) - before
            session.do("RENAME", "two", "parent/two")
            for key, entry in lost:
                pair.redis.cli("xdel", key, entry)
        session.append("INBOX", mail("after it"))
    user.wait_equal()


def test_changes_that_undo_each_other(pair, user):
    """They come to the replica all at once. Its MODSEQs, too, must not be
    lower than the primary's."""
    pair.expect_errors(NO_REDIS)
    with user.imap() as session:
        session.append("INBOX", mail("two"), mail("three"))
        session.select("INBOX")
        session.do(r"STORE 1 +FLAGS (old \Seen)")
        user.wait_equal()
        pair.redis.stop()
        try:
            session.do("STORE 1 -FLAGS (old)")
            session.do("STORE 1:2 +FLAGS (old new)")
            session.do("STORE 2 -FLAGS (new)")
            session.do(r"STORE 3 +FLAGS (\Flagged new)")
            session.do(r"STORE 3 FLAGS ()")
            session.do(r"STORE 1 -FLAGS (\Seen)")
            session.do(r"STORE 1 +FLAGS (\Seen)")
        finally:
            pair.redis.start()
    user.wait_equal()
    assert user.flags() == {1: {"\\Seen", "old", "new"}, 2: {"old"}, 3: set()}


def test_redis_absent_at_start(new_cluster):
    cluster = new_cluster(settings=SETTINGS, start=False)
    cluster.expect_errors(NO_REDIS)
    for node in cluster.nodes:
        node.start()
    user = cluster.user()
    work(user)
    assert_reads_fast(user) if view.status(cluster.b, user) else None
    cluster.redis.start()
    user.wait_equal()


# -- nodes

@pytest.mark.parametrize("end", ["stop", "kill"])
def test_replica_down_and_up(pair, user, end):
    getattr(pair.b, end)()
    work(user)
    for n in range(30):
        user.lmtp(mail("while away %d" % n))
    pair.b.start()
    user.wait_equal()


def test_replica_restarts_under_load(pair, user):
    pair.expect_errors(*ENDED, *HALF_DONE)
    with Writer(user, "imap") as writer, Writer(user, "lmtp") as other:
        for _ in range(2):
            for end in (pair.b.stop, pair.b.kill):
                writer.wait_progress()
                end()
                writer.wait_progress()
                pair.b.start()
    writer.check()
    other.check()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_primary_restarts_under_load(pair, user, end):
    pair.expect_errors(*ENDED, *HALF_DONE)
    with Writer(user, "imap") as writer, Writer(user, "lmtp") as other:
        for _ in range(3):
            writer.wait_progress()
            other.wait_progress()
            getattr(pair.a, end)()
            pair.a.start()
    writer.check(may_defer=True)
    other.check(may_defer=True)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_primary_ends_with_redis_down(pair, user, end):
    """What could not be queued is remembered over a restart."""
    pair.expect_errors(NO_REDIS)
    pair.redis.stop()
    work(user)
    getattr(pair.a, end)()
    pair.a.start()
    pair.redis.start()
    user.wait_equal()


def test_everything_ends_at_once(pair, user):
    """As when the power fails for all."""
    pair.expect_errors(NO_REDIS, *HALF_DONE)
    with Writer(user, "imap") as writer, Writer(user, "lmtp") as other:
        writer.wait_progress()
        for server in (pair.a, pair.redis, pair.b):
            server.kill()
        for server in (pair.b, pair.a, pair.redis):
            server.start()
        writer.wait_progress()
    writer.check(may_defer=True)
    other.check(may_defer=True)


@pytest.mark.parametrize("node", "ab")
def test_reload_under_load(pair, user, node):
    """Not a single error but Dovecot's own, and nothing is lost."""
    pair.expect_errors(*ENDED)
    node = getattr(pair, node)
    with Writer(user, "imap") as writer, Writer(user, "lmtp") as other:
        for _ in range(4):
            writer.wait_progress()
            node.reload()
    writer.check(may_defer=True)
    other.check(may_defer=True)


# -- single processes

@pytest.mark.parametrize("node,service,by", [
    ("a", "imap", "imap"), ("a", "lmtp", "lmtp"),
    ("a", "dovetail-queue", "imap"), ("a", "dovetail-queue", "lmtp"),
    ("a", "dovetail-replay", "imap"), ("b", "dovetail-queue", "imap"),
    ("b", "dovetail-replay", "imap"), ("b", "dovetail-replay", "lmtp")],
    ids=lambda v: v)
def test_kill_while_writing(pair, user, node, service, by):
    pair.expect_errors(*killed(service))
    node = getattr(pair, node)
    with Writer(user, by) as writer:
        for _ in range(8):
            writer.wait_progress(3)
            node.kill_service(service)
        writer.wait_progress(3)
    writer.check(may_defer=service == by)
    # an mdbox that was left half-way is rebuilt, but not again and again
    assert node.log_text()[node.log_offset:].count("rebuilding indexes") <= 32


def test_kill_of_all_services_in_turn(pair, user):
    pair.expect_errors(*killed(*SERVICES))
    with Writer(user, "imap") as writer, Writer(user, "lmtp") as other:
        for node in pair.nodes * 2:
            for service in SERVICES:
                writer.wait_progress(2)
                node.kill_service(service, wait=False)
    writer.check(may_defer=True)
    other.check(may_defer=True)


def test_killed_after_the_last_write(pair, user):
    """The process dies with its work acknowledged and perhaps not queued, and
    nobody opens the mailbox any more."""
    pair.expect_errors(NO_REDIS, *killed("imap", "dovetail-queue"))
    pair.redis.pause()
    try:
        with user.imap() as session:
            session.append("INBOX", mail("last"))
            pair.a.kill_service("imap")
            pair.a.kill_service("dovetail-queue")
    finally:
        pair.redis.resume()
    replica = user.replica
    wait_for(lambda: len(user.look("INBOX", replica)) == 2,
             "the message, without anyone looking at the primary")
    user.wait_equal()


@pytest.mark.parametrize("service", ["dovetail-queue", "dovetail-replay"])
def test_start_while_configuration_is_written(pair, user, service):
    """A service that starts uses the configuration that Dovecot runs with, not
    what an editor has just begun to save; and so do all others after it."""
    pair.expect_errors(*killed(service))
    pids = {node: wait_for(lambda: node.settled(service), service)
            for node in pair.nodes}
    for node in pair.nodes:
        os.rename(node.conf, node.conf + ".old")
        open(node.conf, "w").close()
    try:
        for node in pair.nodes:
            send(signal.SIGKILL, pids[node])
            # as many as before, and they have lived for some time
            wait_for(lambda: len([
                pid for pid in node.pids(service)
                if pid not in pids[node] and age(pid) > 1]) ==
                len(pids[node]), "%s to be started" % service)
        work(user)
        wait_for(lambda: len(user.look()) == len(user.look(
            node=user.primary)), "the new mail on the replica")
    finally:
        for node in pair.nodes:
            os.rename(node.conf + ".old", node.conf)
    user.wait_equal()


@pytest.mark.parametrize("service", ["dovetail-queue", "dovetail-replay"])
def test_service_comes_back(pair, user, service):
    """A service that cannot start is started again when that has passed, by
    nobody's hand, and all its processes are."""
    pair.expect_errors(*killed(service), r"%s: Fatal: .*\.key does not exist" %
                       service, r"service\(%s\): (command startup failed, "
                       r"throttling|child \d+ returned error 89)" % service)
    node = pair.b
    pids = wait_for(lambda: node.settled(service), service)
    key = os.path.join(node.key_dir, node.name + ".key")
    os.rename(key, key + ".away")
    try:
        send(signal.SIGKILL, pids)
        node.wait_log(r"service\(%s\): command startup failed" % service)
    finally:
        os.rename(key + ".away", key)
    wait_for(lambda: len(node.settled(service)) == len(pids),
             "all of %s to come back" % service, 60)
    work(user)
    user.wait_equal()


# -- how Redis is reached

@pytest.mark.parametrize("redis", [
    {"tcp": True}, {"tcp": False}, {"tcp": True, "password": "s3 cret"},
    {"tcp": False, "password": "s3cret"},
    {"tcp": True, "username": "dt", "password": "s3cret"},
    {"tcp": False, "username": "dt", "password": "s3cret"},
    {"tcp": True, "db": 7}, {"tcp": False, "db": 7},
    {"tcp": True, "prefix": "mail-"}, {"tcp": False, "prefix": "mail-"},
    {"tcp": True, "username": "dt", "password": "p", "db": 3,
     "prefix": "x:y:"},
    {"tcp": False, "username": "dt", "password": "p", "db": 3,
     "prefix": "x:y:"}],
    ids=lambda r: "-".join(k if k != "tcp" else "tcp" if v else "unix"
                           for k, v in r.items()))
def test_redis_connection(new_cluster, redis):
    cluster = new_cluster(redis=redis)
    user = cluster.user()
    work(user)
    user.wait_equal()
    keys = cluster.redis.keys()
    assert any(key.startswith(cluster.redis.prefix + "log:a:")
               for key in keys)
    assert all(key.startswith(cluster.redis.prefix) for key in keys)
    assert cluster.redis.cli("info", "keyspace").count("\ndb") == 1 or \
        redis.get("username")


def test_wrong_redis_password(new_cluster):
    """Mail flows, the log says why the replica gets nothing, and the right
    password heals it."""
    cluster = new_cluster(settings=SETTINGS, redis={"password": "right"},
                          start=False)
    cluster.expect_errors(NO_REDIS)
    path = os.path.join(cluster.a.key_dir, "redis.password")
    with open(path, "w") as f:
        f.write("wrong\n")
    cluster.start()
    user = cluster.user()
    work(user)
    cluster.a.wait_log(r"WRONGPASS|invalid (username|password)")
    assert "wrong" not in cluster.a.log_text().replace("wrongpass", "")
    with open(path, "w") as f:
        f.write("right\n")
    cluster.a.reload()
    user.wait_equal()


def test_redis_sees_only_ciphertext(pair, user):
    with user.imap() as session:
        session.do("CREATE Secretfolder")
        session.append("Secretfolder", mail("Secretbody " * 9),
                       flags="Secretword")
        session.do("RENAME Secretfolder Othersecret")
    user.wait_equal()
    known = [b"ecretfolder", b"ecretbody", b"ecretword", b"thersecret",
             b"example.org", user.name.encode() + b"\x00"]
    found = set()
    for path, _, files in os.walk(pair.redis.dir):
        for name in files:
            if name not in ("log", "conf", "out", "s"):
                with open(os.path.join(path, name), "rb") as f:
                    data = f.read()
                found |= {word for word in known if word in data}
    assert not found
    assert pair.redis.entries("a") >= 0


# -- dovetail_ack and dovetail_ack_failure

def test_ack_queued(pair, user):
    """When the client has the answer, Redis has the change."""
    # while a replica is away nothing is trimmed
    pair.b.stop()
    with user.imap() as session:
        for n in range(10):
            before = pair.redis.entries("a")
            session.append("INBOX", mail("m%d" % n))
            assert pair.redis.entries("a") > before
    before = pair.redis.entries("a")
    user.lmtp(mail("lmtp"))
    assert pair.redis.entries("a") > before
    pair.b.start()
    user.wait_equal()


@pytest.fixture(scope="module")
def applied():
    with Cluster(["sdbox", "maildir"], dict(SETTINGS,
                                            dovetail_ack="applied")) as c:
        yield c


def test_ack_applied(applied):
    """When the client has the answer, the replica has the change: the very
    first look sees it."""
    user = applied.user()
    with user.imap() as session:
        session.do("CREATE box")
        assert "box" in user.mailboxes()
        session.select("INBOX")
        for n in range(1, 11):
            session.append("INBOX", mail("m%d" % n))
            assert sorted(user.look()) == list(range(1, n + 1))
            session.do("NOOP")
            session.do(r"STORE %d +FLAGS (\Flagged)" % n)
            assert user.flags()[n] == {r"\Flagged"}
        session.do(r"STORE 2:9 +FLAGS (\Deleted)")
        session.do("EXPUNGE")
        assert sorted(user.look()) == [1, 10]
        session.do("DELETE box")
        assert "box" not in user.mailboxes()
    user.lmtp(mail("lmtp"))
    assert len(user.look()) == 3
    user.wait_equal()


def test_ack_applied_without_replica(applied):
    """Proceeds after the timeout."""
    user = applied.user()
    applied.b.stop()
    work(user)
    applied.b.start()
    user.wait_equal()


def test_ack_local_waits_for_nothing(new_cluster):
    cluster = new_cluster(settings={"dovetail_ack": "local",
                                    "dovetail_ack_timeout": "30s"})
    cluster.expect_errors(NO_REDIS)
    user = cluster.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    cluster.redis.pause()
    try:
        with at_most(1):
            with user.imap() as session:
                for n in range(10):
                    session.append("INBOX", mail("m%d" % n))
        with at_most(0):
            user.lmtp(mail("lmtp"))
    finally:
        cluster.redis.resume()
    user.wait_equal()


@pytest.mark.parametrize("ack", ["queued", "queued, no disk",
                                 "applied"])
def test_ack_failure_refuse(new_cluster, ack):
    """New mail is deferred while it cannot be protected, and taken again
    afterwards. Nothing that was refused is in the mailbox."""
    cluster = new_cluster(settings=dict(
        SETTINGS, dovetail_ack=ack.partition(",")[0],
        dovetail_ack_failure="refuse"))
    cluster.expect_errors(NO_REDIS, "Error: lmtp-server: .* 451 ",
                          "XADD failed: MISCONF")
    user = cluster.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    if ack == "queued, no disk":
        # it says so in a long sentence
        os.mkdir(os.path.join(cluster.redis.dir, "dump.rdb"))
        cluster.redis.cli("config", "set", "save", "3600 1")
        cluster.redis.cli("bgsave")
        wait_for(lambda: "MISCONF" in cluster.redis.cli(
            "set", "x", "y", check=False), "Redis to refuse writes")
    else:
        away = cluster.redis if ack == "queued" else cluster.b
        away.stop()

    def deliver():
        with at_most(ACK_TIMEOUT):
            (code, _), = cluster.a.lmtp([user], mail("deferred")).values()
        return code

    # the first ones may come before the fault is noticed
    wait_for(lambda: deliver() == 451, "LMTP to be deferred")
    count = len(user.look("INBOX", cluster.a))
    assert deliver() == 451
    with user.imap() as session:
        with pytest.raises(Refused, match=r"NO \[UNAVAILABLE\]"):
            session.append("INBOX", mail("refused"))
        assert len(session.messages("INBOX")) == count
    if ack == "queued, no disk":
        cluster.redis.cli("config", "set", "save", "")
    else:
        away.start()
    wait_for(lambda: deliver() == 250, "LMTP to be accepted again")
    user.wait_equal()


def test_list_while_inbox_is_created():
    """Who creates INBOX holds mailboxes.lock and then wants the list index; who
    lists mailboxes meanwhile and finds INBOX half-made must not hold the list
    index and want mailboxes.lock: Dovecot panics then."""
    with Cluster(("sdbox", "sdbox")) as cluster:
        user = cluster.user()
        for node in cluster.nodes:
            root = os.path.join(node.home(user), "mail")
            directory = root
            os.mkdir(root)
            for name in "mailboxes", "INBOX":
                os.chown(directory, user.uid, user.gid)
                directory = os.path.join(directory, name)
                os.mkdir(directory)
            os.chown(directory, user.uid, user.gid)
            user.write(root + "/mailboxes.lock", b"")
            with open(root + "/mailboxes.lock", "r+") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)
                with at_most(ACK_TIMEOUT):
                    user.doveadm("mailbox list", node=node)


def test_delivery_while_the_uid_list_is_locked(new_cluster):
    """Without the lock Dovecot delivers into a Maildir all the same, and gives
    the message its UID later: nothing could be sent before the answer."""
    cluster = new_cluster(["maildir", "sdbox"])
    user = cluster.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    count = cluster.redis.entries("a")
    lock = os.path.join(user.primary.home(user), "mail", "dovecot-uidlist.lock")
    user.write(lock, b"%d:%s" % (os.getpid(), socket.gethostname().encode()))
    writer = threading.Thread(target=user.lmtp, args=(mail("after"),))
    writer.start()
    writer.join(1)
    waited = writer.is_alive()
    os.unlink(lock)
    writer.join()
    assert waited and cluster.redis.entries("a") > count
    user.wait_equal()
