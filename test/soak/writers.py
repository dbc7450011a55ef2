"""Clients that write at random and keep the journal."""

import imaplib
import random
import re
import threading
import time
import traceback

import view
from cluster import GONE, Refused, mail, quote
from journal import FLAGS, KEYWORDS, Folder, Message

# the server went away, or did not let us in
LOST = GONE + (imaplib.IMAP4.error,)
# bytes, how often: below and above what travels in one piece
SIZES = ((500, 30), (6000, 30), (40000, 8), (70000, 4), (150000, 4),
         (600000, 1), (2000000, 0.2))
# folders, messages of one user: more are not made, or some are removed
FOLDERS = 8
MESSAGES = 120


def pick(rng, weighted):
    values, weights = zip(*weighted)
    return rng.choices(values, weights)[0]


def content(rng, text):
    """A message of some size; no two have a line of the body in common."""
    size = pick(rng, SIZES)
    line = "%s %%06d %s\r\n" % (text, "x" * rng.randrange(60))
    return mail(text, subject=text) + "".join(
        line % n for n in range(size // len(line))).encode()


def uid_list(text):
    """The numbers of "5:7,9"."""
    uids = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        uids += range(int(first), int(last or first) + 1)
    return uids


class Writer(threading.Thread):
    """Does one thing after another until it is stopped. tally counts what the
    servers answered: {(kind, "ok" | "refused" | "uncertain"): times}."""

    def __init__(self, name, run):
        super().__init__(name=name, daemon=True)
        self.run_, self.tally = run, run.tally
        self.rng = random.Random("%d %s" % (run.seed, name))
        self.stopped, self.ended = threading.Event(), threading.Event()
        self.texts = 0
        self.error = None

    def run(self):
        try:
            while not self.stopped.wait(
                    self.rng.expovariate(1 / self.run_.pause)):
                try:
                    self.step()
                except LOST:
                    self.lost()
            self.settle()
        except Exception as e:
            self.error = e
            self.run_.note(traceback.format_exc())
        self.ended.set()

    def settle(self):
        """All servers are well again: come to an end."""

    def lost(self):
        self.stopped.wait(0.1)

    def text(self):
        self.texts += 1
        return "%s-%d-%d" % (self.name, self.run_.seed, self.texts)

    def count(self, kind, how, what="", answer=""):
        self.run_.count(self.name, kind, how, what, answer)

    def ask(self, kind, what, function, *args, **kwargs):
        """Have a server change something. Returns its answer, or None when
        nobody knows whether it did; the next step comes to terms with a
        connection that died."""
        begin = time.monotonic()
        try:
            answer = function(*args, **kwargs)
        except Refused as refused:
            self.count(kind, "refused", what, refused)
            return None
        except LOST as e:
            self.count(kind, "uncertain", what, repr(e))
            self.lost()
            return None
        self.count(kind, "ok", what, answer)
        self.run_.slowest = max(self.run_.slowest, time.monotonic() - begin)
        return answer


class Deliverer(Writer):
    """An MTA: delivers to one or several users at a time."""

    def step(self):
        journals = self.rng.sample(self.run_.journals, min(
            len(self.run_.journals), pick(self.rng, ((1, 6), (2, 2), (3, 1)))))
        text = self.text()
        data = content(self.rng, text)
        for journal in journals:
            journal.new(text, data)
        # one answer per recipient, or none when the connection died
        try:
            answers = self.run_.cluster.a.lmtp(
                [journal.user for journal in journals], data)
        except LOST as e:
            answers = {}
            error = repr(e)
        for journal in journals:
            code, answer = answers.get(journal.user.name, (0, None))
            how = "ok" if code == 250 else "refused" if code else "uncertain"
            self.count("LMTP", how, "%s %s" % (journal.user, text),
                       answer or error)
            with journal.lock:
                journal.folders["INBOX"].messages.append(
                    Message(text, maybe=how != "ok"))
        if not answers:
            self.lost()


class Client(Writer):
    """A mail client with one IMAP connection. Only it changes what is in the
    user's folders once it is there."""

    def __init__(self, journal, run):
        super().__init__(journal.user.name, run)
        self.journal = journal
        self.session = None
        self.selected = None
        self.names = 0
        # a change of the list of folders which is to be asked for again until
        # it is known what became of it: a function, returns True when it is
        self.pending = None

    # -- the connection

    def lost(self):
        self.close()
        super().lost()

    def close(self):
        if self.session:
            self.session.shutdown()
        self.session = self.selected = None

    def connect(self):
        if self.session is None:
            self.session = self.journal.user.imap()
            self.selected = None

    def select(self, folder):
        if self.selected is not folder:
            self.selected = None
            self.session.select(folder.name)
            self.selected = folder
        return folder

    def unselect(self):
        if self.selected:
            self.session.do("UNSELECT")
            self.selected = None

    def step(self):
        self.connect()
        if self.pending:
            if self.pending():
                self.pending = None
            return
        try:
            getattr(self, pick(self.rng, self.kinds()))()
        except Refused as refused:
            # a SELECT or so; nothing was changed
            self.count("other", "refused", "", refused)
            self.lost()

    def kinds(self):
        total = sum(len(f.messages) for f in self.journal.folders.values())
        many, empty = total > MESSAGES, len(self.journal.folders) < 4
        return (("append", 4 if many else 20), ("store", 30), ("copy", 8),
                ("move", 8), ("expunge", 40 if many else 8), ("adopt", 8),
                ("create", 6 if empty else 2), ("rename", 2), ("delete", 2),
                ("subscribe", 3), ("close", 1))

    def settle(self):
        deadline = time.monotonic() + 60
        while self.pending:
            assert time.monotonic() < deadline, \
                "%s: it cannot be learnt what became of %s" % (
                    self.name, self.pending)
            try:
                self.step()
            except LOST:
                self.close()
            time.sleep(0.1)
        self.close()

    # -- what to work on

    def folder(self):
        return self.journal.folders[
            self.rng.choice(sorted(self.journal.folders))]

    def some(self):
        """A folder that is selected then, and some of its messages."""
        folder = self.folder()
        with self.journal.lock:
            known = [m for m in folder.messages
                     if m.uid is not None and not m.maybe]
        messages = self.rng.sample(known, min(
            len(known), pick(self.rng, ((1, 4), (2, 2), (5, 1)))))
        if messages:
            self.select(folder)
        return folder, sorted(messages, key=lambda m: m.uid)

    def flags(self):
        return set(self.rng.sample(FLAGS + KEYWORDS, self.rng.randrange(4)))

    @staticmethod
    def sequence(messages):
        return ",".join(str(m.uid) for m in messages)

    # -- messages

    def append(self):
        folder = self.folder()
        flags = self.flags()
        texts = [self.text()
                 for _ in range(pick(self.rng, ((1, 8), (2, 1), (3, 1))))]
        data = [content(self.rng, text) for text in texts]
        for text, one in zip(texts, data):
            self.journal.new(text, one)
        answer = self.ask("APPEND", "%s %s %s" % (folder.name, texts, flags),
                          self.session.append, folder.name, *data,
                          flags=" ".join(flags))
        uids = uid_list(re.search(r"APPENDUID \d+ ([\d,:]+)", answer)[1]) \
            if answer else [None] * len(texts)
        assert len(uids) == len(texts), answer
        with self.journal.lock:
            folder.messages += [Message(text, uid, flags, maybe=not answer)
                                for text, uid in zip(texts, uids)]

    def store(self):
        folder, messages = self.some()
        if not messages:
            return
        flags = self.flags()
        how = self.rng.choice(("+", "+", "-", ""))
        self.store_flags(folder, messages, how, flags)

    def store_flags(self, folder, messages, how, flags):
        """how: add them (+), take them away (-), or have only them.
        Returns what ask() does."""
        answer = self.ask("STORE", "%s %s %s%s" % (
            folder.name, self.sequence(messages), how, flags), self.session.do,
            "UID STORE %s %sFLAGS.SILENT (%s)" % (
                self.sequence(messages), how, " ".join(flags)))
        for message in messages:
            after = message.flags | flags if how == "+" else \
                message.flags - flags if how == "-" else flags
            changed = flags | message.unsure | message.flags \
                if how == "" else flags
            if answer is None:
                message.unsure |= changed & (
                    (message.flags ^ after) | message.unsure)
            else:
                message.unsure -= changed
                message.flags = set(after)
        return answer

    def copied(self, kind, folder, messages):
        """COPY or MOVE them somewhere."""
        if not messages:
            return
        target = self.folder()
        if target is folder:
            return
        answer = self.ask(
            kind, "%s %s to %s" % (folder.name, self.sequence(messages),
                                   target.name), self.copy_command, kind,
            self.sequence(messages), target.name)
        if answer:
            came, uids = map(uid_list, answer.split())
        else:
            came, uids = [m.uid for m in messages], [None] * len(messages)
        copies = []
        for message in messages:
            if message.uid not in came:
                # it was not there: so it stays, and is found to be lost
                continue
            copies.append(copy := Message(
                message.text, uids[came.index(message.uid)], message.flags,
                maybe=not answer))
            copy.unsure = set(message.unsure)
            if kind == "MOVE" and answer is None:
                message.maybe = True
                message.twin, copy.twin = copy, message
        with self.journal.lock:
            target.messages += copies
            if kind == "MOVE" and answer:
                folder.messages = [m for m in folder.messages
                                   if m not in messages or m.uid not in came]

    def copy_command(self, kind, sequence, target):
        """Returns COPYUID's "sources targets"."""
        text = self.session.do("UID %s %s" % (kind, sequence), quote(target))
        told = self.session.untagged_responses.get("COPYUID")
        if told:
            text = "COPYUID " + told[-1].decode()
        match = re.search(r"COPYUID \d+ ([\d,:]+ [\d,:]+)", text)
        # none were there
        return match[1] if match else "0 0"

    def copy(self):
        self.copied("COPY", *self.some())

    def move(self):
        self.copied("MOVE", *self.some())

    def expunge(self):
        folder, messages = self.some()
        if not messages or self.store_flags(folder, messages, "+",
                                            {"\\Deleted"}) is None:
            return
        answer = self.ask("EXPUNGE", "%s %s" % (
            folder.name, self.sequence(messages)), self.session.do,
            "UID EXPUNGE " + self.sequence(messages))
        with self.journal.lock:
            if answer is None:
                for message in messages:
                    message.maybe = True
            else:
                folder.messages = [m for m in folder.messages
                                   if m not in messages]

    def adopt(self):
        """Learn the UIDs of what was delivered."""
        inbox = self.journal.folders["INBOX"]
        with self.journal.lock:
            waiting = {m.text: m for m in inbox.messages
                       if m.uid is None and not m.maybe}
        if not waiting:
            return
        self.select(inbox)
        self.session.do("NOOP")
        for row in self.session.do(
                "UID FETCH 1:* (UID BODY.PEEK[HEADER.FIELDS (SUBJECT)])",
                wanted="FETCH"):
            if isinstance(row, tuple):
                match = re.search(rb"Subject: (\S+)", row[1])
                message = match and waiting.get(match[1].decode())
                if message:
                    message.uid = int(re.search(rb"UID (\d+)", row[0])[1])

    # -- folders

    def again(self, kind, what, attempt):
        """Ask for a change of the list, at once and until it is known to be
        done."""
        def pending():
            self.unselect()
            return attempt()
        pending.__qualname__ = "%s %s" % (kind, what)
        # before the first attempt, which may end with an exception
        self.pending = pending
        if pending():
            self.pending = None

    def list_command(self, kind, what, done, *args):
        """Returns True when it was answered with OK, or with a NO that says
        that it has been done."""
        try:
            answer = self.session.do(kind, *map(quote, args))
        except Refused as refused:
            if done and done in str(refused):
                self.count(kind, "ok", what, refused)
                return True
            self.count(kind, "refused", what, refused)
            return False
        except LOST as e:
            self.count(kind, "uncertain", what, repr(e))
            self.lost()
            return False
        self.count(kind, "ok", what, answer)
        return True

    def new_name(self):
        """Never one that is there; sometimes one that was, sometimes below
        another folder."""
        if self.names and self.rng.random() < 0.3:
            name = "f%d" % self.rng.randrange(self.names)
        else:
            self.names += 1
            name = "f%d%s" % (self.names - 1,
                              self.rng.choice(("", "", " \u00fc")))
        # not below a folder that has a parent
        parents = sorted(n for n in self.journal.folders
                         if n != "INBOX" and "/" not in n)
        if parents and self.rng.random() < 0.2:
            name = "%s/%s" % (self.rng.choice(parents), name)
        taken = {part for f in self.journal.folders for part in (
            f, f.partition("/")[0])}
        return None if name in taken else name

    def leaf(self):
        """A folder that can be renamed or deleted, or None."""
        names = sorted(n for n in self.journal.folders if n != "INBOX" and
                       not any(other.startswith(n + "/")
                               for other in self.journal.folders))
        return self.journal.folders[self.rng.choice(names)] if names else None

    def create(self):
        name = self.new_name()
        if name is None or len(self.journal.folders) > FOLDERS:
            return

        def attempt():
            if not self.list_command("CREATE", name, "ALREADYEXISTS", name):
                return False
            with self.journal.lock:
                self.journal.folders[name] = Folder(name)
            return True
        self.again("CREATE", name, attempt)

    def delete(self):
        folder = self.leaf()
        if folder is None or len(self.journal.folders) < 4:
            return

        def attempt():
            if not self.list_command("DELETE", folder.name, "NONEXISTENT",
                                     folder.name):
                return False
            with self.journal.lock:
                self.journal.dropped(folder)
            return True
        self.again("DELETE", folder.name, attempt)

    def rename(self):
        folder, name = self.leaf(), self.new_name()
        if folder is None or name is None or \
           name.startswith(folder.name + "/"):
            return

        def attempt():
            # Asked again it only says that the new name is there.
            if not self.list_command("RENAME", "%s to %s" % (
                    folder.name, name), None, folder.name, name):
                names = {n for _, n in view.list_mailboxes(self.session)} \
                    if self.session else set()
                if name not in names or folder.name in names:
                    return False
            with self.journal.lock:
                del self.journal.folders[folder.name]
                folder.name = name
                self.journal.folders[name] = folder
            return True
        self.again("RENAME", "%s to %s" % (folder.name, name), attempt)

    def subscribe(self):
        folder = self.folder()
        if folder.name in self.journal.subscribed:
            kind, change = "UNSUBSCRIBE", self.journal.subscribed.discard
        else:
            kind, change = "SUBSCRIBE", self.journal.subscribed.add

        def attempt():
            if not self.list_command(kind, folder.name, "NONEXISTENT",
                                     folder.name):
                return False
            change(folder.name)
            return True
        self.again(kind, folder.name, attempt)


class Reader(Writer):
    """Clients of the replica, which look at mailboxes while they change."""

    def step(self):
        journal = self.rng.choice(self.run_.journals)
        replica = self.run_.cluster.b
        with journal.user.imap(replica) as session:
            for _ in range(3):
                with journal.lock:
                    name = self.rng.choice(sorted(journal.folders))
                try:
                    session.select(name, "EXAMINE")
                    session.do("UID FETCH 1:* (FLAGS)")
                    session.do("UNSELECT")
                except Refused:
                    # not there yet
                    continue
                self.count("read", "ok")
