"""What happens while something is killed or fails.

A scenario is a generator: what comes before its yield is preparation, what
follows is the work. It writes into journals what the server acknowledged, and
nothing else: what was begun may have happened or not."""

import contextlib
import re
import signal
import subprocess
import threading

from cluster import GONE, Refused, mail, send

LARGE = 300000


class Journal:
    """What is known of one user's mail. Names are of mailboxes, texts are
    subjects."""

    def __init__(self, user):
        self.user = user
        # (name, text)
        self.kept, self.gone = set(), set()
        # {(name, text): flags that it has, flags that it has not}
        self.flags = {}
        # texts that were never to be away, wherever they are
        self.somewhere = set()
        self.mailboxes, self.no_mailboxes = {"INBOX"}, set()
        self.subscribed, self.unsubscribed = set(), set()

    def contradictions(self, view):
        """Sentences. Nothing is there twice, either."""
        found = []
        there = {}
        for name, mailbox in view.mailboxes.items():
            for message in mailbox.messages.values():
                key = (name, message.subject)
                if key in there:
                    found.append("%s is there twice" % (key,))
                there[key] = message
        found += ["%s was acknowledged and is not there" % (key,)
                  for key in sorted(self.kept - there.keys())]
        found += ["%s was expunged and is there" % (key,)
                  for key in sorted(self.gone & there.keys())]
        texts = {text for _, text in there}
        found += ["%s is nowhere any more" % text
                  for text in sorted(self.somewhere - texts)]
        for key, (has, has_not) in self.flags.items():
            flags = there[key].flags if key in there else set()
            if not has <= flags or flags & has_not:
                found.append("%s has %s, not %s without %s" % (
                    key, sorted(flags), sorted(has), sorted(has_not)))
        names = set(view.mailboxes)
        found += ["mailbox %s is missing" % name
                  for name in sorted(self.mailboxes - names - {"INBOX"})]
        found += ["mailbox %s is there still" % name
                  for name in sorted(self.no_mailboxes & names)]
        found += ["subscription of %s" % name for name in sorted(
            self.subscribed - view.subscriptions |
            self.unsubscribed & view.subscriptions)]
        return found


class Run:
    """One time through a scenario."""

    def __init__(self, pair):
        self.pair = pair
        self.journals = []
        self.sessions = []

    def journal(self):
        """Of a fresh user, who has two messages and a folder already."""
        journal = Journal(self.pair.fresh_user())
        journal.kept = {("INBOX", "one"), ("INBOX", "two"),
                        ("box", "three")}
        journal.mailboxes.add("box")
        self.journals.append(journal)
        return journal

    def imap(self, journal, mailbox="INBOX"):
        session = journal.user.imap()
        self.sessions.append(session)
        session.select(mailbox)
        return session

    def lmtp(self, journal, text, size=0):
        """Deliver; True: acknowledged."""
        user = journal.user
        (code, _), = user.primary.lmtp([user], mail(text, size)).values()
        if code != 250:
            raise Refused(code)
        journal.kept.add(("INBOX", text))

    def doveadm(self, journal, *args, input=b""):
        """On the primary, where it may be killed."""
        node = journal.user.primary
        argv = node.line.command("doveadm", "-c", node.conf, *args)
        environment = self.pair.controls[node.name].environment
        done = subprocess.run(argv, input=input, capture_output=True,
                              env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                                   **environment}, timeout=60)
        if done.returncode != 0:
            raise Refused("%d %s" % (done.returncode, done.stderr.decode()))

    def end(self):
        for session in self.sessions:
            with contextlib.suppress(Exception):
                session.shutdown()
        self.sessions = []


def uid_of(answer):
    return re.search(r"(?:APPENDUID|COPYUID) \d+ (?:\S+ )?(\d+)", answer)[1]


# -- new mail

def lmtp(run):
    journal = run.journal()
    yield
    run.lmtp(journal, "new")


def lmtp_large(run):
    journal = run.journal()
    yield
    run.lmtp(journal, "large", LARGE)


