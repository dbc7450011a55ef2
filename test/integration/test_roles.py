"""Who may write where: a replica refuses writes and serves reads; each node
can be the primary of some users; there may be more than two nodes."""

import os
import poplib
import pwd
import re
import threading

import pytest

import view
from cluster import Cluster, Refused, literal, mail, wait_equal, wait_for

FENCED = [
    ("append", "APPEND INBOX", literal(mail("no"))),
    ("append-to-folder", "APPEND work", literal(mail("no"))),
    ("store-flags", r"STORE 1 +FLAGS (\Flagged)"),
    ("store-replace", r"STORE 1:* FLAGS (\Seen)"),
    ("store-keyword", "UID STORE 1 +FLAGS (new)"),
    ("store-remove", "UID STORE 2 -FLAGS (old)"),
    ("store-silent", r"STORE 1 +FLAGS.SILENT (\Answered)"),
    ("copy", "COPY 1:2 work"),
    ("uid-copy-here", "UID COPY 1 INBOX"),
    ("move", "MOVE 1 work"),
    ("expunge", "EXPUNGE"),
    ("uid-expunge", "UID EXPUNGE 3"),
    ("create", "CREATE fresh"),
    ("create-child", "CREATE work/fresh/deep"),
    ("delete", "DELETE work/old"),
    ("rename", "RENAME work job"),
    ("subscribe", "SUBSCRIBE work/old"),
    ("unsubscribe", "UNSUBSCRIBE work"),
]


@pytest.fixture(scope="module")
def two():
    with Cluster(["sdbox", "maildir"]) as cluster:
        yield cluster


@pytest.fixture(scope="module", params="ab")
def box(two, request):
    """A user whose primary is a, and one whose primary is b. Message 2 has a
    keyword, message 3 is deleted but not expunged."""
    primary = getattr(two, request.param)
    user = two.user(None if primary is two.a else primary)
    with user.imap() as session:
        for name in ("work", "work/old"):
            session.do("CREATE", name)
        session.do("SUBSCRIBE work")
        session.append("INBOX", mail("one"), mail("two"), mail("three"))
        session.select("INBOX")
        session.do("STORE 2 +FLAGS (old)")
        session.do(r"STORE 3 +FLAGS (\Deleted)")
    user.wait_equal()
    user.before = view.view(user.primary, user)
    return user


def assert_unchanged(user):
    user.wait_equal()
    assert view.differences(user.before,
                            view.view(user.primary, user)) == []


# -- fenced

@pytest.mark.parametrize("command", FENCED, ids=lambda c: c[0])
def test_imap_write_is_refused(box, command):
    with box.imap(box.replica) as session:
        session.select("INBOX")
        with pytest.raises(Refused) as refused:
            session.do(*command[1:])
        assert re.match(r"NO \[UNAVAILABLE\] ", str(refused.value))
        assert re.search(r"\b%s\b" % box.primary.name, str(refused.value))
        # and the session goes on
        assert len(session.do("UID SEARCH ALL", wanted="SEARCH")) == 1
        session.select("work")
    assert_unchanged(box)


def test_imap_close_expunges_nothing(box):
    with box.imap(box.replica) as session:
        session.select("INBOX")
        try:
            session.do("CLOSE")
        except Refused as refused:
            assert "[UNAVAILABLE]" in str(refused)
    assert_unchanged(box)


def test_imap_reads_work(box):
    with box.imap(box.replica) as session:
        session.select("INBOX")
        rows = session.do("FETCH 1:3 (FLAGS BODY[])", wanted="FETCH")
        assert sum(b"Subject: " in row[1] for row in rows
                   if isinstance(row, tuple)) == 3
        session.do('SEARCH TEXT "one"')
        session.do("STATUS work (MESSAGES UIDNEXT)")
        session.do('LIST "" "*"')
        session.do("NOOP")
    assert_unchanged(box)


def test_pop3_reads_work(box):
    with box.pop3(box.replica) as session:
        assert b"Subject: one" in session.retr(1)[1]
        assert len(session.uidl()[1]) == 3
    assert_unchanged(box)


def test_pop3_dele_is_refused(box):
    with pytest.raises(poplib.error_proto, match="SYS/TEMP"):
        with box.pop3(box.replica) as session:
            session.dele(1)
    assert_unchanged(box)


def test_lmtp_defers(box):
    (code, text), = box.replica.lmtp([box], mail("no")).values()
    assert code == 451 and re.search(r"\b%s\b" % box.primary.name, text)
    assert_unchanged(box)


def test_lmtp_defers_only_users_of_others(two):
    """One transaction, two recipients: one is at home here."""
    here, there = two.user(), two.user(two.b)
    answers = two.a.lmtp([here, there], mail("both"))
    assert [code for code, _ in answers.values()] == [250, 451]
    here.wait_equal()
    assert len(here.look()) == 1


def test_sieve_defers(two):
    two.expect_errors(r"sieve: .*(UNAVAILABLE|due to temporary failure)")
    user = two.user(two.b)
    user.sieve('require ["fileinto", "mailbox"];\n'
               'fileinto :create "sorted";\n')
    (code, _), = two.a.lmtp([user], mail("no")).values()
    assert code == 451
    user.lmtp(mail("yes"))
    user.wait_equal()
    assert len(user.look("sorted")) == 1


def test_lda_defers(box):
    assert box.replica.lda(box, mail("no"), check=False) == 75
    assert_unchanged(box)


@pytest.mark.parametrize("command", [
    ["save"], ["flags add", r"\Seen", "mailbox", "INBOX", "all"],
    ["expunge", "mailbox", "INBOX", "all"],
    ["copy", "work", "mailbox", "INBOX", "all"],
    ["move", "work", "mailbox", "INBOX", "all"],
    ["mailbox create", "fresh"], ["mailbox delete", "work/old"],
    ["mailbox rename", "work", "job"], ["mailbox subscribe", "work/old"]],
    ids=lambda c: c[0].replace(" ", "-"))
