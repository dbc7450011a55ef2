"""The fixture and the view themselves, on plain Dovecot without dovetail: two
pictures of one node agree, and each kind of difference is noticed."""

import os
import time

import pytest

import view
from cluster import GONE, Cluster, Memory, Refused, mail, quote, wait_for


@pytest.fixture(scope="module", params=["sdbox", "mdbox", "maildir"])
def plain(request):
    with Cluster([request.param], plugin=False,
                 namespaces=[("Archive", "mdbox")]) as cluster:
        yield cluster


@pytest.fixture
def user(plain):
    """A user with a little of everything."""
    user = plain.user()
    with user.imap() as session:
        for name in ("Grüße & Küsse", "p/c", "p/leaf/"):
            session.do("CREATE", quote(name))
        session.do("CREATE Archive/old")
        session.do("SUBSCRIBE INBOX")
        session.append("INBOX", mail("one"), flags=r"\Seen work",
                       date="17-Jul-1996 02:44:25 -0700")
        session.append("INBOX", mail("two"), mail("three"))
        session.append("Grüße & Küsse", mail("four"))
        session.append("Archive/old", b"\r\n")
    return user


def differences(before, user, **kwargs):
    return view.differences(before, view.view(user.primary, user), **kwargs)


def test_view_is_complete(user):
    picture = view.view(user.primary, user)
    boxes = picture.mailboxes
    assert {"INBOX", "Grüße & Küsse", "p/c", "Archive/old"} <= boxes.keys()
    assert picture.subscriptions == {"INBOX"}
    # 2.4 drops those without children (mailbox_list_drop_noselect)
    assert picture.noselect == (
        set() if user.primary.format == "maildir" or user.primary.line.is_24
        else {"p/leaf"})
    assert boxes["INBOX"].uidnext == 4
    assert boxes["Archive/old"].messages[1].size == 1
    first = boxes["INBOX"].messages[1]
    assert first.flags == {r"\Seen", "work"}
    assert first.received == "837596665"
    assert first.internaldate == "17-Jul-1996 09:44:25 +0000"
    for box in boxes.values():
        assert len(box.guid) == 32 and box.uidvalidity > 0
        for message in box.messages.values():
            assert message.guid and message.sha256 and message.modseq
            assert abs(int(message.saved) - time.time()) < 60


def test_looking_changes_nothing(user):
    before = view.view(user.primary, user)
    assert differences(before, user) == []
    user.wait_equal()


def change_by_imap(*commands):
    def change(user):
        with user.imap() as session:
            for command in commands:
                session.do(command)
    return change


def change_content(user):
    """The same UID, another body of the same size."""
    for path, _, files in os.walk(user.primary.home(user)):
        for name in files:
            full = os.path.join(path, name)
            with open(full, "rb") as f:
                data = f.read()
            if b"\n\ntwo\n" in data:
                assert "index" not in name
                user.write(full, data.replace(b"\n\ntwo\n", b"\n\n2wo\n"))


