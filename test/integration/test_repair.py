"""A replica that is not what the primary is: it notices with the primary's next
change, and makes itself equal; what it alone has is kept."""

import glob
import os
import re
import shutil
import subprocess

import pytest

import view
from cluster import GONE, Cluster, Refused, mail, wait_for

FORMATS = ["sdbox", "mdbox", "maildir"]
KEPT = "dovetail-kept"
# Dovecot's words to whoever has a mailbox open whose index is made anew, and
# what it says when a damaged message is read
DISTURBED = (r"dovecot.index reset, view is now inconsistent",)
# what Dovecot says about the damage that the tests do
DAMAGE = (r"Error: Mailbox .*: UID=\d+: read\(.*\) failed:",
          r"Error: .*Corrupted dbox file", r"already exists, rebuilding index",
          r"Unexpectedly lost uid",
          r"Error: .*No such file or directory")


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


def without_kept(user, ignore=()):
    """Wait until all is equal but for what the replica keeps."""
    found = []

    def same():
        try:
            a, b = (view.view(n, user) for n in (user.primary, user.replica))
        except (RuntimeError, Refused, *GONE) as e:
            # a mailbox went away while it was looked at
            found[:] = [str(e)]
            return False
        for name in list(b.mailboxes):
            if name.split("/")[0] == KEPT:
                del b.mailboxes[name]
        b.noselect.discard(KEPT)
        found[:] = view.differences(a, b, ignore)
        return not found
    try:
        wait_for(same, "the replica to be equal but for %s" % KEPT)
    except AssertionError as e:
        raise AssertionError("\n  ".join([str(e), *found])) from None


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


def test_more_differences_than_one_question_holds(new_cluster):
    cluster = new_cluster(("mdbox", "mdbox"))
    cluster.expected = list(DISTURBED)
    user = cluster.user()
    with user.imap() as session:
        for _ in range(5):
            session.append("INBOX", *([mail("one of many")] * 1000))
    user.wait_equal(60)
    behind_its_back(user, "flags add", r"\Flagged", "mailbox", "INBOX",
                    "uid", ",".join(map(str, range(30, 5000, 30))))
    nudge(user)
    user.wait_equal(60)


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

def repair(user, *args):
    """What the administrator asks for on the primary; returns the exit
    status."""
    done = user.primary.doveadm("dovetail", "repair", "-u", user.name, *args,
                                check=False)
    print(done.stdout.decode())
    return done.returncode


def only_here(user, name, *texts):
    """Make a mailbox on the replica only."""
    behind_its_back(user, "mailbox create", name)
    for text in texts:
        behind_its_back(user, "save", "-m", name, input=mail(text))


def texts(messages):
    return sorted(re.search(rb"Subject: (.*)\r", m.body)[1].decode()
                  for m in messages.values())


def kept_texts(user, mailbox):
    return texts(kept(user, mailbox))


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


# ---- the store itself ----

def store_file(node, user, text):
    """The file of the store with this text in it."""
    for path in sorted(glob.glob(node.home(user) + "/**/*", recursive=True)):
        if os.path.isfile(path) and "dovecot" not in os.path.basename(path):
            with open(path, "rb") as f:
                if text in f.read():
                    return path
    raise AssertionError("no file with %r" % text)


def backup(node, user):
    """A copy of all the user has on a node, its Dovecot stopped for that."""
    node.stop()
    saved = node.home(user) + ".saved"
    subprocess.run(["cp", "-a", node.home(user), saved], check=True)
    node.start()
    return saved


def restore(node, user, saved):
    node.stop()
    shutil.rmtree(node.home(user))
    os.rename(saved, node.home(user))
    node.start()


def some_day(user):
    """What a user does between two backups."""
    with user.imap() as session:
        session.append("INBOX", mail("later 1"), mail("later 2"),
                       flags=r"\Flagged key9")
        session.select()
        session.do(r"UID STORE 1,4 +FLAGS (\Deleted)")
        session.do("UID EXPUNGE 1,4")
        session.do(r"UID STORE 2:3 +FLAGS (\Answered key8)")
        session.do("CREATE new")
        session.append("new", mail("in the new one"))
        session.do("DELETE folder/child")
        session.do("RENAME folder renamed")


def test_body_altered(user):
    """A disk that forgets: only who reads the bodies finds out."""
    path = store_file(user.replica, user, b"\nmessage 4")
    with open(path, "r+b") as f:
        data = f.read()
        f.seek(data.index(b"\nmessage 4"))
        f.write(b"\nmassage 4")
    assert repair(user) == 0
    assert b"\nmassage 4" in user.look()[4].body
    rows = user.primary.doveadm("-f", "tab", "dovetail", "repair", "--dry-run",
                                "--deep", "-u", user.name, check=False)
    assert rows.returncode == 65 and b"UID 4: body" in rows.stdout
    assert b"\nmassage 4" in user.look()[4].body
    assert repair(user, "--deep") == 0
    user.wait_equal()
    no_leftovers(user)


