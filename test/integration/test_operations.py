"""Each way to write mail, for each pair of formats: what stands on the
primary afterwards stands on the replica, by two independent views, and a user
of the replica sees what he would expect.

One cluster per pair of formats serves all tests, each with a fresh user."""

import os
import re
import time

import pytest

import view
from conftest import FORMAT_PAIRS
from cluster import Refused, literal, mail, quote, wait_for

DATE = "17-Jul-1996 02:44:25 -0700"


@pytest.fixture
def box(user):
    """A user with messages 1 to 5 in INBOX and folders work and work/old."""
    with user.imap() as session:
        session.append("INBOX", *(mail("mail %d" % n) for n in range(1, 6)))
        for name in ("work", "work/old"):
            session.do("CREATE", name)
    return user


def subjects(user, mailbox="INBOX"):
    """{uid: subject} on the replica."""
    return {uid: re.search(rb"Subject: (.*)\r\n", m.body)[1].decode()
            for uid, m in user.look(mailbox).items()}


def uids(user, mailbox="INBOX"):
    return sorted(user.look(mailbox, body=False))


def imap(user, *commands, mailbox="INBOX"):
    """Select the mailbox at the primary and run the commands."""
    with user.imap() as session:
        session.select(mailbox)
        for command in commands:
            session.do(command)


# -- LMTP and dovecot-lda

def test_lmtp_one_recipient(user):
    user.lmtp(mail("hello", subject="Grüße"))
    user.wait_equal()
    message, = user.look().values()
    assert b"\r\nhello\r\n" in message.body
    assert b"Return-Path: <sender@example.org>" in message.body


def test_lmtp_several_messages_keep_their_order(user):
    for n in range(1, 8):
        user.lmtp(mail("n%d" % n))
    user.wait_equal()
    assert subjects(user) == {n: "n%d" % n for n in range(1, 8)}


def test_lmtp_several_recipients(pair):
    users = [pair.user() for _ in range(3)]
    answers = pair.a.lmtp(users, mail("to all"))
    assert [code for code, _ in answers.values()] == [250] * 3
    for user in users:
        user.wait_equal()
        assert subjects(user) == {1: "to all"}


def test_lmtp_unknown_recipient_among_others(pair, user):
    answers = pair.a.lmtp([user, "nobody-here"], mail("one"))
    assert [code for code, _ in answers.values()] == [250, 550]
    user.wait_equal()
    assert uids(user) == [1]


def test_lmtp_sieve_into_folder_with_flags(user):
    user.sieve('require ["fileinto", "imap4flags", "mailbox"];\n'
               'fileinto :create :flags ["\\\\Flagged", "$Label1"] '
               '"Lists/dovecot";\n')
    user.lmtp(mail("sorted"))
    user.wait_equal()
    assert user.flags("Lists/dovecot") == {1: {r"\Flagged", "$Label1"}}


def test_lmtp_sieve_into_two_folders(user):
    user.sieve('require ["fileinto", "copy", "mailbox"];\n'
               'fileinto :copy :create "first"; fileinto :create "second"; '
               'keep;\n')
    user.lmtp(mail("sorted"))
    user.wait_equal()
    for mailbox in ("first", "second", "INBOX"):
        assert subjects(user, mailbox) == {1: "sorted"}


def test_lda_delivery(user):
    user.primary.lda(user, mail("by lda"))
    user.wait_equal()
    assert subjects(user) == {1: "by lda"}


def test_lda_into_folder(user):
    user.primary.lda(user, mail("by lda"), "-m", "Lists/ünder")
    user.wait_equal()
    assert subjects(user, "Lists/ünder") == {1: "by lda"}


def test_lda_sieve_into_folder_with_flags(user):
    user.sieve('require ["fileinto", "imap4flags", "mailbox"];\n'
               'fileinto :create :flags "\\\\Seen" "read";\n')
    user.primary.lda(user, mail("sorted"))
    user.wait_equal()
    assert user.flags("read") == {1: {r"\Seen"}}


# -- IMAP: messages

def test_imap_append(user):
    with user.imap() as session:
        session.append("INBOX", mail("plain"))
    user.wait_equal()
    assert user.flags() == {1: set()}


