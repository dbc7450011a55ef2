"""Odd names, many namespaces, many keywords, and large things of each kind."""

import fnmatch
import os
import time

import pytest

import view
from cluster import Cluster, Memory, mail, quote, wait_for
from conftest import FORMAT_PAIRS

MB = 1 << 20

NAMES = [
    "Grüße", "日本語/フォルダ", "\U0001f4ec post", "naïve&co", "&", "&-", "a&b-c",
    'quo"te', "back\\slash", "per%cent", "%", "%s%n", "star*", "*", "{5}",
    "(paren)", "[bracket]", "semi;colon", "comma,", "'", "`", "$HOME", "#news",
    " leading", "trailing ", "two  blanks", " ", "-", "--", "-n", "+", "=",
    "sub/~tilde", "sub/~", "a~", "INBOX/child", "Inboxes", "INBOX2",
    "inbox2", "xINBOX", "cur", "new", "tmp", "subscriptions", "dovecot",
    "NIL", "é", "e\u0301", "case", "CASE", "x" * 200, "ü" * 60,
    "/".join("abcdefghijklmnop"), "a|b", "<>", "!", "?", ":2,S", "@home",
    "under_score",
]
# not legal in Maildir++, which joins the parts of a name with dots
DOTTED = ["a.b", ".hidden", "end.", "..x", "v1.2.3/x.y"]


def some_pairs(*names):
    """Only these of the pairs; in the usual run, where time counts, only the
    first of them (build-aux/check --all runs them all)."""
    if not os.environ.get("DOVETAIL_TEST_ALL"):
        names = names[:1]
    return pytest.mark.parametrize(
        "pair", [p for p in FORMAT_PAIRS if "-".join(p) in names],
        ids="-".join, indirect=True, scope="session")


# -- names

def create(session, names):
    """Subscribed mailboxes with a message each."""
    for name in names:
        session.do("CREATE", quote(name))
        session.append(name, mail("in " + name))
        session.do("SUBSCRIBE", quote(name))


def test_odd_names(pair, user):
    names = NAMES + ([] if "maildir" in (pair.a.format, pair.b.format)
                     else DOTTED)
    with user.imap() as session:
        create(session, names)
    user.wait_equal(60)
    assert set(user.mailboxes()) >= set(names)
    with user.imap(user.replica) as session:
        for name in names:
            message, = session.messages(name).values()
            assert message.body.endswith(("in %s\r\n" % name).encode())
    # and their way back
    with user.imap() as session:
        for name in names[::2]:
            session.do("RENAME", quote(name), quote("r-" + name[-100:]))
        for name in names[1::2]:
            session.do("UNSUBSCRIBE", quote(name))
            session.do("DELETE", quote(name))
    user.wait_equal(60)


def test_names_that_differ_in_case_only(user):
    with user.imap() as session:
        create(session, ["Work", "work", "WORK"])
        session.do("RENAME work Work2")
        session.append("WORK", mail("upper"))
    user.wait_equal()
    assert len(user.look("WORK")) == 2 and len(user.look("Work")) == 1


@some_pairs("mdbox-maildir")
def test_name_the_replica_cannot_have(pair, user):
    """It stands alone: all other mailboxes are replicated, before and after
    it."""
    pair.expect_errors(r"bad\.name", "dovetail")
    with user.imap() as session:
        session.append("INBOX", mail("before"))
        create(session, ["good", "bad.name", "fine"])
        session.append("INBOX", mail("after"))
    other = pair.user()
    other.lmtp(mail("other user"))
    other.wait_equal()

    def rest_is_equal():
        here, there = view.status(pair.a, user), view.status(pair.b, user)
        here.pop("bad.name")
        return not view.status_differences(here, there)
    wait_for(rest_is_equal, "the other mailboxes")


# -- namespaces

@pytest.fixture(scope="module")
def spaces():
    with Cluster(["sdbox", "mdbox"],
                 namespaces=[("Archive", "mdbox"), ("Local", "maildir")],
                 node_options={"b": {"namespaces": [
                     ("Archive", "maildir"), ("Local", "sdbox")]}}
                 ) as cluster:
        yield cluster