CHANGES = {
    "flag": (change_by_imap("SELECT INBOX", r"STORE 2 +FLAGS (\Flagged)"),
             {"flags"}),
    "keyword": (change_by_imap("SELECT INBOX", "STORE 1 -FLAGS (work)"),
                {"flags"}),
    "append": (lambda user: user.lmtp(mail("five")), {"uidnext", "uids"}),
    "expunge": (change_by_imap("SELECT INBOX", r"STORE 2 +FLAGS (\Deleted)",
                               "EXPUNGE"), {"uids"}),
    "uidnext": (lambda user: user.doveadm(
        "mailbox update", "--min-next-uid", "99", "p/c"), {"uidnext"}),
    "uidvalidity": (lambda user: user.doveadm(
        "mailbox update", "--uid-validity", "4711", "p/c"), {"uidvalidity"}),
    "guid": (lambda user: user.doveadm(
        "mailbox update", "--mailbox-guid", "ab" * 16, "p/c"), {"guid"}),
    "create": (change_by_imap("CREATE new"), {"exists"}),
    "delete": (change_by_imap("DELETE p/c"), {"exists", "noselect"}),
    "rename": (change_by_imap("RENAME Archive/old Archive/older"),
               {"exists"}),
    "recreate": (change_by_imap("DELETE p/c", "CREATE p/c"),
                 {"guid", "uidvalidity"}),
    "subscribe": (change_by_imap("SUBSCRIBE p/c"), {"subscriptions"}),
    "unsubscribe": (change_by_imap("UNSUBSCRIBE INBOX"), {"subscriptions"}),
    "body": (change_content, {"sha256"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_difference_is_noticed(user, change):
    act, fields = CHANGES[change]
    before = view.view(user.primary, user)
    act(user)
    found = differences(before, user)
    assert found
    assert {line.split(": ")[1] for line in found} <= fields, found


@pytest.mark.parametrize("field,value", [
    ("guid", "ab" * 16), ("internaldate", "1-Jan-2000 00:00:00 +0000"),
    ("received", "1"), ("saved", "1"), ("size", 1), ("pop3_uidl", "x"),
    ("pop3_order", "7"), ("modseq", 0)])
def test_difference_of_a_field_is_noticed(user, field, value):
    """Those that no mail client can change."""
    before, after = (view.view(user.primary, user) for _ in range(2))
    setattr(after.mailboxes["INBOX"].messages[2], field, value)
    found, = view.differences(before, after)
    assert found.startswith("'INBOX' uid 2: %s: " % field)
    assert view.differences(before, after, ignore=[field]) == []


def test_modseqs_may_only_grow(user):
    before, after = (view.view(user.primary, user) for _ in range(2))
    after.mailboxes["INBOX"].highestmodseq += 5
    after.mailboxes["INBOX"].messages[1].modseq += 5
    assert view.differences(before, after) == []
    assert len(view.differences(after, before)) == 2


def test_guids_between_formats():
    name = "1795381373.M52573P25711.vm,S=167,W=174"
    other = "dde31193a1d4fa3ad8c2b7ea67d0a2dc"
    assert view.same_guid(name, name, True)
    assert view.same_guid(other, other, False)
    assert not view.same_guid(name, other, False)
    hashed = "fb55d7ea8a4da7d3cb80ca4e9f4a0b7e"
    assert not view.same_guid(name, hashed, True)


@pytest.mark.parametrize("name", ["INBOX", "Grüße", "a&b", "日本語", "~x", "+-",
                                  "&", "\U0001f4ec post", "a/b ünd&c"])
def test_mutf7(name):
    coded = view.encode_mutf7(name)
    assert coded.isascii() and view.decode_mutf7(coded) == name


def test_mutf7_of_the_rfc():
    assert view.encode_mutf7("~peter/mail/台北/日本語") == \
        "~peter/mail/&U,BTFw-/&ZeVnLIqe-"


def test_all_ways_in(user):
    node = user.primary
    user.lmtp(mail("by LMTP"))
    node.lda(user, mail("by LDA"), "-m", "p/c")
    assert node.lmtp([user, "nobody-here"], mail("x"))["nobody-here"][0] == 550
    with user.pop3() as session:
        assert len(session.list()[1]) == 5
    assert len(view.pop3_listing(node, user)) == 5
    user.sieve('require ["fileinto", "imap4flags"];\n'
               'fileinto :flags "\\\\Flagged" "p/c";\n')
    user.lmtp(mail("by Sieve"))
    assert user.flags("p/c", node)[2] == {r"\Flagged"}
    with user.imap() as session:
        with pytest.raises(Refused, match="NO .*Mailbox doesn't exist"):
            session.select("nowhere")


def test_lmtp_data_is_kept_to_the_byte(user):
    message = mail("dots\r\n.\r\n..two\r\n\xfc 8bit").replace(
        b"\xc3\xbc", b"\xfc")
    user.lmtp(message)
    body = user.look("INBOX", user.primary)[4].body
    assert body.endswith(message.partition(b"\r\n\r\n")[2])


def test_new_user_exists_at_once(plain):
    other = plain.user(owner="mail", quota_rule="*:storage=1G")
    other.lmtp(mail("one"))
    assert os.stat(plain.a.home(other)).st_uid == other.uid != 65534


def test_stop_start_kill(plain):
    user = plain.user()
    user.lmtp(mail("one"))
    plain.expect_errors("killed with signal 9")
    with user.imap() as session:
        wait_for(lambda: plain.a.kill_service("imap") == 1, "imap")
        with pytest.raises(GONE):
            wait_for(lambda: session.do("NOOP") and None, "the end")
    plain.a.kill()
    with pytest.raises(GONE):
        user.lmtp(mail("never"))
    plain.a.start()
    plain.a.restart()
    user.lmtp(mail("two"))
    assert len(user.look("INBOX", plain.a)) == 2


def test_memory_is_measured(plain):
    user = plain.user()
    with user.imap() as session, Memory(plain.a.pids) as memory:
        session.append("INBOX", mail("large", 5 << 20))
    assert any(name == "imap" for name, _ in memory.growth), memory.growth
    assert max(memory.growth.values()) < 16 << 20