def test_imap_append_with_flags_and_date(user):
    flags = {r"\Answered", r"\Draft", r"\Deleted", r"\Seen", r"\Flagged",
             "$Forwarded", "work-1"}
    with user.imap() as session:
        session.append("INBOX", mail("all"), flags=" ".join(flags), date=DATE)
    user.wait_equal()
    message, = user.look().values()
    assert message.flags == flags
    assert message.internaldate == "17-Jul-1996 09:44:25 +0000"


def test_imap_append_multiple(user):
    with user.imap() as session:
        session.do("APPEND INBOX", r"(\Seen)", literal(mail("one")),
                   "(work)", '"%s"' % DATE, literal(mail("two")),
                   literal(mail("three", 100000)))
    user.wait_equal()
    assert user.flags() == {1: {r"\Seen"}, 2: {"work"}, 3: set()}
    assert subjects(user) == {1: "one", 2: "two", 3: "three"}


def test_imap_append_binary(user):
    data = mail("binary").replace(
        b"\r\n\r\n", b"\r\nMIME-Version: 1.0\r\nContent-Type: image/png\r\n"
        b"Content-Transfer-Encoding: binary\r\n\r\n") + bytes(range(256)) * 9
    with user.imap() as session:
        session.append("INBOX", data, binary=True)
        stored = session.messages("INBOX")[1].body
    user.wait_equal()
    assert user.look()[1].body == stored


def test_imap_append_8bit_and_odd_bytes(user):
    data = mail("odd") + b"\xff\xfe\x01\x1b caf\xe9\r\n.\r\nFrom me\r\n" + \
        b"y" * 20000 + b"\r\nno end of line"
    with user.imap() as session:
        session.append("INBOX", data)
    user.wait_equal()
    assert user.look()[1].body == data


def test_imap_append_64_kb_and_larger(user):
    """Around the size up to which a body travels inside its change."""
    sizes = [65535, 65536, 65537, 200000, 3 << 20]
    with user.imap() as session:
        for size in sizes:
            head = b"Subject: %d\r\n\r\n" % size
            # stored with LF only
            session.append("INBOX", head + b"z" * (size - len(head) + 2))
    user.wait_equal()
    assert [len(m.body) for m in user.look().values()] == [
        size + 2 for size in sizes]


def test_imap_copy_to_other_mailbox(box):
    imap(box, r"STORE 2:3 +FLAGS (\Flagged work)", "UID COPY 2:4 work/old")
    box.wait_equal()
    assert subjects(box, "work/old") == {1: "mail 2", 2: "mail 3",
                                         3: "mail 4"}
    assert box.flags("work/old") == {1: {r"\Flagged", "work"},
                                     2: {r"\Flagged", "work"}, 3: set()}
    assert uids(box) == [1, 2, 3, 4, 5]


def test_imap_copy_within_mailbox(box):
    imap(box, "COPY 1:2 INBOX")
    box.wait_equal()
    assert [subjects(box)[uid] for uid in (6, 7)] == ["mail 1", "mail 2"]


def test_imap_copy_twice_and_again(box):
    imap(box, "COPY 1 work", "COPY 1 work", "COPY 1 work/old")
    imap(box, "COPY 1 work/old", mailbox="work")
    box.wait_equal()
    assert subjects(box, "work") == {1: "mail 1", 2: "mail 1"}
    assert subjects(box, "work/old") == {1: "mail 1", 2: "mail 1"}


def test_imap_copy_then_expunge_source(box):
    imap(box, "COPY 1:5 work", r"STORE 1:5 +FLAGS.SILENT (\Deleted)",
         "EXPUNGE")
    box.wait_equal()
    assert len(subjects(box, "work")) == 5 and uids(box) == []


def test_imap_copy_then_delete_source_mailbox(box):
    imap(box, "MOVE 1:3 work")
    imap(box, "COPY 1:3 work/old", mailbox="work")
    imap(box, "DELETE work")
    box.wait_equal()
    assert subjects(box, "work/old") == {n: "mail %d" % n for n in (1, 2, 3)}


def test_imap_move(box):
    imap(box, r"STORE 2 +FLAGS (\Seen $Junk)", "MOVE 2,4 work")
    box.wait_equal()
    assert subjects(box, "work") == {1: "mail 2", 2: "mail 4"}
    assert box.flags("work")[1] == {r"\Seen", "$Junk"}
    assert uids(box) == [1, 3, 5]