def test_private_namespaces(spaces):
    user = spaces.user()
    with user.imap() as session:
        create(session, ["Archive/2026", "Archive/2026/11", "Local/x",
                         "Local/Ünder", "plain"])
        session.append("INBOX", mail("one"), mail("two"), mail("three"))
        session.select("INBOX")
        session.do("COPY 1:2 Archive/2026")
        session.do("MOVE 2 Local/x")
        session.select("Archive/2026")
        session.do(r"STORE 1:2 +FLAGS (\Flagged $Archived)")
        session.do("COPY 1 Local/x")
        session.do("RENAME Archive/2026 Archive/old")
        session.do("DELETE Local/Ünder".replace("Ü", "&ANw-"))
    user.wait_equal()
    assert user.mailboxes() == ["Archive/old", "Archive/old/11", "INBOX",
                                "Local/x", "plain"]
    assert user.flags("Archive/old")[2] == {r"\Flagged", "$Archived"}
    assert "Archive/2026" in user.subscriptions()


def test_other_hierarchy_separator(new_cluster):
    cluster = new_cluster(["sdbox", "maildir"],
                          node_options={"b": {"separator": "."}})
    user = cluster.user()
    with user.imap() as session:
        create(session, ["a/b/c", "Übung/x"])
        session.do("RENAME a z/y")
    user.wait_equal()
    with user.imap(user.replica) as session:
        names = {name for _, name in view.list_mailboxes(session)}
        assert {"z.y.b.c", "Übung.x"} <= names


# -- keywords

def test_sixty_keywords(user):
    keywords = ["k%02d" % n for n in range(60)]
    with user.imap() as session:
        session.append("INBOX", *(mail("m%d" % n) for n in range(61)))
        session.select("INBOX")
        for n, keyword in enumerate(keywords):
            session.do("STORE %d,61 +FLAGS.SILENT (%s)" % (n + 1, keyword))
    user.wait_equal()
    flags = user.flags()
    assert flags[61] == set(keywords) and flags[45] == {"k44"}
    with user.imap() as session:
        session.select("INBOX")
        session.do("STORE 61 -FLAGS (%s)" % " ".join(keywords[20:40]))
        session.do("STORE 5 FLAGS (k59 new)")
        session.do("CREATE copies")
        session.do("COPY 61 copies")
    user.wait_equal()
    assert user.flags()[61] == set(keywords[:20] + keywords[40:])
    assert user.flags("copies")[1] == set(keywords[:20] + keywords[40:])


# -- large and small messages

def test_empty_and_tiny_messages(user):
    for data in (b"", b"\n", b"x", b"\n\n", b"Subject: only a header"):
        user.doveadm("save", input=data)
    user.wait_equal()
    assert [m.body for m in user.look().values()] == [
        b"", b"\r\n", b"x", b"\r\n\r\n", b"Subject: only a header"]


# -- dates

def test_save_dates(pair, user):
    """A message's save date is when it was saved or copied, on all nodes and
    whatever happens to it later. (Dovecot alone forgets it in sdbox and
    Maildir, where nobody asks for it, and takes the file's ctime.)"""
    with user.imap() as session:
        session.do("CREATE box")
        begin = int(time.time())
        session.append("INBOX", mail("one"), mail("two"))
        user.lmtp(mail("three"))
        pair.a.lda(user, mail("four"))
        session.select("INBOX")
        session.do("COPY 1:2 box")
        end = time.time()
        wait_for(lambda: time.time() > end + 1.1, "another second")
        # new names in Maildir, new links in all formats
        session.do(r"STORE 1:* +FLAGS (\Seen \Flagged key)")
        session.do("CREATE later")
        session.do("COPY 1:* later")
        session.select("box")
        session.do(r"STORE 1:* +FLAGS (\Answered)")
    for node in user.replicas:
        wait_for(lambda: not view.status_differences(
            view.status(user.primary, user), view.status(node, user)),
            "the replica")
    for node in user.cluster.nodes:
        # forgets what nobody wants
        user.doveadm("mailbox cache purge", "INBOX", "box",
                     "later", node=node)
        boxes = view.view(node, user).mailboxes
        for name in ("INBOX", "box"):
            for uid, message in boxes[name].messages.items():
                assert begin <= int(message.saved) <= end, (name, uid)
        for message in boxes["later"].messages.values():
            assert int(message.saved) > end
    user.wait_equal()


def watched(cluster):
    """Grows of all processes of both nodes."""
    return Memory(lambda: [pid for node in cluster.nodes
                           for pid in node.pids()])


def assert_small(memory, limit=16 * MB, only="*"):
    """only: a pattern for the names of the programs."""
    large = {"%s %d" % key: "%.1f MB" % (growth / MB)
             for key, growth in memory.growth.items()
             if growth > limit and fnmatch.fnmatch(key[0], only)}
    assert not large, "grew by more than %.1f MB: %s" % (limit / MB, large)


