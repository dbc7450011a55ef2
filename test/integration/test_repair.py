"""A replica that is not what the primary is: it notices with the primary's next
change, and makes itself equal; what it alone has is kept."""

import glob
import os
import re
import shutil

import pytest

import view
from cluster import GONE, Cluster, Refused, mail, wait_for

FORMATS = ["sdbox", "mdbox", "maildir"]
KEPT = "dovetail-kept"
# Dovecot's words to whoever has a mailbox open whose index is made anew, and
# what it says when a damaged message is read
DISTURBED = (r"dovecot.index reset, view is now inconsistent",)
# what the replica says about the damage that the tests do
DAMAGE = (r"Error: Mailbox .*: UID=\d+: read\(.*\) failed:",
          r"Error: .*Corrupted dbox file",)


@pytest.fixture(scope="module", params=FORMATS)
def pair(request):
    with Cluster((request.param, request.param)) as cluster:
        yield cluster


@pytest.fixture
def user(pair):
    """Ten messages with flags, keywords and dates, on both sides."""
    pair.expected = list(DISTURBED)
    user = pair.user()
    with user.imap() as session:
        for n in range(1, 11):
            session.append("INBOX", mail("message %d" % n, n * 3000),
                           flags=r"\Seen key%d" % (n % 3) if n % 2 else "",
                           date="%02d-Mar-2024 10:00:00 +0000" % n)
        session.do("CREATE folder/child")
        session.do("CREATE folder")
        session.append("folder/child", mail("in the child"))
        session.append("folder", mail("in the folder"), mail("another"))
        session.do("SUBSCRIBE folder/child")
    user.wait_equal()
    return user


def behind_its_back(user, *command, input=b""):
    """doveadm on the replica, without dovetail."""
    args = command[0].split() + ["-u", user.name] + list(command[1:])
    return user.replica.doveadm("-o", "mail_plugins=", *args, input=input)


def nudge(user, mailbox="INBOX"):
    """The primary changes something: its digest travels."""
    with user.imap() as session:
        session.append(mailbox, mail("nudge"))


def without_kept(user):
    """Wait until all is equal but for what the replica keeps."""
    def same():
        try:
            a, b = (view.view(n, user) for n in (user.primary, user.replica))
        except (RuntimeError, Refused, *GONE):
            # a mailbox went away while it was looked at
            return False
        for name in list(b.mailboxes):
            if name.split("/")[0] == KEPT:
                del b.mailboxes[name]
        b.noselect.discard(KEPT)
        return not view.differences(a, b)
    wait_for(same, "the replica to be equal but for %s" % KEPT)


def kept(user, mailbox=KEPT):
    with user.imap(user.replica) as session:
        return session.messages(mailbox)


def no_leftovers(user):
    assert not [name for name in user.mailboxes() if "dovetail-repair" in name]


def test_message_missing_in_the_middle(user):
    behind_its_back(user, "expunge", "mailbox", "INBOX", "uid", "4,5,8")
    assert len(user.look()) == 7
    nudge(user)
    user.wait_equal()
    no_leftovers(user)


def test_first_and_last_message_missing(user):
    behind_its_back(user, "expunge", "mailbox", "INBOX", "uid", "1,10")
    nudge(user)
    user.wait_equal()


def test_all_messages_missing(user):
    behind_its_back(user, "expunge", "mailbox", "INBOX", "all")
    nudge(user)
    user.wait_equal()


def test_mailbox_with_children(user):
    behind_its_back(user, "expunge", "mailbox", "folder", "uid", "1")
    nudge(user, "folder")
    user.wait_equal()


def test_flags_and_keywords_changed(user):
    behind_its_back(user, "flags replace", r"\Flagged other", "mailbox",
                    "INBOX", "uid", "2,3")
    nudge(user)
    user.wait_equal()


def test_extra_message_is_kept(user):
    """At the end of the mailbox, where the primary's next message belongs."""
    behind_its_back(user, "save", "-m", "INBOX", input=mail("only here"))
    nudge(user)
    without_kept(user)
    messages = list(kept(user).values())
    assert [b"only here" in m.body for m in messages] == [True]
    # the next ones go where they belong without a repair
    nudge(user)
    without_kept(user)
    # now an ordinary change of the kept folder's owner is nothing to dovetail
    assert len(kept(user)) == 1
    no_leftovers(user)


def test_everything_at_once_while_mail_comes(user):
    behind_its_back(user, "expunge", "mailbox", "INBOX", "uid", "2,9")
    behind_its_back(user, "save", "-m", "INBOX", input=mail("only here"))
    behind_its_back(user, "flags add", r"\Answered", "mailbox", "INBOX",
                    "uid", "6")
    with user.imap() as session:
        for n in range(20):
            session.append("INBOX", mail("more %d" % n))
        session.select()
        session.do(r"UID STORE 3 +FLAGS (\Deleted)")
        session.do("UID EXPUNGE 3")
        session.do(r"UID STORE 7 +FLAGS (\Flagged late)")
    without_kept(user)
    assert [b"only here" in m.body for m in kept(user).values()] == [True]
    no_leftovers(user)


def test_client_that_has_the_mailbox_open(user):
    """At worst it is disconnected; another finds everything."""
    with user.imap(user.replica) as session:
        session.select()
        behind_its_back(user, "expunge", "mailbox", "INBOX", "uid", "4")
        nudge(user)
        user.wait_equal()
        try:
            session.do("NOOP")
            session.do("FETCH 1:* (UID)")
        except Exception as e:
            assert "inconsistent" in str(e) or "BYE" in str(e) or \
                "EOF" in str(e) or "reset" in str(e), e