def test_imap_uid_move_and_back(box):
    imap(box, "UID MOVE 1:2 work")
    imap(box, "UID MOVE 1:* INBOX", mailbox="work")
    box.wait_equal()
    assert uids(box) == [3, 4, 5, 6, 7] and uids(box, "work") == []
    assert subjects(box)[6] == "mail 1"


def test_imap_replace(box):
    """Only 2.4 knows REPLACE; what it does reaches a 2.3 all the same."""
    if not box.primary.line.is_24:
        return
    with box.imap() as session:
        session.select("INBOX")
        session.do("REPLACE 2 INBOX", r"(\Seen)", literal(mail("new 2")))
        session.do("UID REPLACE 3 work", literal(mail("new 3")))
    box.wait_equal()
    assert subjects(box) == {1: "mail 1", 4: "mail 4", 5: "mail 5",
                             6: "new 2"}
    assert box.flags()[6] == {r"\Seen"}
    assert subjects(box, "work") == {1: "new 3"}


# -- IMAP: flags

def test_imap_store_add_flags(box):
    imap(box, r"STORE 1:2 +FLAGS (\Seen)", r"UID STORE 2,4 +FLAGS "
         r"(\Answered \Flagged \Draft \Deleted)")
    box.wait_equal()
    some = {r"\Answered", r"\Flagged", r"\Draft", r"\Deleted"}
    assert box.flags() == {1: {r"\Seen"}, 2: some | {r"\Seen"}, 3: set(),
                           4: some, 5: set()}


def test_imap_store_remove_flags(box):
    imap(box, r"STORE 1:5 +FLAGS (\Seen \Flagged)")
    box.wait_equal()
    imap(box, r"STORE 2:3 -FLAGS (\Seen \Draft)")
    box.wait_equal()
    assert box.flags()[2] == {r"\Flagged"}
    assert box.flags()[4] == {r"\Seen", r"\Flagged"}


def test_imap_store_replace_flags(box):
    imap(box, r"STORE 1:5 +FLAGS (\Seen \Flagged old)")
    box.wait_equal()
    imap(box, r"STORE 1:3 FLAGS (\Answered new)", "STORE 4 FLAGS ()")
    box.wait_equal()
    assert box.flags() == {
        **{n: {r"\Answered", "new"} for n in (1, 2, 3)}, 4: set(),
        5: {r"\Seen", r"\Flagged", "old"}}


def test_imap_store_silent(box):
    imap(box, r"STORE 1 +FLAGS.SILENT (\Seen k1)",
         r"STORE 2 FLAGS.SILENT (\Flagged)", r"STORE 1 -FLAGS.SILENT (k1)")
    box.wait_equal()
    assert box.flags()[1] == {r"\Seen"} and box.flags()[2] == {r"\Flagged"}


def test_imap_store_add_keywords(box):
    imap(box, "STORE 1:3 +FLAGS (alpha)", "STORE 2 +FLAGS (beta $MDNSent)")
    box.wait_equal()
    assert box.flags()[2] == {"alpha", "beta", "$MDNSent"}
    assert box.flags()[3] == {"alpha"}


def test_imap_store_remove_keywords(box):
    imap(box, "STORE 1:3 +FLAGS (alpha beta)")
    box.wait_equal()
    imap(box, "STORE 2 -FLAGS (alpha gamma)")
    box.wait_equal()
    assert box.flags()[1] == {"alpha", "beta"} and box.flags()[2] == {"beta"}


def test_imap_store_replace_keywords(box):
    imap(box, "STORE 1:3 +FLAGS (alpha beta)")
    imap(box, "STORE 1:2 FLAGS (gamma)")
    box.wait_equal()
    assert box.flags()[1] == {"gamma"} and box.flags()[3] == {"alpha", "beta"}


def test_imap_store_unchangedsince(box):
    """Only the messages that did not change since get the flag."""
    with box.imap() as session:
        session.select("INBOX")
        session.do("STORE 1 +FLAGS (first)")
        since = session.messages("INBOX", False)[2].modseq
        session.select("INBOX")
        session.do("STORE 3 +FLAGS (later)")
        answer = session.do(r"STORE 2:4 (UNCHANGEDSINCE %d) "
                            r"+FLAGS.SILENT (\Flagged)" % since)
        assert "[MODIFIED 3]" in answer
    box.wait_equal()
    assert box.flags() == {1: {"first"}, 2: {r"\Flagged"}, 3: {"later"},
                           4: {r"\Flagged"}, 5: set()}


