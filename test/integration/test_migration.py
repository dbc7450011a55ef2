"""README's chapter 10, "From Dovecot 2.3 to 2.4, with a way back", with its own
commands in its order, while mail is delivered and read: from Maildir on node a
to sdbox on node b, and back. build-aux/check runs it with 2.3 and 2.4; with one
line only the format changes."""

import contextlib
import imaplib
import os
import re
import shlex
import shutil
import subprocess
import threading
import time

import pytest

import view
from cluster import GONE, Refused, mail, quote, wait_for

README = os.path.join(os.path.dirname(__file__), "..", "..", "README")
# How long a client or an MTA waits before it tries again, and between two of
# its actions: the machine shall have other things to do.
RETRY = 0.1
PACE = 0.05


def chapter(number):
    with open(README) as f:
        text = f.read()
    return re.search(r"(?ms)^%d [^\n]*\n-+\n(.*?)(?=^\d+ [^\n]*\n-+\n|\Z)" %
                     number, text)[1]


def commands(number):
    """[(node, command)] of a chapter: "a# COMMAND", perhaps with more lines,
    and what is said about it behind two blanks or more."""
    found = []
    for node, command in re.findall(
            r"(?m)^ +([ab])# ((?:.*[|\\]\n)*.*)$", chapter(number)):
        first, *more = command.split("\n")
        lines = [re.split(r" {2,}", first)[0]] + [line.strip()
                                                  for line in more]
        found.append((node, "\n".join(lines)))
    return found


class Script:
    """Does what a chapter says: run() runs its next command, which must be of
    that node and begin so. swap: with a and b exchanged."""

    def __init__(self, cluster, number, swap=False):
        self.cluster, self.swap = cluster, swap
        self.commands = commands(number)

    def run(self, node, beginning, input=""):
        wanted, command = self.commands.pop(0)
        assert (wanted, command[:len(beginning)]) == (node, beginning)
        if self.swap:
            node = {"a": "b", "b": "a"}[node]
        return shell(getattr(self.cluster, node), command, input)