def test_index_of_the_replica_lost(user):
    user.cluster.expected += DAMAGE
    user.replica.stop()
    for path in glob.glob(user.replica.home(user) + "/**/dovecot*",
                          recursive=True):
        if re.search(r"\.(index|list)(\.|$)", path):
            os.unlink(path)
    user.replica.start()
    nudge(user)
    assert repair(user) == 0
    # mdbox has a save date nowhere else
    without_kept(user, ["saved"])


def test_replica_from_yesterdays_backup(user):
    user.cluster.expected += ["no longer at the primary, deleting"]
    saved = backup(user.replica, user)
    some_day(user)
    user.wait_equal()
    restore(user.replica, user, saved)
    assert repair(user) == 0
    without_kept(user)


def test_replica_from_yesterdays_backup_by_itself(user):
    """With the next change of each mailbox."""
    saved = backup(user.replica, user)
    with user.imap() as session:
        session.append("INBOX", mail("later 1"), mail("later 2"))
        session.select()
        session.do(r"UID STORE 1,5 +FLAGS (\Deleted)")
        session.do("UID EXPUNGE 1,5")
        session.do(r"UID STORE 2:3 +FLAGS (\Answered key8)")
    user.wait_equal()
    restore(user.replica, user, saved)
    nudge(user)
    user.wait_equal()


def test_primary_is_resynced(user):
    """Its log begins anew. What only the replica has stays safe."""
    behind_its_back(user, "save", "-m", "INBOX", input=mail("only here"))
    user.doveadm("force-resync", "*")
    nudge(user)
    without_kept(user)
    assert kept_texts(user, KEPT) == ["only here"]


def test_primary_from_yesterdays_backup(user):
    """The primary is the truth. What it lost is kept on the replica."""
    saved = backup(user.primary, user)
    some_day(user)
    user.wait_equal()
    restore(user.primary, user, saved)
    # the UIDs of the lost ones are given again; a Maildir's UIDNEXT does not go
    # back, so it is equal only when the primary has come there
    for n in range(2):
        nudge(user)
        assert repair(user) == 0
    without_kept(user)
    assert kept_texts(user, KEPT) == ["later 1", "later 2"]
    assert kept_texts(user, KEPT + "/new") == ["in the new one"]


def test_primary_restored_without_a_stop(user):
    """Of one user's mail, while others are served."""
    saved = backup(user.primary, user)
    some_day(user)
    user.wait_equal()
    shutil.rmtree(user.primary.home(user))
    os.rename(saved, user.primary.home(user))
    for n in range(2):
        nudge(user)
        assert repair(user) == 0
    without_kept(user)
    assert kept_texts(user, KEPT) == ["later 1", "later 2"]


def test_made_again_under_the_same_name(user):
    """Behind dovetail's back, at the primary."""
    user.cluster.expected += ["no longer at the primary, deleting"]
    for command in ("mailbox delete", "mailbox create"):
        user.primary.doveadm("-o", "mail_plugins=", *command.split(), "-u",
                             user.name, "folder/child")
    user.primary.doveadm("-o", "mail_plugins=", "save", "-u", user.name, "-m",
                         "folder/child", input=mail("another life"))
    nudge(user, "folder/child")
    assert repair(user) == 0
    user.wait_equal()


@pytest.mark.parametrize("mail_format", ["sdbox", "maildir"])
def test_file_of_a_message_lost(new_cluster, mail_format):
    """An mdbox has no such file."""
    cluster = new_cluster(("mdbox", mail_format))
    cluster.expected = [*DISTURBED, *DAMAGE]
    user = cluster.user()
    with user.imap() as session:
        for n in range(1, 9):
            session.append("INBOX", mail("message %d" % n), flags=r"\Flagged")
    user.wait_equal()
    os.unlink(store_file(user.replica, user, b"\nmessage 4"))
    # it cannot be read: "could not tell", until Dovecot has noticed, too
    assert repair(user, "--deep") == (75 if mail_format == "sdbox" else 0)
    assert repair(user, "--deep") == 0
    user.wait_equal()


def edit_maildir(node, user):
    """By hand: one message goes, one comes, one gets other flags."""
    os.unlink(store_file(node, user, b"\nmessage 3"))
    path = store_file(node, user, b"\nmessage 6")
    os.rename(path, path.partition(":")[0] + ":2,FR")
    directory = os.path.dirname(os.path.dirname(path))
    user.write(os.path.join(directory, "new", "1700000000.M1P1.hand"),
               mail("by hand").replace(b"\r\n", b"\n"))


@pytest.mark.parametrize("formats", [("maildir", "mdbox"), ("sdbox", "maildir")],
                         ids="-".join)
def test_maildir_edited_by_hand(new_cluster, formats):
    cluster = new_cluster(formats)
    cluster.expected = list(DISTURBED)
    user = cluster.user()
    with user.imap() as session:
        for n in range(1, 9):
            session.append("INBOX", mail("message %d" % n))
    user.wait_equal()
    edited = cluster.a if formats[0] == "maildir" else cluster.b
    edit_maildir(edited, user)
    nudge(user)
    without_kept(user)
    if edited is cluster.a:
        assert "by hand" in texts(user.look()) and 3 not in user.look()
        assert user.flags()[6] == {r"\Flagged", r"\Answered"}
    else:
        assert kept_texts(user, KEPT) == ["by hand"]
    no_leftovers(user)


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
