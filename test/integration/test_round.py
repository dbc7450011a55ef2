"""The round: every dovetail_verify_interval all users are compared, and what
nobody saw is found and repaired, though nobody logs in."""

import glob
import json
import os

import pytest

from cluster import Cluster, mail, wait_for

# by Dovecot, when it ends while users are listed
ENDED = (r"auth-worker: Aborted LIST request", r"userdb list: ",
         r"Fatal: Error reading configuration: .*/run/config\)?.* failed")
INTERVAL = {"dovetail_verify_interval": "2s", "dovetail_verify_rate": "1000"}
FIELDS = ("slots", "shards", "began", "ended", "last_different",
          "last_repaired", "users", "mailboxes", "messages", "different",
          "repaired", "user")


def behind(user, node, *command):
    """doveadm without the plugin: neither captured nor refused."""
    node.doveadm("-o", "mail_plugins=", *command)


def status(node):
    """The node's own row."""
    rows = json.loads(node.doveadm("-f", "json", "dovetail", "status"))
    row, = [row for row in rows if row["direction"] == "self"]
    return row


def progress_of_all(node):
    """What the workers' files say, a dict of each."""
    found = []
    for path in glob.glob(os.path.join(node.state_dir, "dovetail", "replay",
                                       "round.*[0-9]")):
        with open(path) as f:
            fields = dict(zip(FIELDS, f.read().rstrip("\n").split("\t")))
        found.append({key: value if key == "user" else int(value)
                      for key, value in fields.items()})
    return found


def progress(node):
    """Of the only one."""
    only, = progress_of_all(node)
    return only


def unfinished(node):
    """Workers whose round has begun."""
    return [p for p in progress_of_all(node) if p["began"] > p["ended"]]


def filled(cluster, count=3):
    user = cluster.user()
    for n in range(count):
        user.lmtp(mail("m%d" % n))
    user.doveadm("mailbox create", "Work", "Play")
    user.doveadm("mailbox subscribe", "Work")
    user.wait_equal()
    return user


@pytest.fixture(scope="module")
def two():
    with Cluster(["maildir", "sdbox"], settings=INTERVAL) as cluster:
        yield cluster


def test_flags_of_an_idle_user(two):
    user = filled(two)
    behind(user, two.b, "flags", "add", "-u", str(user), r"\Flagged wrong",
           "uid", "2")
    assert "wrong" in user.flags()[2]
    two.a.wait_log(r"User %s mailbox INBOX: Verification: Was different on b, "
                   r"repaired: UID 2: flags none on a, \\Flagged wrong on b"
                   % user)
    user.wait_equal()


def test_subscription_and_mailbox_of_an_idle_user(two):
    user = filled(two)
    behind(user, two.b, "mailbox", "unsubscribe", "-u", str(user), "Work")
    behind(user, two.b, "mailbox", "subscribe", "-u", str(user), "Play")
    two.a.wait_log(r"User %s: Verification: Was different on b, repaired: .*"
                   r"(Work is not subscribed on b|Play is subscribed only on b)"
                   % user)
    wait_for(lambda: user.subscriptions() == ["Work"], "the subscription")
    behind(user, two.b, "mailbox", "delete", "-u", str(user), "Play")
    two.a.wait_log(r"User %s: Verification: Was different on b, repaired: "
                   r"Mailbox Play is not on b" % user)
    user.wait_equal()


def test_mailbox_that_only_the_replica_has(two):
    user = filled(two)
    behind(user, two.b, "mailbox", "create", "-u", str(user), "Extra")
    two.b.doveadm("-o", "mail_plugins=", "save", "-u", str(user),
                  "-m", "Extra", input=mail("extra"))
    two.a.wait_log(r"User %s: Verification: .*on b.*: Mailbox Extra "
                   r"\(1 messages\) is only on b" % user)
    # which keeps what was in it
    wait_for(lambda: two.b.doveadm("-f", "tab", "fetch", "-u", str(user), "uid",
                                   "mailbox", "dovetail-kept/Extra")
             == "uid\n1\n", "the message in dovetail-kept")
    wait_for(lambda: status(two.a)["different"] == "0", "the next round")


def test_file_that_nobody_saw(two):
    """A Maildir of the primary, that nobody opens."""
    user = filled(two)
    user.write(os.path.join(two.a.home(user), "mail", ".Work", "new",
                            "1.by.hand"),
               mail("by hand").replace(b"\r\n", b"\n"))
    wait_for(lambda: len(user.look("Work")) == 1, "the message on b")
    user.wait_equal()


def test_status_says_when(two):
    first = wait_for(lambda: status(two.a)["verified"], "a round")
    assert first.startswith("20")
    wait_for(lambda: status(two.a)["verified"] > first, "another one")
    # b is the primary of nobody, and none of its users differs
    assert status(two.b)["different"] == "0"


def test_an_administrator_goes_first(new_cluster):
    """Though a round is always running."""
    cluster = new_cluster(settings=dict(
        INTERVAL, dovetail_verify_interval="1s", dovetail_verify_rate="1"), users=20)
    cluster.expect_errors(*ENDED)
    filled(cluster)
    wait_for(lambda: unfinished(cluster.a), "a round")
    done = cluster.a.doveadm("dovetail", "verify", "-A", check=False)
    assert done.returncode == 0 and b"waiting" not in done.stderr


def test_goes_on_after_a_restart(new_cluster):
    cluster = new_cluster(settings=dict(
        INTERVAL, dovetail_verify_interval="1s", dovetail_verify_rate="4"),
        replay_workers=1, users=24)
    cluster.expect_errors("dovetail-replay.*killed with signal 9", *ENDED)
    everybody = len(cluster.a.doveadm("user", "*").split())
    filled(cluster)
    before = wait_for(lambda: (p := progress(cluster.a)) and
                      8 <= p["users"] <= everybody // 2 and p, "a part", 120)
    cluster.a.kill_service("dovetail-replay")
    after = progress(cluster.a)
    # not from its beginning
    later = wait_for(lambda: (p := progress(cluster.a)) and
                     p["user"] != after["user"] and p, "it to go on")
    assert before["began"] == after["began"] == later["began"]
    assert before["user"] <= after["user"] < later["user"]
    assert before["users"] <= after["users"] < later["users"] < everybody
    cluster.a.wait_log("Verification: %d users, " % everybody, 120)


def test_never(new_cluster):
    cluster = new_cluster(settings={"dovetail_verify_interval": "0"})
    user = filled(cluster)
    behind(user, cluster.b, "flags", "add", "-u", str(user), "wrong",
           "uid", "2")
    # the same as what a round would do
    cluster.a.doveadm("dovetail", "verify", "-u", str(user), check=False)
    assert status(cluster.a)["verified"] in ("", "-")
    assert not glob.glob(os.path.join(cluster.a.state_dir, "dovetail",
                                      "replay", "round.*"))
    assert "wrong" in user.flags()[2]
