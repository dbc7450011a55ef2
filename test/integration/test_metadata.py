"""METADATA: the attributes of mailboxes and of the server (mail_attribute_dict)."""

import json
import os
import re
import shutil

import pytest

from cluster import Cluster, Refused, literal, mail, quote, wait_for

# sysexits.h
DATAERR = 65
EQUAL = "equal", {"-"}
DICT = "dovecot-attributes"


def conf(line):
    """METADATA, in a file of the user's home"""
    if line.is_24:
        return """
mail_attribute {
  dict file {
    path = %%{home}/%s
  }
}
protocol imap {
  imap_metadata = yes
}
""" % DICT
    return """
mail_attribute_dict = file:%%h/%s
protocol imap {
  imap_metadata = yes
}
""" % DICT


@pytest.fixture(scope="module")
def two():
    with Cluster(["sdbox", "maildir"], conf=conf) as cluster:
        yield cluster


def set_metadata(session, mailbox, **values):
    """values: private_NAME or shared_NAME: text, bytes, or None to remove it"""
    parts = []
    for name, value in values.items():
        if isinstance(value, str):
            value = value.encode()
        parts += [" /" + name.replace("_", "/"), " ",
                  "NIL" if value is None else literal(value)]
    parts[0] = "(" + parts[0].lstrip()
    session.do("SETMETADATA", quote(mailbox), b"".join(
        p if isinstance(p, bytes) else p.encode() for p in parts) + b")")


def metadata(user, node, *mailboxes):
    """{(mailbox, entry): value} as an IMAP client sees them; "" is the
    server, of which only the comments are asked for"""
    seen = {}
    with node.imap(user) as session:
        for mailbox in mailboxes:
            # Dovecot does not list the server's
            rows = session.do("GETMETADATA (DEPTH infinity)", quote(mailbox),
                              "(/private /shared)" if mailbox else
                              "(/private/comment /shared/comment)",
                              wanted="METADATA")
            for row in rows:
                text, data = row if isinstance(row, tuple) else (row, None)
                for key, value in re.findall(
                        rb'(/(?:private|shared)\S*) "((?:\\.|[^"\\])*)"', text):
                    seen[mailbox, key.decode()] = re.sub(rb"\\(.)", rb"\1",
                                                         value)
                if data is not None:
                    key = re.search(rb"(\S+) ~?\{\d+\}$", text)[1]
                    seen[mailbox, key.lstrip(b"(").decode()] = data
    return seen


def wait_metadata(user, expected, *mailboxes, node=None):
    """Until a client of the replica sees exactly these; so does one of the
    primary."""
    mailboxes = mailboxes or ("", "INBOX")
    expected = {key: value.encode() if isinstance(value, str) else value
                for key, value in expected.items()}
    assert metadata(user, user.primary, *mailboxes) == expected

    def equal():
        equal.seen = metadata(user, node or user.replica, *mailboxes)
        return equal.seen == expected
    try:
        wait_for(equal, "metadata")
    except AssertionError:
        assert equal.seen == expected


def dict_path(user, node):
    return os.path.join(node.home(user), DICT)


def edit_dict(user, node, edit):
    """Change the dict behind everybody's back: edit gets {path: value}."""
    path = dict_path(user, node)
    with open(path) as f:
        lines = f.read().split("\n")[:-1]
    entries = dict(zip(lines[::2], lines[1::2]))
    edit(entries)
    user.write(path, "".join("%s\n%s\n" % e for e in sorted(
        entries.items())).encode())


def guid(user, mailbox="INBOX"):
    return user.doveadm("-f tab mailbox status", "guid",
                        mailbox).split("\n")[1].split("\t")[1]


def verified(user, *args, exit=0):
    """What is said of INBOX: (result, {difference, ...})"""
    done = user.primary.doveadm("-f", "json", "dovetail", *args, "-u", user,
                                check=False)
    assert done.returncode == exit, (done.stdout, done.stderr)
    rows = [row for row in json.loads(done.stdout)
            if row["mailbox"] == "INBOX"]
    result, = {row["result"] for row in rows}
    return result, {row["difference"] for row in rows}


# -- changes

def test_set_change_remove(two):
    user = two.user()
    user.lmtp(mail("one"))
    with user.imap() as session:
        set_metadata(session, "INBOX", private_comment="mine",
                     shared_comment="everybody's")
        wait_metadata(user, {("INBOX", "/private/comment"): "mine",
                             ("INBOX", "/shared/comment"): "everybody's"})
        set_metadata(session, "INBOX", private_comment="Prüfung \"x\"\r\n\t",
                     shared_comment=None)
        wait_metadata(user, {("INBOX", "/private/comment"):
                             "Prüfung \"x\"\r\n\t"})
        set_metadata(session, "INBOX", private_comment=None)
        wait_metadata(user, {})
        # the same once more
        set_metadata(session, "INBOX", private_comment=None,
                     shared_comment="again")
        wait_metadata(user, {("INBOX", "/shared/comment"): "again"})
    user.wait_equal()
    assert verified(user, "verify") == EQUAL