def test_doveadm_write_is_refused(box, command):
    done = box.doveadm(*command, node=box.replica, check=False,
                       input=b"Subject: no\n\n")
    assert done.returncode != 0
    assert re.search(r"\b%s\b" % box.primary.name, done.stderr.decode())
    assert_unchanged(box)


def test_login_before_the_first_mail(two):
    """A user who looks at the replica first does not spoil his INBOX."""
    user = two.user()
    with user.imap(two.b) as session:
        session.do('LIST "" "*"')
        try:
            session.select("INBOX")
        except Refused as refused:
            assert "[UNAVAILABLE]" in str(refused)
    user.lmtp(mail("first"))
    user.wait_equal()
    with user.imap(two.b) as session:
        session.select("INBOX")


# -- both directions

def test_both_directions_at_once(two):
    users = [two.user(), two.user(), two.user(two.b), two.user(two.b)]
    errors = []

    def write(user):
        try:
            with user.imap() as session:
                session.do("CREATE box")
                session.select("INBOX")
                for n in range(1, 41):
                    session.append("INBOX", mail("n%d" % n))
                    session.do("NOOP")
                    session.do(r"UID STORE %d +FLAGS (\Flagged)" % n)
                    if n % 4 == 0:
                        session.do("UID MOVE %d box" % n)
                    if n % 10 == 0:
                        user.lmtp(mail("by lmtp"), user.primary)
                        session.do("SUBSCRIBE box")
        except Exception as e:  # shown by the test itself
            errors.append(e)
    threads = [threading.Thread(target=write, args=(u,)) for u in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for user in users:
        user.wait_equal()
        assert len(user.look("box")) >= 8


def test_what_was_replayed_is_not_sent_back(two):
    """Writes for users of a put nothing into the streams of b."""
    user = two.user()
    user.lmtp(mail("settles"))
    user.wait_equal()
    before = two.redis.entries("b")
    with user.imap() as session:
        session.do("CREATE box")
        session.append("INBOX", *(mail("n%d" % n) for n in range(30)))
        session.select("INBOX")
        session.do("MOVE 1:10 box")
        session.do(r"STORE 1:5 +FLAGS (\Deleted)")
        session.do("EXPUNGE")
        session.do("RENAME box boxed")
    user.wait_equal()
    # room for heartbeats, not for 30 messages
    assert two.redis.entries("b") - before < 10


# -- more than two nodes

@pytest.fixture(scope="module")
def three():
    with Cluster(["sdbox", "mdbox", "maildir"], replay_workers=2) as cluster:
        yield cluster


def work(user):
    with user.imap() as session:
        session.do("CREATE box/deep")
        session.append("INBOX", mail("one"), mail("two"), flags="keyword")
        session.select("INBOX")
        session.do("COPY 1 box/deep")
        session.do(r"STORE 2 +FLAGS (\Deleted)")
        session.do("EXPUNGE")
        session.do("SUBSCRIBE box/deep")
    user.lmtp(mail("three"))


@pytest.mark.parametrize("primary", "abc")
def test_three_nodes(three, primary):
    user = three.user(getattr(three, primary))
    work(user)
    user.wait_equal()
    for replica in user.replicas:
        assert len(user.look("INBOX", replica)) == 2
        with user.imap(replica) as session:
            with pytest.raises(Refused, match=r"UNAVAILABLE.*\b%s\b" %
                               primary):
                session.do("CREATE no")


def test_three_nodes_one_away(three):
    """It delays nobody else, and gets all of it when it comes back."""
    user = three.user()
    user.lmtp(mail("before"))
    user.wait_equal()
    three.c.stop()
    work(user)
    wait_equal(user, three.a, three.b)
    three.c.start()
    user.wait_equal()


# -- privileges

def uids_of(pid):
    with open("/proc/%d/status" % pid) as f:
        return set(re.search(r"^Uid:(.*)$", f.read(), re.M)[1].split())


def test_services_are_not_root(two):
    for node in two.nodes:
        for service in ("dovetail-queue", "dovetail-replay"):
            pids = node.pids(service)
            assert pids
            for pid in pids:
                assert "0" not in uids_of(pid), service


def test_queue_becomes_default_internal_user(new_cluster):
    """Which is not always its default."""
    cluster = new_cluster(conf="default_internal_user = mail\n")
    uid = str(pwd.getpwnam("mail").pw_uid)
    for node in cluster.nodes:
        pids = wait_for(lambda: node.settled("dovetail-queue"), "the queue")
        assert [uids_of(pid) for pid in pids] == [{uid}]


def test_keys_are_secret(two):
    for node in two.nodes:
        key = os.stat(os.path.join(node.key_dir, node.name + ".key"))
        assert (key.st_uid, key.st_mode & 0o777) == (0, 0o600)
        with open(os.path.join(node.key_dir, node.name + ".key")) as f:
            secret = f.read().split()[-1]
        assert secret not in node.log_text()


def test_users_with_uids_of_their_own(new_cluster):
    """As with system users: every file belongs to its user."""
    cluster = new_cluster(["sdbox", "maildir"], replay_user="root")
    users = [cluster.user(owner=owner, name=owner) for owner in
             ("mail", "news", "www-data")]
    assert len({user.uid for user in users}) == 3
    for user in users:
        work(user)
    for user in users:
        user.wait_equal()
        for node in cluster.nodes:
            for path, _, files in os.walk(node.home(user)):
                for name in files + [""]:
                    assert os.stat(os.path.join(path, name)).st_uid == \
                        user.uid, os.path.join(path, name)