def test_worker_is_killed_meanwhile(user):
    user.cluster.expected += [r"service\(dovetail-replay\): child \d+ killed"]
    for n in range(5):
        behind_its_back(user, "expunge", "mailbox", "INBOX", "uid", "2,4,6")
        nudge(user)
        wait_for(lambda: user.replica.kill_service("dovetail-replay", False),
                 "a worker")
    nudge(user)
    # a worker that was spared and has repaired the mailbox leaves it alone for
    # a minute
    user.wait_equal(timeout=100)
    no_leftovers(user)


# ---- the tree ----

def repair(user):
    """What the administrator asks for on the primary; returns the exit
    status."""
    return user.primary.doveadm("dovetail", "repair", "-u", user.name,
                                check=False).returncode


def only_here(user, name, *texts):
    """Make a mailbox on the replica only."""
    behind_its_back(user, "mailbox create", name)
    for text in texts:
        behind_its_back(user, "save", "-m", name, input=mail(text))


def kept_texts(user, mailbox):
    return sorted(re.search(rb"Subject: (.*)\r", m.body)[1].decode()
                  for m in kept(user, mailbox).values())


def test_mailbox_only_here_is_kept(user):
    only_here(user, "mine", "one", "two")
    only_here(user, "mine/below", "three")
    behind_its_back(user, "flags add", r"\Flagged own", "mailbox", "mine",
                    "subject", "two")
    assert repair(user) == 0
    without_kept(user)
    assert kept_texts(user, KEPT + "/mine") == ["one", "two"]
    assert kept_texts(user, KEPT + "/mine/below") == ["three"]
    flags = {re.search(rb"Subject: (.*)\r", m.body)[1]: m.flags
             for m in kept(user, KEPT + "/mine").values()}
    assert flags == {b"one": frozenset(), b"two": {r"\Flagged", "own"}}
    # nothing is kept twice, and what is kept is no difference
    assert repair(user) == 0
    assert kept_texts(user, KEPT + "/mine") == ["one", "two"]


def test_mailbox_lost_by_the_primary_is_kept(user):
    """Nobody deleted it there: its files are gone."""
    user.cluster.expected += ["No such file or directory"]
    with user.imap() as session:
        session.do("CREATE lost")
        session.append("lost", mail("precious"))
    user.wait_equal()
    home = user.primary.home(user)
    found = [path for path in glob.glob(home + "/mail/**/*lost",
                                        recursive=True) +
             glob.glob(home + "/mail/.lost") if os.path.isdir(path)]
    assert found
    for path in found:
        shutil.rmtree(path)
    assert repair(user) == 0
    without_kept(user)
    assert kept_texts(user, KEPT + "/lost") == ["precious"]


def test_mailbox_deleted_behind_dovetails_back_goes(user):
    """The primary's Dovecot remembers that it was deleted."""
    user.cluster.expected += ["no longer at the primary, deleting"]
    user.primary.doveadm("-o", "mail_plugins=", "mailbox", "delete", "-u",
                         user.name, "folder/child")
    assert repair(user) == 0
    user.wait_equal()


def test_another_mailbox_of_the_same_name(user):
    # it has the one before open
    user.replica.stop()
    user.replica.start()
    behind_its_back(user, "mailbox delete", "folder/child")
    only_here(user, "folder/child", "mine")
    assert repair(user) == 0
    without_kept(user)
    assert kept_texts(user, KEPT + "/folder/child") == ["mine"]


def test_primary_has_a_folder_of_that_name(user):
    """Ours makes room."""
    only_here(user, "mine", "one")
    assert repair(user) == 0
    without_kept(user)
    with user.imap() as session:
        session.do("CREATE " + KEPT)
        session.append(KEPT, mail("the primary's"))
        session.do("CREATE %s/mine" % KEPT)
    assert repair(user) == 0
    def placed():
        try:
            return kept_texts(user, KEPT) == ["the primary's"] and \
                kept_texts(user, KEPT + "-2/mine") == ["one"]
        except Refused:
            return False
    wait_for(placed, "both to have a name")
    # what comes now goes to ours
    only_here(user, "mine", "two")
    assert repair(user) == 0
    assert kept_texts(user, KEPT + "-2/mine") == ["one", "two"]


@pytest.mark.parametrize("mail_format", FORMATS)
def test_report(new_cluster, mail_format):
    """dovetail_repair_extra=report: all stays where it is."""
    cluster = new_cluster((mail_format, mail_format),
                          {"dovetail_repair_extra": "report"})
    cluster.expected = list(DISTURBED)
    user = cluster.user()
    with user.imap() as session:
        session.append("INBOX", mail("one"), mail("two"), mail("three"))
    user.wait_equal()
    only_here(user, "mine", "mine")
    behind_its_back(user, "save", "-m", "INBOX", input=mail("extra"))
    behind_its_back(user, "expunge", "mailbox", "INBOX", "uid", "2")
    assert repair(user) != 0
    subjects = [re.search(rb"Subject: (.*)\r", m.body)[1].decode()
                for m in user.look().values()]
    assert subjects == ["one", "two", "three", "extra"]
    assert kept_texts(user, "mine") == ["mine"]
    assert KEPT not in user.mailboxes()
    user.replica.wait_log(r"UID 4 is a message that the primary has not")
    user.replica.wait_log(r"Mailbox mine is only here")