def test_imap_fetch_sets_seen(box):
    imap(box, "FETCH 2 BODY[]")
    box.wait_equal()
    assert box.flags()[2] == {r"\Seen"} and box.flags()[3] == set()


# -- IMAP: expunge

def test_imap_expunge(box):
    imap(box, r"STORE 1,3:4 +FLAGS.SILENT (\Deleted)", "EXPUNGE")
    box.wait_equal()
    assert subjects(box) == {2: "mail 2", 5: "mail 5"}


def test_imap_uid_expunge(box):
    imap(box, r"STORE 1:5 +FLAGS.SILENT (\Deleted)", "UID EXPUNGE 2:3,99")
    box.wait_equal()
    assert box.flags() == {uid: {r"\Deleted"} for uid in (1, 4, 5)}


def test_imap_expunge_last_keeps_uidnext(box):
    imap(box, r"STORE 1:5 +FLAGS (\Deleted)", "EXPUNGE")
    box.wait_equal()
    with box.imap() as session:
        session.append("INBOX", mail("again"))
    box.wait_equal()
    assert uids(box) == [6]


def test_imap_close_expunges(box):
    imap(box, r"STORE 2 +FLAGS (\Deleted)", "CLOSE")
    box.wait_equal()
    assert uids(box) == [1, 3, 4, 5]


def test_imap_unselect_does_not(box):
    imap(box, r"STORE 2 +FLAGS (\Deleted)", "UNSELECT")
    box.wait_equal()
    assert box.flags()[2] == {r"\Deleted"}


def test_imap_replica_session_sees_changes(box):
    """A client that idles on the replica is told, as on any other server."""
    box.wait_equal()
    with box.imap(box.replica) as session:
        session.select("INBOX")
        imap(box, r"STORE 1 +FLAGS (\Flagged)", r"STORE 2 +FLAGS (\Deleted)",
             "EXPUNGE")
        box.lmtp(mail("new"))
        box.wait_equal()
        session.untagged_responses = {}
        session.xatom("NOOP")
        told = session.untagged_responses
        assert told["EXPUNGE"] == [b"2"] and told["EXISTS"][-1] == b"5"
        assert any(rb"\Flagged" in row for row in told["FETCH"])


# -- IMAP: mailboxes

def test_imap_create(user):
    with user.imap() as session:
        for name in ("Sent", "a/b/c", "Übung/日本語", "with space"):
            session.do("CREATE", quote(name))
    user.wait_equal()
    assert set(user.mailboxes()) >= {"Sent", "a/b/c", "Übung/日本語",
                                     "with space"}


def test_imap_create_parent_afterwards(user):
    with user.imap() as session:
        session.do("CREATE a/b")
        session.do("CREATE a")
        session.append("a", mail("in the parent"))
    user.wait_equal()
    assert subjects(user, "a") == {1: "in the parent"}


def test_imap_delete(box):
    imap(box, "DELETE work/old")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX", "work"]


def test_imap_delete_with_mail(box):
    imap(box, "COPY 1:5 work/old", "DELETE work/old")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX", "work"]


def test_imap_delete_parent_keeps_children(box):
    imap(box, "COPY 1 work/old", "DELETE work")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX", "work/old"]
    assert subjects(box, "work/old") == {1: "mail 1"}


def test_imap_delete_and_create_again(box):
    imap(box, "COPY 1:3 work/old")
    box.wait_equal()
    imap(box, "DELETE work/old", "CREATE work/old", "COPY 5 work/old")
    box.wait_equal()
    assert subjects(box, "work/old") == {1: "mail 5"}


def test_imap_rename(box):
    imap(box, "COPY 1:3 work/old", "RENAME work/old archive")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX", "archive", "work"]
    assert len(uids(box, "archive")) == 3


def test_imap_rename_with_children(box):
    imap(box, "CREATE work/old/older", "COPY 1 work/old/older",
         "COPY 2 work/old", "COPY 3 work", "RENAME work job/past")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX", "job/past", "job/past/old",
                               "job/past/old/older"]
    assert subjects(box, "job/past/old/older") == {1: "mail 1"}


def test_imap_rename_parent_that_cannot_be_selected(user):
    with user.imap() as session:
        session.do("CREATE top/leaf")
        session.append("top/leaf", mail("one"))
        session.do("RENAME top other")
    user.wait_equal()
    assert subjects(user, "other/leaf") == {1: "one"}


