#!/usr/bin/python3
"""demo.py [--keep]: dovetail at work, told step by step.

Run by build-aux/demo inside build-aux/sandbox. Starts a private Redis and two
private nodes, writes real mail through LMTP and IMAP to one of them, and shows
both. Ends with exit status 1 unless an independent comparison (view.py, which
uses none of dovetail's own tools) finds both sides equal.
"""

import argparse
import atexit
import contextlib
import email.message
import email.utils
import os
import re
import secrets
import signal
import sys
import threading
import time
import unicodedata

import cluster
import lines
import view
from cluster import Refused, literal, quote

# per side of the table; two of them and what is between fit 80 columns
SIDE = 37
LETTERS = {"\\Seen": "S", "\\Answered": "A", "\\Flagged": "F", "\\Draft": "D",
           "\\Deleted": "T"}
NEWS = "Lists/Announce"
OFFICE = "Büro/Ärger & Überstunden"
PLANS = "Σχέδια"
ADDRESS = "%s@example.org"

SIEVE = """require ["fileinto", "imap4flags", "mailbox"];
if header :contains "List-Id" "announce" {
  fileinto :create :flags ["\\\\Flagged", "$Announcement"] "%s";
}
""" % NEWS


class Failed(Exception):
    """Something is not as it should be; str() says what."""


# -- how it is told

def say(text=""):
    print(text, flush=True)


chapters = 0


def chapter(title):
    global chapters
    chapters += 1
    say("\n%d. %s\n" % (chapters, title))


def indented(text, prefix="     "):
    for line in text.rstrip("\n").split("\n"):
        say((prefix + line).rstrip())