def shell(node, command, input=""):
    """Run a command as root of a node's machine."""
    command = command.replace("/etc/dovecot/dovetail", node.key_dir)
    for _ in range(3):
        done = subprocess.run(
            ["/bin/bash", "-c", command], cwd=node.dir, input=input,
            env={"PATH": node.dir + "/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            timeout=120, capture_output=True, text=True)
        # Dovecot's auth was just told to reload: the chapter says, again
        if "User listing returned failure" not in done.stderr:
            break
    assert done.returncode == 0, (node.name, command, done.stderr)
    return done.stdout


def programs(node, other):
    """doveadm of this node, and scp to the other one."""
    directory = os.path.join(node.dir, "bin")
    os.mkdir(directory)
    for name, text in (
            ("doveadm", 'exec %s "$@"' % shlex.join(
                node.line.command("doveadm", "-c", node.conf))),
            ("scp", 'case $2 in %s.example.net:*) cp "$1" %s ;; *) exit 1; esac'
             % (other.name, other.key_dir))):
        path = os.path.join(directory, name)
        with open(path, "w") as f:
            f.write("#!/bin/sh\n%s\n" % text)
        os.chmod(path, 0o755)


class World:
    """Where MTAs and clients go, and what they were told."""

    def __init__(self, node):
        self.node = node
        self.done = threading.Event()
        self.errors = []
        # by thread: how often it got its way, and its longest time without
        self.count, self.longest = {}, {}

    @contextlib.contextmanager
    def traffic(self, *actions):
        """Each of these again and again in a thread of its own. They are told
        to go on by True, and else try again a moment later."""
        threads = [threading.Thread(target=self.repeat, args=(n, action),
                                    daemon=True)
                   for n, action in enumerate(actions)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.done.set()
            for thread in threads:
                thread.join()
        assert not self.errors, self.errors

    def repeat(self, number, action):
        self.count[number], self.longest[number] = 0, 0
        since = time.monotonic()
        try:
            while not self.done.is_set():
                if action():
                    now = time.monotonic()
                    self.longest[number] = max(self.longest[number],
                                               now - since)
                    self.count[number] += 1
                    since = now
                    self.done.wait(PACE)
                else:
                    self.done.wait(RETRY)
        except Exception as e:  # shown by the test itself
            self.errors.append(e)

    def wait_traffic(self, each=20):
        """Until everybody got through some more times."""
        before = dict(self.count)
        wait_for(lambda: self.errors or all(
            self.count[n] >= before[n] + each for n in before),
            "%d of each: %s" % (each, self.count), 60)
        assert not self.errors, self.errors


class Mta:
    """Delivers to a user, and keeps a mail until it was taken."""

    def __init__(self, world, user):
        self.world, self.user = world, user
        self.taken = []
        self.next = 0

    def __call__(self):
        subject = "mta-%s-%d" % (self.user, self.next)
        try:
            (code, _), = self.world.node.lmtp(
                [self.user], mail("by LMTP", subject=subject)).values()
        except GONE:
            return False
        if code == 250:
            self.taken.append(subject)
            self.next += 1
        # what may the MTA not get: to bounce a mail
        assert code == 250 or 400 <= code < 500, code
        return code == 250


class Client:
    """An IMAP client: writes drafts, marks them, deletes every third, and files
    what came. It logs in again when it is thrown out."""

    def __init__(self, world, user):
        self.world, self.user = world, user
        self.session, self.node = None, None
        self.next = 0
        # {subject: keyword or None}; gone: expunged
        self.drafts, self.gone = {}, set()

    def __call__(self):
        try:
            if self.session is None or self.node is not self.world.node:
                self.leave()
                self.node = self.world.node
                self.session = self.node.imap(self.user)
                self.session.select("Drafts")
            return self.work(self.session)
        except GONE:
            self.leave()
        except (Refused, imaplib.IMAP4.error) as refused:
            # a login that Dovecot is stopped in is refused so, too
            assert "UNAVAILABLE" in str(refused), refused
            self.leave()
        return False

    def work(self, session):
        self.next += 1
        subject = "draft-%d" % self.next
        # whether it is there, if this fails, the client does not know
        answer = session.append("Drafts", mail("draft", subject=subject))
        uid = re.search(r"APPENDUID \d+ (\d+)", answer)[1]
        self.drafts[subject] = None
        session.do("NOOP")
        session.do("UID STORE %s +FLAGS (k%d)" % (uid, self.next % 5))
        self.drafts[subject] = "k%d" % (self.next % 5)
        if self.next % 3 == 0:
            del self.drafts[subject]
            session.do(r"UID STORE %s +FLAGS (\Deleted)" % uid)
            session.do("UID EXPUNGE " + uid)
            self.gone.add(subject)
        if self.next % 5 == 0:
            session.select("INBOX")
            if session.do("SEARCH UNSEEN", wanted="SEARCH") != [b""]:
                session.do(r"STORE 1 +FLAGS (\Seen)")
                session.do("MOVE 1 Filed")
            session.select("Drafts")
        return True

    def leave(self):
        if self.session is not None:
            with contextlib.suppress(*GONE, Refused):
                self.session.logout()
            with contextlib.suppress(OSError):
                self.session.shutdown()
        self.session = None


def subjects(user, node, *mailboxes):
    """{subject: flags}"""
    found = {}
    with node.imap(user) as session:
        for mailbox in mailboxes:
            for message in session.messages(mailbox).values():
                subject = re.search(rb"Subject: (\S+)", message.body)[1]
                found[subject.decode()] = message.flags
    return found


def years_of_mail(user):
    """What a user of the old server has."""
    with user.imap() as session:
        for name in ("Drafts", "Filed", "Lists", "Lists.Dovecot.2025",
                     "Büro & Co"):
            session.do("CREATE", quote(name))
        session.do("SUBSCRIBE", quote("Büro & Co"))
        session.do("SUBSCRIBE Lists.Dovecot.2025")
        for n in range(30):
            session.append("INBOX", mail("old %d" % n, size=300 * n),
                           flags=r"\Answered old" if n % 7 == 0 else "",
                           date="%02d-Mar-2019 11:22:33 +0100" % (n + 1))
        session.append("Lists.Dovecot.2025", mail("large", size=300000))
        session.append("Büro & Co", mail("one"), mail("two"), mail("three"))
        session.select("INBOX")
        session.do("MOVE 5:9 Filed")
        session.do("COPY 1:3", quote("Büro & Co"))
        session.do(r"STORE 3:6 +FLAGS.SILENT (\Flagged \Seen $Forwarded)")
        session.do(r"STORE 10:12 +FLAGS.SILENT (\Deleted)")
        session.do("EXPUNGE")
    for n in range(3):
        user.lmtp(mail("lmtp %d" % n))


def try_user(node, name):
    """A user that only this node has, for as long as this takes."""
    (code, _), = node.lmtp([name], mail("try")).values()
    assert code == 250
    with node.imap(name) as session:
        assert len(session.messages("INBOX")) == 1
    for other in node.cluster.nodes:
        with open(other.passwd) as f:
            lines = f.readlines()
        with open(other.passwd + ".new", "w") as f:
            f.writelines(line for line in lines
                         if not line.startswith(name + ":"))
        os.rename(other.passwd + ".new", other.passwd)


def connections(status):
    """The column of "doveadm dovetail status"."""
    return [row.split()[3] for row in status.splitlines()[1:]]


def different(cluster, compare, busy):
    """What the last commands of chapter 10 show of users that are not busy."""
    (node, command), (_, same) = compare
    assert node == "a" and command.endswith("> a.txt"), command
    assert same == "the same > b.txt"
    shell(cluster.a, command)
    shell(cluster.b, command.replace("a.txt", "b.txt"))
    sides = []
    for path in (cluster.a.dir + "/a.txt", cluster.b.dir + "/b.txt"):
        with open(path) as f:
            sides.append({line for line in f if line.split("\t")[0]
                          not in {str(user) for user in busy}})
    assert len(sides[0]) >= 7
    return sides[0] ^ sides[1]


def change_primary(cluster, world, old, new, swap):
    """Chapter 9, "A planned change of the primary"."""
    script = Script(cluster, 9, swap)
    script.run("a", "doveadm service stop imap-login pop3-login lmtp")
    script.run("a", "doveadm kick")
    script.run("a", "doveadm service stop imap pop3")
    # but for the table's head
    assert script.run("a", "doveadm who").count("\n") <= 1
    script.run("a", "while doveadm -f flow dovetail status")
    assert connections(script.run("a", "doveadm dovetail status")) == \
        ["ok"] * 3
    for node in cluster.nodes:
        node.settings["dovetail_primary"] = new.name
        node.write_conf()
    script.run("a", "doveadm reload")
    script.run("b", "doveadm reload")
    world.node = new
    for user in cluster.users:
        user.primary = new
    script.run("b", "doveadm search -A ALL > /dev/null")
    assert not script.commands


def assert_replica(user, node, other):
    """It can be read, and nothing is taken here."""
    with node.imap(user) as session:
        assert session.messages("INBOX", False)
        with pytest.raises(Refused, match="UNAVAILABLE.* %s" % other.name):
            session.append("INBOX", mail("no"))
    (code, _), = node.lmtp([user], mail("no")).values()
    assert code == 451


def test_from_23_to_24_and_back(new_cluster):
    cluster = new_cluster(
        ["maildir", "sdbox"], separator=".", start=False, users=4,
        redis={"tcp": True, "username": "dovetail", "password": "pw"})
    a, b = cluster.a, cluster.b
    # a login while imap-login is stopped; clients while Dovecot is
    cluster.expect_errors(
        r"net_connect_unix\(\S*/stats-writer\) failed",
        r"auth: Error: auth-worker: net_connect_unix\(auth-worker\) failed",
        "auth: Error: auth-master client: Master requested auth for "
        "nonexistent client",
        "auth: Error: auth-worker: Aborted LIST request for .: Worker process "
        "died unexpectedly",
        "imap.*: Error: auth-master: login: .* Login auth request failed",
        r"auth: Error: auth client \d+ disconnected with \d+ pending requests",
        r"-login: Error: master\(imap\): (net_connect_unix\(imap\)|read\(\)) "
        "failed")
    for node, other in ((a, b), (b, a)):
        programs(node, other)
        shutil.rmtree(node.key_dir)
        node.plugin = False
        node.settings["dovetail_primary"] = "a"
    cluster.redis.start()

    # The old server, as it always was, with somebody who never got mail.
    a.start()
    idle = cluster.user(name="jane@example.net")
    busy = [cluster.user(), cluster.user()]
    cluster.user()
    for user in [idle] + busy:
        years_of_mail(user)
    idle.write(os.path.join(a.home(idle), "mail", "new",
                            "1600000000.M1P1.old"),
               mail("by hand").replace(b"\r\n", b"\n"))
    before = view.view(a, idle)
    assert len(before.mailboxes["INBOX"].messages) == 26

    world = World(a)
    mtas = [Mta(world, user) for user in busy]
    clients = [Client(world, user) for user in busy]
    with world.traffic(*mtas, *clients):
        world.wait_traffic()

        # 1. b, and a user to try it with
        b.start()
        try_user(b, cluster.prepared.pop())

        # 2. chapter 3
        for node in cluster.nodes:
            node.plugin = True
            node.write_conf()
        three = Script(cluster, 3)
        for node in "ab":
            three.run(node, "doveadm dovetail keygen")
        for node in "ab":
            three.run(node, "scp")
        for node in "ab":
            three.run(node, "(umask 077; cat > ", "pw\n")
        for node in "ab":
            peers = three.run(node, "doveadm dovetail peers")
            assert len(re.findall(r"(?m) ok *$", peers)) == 2, peers
        for node in (b, a):
            node.restart()
        wait_for(lambda: connections(shell(
            a, "doveadm dovetail status")) == ["ok"] * 3, "connections")
        three.run("a", "doveadm dovetail status")
        idle.lmtp(mail("first"))
        wait_for(lambda: shell(b, three.commands[0][1]), "the first mail")
        three.run("b", "doveadm fetch -u " + str(idle))

        # 3. existing mail
        script = Script(cluster, 10)
        script.run("a", "doveadm dovetail seed")

        # 4. compare those that nobody writes to
        compare = script.commands[:]
        wait_for(lambda: not different(cluster, compare, busy),
                 "no difference", step=1)
        world.wait_traffic()

        # 5. switch
        change_primary(cluster, world, a, b, swap=False)
        world.wait_traffic()
        assert_replica(busy[0], a, b)
        idle.lmtp(mail("second"))

        # the way back
        change_primary(cluster, world, b, a, swap=True)
        world.wait_traffic()
        assert_replica(busy[0], b, a)

    for user in cluster.users:
        # README, "Limits": where much is going on at once, a Maildir's cache
        # may lack a save date
        user.wait_equal(60, ignore=("saved",) if user in busy else ())
    for node in cluster.nodes:
        after = view.view(node, idle)
        messages = after.mailboxes["INBOX"].messages
        # the two that came
        assert len(messages) == 28
        for uid in sorted(messages)[-2:]:
            del messages[uid]
        after.mailboxes["INBOX"].uidnext -= 2
        assert view.differences(before, after) == []
        for client, mta in zip(clients, mtas):
            found = subjects(mta.user, node, "INBOX", "Filed")
            assert not set(mta.taken) - found.keys()
            drafts = subjects(client.user, node, "Drafts")
            assert not client.drafts.keys() - drafts.keys()
            assert not client.gone & drafts.keys()
            assert not [draft for draft, keyword in client.drafts.items()
                        if keyword and keyword not in drafts[draft]]
    # while a restarts, and while the primary changes
    assert max(world.longest.values()) < 20, world.longest
    print("\ntook their turn: %s, waited at most: %s" % (world.count,
                                                        world.longest))