def test_imap_rename_inbox(box):
    if box.primary.format == "maildir":
        with pytest.raises(Refused, match="Renaming INBOX isn't supported"):
            imap(box, "RENAME INBOX archive-2026")
        box.wait_equal()
        return
    imap(box, r"STORE 2 +FLAGS (\Seen)", "RENAME INBOX archive-2026")
    box.lmtp(mail("new"))
    box.wait_equal()
    assert len(uids(box, "archive-2026")) == 5
    assert box.flags("archive-2026")[2] == {r"\Seen"}
    assert list(subjects(box).values()) == ["new"]


def test_imap_rename_exchanges_two_names(box):
    imap(box, "CREATE one", "CREATE two", "COPY 1 one", "COPY 2 two",
         "RENAME one temp", "RENAME two one", "RENAME temp two")
    box.wait_equal()
    assert subjects(box, "one") == {1: "mail 2"}
    assert subjects(box, "two") == {1: "mail 1"}


def test_imap_rename_then_write(box):
    imap(box, "COPY 1 work/old", "RENAME work/old archive", "COPY 2 archive",
         "CREATE work/old", "COPY 3 work/old")
    box.wait_equal()
    assert subjects(box, "archive") == {1: "mail 1", 2: "mail 2"}
    assert subjects(box, "work/old") == {1: "mail 3"}


def test_imap_subscribe(box):
    imap(box, "SUBSCRIBE INBOX", "SUBSCRIBE work/old")
    box.wait_equal()
    assert box.subscriptions() == ["INBOX", "work/old"]


def test_imap_unsubscribe(box):
    imap(box, "SUBSCRIBE work", "SUBSCRIBE work/old")
    box.wait_equal()
    imap(box, "UNSUBSCRIBE work")
    box.wait_equal()
    assert box.subscriptions() == ["work/old"]


def test_imap_subscription_outlives_its_mailbox(box):
    imap(box, "SUBSCRIBE work/old", "DELETE work/old")
    box.wait_equal()
    assert box.subscriptions() == ["work/old"]


# -- POP3

def test_pop3_dele(box):
    with box.pop3() as session:
        session.dele(2)
        session.dele(4)
    box.wait_equal()
    assert uids(box) == [1, 3, 5]


def test_pop3_rset_deletes_nothing(box):
    with box.pop3() as session:
        session.dele(2)
        session.rset()
    box.wait_equal()
    assert uids(box) == [1, 2, 3, 4, 5]


def test_pop3_retr_sets_seen(box):
    with box.pop3() as session:
        session.retr(3)
    box.wait_equal()
    assert box.flags()[3] == {r"\Seen"} and box.flags()[2] == set()


def test_pop3_uidls_and_order(box):
    imap(box, "COPY 2 INBOX", r"STORE 3 +FLAGS (\Deleted)", "EXPUNGE")
    box.wait_equal()
    listing = view.pop3_listing(box.primary, box)
    assert len(listing) == 5
    assert view.pop3_listing(box.replica, box) == listing


def old_server(user):
    """Mail with UIDLs of an older server, as Maildir keeps them (P), and in
    another order (O)."""
    path = os.path.join(user.primary.home(user), "old")
    for sub in ("", "cur", "new", "tmp"):
        os.mkdir(os.path.join(path, sub))
        os.chown(os.path.join(path, sub), user.uid, user.gid)
    names = ["%d.M%dP1.old" % (time.time(), n) for n in (1, 2, 3)]
    for n, name in enumerate(names, 1):
        user.write(os.path.join(path, "cur", name + ":2,"),
                   mail("mail %d" % n).replace(b"\r\n", b"\n"))
    user.write(os.path.join(path, "dovecot-uidlist"), "".join(
        ["3 V%d N4 G%s\n" % (time.time(), "cd" * 16)] +
        ["%d Pold-uidl-%d O%d :%s\n" % (n, n, 4 - n, name)
         for n, name in enumerate(names, 1)]).encode())
    return path


def test_pop3_uidls_of_an_older_server(user):
    """Imported mail keeps the UIDLs and the order its POP3 clients know."""
    user.doveadm("import", "maildir:" + old_server(user), "", "all")
    listing = [uidl for uidl, _ in view.pop3_listing(user.primary, user)]
    user.wait_equal()
    assert [uidl for uidl, _ in view.pop3_listing(user.replica, user)] == \
        listing