def append(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.append("INBOX", mail("new"), flags=r"\Flagged word")
    journal.kept.add(("INBOX", "new"))
    journal.flags["INBOX", "new"] = {r"\Flagged", "word"}, set()
    session.logout()


def append_large(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.append("INBOX", mail("large", LARGE))
    journal.kept.add(("INBOX", "large"))
    session.logout()


def multiappend(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.append("INBOX", *(mail("new %d" % n) for n in range(4)))
    journal.kept |= {("INBOX", "new %d" % n) for n in range(4)}
    session.append("box", mail("last"))
    journal.kept.add(("box", "last"))
    session.logout()


def first_mail(run):
    """A user of whom nobody has heard."""
    journal = Journal(run.pair.new_user())
    run.journals.append(journal)
    yield
    run.lmtp(journal, "first")


def doveadm_save(run):
    journal = run.journal()
    yield
    run.doveadm(journal, "save", "-u", journal.user.name, "-m", "box",
                input=mail("saved").replace(b"\r\n", b"\n"))
    journal.kept.add(("box", "saved"))


# -- flags

def store(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.do(r"STORE 1 +FLAGS (\Flagged)")
    journal.flags["INBOX", "one"] = {r"\Flagged"}, set()
    session.do(r"STORE 1:2 +FLAGS (\Seen)")
    journal.flags["INBOX", "two"] = {r"\Seen"}, set()
    del journal.flags["INBOX", "one"]
    session.do(r"STORE 1 -FLAGS (\Flagged)")
    journal.flags["INBOX", "one"] = {r"\Seen"}, {r"\Flagged"}
    session.logout()


def keyword(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.do("STORE 1:2 +FLAGS (first second)")
    journal.flags["INBOX", "one"] = {"first", "second"}, set()
    session.do("STORE 2 -FLAGS (second)")
    journal.flags["INBOX", "two"] = {"first"}, {"second"}
    session.logout()


# -- copies

def copy(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.do("COPY 1:2 box")
    journal.kept |= {("box", "one"), ("box", "two")}
    session.logout()


def move(run):
    journal = run.journal()
    session = run.imap(journal)
    journal.kept -= {("INBOX", "one"), ("INBOX", "two")}
    journal.somewhere = {"one", "two"}
    yield
    session.do("MOVE 1:2 box")
    journal.kept |= {("box", "one"), ("box", "two")}
    journal.gone |= {("INBOX", "one"), ("INBOX", "two")}
    session.logout()


def copy_large(run):
    journal = run.journal()
    run.lmtp(journal, "large", LARGE)
    session = run.imap(journal)
    yield
    session.do("COPY 3 box")
    journal.kept.add(("box", "large"))
    session.logout()


# -- expunges

def expunge(run):
    journal = run.journal()
    session = run.imap(journal)
    journal.kept.discard(("INBOX", "one"))
    yield
    session.do(r"STORE 1 +FLAGS (\Deleted)")
    session.do("EXPUNGE")
    journal.gone.add(("INBOX", "one"))
    session.logout()


def doveadm_expunge(run):
    journal = run.journal()
    journal.kept -= {("INBOX", "one"), ("INBOX", "two")}
    yield
    run.doveadm(journal, "expunge", "-u", journal.user.name, "mailbox",
                "INBOX", "ALL")
    journal.gone |= {("INBOX", "one"), ("INBOX", "two")}


# -- the list of mailboxes

def create(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.do("CREATE folder")
    journal.mailboxes.add("folder")
    session.append("folder", mail("inside"))
    journal.kept.add(("folder", "inside"))
    session.do("CREATE", "parent/child")
    journal.mailboxes.add("parent/child")
    session.logout()


def rename(run):
    journal = run.journal()
    session = run.imap(journal)
    journal.kept.discard(("box", "three"))
    journal.mailboxes.discard("box")
    journal.somewhere.add("three")
    yield
    session.do("RENAME box renamed")
    journal.mailboxes.add("renamed")
    journal.no_mailboxes.add("box")
    journal.kept.add(("renamed", "three"))
    session.append("renamed", mail("behind"))
    journal.kept.add(("renamed", "behind"))
    session.logout()


def rename_parent(run):
    journal = run.journal()
    session = run.imap(journal)
    session.do("CREATE", "parent/child")
    session.append("parent/child", mail("inside"))
    journal.somewhere.add("inside")
    yield
    session.do("RENAME parent other")
    journal.mailboxes.add("other/child")
    journal.no_mailboxes.add("parent/child")
    session.logout()


def delete(run):
    journal = run.journal()
    session = run.imap(journal)
    journal.kept.discard(("box", "three"))
    journal.mailboxes.discard("box")
    yield
    session.do("DELETE box")
    journal.no_mailboxes.add("box")
    session.logout()


def delete_and_create(run):
    """Another mailbox of the same name."""
    journal = run.journal()
    session = run.imap(journal)
    journal.kept.discard(("box", "three"))
    journal.mailboxes.discard("box")
    yield
    session.do("DELETE box")
    session.do("CREATE box")
    journal.mailboxes.add("box")
    journal.gone.add(("box", "three"))
    session.append("box", mail("inside"))
    journal.kept.add(("box", "inside"))
    session.logout()


def subscribe(run):
    journal = run.journal()
    session = run.imap(journal)
    yield
    session.do("SUBSCRIBE box")
    journal.subscribed.add("box")
    session.do("SUBSCRIBE INBOX")
    journal.subscribed.add("INBOX")
    journal.subscribed.discard("box")
    session.do("UNSUBSCRIBE box")
    journal.unsubscribed.add("box")
    session.logout()


# -- much at once

def burst(run):
    """Several users, each by a client of their own."""
    journals = [run.journal() for _ in range(4)]
    sessions = [run.imap(journal) for journal in journals[:2]]
    yield

    def by_imap(journal, session):
        for n in range(2):
            session.append("INBOX", mail("burst %d" % n))
            journal.kept.add(("INBOX", "burst %d" % n))
        session.do(r"STORE 1 +FLAGS (\Flagged)")
        journal.flags["INBOX", "one"] = {r"\Flagged"}, set()
        session.logout()

    def by_lmtp(journal):
        for n in range(2):
            run.lmtp(journal, "burst %d" % n)

    in_parallel([lambda j=j, s=s: by_imap(j, s)
                 for j, s in zip(journals, sessions)] +
                [lambda j=j: by_lmtp(j) for j in journals[2:]])


def in_parallel(functions):
    def guarded(function):
        with contextlib.suppress(Refused, *GONE):
            function()

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def standing_still(pids):
    send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        send(signal.SIGCONT, pids)


def repair(run):
    """Redis lost what two users' replicas need, and they ask for it."""
    journals = [run.journal() for _ in range(2)]
    pair = run.pair
    replay = pair.controls["b"].heard("dovetail-replay")
    before = pair.entries()
    with standing_still(replay):
        # the answer to a question that is open already is on its way
        for journal in journals:
            run.lmtp(journal, "on its way")
        before = pair.entries()
        for journal in journals:
            run.lmtp(journal, "lost")
            run.lmtp(journal, "lost and large", LARGE)
        for key, entry in pair.entries() - before:
            pair.redis.cli("xdel", key, entry)
    yield
    for journal in journals:
        run.lmtp(journal, "behind it")


def rebuild(run):
    """A replica's mailbox lost messages, and gets them back in their places when
    the primary's next digest comes."""
    journal = run.journal()
    run.lmtp(journal, "two again")
    run.pair.wait_equal(journal.user)
    run.pair.nodes[1].doveadm(
        "-o", "mail_plugins=", "expunge", "-u", journal.user.name, "mailbox",
        "INBOX", "uid", "1:2")
    yield
    run.lmtp(journal, "behind it")


def backlog(run):
    """dovetail-queue comes up where a replica has not read yet."""
    journals = [run.journal() for _ in range(3)]
    pair = run.pair
    replay = pair.controls["b"].heard("dovetail-replay")
    send(signal.SIGSTOP, replay)
    try:
        for journal in journals:
            run.lmtp(journal, "in the backlog")
            run.lmtp(journal, "in it as well", LARGE)
        pair.kill("a", "dovetail-queue")
        yield
    finally:
        send(signal.SIGCONT, replay)
    for journal in journals:
        run.lmtp(journal, "behind it")


def outage(run):
    """Redis does not answer and comes back: what was written meanwhile is swept
    up."""
    journals = [run.journal() for _ in range(2)]
    redis = run.pair.redis
    redis.pause()
    try:
        run.lmtp(journals[0], "meanwhile")
        with journals[1].user.imap() as session:
            session.append("INBOX", mail("meanwhile"))
            journals[1].kept.add(("INBOX", "meanwhile"))
            session.do("CREATE", "made")
            journals[1].mailboxes.add("made")
            session.do("SUBSCRIBE", "made")
            journals[1].subscribed.add("made")
        yield
    finally:
        redis.resume()


SCENARIOS = {f.__name__: f for f in (
    lmtp, lmtp_large, first_mail, append, append_large, multiappend,
    doveadm_save, store, keyword, copy, copy_large, move, expunge,
    doveadm_expunge, create, rename, rename_parent, delete, delete_and_create,
    subscribe, burst, repair, rebuild, backlog, outage)}
