"""What a user's clients were told, and what must be there because of it.

A change that was answered with OK is certain. One that was refused, or whose
connection died, may have happened or not, for good: a message is then "maybe",
a flag "unsure". Nothing is ever done to a "maybe" message again, so one look at
the end decides all.
"""

import hashlib
import re
import threading

FLAGS = ("\\Answered", "\\Flagged", "\\Draft", "\\Seen")
KEYWORDS = ("work", "$Later", "k1", "k2", "k3")


class Message:
    """One message in one folder."""

    def __init__(self, text, uid=None, flags=(), maybe=False):
        # the subject, which tells it from all others but its copies
        self.text = text
        # None: not known yet
        self.uid = uid
        self.flags = set(flags)
        # flags which may be there or not
        self.unsure = set()
        self.maybe = maybe
        # it is new and maybe, and nothing is known of its flags: Dovecot
        # found it without its index records
        self.bare = maybe
        # of a move that is maybe: the other end. One of them must be there.
        self.twin = None


class Folder:
    def __init__(self, name):
        self.name = name
        self.messages = []


class Journal:
    """Of one user. lock: held by whoever looks or writes, but not while
    waiting for a server."""

    def __init__(self, user):
        self.user = user
        self.lock = threading.Lock()
        self.folders = {"INBOX": Folder("INBOX")}
        self.subscribed = set()
        # {text: (size, sha256) as it was given to the server}
        self.contents = {}

    def new(self, text, content):
        self.contents[text] = (len(content),
                               hashlib.sha256(content).digest())

    def whole(self, text, body):
        """body is what was given, perhaps with more header in front."""
        size, digest = self.contents[text]
        return len(body) >= size and \
            hashlib.sha256(body[len(body) - size:]).digest() == digest

    def dropped(self, folder):
        """The folder is gone with all that was in it."""
        del self.folders[folder.name]
        for message in folder.messages:
            if message.twin:
                message.twin.twin = None

    # -- the end

    def look(self, node):
        """{folder: {uid: (text, flags, whole)}} as a client of node sees
        it."""
        found = {}
        for name in self.user.mailboxes(node):
            with self.user.imap(node) as session:
                messages = session.messages(name.replace("/",
                                                         node.separator))
            found[name] = rows = {}
            for uid, message in messages.items():
                match = re.search(rb"(?m)^Subject: (\S+)", message.body)
                text = match and match[1].decode()
                rows[uid] = (text, set(message.flags),
                             text in self.contents and
                             self.whole(text, message.body))
        return found

    def judge(self, node):
        """Compare with what is on a node. Returns [(what, sentence)]; what:
        lost, twice, or damaged."""
        verdict = []
        found = self.look(node)

        def say(what, *words):
            verdict.append((what, "%s on %s: %s" % (
                self.user, node.name, " ".join(map(str, words)))))

        for name in self.folders.keys() - found.keys() - {"INBOX"}:
            say("lost", "folder", name)
        for name in found.keys() - self.folders.keys():
            say("twice", "folder", name, "was deleted or renamed")
        there = set()
        for name in found.keys() & self.folders.keys():
            self.judge_folder(name, found[name], there, say)
        if "INBOX" not in found:
            self.judge_folder("INBOX", {}, there, say)
        for folder in self.folders.values():
            for message in folder.messages:
                if message.twin and not {message, message.twin} & there:
                    say("lost", "a message that was being moved:",
                        message.text)
        subscribed = set(self.user.subscriptions(node))
        for name in self.subscribed - subscribed:
            say("lost", "subscription of", name)
        for name in subscribed - self.subscribed:
            say("twice", "subscription of", name, "was cancelled")
        return verdict

    def judge_folder(self, name, rows, there, say):
        """there: gets the messages that are there."""
        rows = dict(rows)

        def take(message):
            """The row of a message."""
            if message.uid is not None:
                row = rows.get(message.uid)
                if row is None or row[0] != message.text:
                    return None
                return message.uid, rows.pop(message.uid)
            for uid, row in rows.items():
                if row[0] == message.text:
                    return uid, rows.pop(uid)
            return None

        # those whose place is known first, and those who may be there last
        for message in sorted(self.folders[name].messages,
                              key=lambda m: (m.maybe, m.uid is None)):
            row = take(message)
            if row is None:
                if not message.maybe:
                    say("lost", name, "uid", message.uid, message.text)
                continue
            there.add(message)
            uid, (_, flags, whole) = row
            if not whole:
                say("damaged", name, "uid", uid, message.text)
            differ = (flags ^ message.flags) - message.unsure
            if message.bare:
                differ = flags - message.flags - message.unsure
            for flag in sorted(differ):
                say("twice" if flag in flags else "lost", name, "uid", uid,
                    message.text, "flag", flag)
        for uid, (text, _, _) in rows.items():
            say("twice", name, "uid", uid, text)