# -- doveadm

def test_doveadm_save(user):
    user.doveadm("save", input=mail("saved").replace(b"\r\n", b"\n"))
    user.wait_equal()
    assert subjects(user) == {1: "saved"}


def test_doveadm_save_empty_message(user):
    user.doveadm("save", input=b"")
    user.wait_equal()
    assert user.look()[1].body == b""


def test_doveadm_copy(box):
    box.doveadm("copy", "work", "mailbox", "INBOX", "uid", "2:3")
    box.wait_equal()
    assert subjects(box, "work") == {1: "mail 2", 2: "mail 3"}


def test_doveadm_move(box):
    box.doveadm("move", "work", "mailbox", "INBOX", "uid", "2:3")
    box.wait_equal()
    assert subjects(box, "work") == {1: "mail 2", 2: "mail 3"}
    assert uids(box) == [1, 4, 5]


@pytest.mark.parametrize("verb,expected", [
    ("add", {r"\Seen", "old", r"\Flagged", "new"}),
    ("remove", {r"\Seen", "old"}),
    ("replace", {r"\Flagged", "new"})])
def test_doveadm_flags(box, verb, expected):
    imap(box, r"STORE 1:5 FLAGS (\Seen old)")
    box.doveadm("flags " + verb, r"\Flagged new", "mailbox", "INBOX", "uid",
                "2")
    box.wait_equal()
    assert box.flags()[2] == expected
    assert box.flags()[1] == {r"\Seen", "old"}


def test_doveadm_expunge(box):
    box.doveadm("expunge", "mailbox", "INBOX", "uid", "1,5")
    box.wait_equal()
    assert uids(box) == [2, 3, 4]


def test_doveadm_mailbox_create(user):
    user.doveadm("mailbox create", "-s", "neu/Übung")
    user.wait_equal()
    assert "neu/Übung" in user.mailboxes()
    assert user.subscriptions() == ["neu/Übung"]


def test_doveadm_mailbox_delete(box):
    imap(box, "COPY 1 work/old")
    box.doveadm("mailbox delete", "-r", "work")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX"]


def test_doveadm_mailbox_rename(box):
    box.doveadm("mailbox rename", "work", "job")
    box.wait_equal()
    assert box.mailboxes() == ["INBOX", "job", "job/old"]


def test_doveadm_mailbox_subscribe_and_unsubscribe(box):
    box.doveadm("mailbox subscribe", "work", "work/old")
    box.wait_equal()
    assert box.subscriptions() == ["work", "work/old"]
    box.doveadm("mailbox unsubscribe", "work")
    box.wait_equal()
    assert box.subscriptions() == ["work/old"]


@pytest.mark.parametrize("options,field", [
    (("--min-next-uid", "77"), "uidnext"),
    (("--uid-validity", "4711"), "uidvalidity"),
    (("--mailbox-guid", "ab" * 16), "guid")])
def test_doveadm_mailbox_update(box, options, field):
    imap(box, "COPY 1:2 work")
    box.wait_equal()
    box.doveadm("mailbox update", *options, "work")
    box.wait_equal()
    assert str(getattr(view.status(box.replica, box)["work"], field)) == \
        options[1]
    assert subjects(box, "work") == {1: "mail 1", 2: "mail 2"}


def test_doveadm_force_resync(box):
    """The index is made anew; nothing may be lost, or come twice."""
    imap(box, r"STORE 2 +FLAGS (\Seen work)", "COPY 1:2 work")
    box.wait_equal()
    box.cluster.expect_errors("[Rr]ebuild")
    box.doveadm("force-resync", "*")
    box.wait_equal()
    with box.imap() as session:
        session.append("INBOX", mail("after"))
        session.select("INBOX")
        session.do(r"STORE 1 +FLAGS (\Answered)")
    box.wait_equal()
    assert sorted(subjects(box).values())[:2] == ["after", "mail 1"]
    assert len(uids(box)) == 6


# -- by hand, in a Maildir

by_hand = pytest.mark.parametrize(
    "pair", [pair for pair in FORMAT_PAIRS if pair[0] == "maildir"],
    ids="-".join, indirect=True, scope="session")


