"""doveadm dovetail verify, repair, seed: the jobs behind them."""

import base64
import contextlib
import glob
import http.client
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import threading
import time

import pytest

from cluster import Cluster, free_port, mail, wait_for
from test_doveadm import (FORMATTERS, NOUSER, NOPERM, PROTOCOL, TEMPFAIL,
                          USAGE, CONFIG, FakeQueue, ask, dovetail, frame, num,
                          string, welcome)

# sysexits.h
DATAERR, UNAVAILABLE = 65, 69
COLUMNS = ["user", "mailbox", "peer", "result", "messages", "difference"]
REPLY, JOB_RESULT, JOB_PROGRESS, JOB_DONE = 66, 12, 13, 14


@pytest.fixture(scope="module")
def two():
    with Cluster(["sdbox", "maildir"]) as cluster:
        yield cluster


def found(node, *args, exit=0):
    """The rows as a dict {(user, mailbox, peer): (result, difference)}."""
    done = node.doveadm("-f", "json", "dovetail", *map(str, args), check=False)
    assert done.returncode == exit, (done.stdout, done.stderr)
    rows = json.loads(done.stdout)
    assert all(list(row) == COLUMNS for row in rows)
    result = {(row["user"], row["mailbox"], row["peer"]):
              (row["result"], row["difference"]) for row in rows}
    assert len(result) == len(rows)
    return result


def summary(node, *args, exit=0):
    """The numbers, as numbers."""
    out, _ = dovetail(node, *args, "--summary", exit=exit, formatter="json")
    row, = json.loads(out)
    return {key: float(value) if key == "seconds" else int(value)
            for key, value in row.items()}


def filled(cluster, folders=("Work",), primary=None):
    """A user with a mail in INBOX, equal on all nodes."""
    user = cluster.user(primary)
    user.lmtp(mail("one"))
    for name in folders:
        user.doveadm("mailbox create", name)
    user.wait_equal()
    return user


def crowd(cluster):
    """So many users with mail that a job with a rate takes a while, whatever ran
    before. Returns one of them."""
    user = filled(cluster)
    while len(cluster.users) < 12:
        filled(cluster)
    return user


def lose_a_message(user, node):
    """Behind everybody's back."""
    path = glob.glob(os.path.join(node.home(user), "mail", "*", "*,S=*"))[0]
    os.unlink(path)


