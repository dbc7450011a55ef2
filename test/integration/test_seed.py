"""doveadm dovetail seed: an existing store comes to a new replica."""

import os
import re
import shutil
import signal
import threading
import time

import pytest

import view
from cluster import MAIL_USER, PATIENCE, mail, wait_for
from test_verify import TEMPFAIL, Command, summary

# a message of the store
SIZE = 4000


def body(n):
    return mail("m%d" % n) + (b"x" * 78 + b"\r\n") * (SIZE // 80)


def store(cluster, users=3, messages=40):
    """Users with mail that a has from before dovetail. a is stopped then."""
    found = [cluster.user() for _ in range(users)]
    a = cluster.a
    a.plugin = False
    a.start()
    for user in found:
        with user.imap() as session:
            session.do("CREATE Work")
            session.do("SUBSCRIBE Work")
            for folder in ("INBOX", "Work"):
                session.append(folder, *map(body, range(messages)),
                               flags=r"\Seen kw")
                session.select(folder)
                session.do("UID STORE 3 +FLAGS (\\Deleted)")
                session.do("EXPUNGE")
    a.stop()
    a.plugin = True
    return found


@pytest.fixture
def seeded(new_cluster):
    """make(formats, ...): a cluster that runs, with users whose mail only the
    primary has."""
    def make(formats=("sdbox", "maildir"), settings=(), store_options=(),
             **options):
        cluster = new_cluster(formats, start=False, settings=settings,
                              users=8, **options)
        users = store(cluster, **dict(store_options))
        cluster.start()
        return cluster, users
    return make


def ready(cluster):
    """Workers are there, and the replica reports."""
    wait_for(lambda: cluster.a.doveadm(
        "dovetail", "verify", "-u", "u8", check=False).returncode == 0,
        "the services")


def on_replica(cluster, users):
    """How many messages it has."""
    return sum(mailbox.messages for user in users
               for mailbox in view.status(cluster.b, user).values())


def redis_bytes(cluster):
    """That were sent to Redis."""
    return int(re.search(r"total_net_input_bytes:(\d+)",
                         cluster.redis.cli("info", "stats"))[1])


def test_existing_store(seeded):
    cluster, users = seeded(store_options={"messages": 60})
    ready(cluster)
    assert on_replica(cluster, users) == 0
    command = Command(cluster.a, "seed", "--rate", "100", terminal=True)
    # users, messages, rate, bytes, time left
    command.read_terminal(
        r"seed: [123] of 8 users, \d+ mailboxes, \d+ messages, \d+/s.*, "
        r"\d+\.\d MB sent, 0:00:\d\d left")
    _, err = command.end()
    sent = float(re.search(r"Info: seed: 8 users, .*, (\d+\.\d) MB sent;",
                           err)[1])
    total = 3 * 2 * 59 * len(body(1)) / 1e6
    assert total * 0.95 < sent < total * 1.3
    for user in users:
        user.wait_equal()
    # once more: nothing is sent
    numbers = summary(cluster.a, "seed")
    assert numbers["bytes"] == numbers["repaired"] == 0
    assert numbers["messages"] == 3 * 2 * 59


def test_rate(seeded):
    cluster, users = seeded()
    ready(cluster)
    start = time.monotonic()
    # of two workers at least; each takes what it begins with at once
    dovetail = cluster.a.doveadm("dovetail", "seed", "--rate", "40")
    assert time.monotonic() - start > 39 * 2 / 40
    for user in users:
        user.wait_equal()


@pytest.mark.parametrize("what", ["interrupt", "worker", "redis", "replica"])
def test_interruption(seeded, what):
    """What arrived is not sent again."""
    messages = 250
    # a Maildir of which Dovecot was killed may have others
    cluster, users = seeded(["maildir", "sdbox"],
                            store_options={"messages": messages})
    everything = len(users) * 2 * (messages - 1)
    ready(cluster)
    command = Command(cluster.a, "seed", terminal=True)
    arrived = wait_for(lambda: everything // 5 <
                       on_replica(cluster, users) < everything, "a part", 60)
    assert arrived and command.running()
    if what == "interrupt":
        command.end(signal.SIGINT, exit=TEMPFAIL)
    elif what == "worker":
        cluster.expect_errors("dovetail-replay.*killed with signal 9")
        cluster.a.kill_service("dovetail-replay")
        command.end(exit=TEMPFAIL)
    elif what == "redis":
        cluster.expect_errors("(?i)redis")
        cluster.redis.kill()
        time.sleep(1)
        cluster.redis.start()
        command.process.wait(120)
        os.close(command.master)
    else:
        cluster.b.kill()
        cluster.b.start()
        # It has forgotten the question; but on a busy machine all may have
        # been there before it was killed, and then that is what was said.
        command.process.send_signal(signal.SIGINT)
        done = command.process.wait(120) == 0
        command.end(exit=0 if done else TEMPFAIL)
        assert not done or on_replica(cluster, users) == everything
    before = redis_bytes(cluster) if what != "redis" else 0

    def complete():
        done = cluster.a.doveadm("dovetail", "seed", "--resume", check=False)
        assert done.returncode in (0, TEMPFAIL), done.stderr
        return done.returncode == 0
    wait_for(complete, "the rest", 120)
    for user in users:
        user.wait_equal(60)
    assert redis_bytes(cluster) - before < everything * SIZE * 1.3
    assert summary(cluster.a, "seed")["bytes"] == 0


def test_live_changes_meanwhile(seeded):
    """They do not wait for the end of it."""
    cluster, users = seeded(store_options={"messages": 250})
    everything = len(users) * 2 * 249
    ready(cluster)
    others = [cluster.user() for _ in range(4)]
    for user in others:
        user.lmtp(mail("before"))
        user.wait_equal()
    command = Command(cluster.a, "seed")
    overtook = 0
    try:
        while on_replica(cluster, users) < everything:
            for user in others:
                count = len(user.look(body=False))
                user.lmtp(mail("live"))
                wait_for(lambda: len(user.look(body=False)) > count, "it")
                overtook += on_replica(cluster, users) < everything
            assert command.running() or not command.process.returncode
    finally:
        command.end()
    assert overtook >= 1
    for user in users + others:
        user.wait_equal()


def dsync(user):
    a, b = user.cluster.nodes
    # a command of a's system
    command = "/usr/bin/env -i %s -c %s dsync-server -u %s" % (
        b.line.doveadm, b.conf, user)
    a.doveadm("-o", "dsync_remote_cmd=" + command, "backup", "-u", user,
              "-N", "remote:b")


def take_over(cluster, users, how):
    """The replica gets the mail in another way, without dovetail."""
    a, b = cluster.nodes
    if how == "backup":
        for user in users:
            shutil.rmtree(b.home(user))
            shutil.copytree(a.home(user), b.home(user))
            for top, dirs, files in os.walk(b.home(user)):
                for name in (".", *dirs, *files):
                    shutil.chown(os.path.join(top, name), MAIL_USER)
        return
    for node in cluster.nodes:
        node.plugin = False
        node.start()
    for user in users:
        dsync(user)
    for node in cluster.nodes:
        node.stop()
        node.plugin = True


@pytest.mark.parametrize("formats,how", [
    (("sdbox", "sdbox"), "backup"), (("maildir", "maildir"), "backup"),
    (("sdbox", "sdbox"), "dsync"), (("mdbox", "mdbox"), "dsync"),
    (("maildir", "sdbox"), "dsync"), (("sdbox", "maildir"), "dsync")],
    ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_adopt(new_cluster, formats, how):
    """A replica that has the mail already."""
    cluster = new_cluster(formats, start=False, users=8)
    users = store(cluster)
    take_over(cluster, users, how)
    # a copy of files has no save dates, where the storage keeps none
    ignore = ["saved"] if how == "backup" else []
    cluster.start()
    ready(cluster)
    before = redis_bytes(cluster)
    numbers = summary(cluster.a, "seed")
    assert numbers["bytes"] == 0
    assert numbers["different"] == numbers["unknown"] == 0
    for user in users:
        user.wait_equal(ignore=ignore)
        user.lmtp(mail("after"))
        with user.imap() as session:
            session.select("Work")
            session.do("UID STORE 5 +FLAGS (\\Flagged)")
        user.wait_equal(ignore=ignore)
    assert redis_bytes(cluster) - before < 3 * 39 * SIZE