@pytest.fixture
def maildir(box):
    path = os.path.join(box.primary.home(box), "mail")
    box.wait_equal()

    def look():
        """Dovecot looks again."""
        box.doveadm("mailbox status", "messages", "INBOX")

    def file_of(uid):
        guid = view.view(box.primary, box).mailboxes["INBOX"].messages[
            uid].guid
        file, = (os.path.join(path, sub, name) for sub in ("new", "cur")
                 for name in os.listdir(os.path.join(path, sub))
                 if name.startswith(guid.partition(",")[0]))
        return file
    box.maildir, box.look_again, box.file_of = path, look, file_of
    return box


@by_hand
def test_maildir_file_dropped_into_new(maildir):
    maildir.write(os.path.join(maildir.maildir, "new", "1700000000.M1P1.hand"),
                  b"Subject: by hand\n\nfile\n")
    maildir.look_again()
    maildir.wait_equal()
    assert subjects(maildir)[6] == "by hand"


@by_hand
def test_maildir_file_dropped_into_cur_with_flags(maildir):
    maildir.write(os.path.join(maildir.maildir, "cur",
                               "1700000000.M1P1.hand:2,FS"),
                  b"Subject: by hand\n\nfile\n")
    maildir.look_again()
    maildir.wait_equal()
    assert maildir.flags()[6] == {r"\Flagged", r"\Seen"}


@by_hand
def test_maildir_file_renamed_with_other_flags(maildir):
    old = maildir.file_of(2)
    os.rename(old, os.path.join(maildir.maildir, "cur",
                                os.path.basename(old).partition(":")[0] +
                                ":2,RS"))
    maildir.look_again()
    maildir.wait_equal()
    assert maildir.flags()[2] == {r"\Answered", r"\Seen"}


@by_hand
def test_maildir_file_removed(maildir):
    os.unlink(maildir.file_of(3))
    maildir.look_again()
    maildir.wait_equal()
    assert uids(maildir) == [1, 2, 4, 5]


@by_hand
def test_maildir_folder_made_by_hand(maildir):
    for sub in ("", "cur", "new", "tmp"):
        path = os.path.join(maildir.maildir, ".byhand", sub)
        os.mkdir(path)
        os.chown(path, maildir.uid, maildir.gid)
    maildir.write(os.path.join(maildir.maildir, ".byhand", "new",
                               "1700000000.M1P1.hand"),
                  b"Subject: by hand\n\nfile\n")
    maildir.doveadm("mailbox status", "messages", "byhand")
    maildir.wait_equal()
    assert subjects(maildir, "byhand") == {1: "by hand"}


# -- and together

def test_dates_are_those_of_the_primary(box):
    """Also when the replica is seconds behind."""
    box.wait_equal()
    with box.replica.paused("dovetail-replay"):
        box.lmtp(mail("mail 6"))
        imap(box, "COPY 1:2 INBOX", "COPY 3 work", "MOVE 4 work/old",
             r"STORE 5 +FLAGS (\Seen)")
        with box.imap() as session:
            session.append("work", mail("appended"))
        box.doveadm("copy", "work", "mailbox", "INBOX", "uid", "5")
        begin = time.time()
        wait_for(lambda: time.time() > begin + 2.1, "another second")
    box.wait_equal()


def test_refused_command_changes_nothing(box):
    before = view.view(box.primary, box)
    for command in ("CREATE work", "RENAME work work/old", "DELETE INBOX",
                    "COPY 1 nowhere"):
        with pytest.raises(Refused):
            imap(box, command)
    box.wait_equal()
    assert view.differences(before, view.view(box.primary, box)) == []


def test_a_busy_session(box):
    """Everything mixed, without waiting in between."""
    with box.imap() as session:
        session.select("INBOX")
        for n in range(6, 36):
            session.append("INBOX", mail("mail %d" % n),
                           flags=r"\Seen" if n % 2 else "odd%d" % (n % 7))
            session.do("NOOP")
            session.do(r"UID STORE %d +FLAGS (k%d)" % (n - 3, n % 5))
            if n % 4 == 0:
                session.do("UID MOVE %d work" % (n - 4))
            if n % 5 == 0:
                session.do(r"UID STORE %d +FLAGS (\Deleted)" % (n - 2))
                session.do("EXPUNGE")
            if n % 9 == 0:
                session.do("RENAME work/old work/old%d" % n)
                session.do("RENAME work/old%d work/old" % n)
                session.do("UID COPY %d work/old" % n)
            if n % 10 == 0:
                box.lmtp(mail("delivered %d" % n))
    box.wait_equal()