def test_server(two):
    user = two.user()
    with user.imap() as session:
        set_metadata(session, "", private_comment="the whole account")
        set_metadata(session, "INBOX", private_comment="the mailbox")
        wait_metadata(user, {("", "/private/comment"): "the whole account",
                             ("INBOX", "/private/comment"): "the mailbox"})
        set_metadata(session, "", private_comment=None)
        wait_metadata(user, {("INBOX", "/private/comment"): "the mailbox"})


def test_with_mail(two):
    """Messages and attributes in one change, several of one attribute"""
    user = two.user()
    user.doveadm("mailbox create", "Work")
    user.wait_equal()
    with two.b.paused("dovetail-replay"):
        with user.imap() as session:
            for text in ("one", "two", "three"):
                session.append("Work", mail(text))
                set_metadata(session, "Work", private_comment=text,
                             shared_comment=text if text != "three" else None)
    user.wait_equal()
    wait_metadata(user, {("Work", "/private/comment"): "three"}, "Work")


def test_doveadm(two):
    user = two.user()
    user.doveadm("mailbox metadata set", "INBOX", "/private/vendor/x/y", "z")
    wait_metadata(user, {("INBOX", "/private/vendor/x/y"): "z"})
    user.doveadm("mailbox metadata unset", "INBOX", "/private/vendor/x/y")
    wait_metadata(user, {})


def test_without_plugin(two):
    """A writer that knows nothing of dovetail: the next one finds it in the
    mailbox's log."""
    user = two.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    option = "mail_plugins/dovetail=no" if two.a.line.is_24 else \
        "mail_plugins="
    two.a.doveadm("-o", option, "mailbox", "metadata", "set", "-u", user,
                  "INBOX", "/private/comment", "unseen")
    assert metadata(user, two.b, "INBOX") == {}
    user.lmtp(mail("two"))
    wait_metadata(user, {("INBOX", "/private/comment"): "unseen"})


def test_rename_delete(two):
    user = two.user()
    user.doveadm("mailbox create", "Old")
    with user.imap() as session:
        set_metadata(session, "Old", private_comment="kept")
        session.do("RENAME Old New")
        wait_for(lambda: "New" in user.mailboxes(), "rename")
        wait_metadata(user, {("New", "/private/comment"): "kept"}, "New")
        session.do("DELETE New")
        session.do("CREATE New")
        user.wait_equal()
        wait_metadata(user, {}, "New")
    with open(dict_path(user, two.b)) as f:
        assert "kept" not in f.read()


def test_refused_on_a_replica(two):
    user = two.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    with user.imap(two.b) as session:
        with pytest.raises(Refused):
            set_metadata(session, "INBOX", private_comment="here")
    wait_metadata(user, {})


def test_largest_and_too_large(two):
    user = two.user()
    user.lmtp(mail("one"))
    with user.imap() as session:
        set_metadata(session, "INBOX", private_comment="x" * 65536)
        wait_metadata(user, {("INBOX", "/private/comment"): "x" * 65536})
        set_metadata(session, "INBOX", private_comment="x" * 65537,
                     shared_comment="next")
    two.a.wait_log(r"Mailbox INBOX: Attribute /private/comment is not "
                   r"replicated: Its value has more than 65536 bytes")
    # as if it was not there
    wait_for(lambda: metadata(user, two.b, "INBOX") ==
             {("INBOX", "/shared/comment"): b"next"}, "shared attribute")
    assert verified(user, "verify") == EQUAL


def test_sieve_stays(two):
    """Pigeonhole notes changes of scripts in the log as attributes."""
    user = two.user()
    user.lmtp(mail("one"))
    path = os.path.join(two.a.home(user), "script")
    user.write(path, b"keep;\n")
    user.doveadm("sieve put", "mine", path)
    user.doveadm("sieve activate", "mine")
    # an attribute, so that there is a dict
    user.doveadm("mailbox metadata set", "INBOX", "/private/comment", "x")
    prefix = "priv/%s/vendor/vendor.dovecot/pvt/" % guid(user)
    edit_dict(user, two.a, lambda entries: entries.update({
        prefix + "server/sieve/files/mine": "a script",
        prefix + "acl/user=ann": "lr"}))
    user.lmtp(mail("two"))
    wait_metadata(user, {("INBOX", "/private/comment"): "x"})
    assert verified(user, "verify") == EQUAL
    assert verified(user, "repair") == EQUAL
    assert not os.path.exists(os.path.join(two.b.home(user), "sieve"))
    with open(dict_path(user, two.b)) as f:
        assert re.findall("sieve|acl", f.read()) == []