class Command:
    """doveadm that runs beside the test, with a terminal if it shall have one."""

    def __init__(self, node, *args, terminal=False, options=()):
        argv = node.line.command("doveadm", *options, "-c", node.conf,
                                 "dovetail", *args)
        self.master = slave = None
        if terminal:
            self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=slave or subprocess.PIPE, text=True)
        if slave:
            os.close(slave)
        self.seen = ""

    def read_terminal(self, regex, timeout=60):
        """Until the terminal shows it."""
        deadline = time.monotonic() + timeout
        while not re.search(regex, self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode()
                except OSError:
                    # the other side is closed
                    assert re.search(regex, self.seen), self.seen
        return re.search(regex, self.seen)

    def end(self, signal=None, exit=0):
        if signal:
            self.process.send_signal(signal)
        out, err = self.process.communicate(timeout=120)
        if self.master is not None:
            with contextlib.suppress(OSError):
                while data := os.read(self.master, 65536):
                    self.seen += data.decode()
            os.close(self.master)
            err = self.seen
        assert self.process.returncode == exit, (out, err)
        return out, err

    def running(self):
        return self.process.poll() is None


def state_files(node):
    path = os.path.join(node.state_dir, "dovetail", "replay", "job.*")
    return sorted(map(os.path.basename, glob.glob(path)))


# -- what is told

def test_equal(two):
    user = filled(two)
    assert found(two.a, "verify", "-u", user) == {
        (str(user), "-", "b"): ("equal", "-"),
        (str(user), "INBOX", "b"): ("equal", "-"),
        (str(user), "Work", "b"): ("equal", "-")}
    numbers = summary(two.a, "verify", "-u", user)
    assert numbers.pop("seconds") < 10
    assert numbers.pop("rate") > 0
    assert numbers == {"users": 1, "mailboxes": 2, "messages": 1, "equal": 2,
                       "different": 0, "repaired": 0, "unknown": 0,
                       "elsewhere": 0, "bytes": 0}
    _, err = dovetail(two.a, "verify", "-u", user)
    assert re.search(r"^Info: verify: 1 users, 2 mailboxes, 1 messages: "
                     r"2 equal; \d+\.\d{3} s, \d+ messages/s$", err)


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_formatters(two, formatter):
    user = filled(two)
    out, _ = dovetail(two.a, "verify", "-u", user, formatter=formatter)
    if formatter in ("table", "tab"):
        assert out.split()[:6] == COLUMNS and len(out.splitlines()) == 4
    assert out.count("INBOX") == 1 and out.count("equal") == 3
    out, _ = dovetail(two.a, "verify", "-u", user, "--summary",
                      formatter=formatter)
    assert "INBOX" not in out and out.count("mailboxes") == 1


def test_different(two):
    good, bad = filled(two), filled(two)
    lose_a_message(bad, two.b)
    rows = found(two.a, "verify", "-u", bad, exit=DATAERR)
    assert rows[str(bad), "INBOX", "b"][0] == "different"
    assert rows[str(bad), "Work", "b"][0] == "equal"
    # of many, only what is not equal; the first in the way of the others
    rows = found(two.a, "verify", "-A", exit=DATAERR)
    assert {key: row[0] for key, row in rows.items()} == {
        (str(bad), "INBOX", "b"): "different"}
    numbers = summary(two.a, "verify", "-A", exit=DATAERR)
    assert (numbers["different"], numbers["unknown"]) == (1, 0)
    assert numbers["equal"] == numbers["mailboxes"] - 1 > 2
    # and what is asked for
    assert found(two.a, "verify", "-u", good)
    pattern = str(good)[:-1] + "?"
    assert summary(two.a, "verify", "-u", pattern,
                   exit=DATAERR)["users"] in range(2, 12)
    dovetail(two.a, "repair", "--dry-run", "-u", bad, exit=DATAERR)
    # for the tests that look at everybody
    bad.doveadm("expunge", "mailbox", "INBOX", "all")
    bad.wait_equal()
    found(two.a, "verify", "-A")


def replica_file(user, node, name):
    return os.path.join(node.home(user), "mail", name)


def test_subscriptions_differ(two):
    user = filled(two, ["Work", "Play"])
    user.doveadm("mailbox subscribe", "Work")
    user.wait_equal()
    with open(replica_file(user, two.b, "subscriptions")) as f:
        before = f.read()
    assert before.endswith("Work\n")
    user.write(replica_file(user, two.b, "subscriptions"),
               before.replace("Work", "Play").encode())
    rows = json.loads(dovetail(two.a, "verify", "-u", user, exit=DATAERR,
                               formatter="json")[0])
    assert [(row["mailbox"], row["difference"]) for row in rows
            if row["result"] == "different"] == [
        ("-", "Work is not subscribed on b"),
        ("-", "Play is subscribed only on b")]
    # only looked at
    assert user.subscriptions() == ["Play"]
    rows = json.loads(dovetail(two.a, "repair", "-u", user,
                               formatter="json")[0])
    assert [row["difference"] for row in rows
            if row["result"] == "repaired"] == [
        "Work is not subscribed on b", "Play is subscribed only on b"]
    assert user.subscriptions() == ["Work"]
    found(two.a, "verify", "-u", user)


def test_mailboxes_differ(two):
    user = filled(two, ["Work", "Play"])
    two.expect_errors("Couldn't verify mailbox GUID")
    os.rename(replica_file(user, two.b, ".Work"),
              replica_file(user, two.b, ".Job"))
    rows = found(two.a, "verify", "-u", user, exit=DATAERR)
    assert rows[str(user), "-", "b"] == ("different",
                                         "Mailbox Work is Job on b")
    assert found(two.a, "repair", "-u", user)[str(user), "-", "b"][0] == \
        "repaired"
    user.wait_equal()
    # a folder is gone
    shutil.rmtree(replica_file(user, two.b, ".Play"))
    rows = found(two.a, "verify", "-u", user, exit=DATAERR)
    assert rows[str(user), "-", "b"] == ("different",
                                         "Mailbox Play is not on b")
    assert rows[str(user), "Play", "b"][0] == "different"
    assert rows[str(user), "Work", "b"][0] == "equal"
    found(two.a, "repair", "-u", user)
    user.wait_equal()


def test_all_users(two):
    here, there = filled(two), filled(two, primary=two.b)
    everybody = len(two.a.doveadm("user", "*").split())
    numbers = summary(two.a, "verify", "-A")
    assert numbers["elsewhere"] >= 1
    assert numbers["users"] + numbers["elsewhere"] == everybody
    _, err = dovetail(two.a, "verify", "-A")
    assert "other nodes are the primary" in err
    assert summary(two.b, "verify", "-u", there)["mailboxes"] == 2
    # all is the default
    for args in ("seed", "-A"), ("seed",):
        numbers = summary(two.a, *args)
        assert numbers["users"] + numbers["elsewhere"] == everybody
    wait_for(lambda: not state_files(two.a), "the state to go")


def test_user_who_is_not_here(two):
    there = filled(two, primary=two.b)
    out, err = dovetail(two.a, "verify", "-u", there, exit=UNAVAILABLE)
    assert "node b" in err
    out, err = dovetail(two.a, "verify", "-u", "nobody.there", exit=NOUSER)
    assert "nobody.there" in err and "userdb" in err
    found(two.a, "verify", "-u", "nobody.th*")


def test_user_without_mail(two):
    user = two.user()
    assert summary(two.a, "verify", "-u", user)["different"] == 0


# -- arguments

@pytest.mark.parametrize("args", [
    ("verify",), ("repair",), ("verify", "-u", "x", "-A"), ("seed", "x"),
    ("verify", "-A", "x"), ("verify", "-A", "--rate", "0"),
    ("verify", "-A", "--rate", "fast"), ("verify", "-u", "x", "--resume"),
    ("seed", "--dry-run"), ("verify", "-A", "--rate", "4294967296")])
def test_arguments_that_make_no_sense(two, args):
    out, err = dovetail(two.a, *args, exit=USAGE)
    assert out == "" and err


def test_no_peers(two):
    _, err = dovetail(two.a, "verify", "-A", exit=CONFIG, peers="")
    assert "dovetail_peers" in err


def test_not_for_everybody(two):
    done = subprocess.run(
        two.a.line.command("doveadm", "-c", two.a.conf, "dovetail", "verify",
                           "-A", user="dovenull"),
        capture_output=True, text=True, timeout=60)
    assert done.returncode == NOPERM and "Permission denied" in done.stderr


def job_frame(kind, slot, *parts):
    return frame(kind, num(1), num(slot), *parts)


def row(user="u", mailbox="m", peer="b", result=2, messages=1, *texts):
    return string(user) + string(mailbox) + string(peer) + bytes([result]) + \
        num(messages) + num(len(texts)) + b"".join(map(string, texts))


ENDED = job_frame(JOB_DONE, 0, num(0), string("")) + \
    frame(REPLY, num(1), num(0), string(""))


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_prints_what_it_gets(two, tmp_path, formatter):
    path = str(tmp_path / "s")
    with FakeQueue(path, welcome, job_frame(JOB_RESULT, 0, row(
            "u\n1", "Grüße", "b", 2, 4294967295, "one\ttext", "another")),
            job_frame(JOB_RESULT, 3, row("u2", "", "", 4, 0)),
            job_frame(JOB_PROGRESS, 3, num(0), *map(num, range(1, 12))),
            ENDED, hang=True):
        out, err = dovetail(two.a, "verify", "-A", "-a", path,
                            formatter=formatter, exit=DATAERR)
    assert "Grüße" in out and "4294967295" in out and "another" in out
    if formatter == "json":
        one, two_, three = json.loads(out)
        assert [r["difference"] for r in (one, two_, three)] == [
            "one\ufffdtext", "another", "-"]
        assert (three["user"], three["mailbox"], three["peer"],
                three["result"]) == ("u2", "-", "-", "unknown")
    assert "8 different, 9 repaired, 10 unknown" in err


@pytest.mark.parametrize("sends,exit,what", [
    ([welcome], TEMPFAIL, "hung up"),
    ([welcome, frame(REPLY, num(1), num(3), string("not you"))], NOPERM,
     "not you"),
    ([welcome, frame(REPLY, num(1), num(1), string("not now"))], TEMPFAIL,
     "not now"),
    ([welcome, job_frame(JOB_RESULT, 0, b"\xff")], PROTOCOL,
     "cannot be read"),
    ([welcome, job_frame(JOB_PROGRESS, 9999999, num(0),
                         *map(num, range(11)))], PROTOCOL, "cannot be read"),
    ([welcome, job_frame(JOB_RESULT, 0, row(result=5))], PROTOCOL,
     "cannot be read"),
    ([welcome, job_frame(JOB_DONE, 0, num(1), string("because")),
      frame(REPLY, num(1), num(0), string(""))], TEMPFAIL, "because"),
    ([b"\0\0\0\1" + bytes([99])], PROTOCOL, "not a dovetail-queue")])
def test_a_stranger(two, tmp_path, sends, exit, what):
    path = str(tmp_path / "s")
    with FakeQueue(path, *sends):
        _, err = dovetail(two.a, "verify", "-A", "-a", path, exit=exit)
    assert what in err


# -- progress, interruption, several at once

def test_progress_on_a_terminal(two):
    user = filled(two)
    with user.imap() as session:
        session.append("Work", *[mail("x")] * 30)
    user.wait_equal()
    command = Command(two.a, "verify", "-A", "--rate", "20", terminal=True)
    command.read_terminal(r"verify: \d+ of \d+ users, \d+ mailboxes, "
                          r"\d+ messages, \d+/s, \d+:\d\d:\d\d left")
    _, err = command.end()
    # the line is gone when something else is said
    assert re.search(r"\r\x1b\[KInfo: verify: ", err)
    _, err = Command(two.a, "verify", "-u", str(user)).end()
    assert "\r" not in err


def test_interrupt_and_resume(two):
    crowd(two)
    everybody = len(two.a.doveadm("user", "*").split())
    whole = summary(two.a, "verify", "-A")
    command = Command(two.a, "verify", "-A", "--rate", "4", terminal=True)
    # some, but not all
    command.read_terminal(r"verify: (?!0)\d+ of %d users" % everybody)
    out, err = command.end(signal.SIGINT, exit=TEMPFAIL)
    resume = re.search(r"To go on where this ended: doveadm dovetail (.*?)\r",
                       err)[1]
    assert resume == "verify -A --resume"
    wait_for(lambda: state_files(two.a), "the state")
    before = int(re.search(r"(\d+) of %d users" % everybody, err)[1])
    _, err = dovetail(two.a, *resume.split())
    assert "finished before" in err
    done = int(re.search(r"verify: (\d+) users", err)[1])
    assert 0 < done <= whole["users"] - before + 1
    wait_for(lambda: not state_files(two.a), "the state to go")
    # nothing to resume: all of it
    assert summary(two.a, "verify", "-A", "--resume")["users"] == \
        whole["users"]


def test_resume_is_for_the_same(two):
    crowd(two)
    command = Command(two.a, "verify", "-A", "--rate", "4", terminal=True)
    command.read_terminal(r"verify: (?!0)\d+ of")
    command.end(signal.SIGTERM, exit=TEMPFAIL)
    _, err = dovetail(two.a, "verify", "-A", "--deep", "--resume")
    assert "finished before" not in err


def test_several_at_once(two):
    user = crowd(two)
    first = Command(two.a, "verify", "-A", "--rate", "4", terminal=True)
    first.read_terminal("verify: ")
    second = Command(two.a, "verify", "-A", terminal=True)
    second.read_terminal("waiting for its end")
    # one user is not kept waiting
    found(two.a, "verify", "-u", user)
    assert first.running() and second.running()
    first.end(signal.SIGINT, exit=TEMPFAIL)
    second.end()


# -- something is away

def test_replica_is_down(new_cluster):
    cluster = new_cluster()
    user = filled(cluster)
    cluster.b.stop()
    all_users = Command(cluster.a, "verify", "-A")
    rows = found(cluster.a, "verify", "-u", user, exit=TEMPFAIL)
    assert len(rows) == 3
    assert {row[0] for row in rows.values()} == {"unknown"}
    assert {row[1] for row in rows.values()} == {
        "No answer from b, which confirms nothing"}
    _, err = all_users.end(exit=TEMPFAIL)
    assert "Node b answers nothing" in err
    assert "doveadm dovetail verify -A --resume" in err
    cluster.b.start()
    _, err = dovetail(cluster.a, "verify", "-A", "--resume")
    assert "different" not in err and "unknown" not in err


def test_takes_longer_than_a_peer_may_be_silent(two):
    """Between questions a peer has nothing to confirm."""
    folders = ["f1", "f2", "f3", "f4"]
    user = filled(two, folders)
    with user.imap() as session:
        for folder in folders:
            session.append(folder, *[mail("x")] * 21)
    user.wait_equal()
    _, err = Command(two.a, "verify", "-u", user, "--rate", "1").end()
    equal, seconds = re.search(r": (\d+) equal; (\d+)\.", err).groups()
    # when the last question was asked
    assert (int(equal), int(seconds) > 61) == (5, True)


def test_redis_is_away_for_a_moment(two):
    crowd(two)
    two.expect_errors("(?i)redis")
    command = Command(two.a, "verify", "-A", "--rate", "4", terminal=True)
    command.read_terminal(r"verify: (?!0)\d+ of")
    two.redis.stop()
    time.sleep(2)
    two.redis.start()
    _, err = command.end()
    assert "unknown" not in err and "different" not in err


def test_worker_dies(two):
    crowd(two)
    two.expect_errors("dovetail-replay.*killed with signal 9")
    command = Command(two.a, "verify", "-A", "--rate", "2", terminal=True)
    command.read_terminal(r"verify: (?!0)\d+ of")
    two.a.kill_service("dovetail-replay")
    _, err = command.end(exit=TEMPFAIL)
    assert "A dovetail-replay process ended" in err
    assert "verify -A --resume" in err

    def resumed():
        # the workers are just starting
        done = two.a.doveadm("dovetail", "verify", "-A", "--resume",
                             check=False)
        assert done.returncode in (0, TEMPFAIL), done.stderr
        return done.returncode == 0
    wait_for(resumed, "the workers", 60)


def test_queue_ends(two):
    crowd(two)
    two.expect_errors("dovetail-queue.*killed with signal 9", "dovetail-queue",
                      "connect.*dovetail-queue")
    command = Command(two.a, "verify", "-A", "--rate", "2", terminal=True)
    command.read_terminal(r"verify: (?!0)\d+ of")
    two.a.kill_service("dovetail-queue")
    _, err = command.end(exit=TEMPFAIL)
    assert "hung up" in err and "verify -A --resume" in err


# -- while others write

class Writer(threading.Thread):
    """A client that never rests."""

    def __init__(self, user):
        super().__init__()
        self.user, self.stopped, self.rounds = user, threading.Event(), 0

    def run(self):
        with self.user.imap() as session:
            while not self.stopped.is_set():
                self.rounds += 1
                folder = "f%d" % (self.rounds % 7)
                session.append("INBOX", mail("hello"))
                session.do("CREATE %s" % folder)
                session.do("SUBSCRIBE %s" % folder)
                session.select("INBOX")
                session.do(r"STORE * +FLAGS (\Seen kw%d)" %
                           (self.rounds % 5))
                session.do("COPY * %s" % folder)
                if self.rounds % 3 == 0:
                    session.do(r"STORE 1 +FLAGS (\Deleted)")
                    session.do("EXPUNGE")
                session.do("UNSUBSCRIBE %s" % folder)
                session.do("DELETE %s" % folder)


def test_no_false_alarm(new_cluster):
    # writers that wait for the replica are never far ahead of it
    cluster = new_cluster(["sdbox", "maildir"],
                          settings={"dovetail_ack": "applied"})
    # the writers do delete them; also those that were just asked about
    cluster.expect_errors("no longer at the primary, deleting",
                          "This node is not the user's primary")
    writers = [Writer(filled(cluster)) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(20):
            assert found(cluster.a, "verify", "-A") == {}
            for writer in writers:
                assert writer.is_alive()
                rows = found(cluster.a, "verify", "-u", writer.user)
                assert {row[0] for row in rows.values()} == {"equal"}
    finally:
        for writer in writers:
            writer.stopped.set()
        for writer in writers:
            writer.join()
    assert all(writer.rounds > 10 for writer in writers)
    for writer in writers:
        writer.user.wait_equal()


# -- the same over HTTP

def test_http(new_cluster):
    port = free_port()
    cluster = new_cluster(["sdbox", "maildir"], node_options={"a": {"conf": """
doveadm_password = secret
service doveadm {
  inet_listener http {
    port = %d
  }
}
""" % port}})
    user = filled(cluster)

    def post(name, **parameters):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST", "/doveadm/v1", json.dumps([[name, parameters, "t"]]),
            {"Content-Type": "application/json", "Authorization": "Basic " +
             base64.b64encode(b"doveadm:secret").decode()})
        (kind, body, tag), = json.loads(connection.getresponse().read())
        assert tag == "t"
        return kind, body

    kind, body = post("dovetailVerify", user=str(user))
    assert kind == "doveadmResponse"
    assert {row["result"] for row in body} == {"equal"} and len(body) == 3
    lose_a_message(user, cluster.b)
    kind, body = post("dovetailVerify", allUsers=True, explain=True)
    assert kind == "doveadmResponse"
    assert {(row["user"], row["mailbox"], row["result"]) for row in body} == {
        (str(user), "INBOX", "different")}
    kind, body = post("dovetailVerify", allUsers=True, summary=True, rate=1000)
    assert body[0]["different"] == "1"
    cluster.expect_errors("not known here")
    assert post("dovetailVerify", user="nobody.there") == (
        "error", {"type": "exitCode", "exitCode": NOUSER})