@some_pairs("sdbox-sdbox", "maildir-sdbox", "mdbox-maildir")
def test_message_of_100_mb(pair, user):
    """Memory stays flat everywhere: nothing holds a whole message."""
    line = bytes(range(33, 109)) + b"\r\n"
    data = mail("large") + line * (100 * MB // len(line) + 1)
    with watched(pair) as memory:
        with user.imap() as session:
            session.append("INBOX", data)
            session.do("CREATE copies")
            session.select("INBOX")
            session.do("COPY 1 copies")
        user.lmtp(data)
        user.wait_equal(180, bodies=False)
    services = {name for name, _ in memory.growth}
    assert services >= {"imap", "lmtp", "dovetail-queue", "dovetail-replay"}
    assert_small(memory)
    user.wait_equal(180)
    assert user.look()[1].body == data


@some_pairs("sdbox-sdbox")
def test_large_message_delays_nobody(pair, user):
    """Another user's mail overtakes 100 MB that are on their way."""
    other = pair.user()
    other.lmtp(mail("first"))
    other.wait_equal()
    with user.imap() as session:
        session.append("INBOX", mail("large", 100 * MB))
    other.lmtp(mail("second"))
    other.wait_equal(10, bodies=False)
    user.wait_equal(180)


def fill(session, count):
    """Make a mailbox of count messages fast: copy what is there."""
    start = count
    while start > 4000:
        start //= 2
    for first in range(0, start, 500):
        session.append("big", *(mail("n%d" % n) for n in
                                range(first, min(first + 500, start))))
    session.select("big")
    have = start
    while have < count:
        step = min(have, count - have)
        session.do("COPY 1:%d big" % step)
        have += step
    return have


def make_big(user):
    with user.imap() as session:
        session.sock.settimeout(600)
        session.do("CREATE big")
        assert fill(session, 100000) == 100000
        session.do(r"STORE 1:50000 +FLAGS.SILENT (\Seen)")
        session.do("STORE 2:* +FLAGS.SILENT (many)")


def growth_without_dovetail(mail_format):
    """Of the imap process: Dovecot itself needs more for large mailboxes."""
    with Cluster([mail_format], plugin=False) as plain:
        with watched(plain) as memory:
            make_big(plain.user())
    return max(growth for (name, _), growth in memory.growth.items()
               if name == "imap")


@some_pairs("mdbox-mdbox", "maildir-sdbox")
def test_mailbox_of_100000_messages(pair, user):
    with watched(pair) as services:
        with watched(pair) as mail_processes:
            make_big(user)
        wait_for(lambda: not view.status_differences(
            view.status(pair.a, user), view.status(pair.b, user)),
            "100,000 messages on the replica", 600, 1)
    assert_small(services, 64 * MB, "dovetail-*")
    # A digest takes 24 bytes of each record of the index, of which Dovecot has
    # up to three copies, in buffers that double.
    assert_small(mail_processes,
                 growth_without_dovetail(pair.a.format) + 24 * MB, "imap")
    user.wait_equal(300, bodies=False)
    # one change costs one change
    with user.imap() as session, user.imap(pair.b) as there:
        there.select("big")
        session.select("big")
        session.do(r"STORE 77777 +FLAGS.SILENT (\Flagged)")
        begin = time.monotonic()
        wait_for(lambda: there.do(
            "FETCH 77777 FLAGS", wanted="FETCH")[0].count(rb"\Flagged"),
            "the flag on the replica")
        assert time.monotonic() - begin < 2
        session.do(r"STORE 1:99990 +FLAGS.SILENT (\Deleted)")
        session.do("EXPUNGE")
    user.wait_equal(300)
    assert len(user.look("big", body=False)) == 10


@some_pairs("sdbox-sdbox", "maildir-maildir", "mdbox-maildir")
def test_a_thousand_folders(pair, user):
    names = ["t%d/f%d" % (n // 100, n) for n in range(1000)]
    with watched(pair) as memory:
        with user.imap() as session:
            for n, name in enumerate(names):
                session.do("CREATE", name)
                if n % 10 == 0:
                    session.append(name, mail(name))
        user.wait_equal(120)
        assert len(user.mailboxes()) >= 1000
        with user.imap() as session:
            session.do("RENAME t3 renamed")
            for name in names[:100]:
                session.do("DELETE", name)
        user.wait_equal(120)
    assert_small(memory)
    assert "renamed/f300" in user.mailboxes()