def width(text):
    return sum(0 if unicodedata.combining(c) else
               2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


def column(text, size):
    """text in exactly size columns"""
    if width(text) > size:
        while width(text) > size - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (size - width(text))


def duration(secs):
    return "%.1f ms" % (secs * 1000) if secs < 1 else "%.2f s" % secs


def doveadm(node, *args, show=None):
    """Run it and show it as if typed on that node."""
    say("   %s# doveadm %s" % (node.name, show or " ".join(map(str, args))))
    done = node.doveadm(*args, check=False)
    indented((done.stdout + done.stderr).decode(errors="replace"))
    if done.returncode != 0:
        raise Failed("doveadm %s on %s: exit status %d" %
                     (" ".join(map(str, args)), node.name, done.returncode))


# -- what a mail client on b sees

class Watch(threading.Thread):
    """An IMAP session on a replica that is asked again and again, before,
    while and after something is written at the primary, until test() is true
    of what it shows. mailbox None: test(names, subscribed names), else
    test({uid: flags})."""

    def __init__(self, user, mailbox, test):
        super().__init__(daemon=True)
        self.user, self.mailbox, self.test = user, mailbox, test
        self.selected, self.seen_at, self.error = False, None, None
        self.patience = cluster.PATIENCE
        self.session = user.imap(user.replica)
        if mailbox is not None:
            self.messages()

    def messages(self):
        try:
            if self.selected:
                self.session.do("NOOP")
            else:
                self.session.select(self.mailbox, "EXAMINE")
                self.selected = True
        except Refused:
            # not there yet
            return None
        rows = self.session.do("UID FETCH 1:* (UID FLAGS)", wanted="FETCH")
        # what the server tells unasked comes without UID
        found = (re.fullmatch(rb"\d+ \(UID (\d+) FLAGS \(([^)]*)\)\)", row)
                 for row in rows if row)
        return {int(match[1]): set(match[2].decode().split())
                for match in found if match}

    def names(self, command):
        return {name for attributes, name in
                view.list_mailboxes(self.session, command)
                if "\\NonExistent" not in attributes}

    def look(self):
        if self.mailbox is None:
            return self.test(self.names("LIST"), self.names("LSUB"))
        messages = self.messages()
        return messages is not None and self.test(messages)

    def run(self):
        deadline = time.monotonic() + self.patience
        try:
            while not self.look():
                if time.monotonic() > deadline:
                    self.error = "did not arrive within %d s" % self.patience
                    return
            self.seen_at = time.monotonic()
            self.session.logout()
        except (Refused, *cluster.GONE) as e:
            self.error = str(e)


def arrival(watches):
    """When everything was there."""
    for watch in watches:
        watch.join()
        if watch.error:
            raise Failed("%s, %s on %s: %s" % (
                watch.user, watch.mailbox or "the list of folders",
                watch.user.replica.name, watch.error))
    return max(watch.seen_at for watch in watches)


def table_head():
    say("   %-50s %11s %11s" % ("", "took at a", "lag to b"))


def step(text, write, *watches):
    """Do it at the primary and say how long it took to be acknowledged there,
    and from then on, to be shown by b."""
    watches = [Watch(*watch) for watch in watches]
    for watch in watches:
        watch.start()
    began = time.monotonic()
    write()
    acknowledged = time.monotonic()
    lag = max(0.0, arrival(watches) - acknowledged)
    say("   %s %11s %11s" % (column(text, 50), duration(acknowledged - began),
                             duration(lag)))


# -- mail

def message(subject, text="Hello.", attachment=0, **headers):
    mail = email.message.EmailMessage()
    mail["From"] = "Ada <ada@example.net>"
    mail["To"] = ADDRESS % "ann"
    mail["Date"] = email.utils.formatdate()
    mail["Message-ID"] = email.utils.make_msgid(domain="example.net")
    mail["Subject"] = subject
    for name, value in headers.items():
        mail[name.replace("_", "-")] = value
    mail.set_content(text)
    if attachment:
        mail.add_attachment(os.urandom(attachment), maintype="image",
                            subtype="jpeg", filename="holiday.jpg")
    return mail.as_bytes().replace(b"\n", b"\r\n")


def must_accept(answers):
    for user, (code, text) in answers.items():
        if code != 250:
            raise Failed("LMTP for %s: %d %s" % (user, code, text))


# -- the story

def set_up(nodes):
    a, b = nodes.a, nodes.b
    chapter("Two Dovecot nodes and a Redis, all private")
    say("   All of it lives in %s:" % nodes.dir)
    nodes.redis.start()
    say("   Redis      port %d, persistent (appendonly), ACL user \"%s\"" %
        (nodes.redis.port, nodes.redis.username))
    for node, what in ((a, "primary: takes all writes"), (b, "replica")):
        say("   node \"%s\"   IMAP port %d, LMTP port %d, mail in %s; %s" % (
            node.name, node.imap_port, node.lmtp_port, node.format, what))
    say("\n   dovetail's settings on a (on b, node and peers are exchanged):")
    indented("\n".join(
        line.strip() for line in open(a.conf) if
        re.match(r"\s*dovetail_\w+ =", line)))

    chapter("Each node gets a key, and learns the other's public one")
    for node in (a, b):
        doveadm(node, "dovetail", "keygen")
        path = os.path.join(node.key_dir, "redis.password")
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as f:
            f.write(nodes.redis.password + "\n")
    for node, other in ((b, a), (a, b)):
        say("   copied a line: %s.pub of %s -> dovetail_key_dir of %s" %
            (other.name, other.name, node.name))
        node.trust(other)
    say("   The password for Redis stands in redis.password beside the keys.")
    say()
    doveadm(a, "dovetail", "peers")
    for node in (a, b):
        node.start()
    say("\n   Both nodes are started.")


def wait_connected(nodes):
    """Replication goes both ways: what is slow now is not the start."""
    for node in (nodes.a, nodes.b):
        def connected():
            rows = view.doveadm_rows(node, "dovetail", "status")
            return all(row["connection"] == "ok" for row in rows)
        cluster.wait_for(connected, "node %s to see the other" % node.name)


def deliver(nodes, ann, ben, carl):
    chapter("Mail is delivered to a by LMTP")
    ann.write(os.path.join(nodes.a.home(ann), ".dovecot.sieve"),
              SIEVE.encode())
    must_accept(nodes.a.lmtp([ann, ben, carl], message("Welcome")))
    for user in (ann, ben, carl):
        user.wait_equal(bodies=False)
    say("   dovetail_ack = queued: a says OK when Redis has it. Lag: from "
        "that OK until an\n   open IMAP session on b shows it. Each of them "
        "has got a first mail already.\n")
    table_head()

    def count(n):
        return lambda messages: len(messages) >= n
    step("to ann: plain text", lambda: ann.lmtp(message("Lunch on Friday?")),
         (ann, "INBOX", count(2)))
    # random bytes in base64 grow by a third
    big = message("Holiday pictures", attachment=5 * 1000 * 1000 * 3 // 4)
    step("to ann: with an attachment, %.1f MB" % (len(big) / 1e6),
         lambda: ann.lmtp(big), (ann, "INBOX", count(3)))
    step("to ann, ben and carl at once",
         lambda: must_accept(nodes.a.lmtp([ann, ben, carl], message(
             "Meeting at ten"))),
         (ann, "INBOX", count(4)), (ben, "INBOX", count(2)),
         (carl, "INBOX", count(2)))
    step("to ann: Sieve files it into a new folder, flagged",
         lambda: ann.lmtp(message("Release 2.0", List_Id="<announce>")),
         (ann, NEWS, lambda m: any("\\Flagged" in f for f in m.values())))
    must_accept(nodes.a.lmtp([ann], message("Tomorrow's agenda")))
    must_accept(nodes.a.lmtp([ann], message("Junk")))
    must_accept(nodes.a.lmtp([ben], message("Only for ben")))


def folders(ann):
    chapter("ann's mail client on a makes folders")
    table_head()
    with ann.imap() as session:
        def do(command, *names):
            return lambda: session.do(command, *map(quote, names))
        step("CREATE %s" % OFFICE, do("CREATE", OFFICE),
             (ann, None, lambda names, _: OFFICE in names))
        step("SUBSCRIBE %s" % OFFICE, do("SUBSCRIBE", OFFICE),
             (ann, None, lambda _, subscribed: OFFICE in subscribed))
        step("CREATE Plans/2026", do("CREATE", "Plans/2026"),
             (ann, None, lambda names, _: "Plans/2026" in names))
        step("RENAME Plans %s (its child comes along)" % PLANS,
             do("RENAME", "Plans", PLANS),
             (ann, None, lambda names, _: PLANS + "/2026" in names and
              "Plans/2026" not in names))
        step("CREATE Mistake", do("CREATE", "Mistake"),
             (ann, None, lambda names, _: "Mistake" in names))
        step("DELETE Mistake", do("DELETE", "Mistake"),
             (ann, None, lambda names, _: "Mistake" not in names))


def imap_changes(ann):
    chapter("ann's mail client on a changes mail")
    table_head()
    with ann.imap() as session:
        session.select("INBOX")

        def do(command, *names):
            return lambda: session.do(command, *map(quote, names))
        step("STORE 1 +FLAGS (\\Seen \\Answered)",
             do("UID STORE 1 +FLAGS (\\Seen \\Answered)"),
             (ann, "INBOX", lambda m: {"\\Seen", "\\Answered"} <=
              m.get(1, set())))
        step("STORE 2 +FLAGS ($Important)",
             do("UID STORE 2 +FLAGS ($Important)"),
             (ann, "INBOX", lambda m: "$Important" in m.get(2, ())))
        step("APPEND to %s, a draft" % PLANS, lambda: session.append(
            PLANS + "/2026", message("My plans"), flags="\\Draft \\Seen"),
            (ann, PLANS + "/2026", lambda m: len(m) == 1))
        step("COPY the 5 MB message to %s" % OFFICE,
             do("UID COPY 3", OFFICE), (ann, OFFICE, lambda m: len(m) == 1))
        step("MOVE a message to %s" % OFFICE,
             do("UID MOVE 4", OFFICE), (ann, OFFICE, lambda m: len(m) == 2),
             (ann, "INBOX", lambda m: 4 not in m))
        step("EXPUNGE what is marked \\Deleted",
             lambda: (session.do("UID STORE 6 +FLAGS.SILENT (\\Deleted)"),
                      session.do("EXPUNGE")),
             (ann, "INBOX", lambda m: 6 not in m))


def listing(node, user):
    """{folder: [(uid, letters and keywords, subject)]}"""
    folders = {name: [] for name in view.status(node, user)}
    for row in view.doveadm_rows(node, "fetch", "-u", user,
                                 "mailbox uid flags hdr.subject", "all"):
        flags = set(row["flags"].split()) - {"\\Recent"}
        words = sorted(f for f in flags if f not in LETTERS)
        letters = "".join(letter for flag, letter in LETTERS.items()
                          if flag in flags)
        folders[row["mailbox"].replace(node.separator, "/")].append(
            (int(row["uid"]), " ".join(([letters] if letters else []) + words),
             row["hdr.subject"]))
    return folders


def side(row):
    if row is None:
        return " " * SIDE
    return "%3d %s %s" % (row[0], column(row[1] or "-", 14),
                          column(row[2], SIDE - 19))


def show_both(nodes, users):
    chapter("Both sides next to each other")
    say("   UID, flags (S seen, A answered, F flagged, D draft; keywords), "
        "subject\n")
    for user in users:
        left, right = (listing(node, user) for node in (nodes.a, nodes.b))
        say("   %s │ %s" % (column("%s at a" % user, SIDE),
                            "%s at b" % user))
        say("   " + "─" * (SIDE + 1) + "┼" + "─" * (SIDE + 1))
        for name in sorted(left.keys() | right.keys()):
            say("   %s │ %s" % tuple(
                column(name if name in there else "(no such folder)", SIDE)
                for there in (left, right)))
            rows = [{row[0]: row for row in there.get(name, ())}
                    for there in (left, right)]
            for uid in sorted(rows[0].keys() | rows[1].keys()):
                say("   %s │ %s" % (side(rows[0].get(uid)),
                                    side(rows[1].get(uid)).rstrip()))
        say()


def refused_writes(nodes, ann):
    chapter("b holds replicas: it lets read, and refuses to write")
    with ann.imap(nodes.b) as session:
        session.select("INBOX")
        subject = session.do("UID FETCH 2 BODY.PEEK[HEADER.FIELDS (SUBJECT)]",
                             wanted="FETCH")
        say("   ann reads message 2 on b:  %s" %
            subject[0][1].decode().strip())
        for words, args in (("UID STORE 2 +FLAGS (\\Flagged)", ()),
                            ("APPEND INBOX ...",
                             ("INBOX", literal(message("Not here"))))):
            try:
                session.do(words if not args else "APPEND", *args)
            except Refused as refused:
                say("   ann: %s" % words)
                indented(str(refused), "     b: ")
            else:
                raise Failed("b accepted a write: %s" % words)
    (code, text), = nodes.b.lmtp([ann], message("Wrong server")).values()
    say("   The MTA delivers to b by LMTP: it keeps the mail in its queue.")
    indented("%d %s" % (code, text), "     b: ")
    if code != 451:
        raise Failed("b did not refuse the delivery")


def without_redis(nodes, ann):
    chapter("Redis fails, and mail goes on")
    nodes.redis.stop()
    say("   Redis is stopped.")
    began = time.monotonic()
    ann.lmtp(message("Sent while Redis was away"))
    say("   A mail for ann is delivered to a: accepted, after %s." %
        duration(time.monotonic() - began))
    began = time.monotonic()
    with ann.imap() as session:
        session.select("INBOX")
        session.do("UID STORE 2 +FLAGS (\\Flagged)")
    say("   ann flags a message at a: done, with login after %s." %
        duration(time.monotonic() - began))
    doveadm(nodes.a, "dovetail", "status")
    watches = [Watch(ann, "INBOX", lambda m: 7 in m and
                     "\\Flagged" in m.get(2, ()))]
    if watches[0].look():
        raise Failed("it arrived without Redis")
    nodes.redis.start()
    began = time.monotonic()
    for watch in watches:
        watch.start()
    say("   Redis is started again. Both arrived at b %s later." %
        duration(arrival(watches) - began))


def show_status(nodes, ann):
    chapter("What the administrator sees")
    for node in (nodes.a, nodes.b):
        # what the outage left in the numbers goes within a few seconds
        cluster.wait_for(lambda: all(
            row["connection"] == "ok" and row.get("dirty_users", "0") in "0-"
            for row in view.doveadm_rows(node, "dovetail", "status")),
            "node %s to be at rest" % node.name)
        doveadm(node, "dovetail", "status")
        say()
    for node in (nodes.a, nodes.b):
        doveadm(node, "dovetail", "status", "-u", ann)
        say()


def compare(nodes, users):
    """Everything: names, GUIDs, UIDs, flags, dates, sizes, hashes of the
    bodies, subscriptions. Returns TRUE if all is equal."""
    chapter("An independent comparison, by IMAP and \"doveadm fetch\"")
    n_folders = n_messages = 0
    equal = True
    for user in users:
        try:
            user.wait_equal()
        except AssertionError as e:
            say("   %s" % e)
            equal = False
            continue
        seen = view.view(nodes.b, user)
        messages = sum(len(m.messages) for m in seen.mailboxes.values())
        say("   %-5s %d folders, %d messages, %d subscriptions" % (
            user, len(seen.mailboxes), messages, len(seen.subscriptions)))
        n_folders += len(seen.mailboxes)
        n_messages += messages
    if equal:
        say("   Compared: folder names, GUIDs, UIDVALIDITY, UIDNEXT, "
            "subscriptions; of each\n   message UID, GUID, flags, keywords, "
            "dates, POP3 UIDL, size, SHA-256 of its bytes.\n")
        say("both sides are equal: %d folders, %d messages" %
            (n_folders, n_messages))
    else:
        say("\nboth sides are NOT equal")
    return equal


def how_to_look(nodes):
    pid = nodes.a.process.pid
    a, b = nodes.a, nodes.b
    say("""
The nodes are left running. Dovecot finds dovetail only in its own mount
namespace: enter it (as root), and look around from there:

  nsenter -t {pid} -m bash
    doveadm -c {a.conf} dovetail status
    doveadm -c {b.conf} dovetail status
    doveadm -c {b.conf} dovetail status -u ann
    doveadm -c {b.conf} fetch -u ann 'mailbox uid flags hdr.subject' all
    printf 'Subject: again\\n\\nHello\\n' | doveadm -c {a.conf} save -u ann
    exit

IMAP needs no namespace. Users are ann, ben and carl, the password is "{pw}":

  curl -u ann:{pw} imap://127.0.0.1:{a.imap_port}/ -X 'STATUS INBOX (MESSAGES UIDNEXT)'
  curl -u ann:{pw} imap://127.0.0.1:{b.imap_port}/ -X 'STATUS INBOX (MESSAGES UIDNEXT)'
  curl -u ann:{pw} 'imap://127.0.0.1:{b.imap_port}/INBOX;UID=1'

Redis:

  redis-cli -p {redis.port} --user {redis.username} -a "$(cat {a.key_dir}/redis.password)" keys '*'

Logs are {a.log} and {b.log}.
To stop all of it and to remove its files:

  kill {pid} {b.process.pid} {redis.process.pid}; sleep 2; rm -r {dir}
""".format(pid=pid, a=a, b=b, redis=nodes.redis, dir=nodes.dir,
           pw=cluster.PASSWORD).rstrip())


class Nodes(cluster.Cluster):
    """Without keys: making them is part of the story."""

    def exchange_keys(self):
        pass


def end(nodes):
    for node in nodes.nodes:
        with contextlib.suppress(AssertionError):
            if node.process is not None:
                node.stop()
    nodes.close()


def stop_signal(number, frame):
    sys.exit(128 + number)


def main():
    parser = argparse.ArgumentParser(prog="demo", description=(
        "Show dovetail at work, with servers of its own."))
    parser.add_argument("--keep", action="store_true", help=(
        "leave the nodes running, and say how to look around and how to "
        "stop them"))
    options = parser.parse_args()
    if not os.environ.get("DOVETAIL_SANDBOX"):
        parser.error("run build-aux/demo, or in build-aux/sandbox")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_signal)
    sys.stdout.reconfigure(errors="replace")
    # three threads take turns, and what they do is short
    sys.setswitchinterval(0.0002)
    # ours are called by name, and need no others
    cluster.USERS = 0

    version = lines.of_node(0).version
    say("dovetail: what is written on one Dovecot node (%s) stands on the "
        "other" % version)
    nodes = Nodes(["sdbox", "mdbox"], start=False, redis={
        "tcp": True, "username": "dovetail",
        "password": secrets.token_urlsafe(18)})
    users = [nodes.user(name=name) for name in ("ann", "ben", "carl")]
    keep = equal = failed = False
    try:
        set_up(nodes)
        wait_connected(nodes)
        deliver(nodes, *users)
        folders(users[0])
        imap_changes(users[0])
        show_both(nodes, users)
        refused_writes(nodes, users[0])
        without_redis(nodes, users[0])
        show_status(nodes, users[0])
        equal = compare(nodes, users)
        keep = options.keep
        if keep:
            how_to_look(nodes)
        failed = not equal
    except (Failed, Refused, AssertionError, RuntimeError,
            *cluster.GONE) as e:
        say("\nFAILED: %s" % e)
        failed = True
    except KeyboardInterrupt:
        say("\nInterrupted.")
        keep = equal = False
    finally:
        if failed:
            for node in nodes.nodes:
                say("\nThe last lines of the log of %s:" % node.name)
                indented("\n".join(node.log_text().splitlines()[-25:]))
        if keep:
            atexit.unregister(nodes.close)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            end(nodes)
    if not keep:
        say("Nothing is left running." if not options.keep else
            "\nNothing is left running, in spite of --keep.")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