# -- snapshots

def test_new_replica(two):
    user = two.user()
    user.lmtp(mail("one"))
    user.doveadm("mailbox create", "Work")
    with user.imap() as session:
        set_metadata(session, "", private_comment="server")
        set_metadata(session, "INBOX", private_comment="inbox")
        set_metadata(session, "Work", shared_comment="work")
    expected = {("", "/private/comment"): "server",
                ("INBOX", "/private/comment"): "inbox",
                ("Work", "/shared/comment"): "work"}
    mailboxes = ("", "INBOX", "Work")
    wait_metadata(user, expected, *mailboxes)
    # with replay stopped: nobody keeps the user open
    two.b.stop()
    home = two.b.home(user)
    shutil.rmtree(home)
    os.makedirs(home)
    os.chown(home, user.uid, user.gid)
    two.b.start()
    two.a.doveadm("dovetail", "seed", "-u", user)
    user.wait_equal()
    wait_metadata(user, expected, *mailboxes)


def test_log_is_lost(two):
    """A change that nobody captured before the mailbox's log was gone comes with
    the snapshot, and so does that others were removed."""
    user = two.user()
    user.lmtp(mail("one"))
    with user.imap() as session:
        set_metadata(session, "INBOX", private_comment="one",
                     shared_comment="to be removed")
    wait_metadata(user, {("INBOX", "/private/comment"): "one",
                         ("INBOX", "/shared/comment"): "to be removed"})
    path = "/%s/comment" % guid(user)

    def edit(entries):
        entries["priv" + path] = "two"
        del entries["shared" + path]
    edit_dict(user, two.a, edit)
    user.doveadm("force-resync", "INBOX")
    user.lmtp(mail("two"))
    wait_metadata(user, {("INBOX", "/private/comment"): "two"})
    user.wait_equal()


# -- differences

@pytest.mark.parametrize("where", ["replica", "primary"])
def test_verify_and_repair(two, where):
    user = two.user()
    user.lmtp(mail("one"))
    with user.imap() as session:
        set_metadata(session, "INBOX", private_comment="comment",
                     private_lost="lost", shared_same="same")
    expected = {("INBOX", "/private/comment"): "comment",
                ("INBOX", "/private/lost"): "lost",
                ("INBOX", "/shared/same"): "same"}
    wait_metadata(user, expected)
    assert verified(user, "verify") == EQUAL
    prefix = "/%s/" % guid(user)

    def edit(entries):
        entries["priv%scomment" % prefix] = "changed"
        entries["shared%smore" % prefix] = "more"
        del entries["priv%slost" % prefix]
    edit_dict(user, two.b if where == "replica" else two.a, edit)
    if where == "primary":
        expected[("INBOX", "/private/comment")] = "changed"
        expected[("INBOX", "/shared/more")] = "more"
        del expected[("INBOX", "/private/lost")]
    lacking, extra = ("/private/lost", "/shared/more") \
        if where == "replica" else ("/shared/more", "/private/lost")
    for args in ((), ("--explain",), ("--deep",)):
        result, difference = verified(user, "verify", *args, exit=DATAERR)
        assert result == "different"
        assert difference == {
            "Attribute /private/comment: another value than on a",
            "Attribute %s: not on b" % lacking,
            "Attribute %s: only on b" % extra}
    assert verified(user, "repair")[0] == "repaired"
    wait_metadata(user, expected)
    assert verified(user, "verify") == EQUAL
    user.wait_equal()


# -- nodes that keep none

def test_replica_without_dict(new_cluster):
    cluster = new_cluster(["sdbox", "sdbox"], node_options={
        "a": {"conf": conf}, "b": {"replay_workers": 1}})
    user = cluster.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    assert verified(user, "verify") == EQUAL
    with user.imap() as session:
        for text in ("one", "two"):
            set_metadata(session, "INBOX", private_comment=text)
            session.append("INBOX", mail(text))
    user.wait_equal()
    warnings = re.findall("Attributes .METADATA. of a are not kept here.*",
                          cluster.b.log_text())
    assert len(warnings) == 1 and "mail_attribute_dict" in warnings[0]
    result, difference = verified(user, "verify", exit=DATAERR)
    assert result == "different"
    assert difference == \
        {"Attributes (METADATA) of b: mail_attribute_dict is not set"}


def test_primary_without_dict(new_cluster):
    cluster = new_cluster(["sdbox", "sdbox"],
                          node_options={"b": {"conf": conf}})
    user = cluster.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    assert verified(user, "verify") == EQUAL
    assert not re.search("(?i)attribute", cluster.a.log_text() +
                         cluster.b.log_text())
