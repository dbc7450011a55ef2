"""The independent picture of a user's mail on one node.

Taken with "doveadm fetch", "doveadm mailbox status" and IMAP, without any of
dovetail's own tools, and without changing the mailboxes: only mailboxes that
exist are opened, with EXAMINE. differences() compares two pictures."""

import base64
import dataclasses
import hashlib
import json
import re

FETCH_FIELDS = ("mailbox uid guid date.received.unixtime "
                "date.saved.unixtime size.physical pop3.uidl pop3.order")
DBOX = ("sdbox", "mdbox")


@dataclasses.dataclass
class Message:
    """None: not looked at."""
    # IMAP system flags and keywords, without \Recent, which is no flag
    flags: frozenset
    internaldate: str
    modseq: int
    sha256: str = None
    body: bytes = None
    subject: str = None
    guid: str = None
    received: str = None
    saved: str = None
    size: int = None
    pop3_uidl: str = None
    pop3_order: str = None


@dataclasses.dataclass
class Mailbox:
    guid: str
    uidvalidity: int
    uidnext: int
    highestmodseq: int
    # {uid: Message}
    messages: dict = None


@dataclasses.dataclass
class View:
    node: str
    format: str
    # {name with / between its parts: Mailbox}
    mailboxes: dict
    # leaves of the tree that cannot be selected
    noselect: set
    subscriptions: set


def encode_mutf7(name):
    def shift(match):
        if match[0] == "&":
            return "&-"
        text = base64.b64encode(match[0].encode("utf-16-be")).decode()
        return "&%s-" % text.rstrip("=").replace("/", ",")
    return re.sub("&|[^ -~]+", shift, name)


def decode_mutf7(name):
    def unshift(match):
        if not match[1]:
            return "&"
        text = match[1].replace(",", "/")
        return base64.b64decode(text + "=" * (-len(text) % 4)).decode(
            "utf-16-be")
    return re.sub("&([^-]*)-", unshift, name)


def parse_fetch(rows):
    """{uid: Message} from imaplib's FETCH responses, those with FLAGS,
    INTERNALDATE, MODSEQ and perhaps BODY[]."""
    messages = {}
    for row in rows:
        if row == b")":
            continue
        # (text, literal) when there is one, then a row with what follows
        text, body = row if isinstance(row, tuple) else (row, None)
        if b"INTERNALDATE" not in text:
            # not what was asked for: somebody just changed the flags
            continue
        if body is None and b'BODY[] ""' in text:
            body = b""
        flags, = re.search(rb"FLAGS \(([^)]*)\)", text).groups()
        subject = body and re.search(rb"(?im)^Subject: (.*?)\r?$", body)
        messages[int(re.search(rb"UID (\d+)", text)[1])] = Message(
            flags=frozenset(flags.decode().split()) - {"\\Recent"},
            internaldate=re.search(rb'INTERNALDATE "([^"]*)"',
                                   text)[1].decode(),
            modseq=int(re.search(rb"MODSEQ \((\d+)\)", text)[1]),
            sha256=None if body is None else hashlib.sha256(body).hexdigest(),
            body=body, subject=subject[1].decode(errors="replace")
            if subject else None)
    return messages


def list_mailboxes(session, command="LIST"):
    """[(set of attributes, name)] of all namespaces."""
    found = []
    for row in session.do(command, '"" "*"', wanted=command):
        text, name = row if isinstance(row, tuple) else (row, None)
        if not text:
            continue
        attributes, rest = re.fullmatch(
            r'\(([^)]*)\) (?:"(?:\\.|[^"\\])*"|NIL) (.*)',
            text.decode()).groups()
        if name is not None:
            name = name.decode()
        elif rest.startswith('"'):
            name = re.sub(r"\\(.)", r"\1", rest[1:-1])
        else:
            name = rest
        found.append((set(attributes.split()), decode_mutf7(name)))
    return found


def doveadm_rows(node, *args):
    """What doveadm prints. It complains about a Maildir++ folder that is
    listed only because it has children."""
    done = node.doveadm("-f", "json", *args, check=False)
    errors = [line for line in done.stderr.decode().splitlines()
              if "Mailbox doesn't exist" not in line and
              " Warning: " not in line]
    if done.returncode not in (0, 68) or errors:
        raise RuntimeError("doveadm %s on %s: exit %d: %s" % (
            " ".join(map(str, args)), node.name, done.returncode, errors))
    return json.loads(done.stdout or b"[]")


def status(node, user):
    """{name: Mailbox without messages, but their number} of all mailboxes
    that exist. Asks the least that can tell that something is missing."""
    # the second mask is for namespaces with a prefix
    rows = doveadm_rows(node, "mailbox", "status", "-u", user,
                        "guid uidvalidity uidnext highestmodseq messages",
                        "*", "*%s*" % node.separator)
    return {row["mailbox"].replace(node.separator, "/"): Mailbox(
        row["guid"], int(row["uidvalidity"]), int(row["uidnext"]),
        int(row["highestmodseq"]), int(row["messages"])) for row in rows}


def view(node, user, bodies=True):
    """Everything that must be equal. bodies: read and hash each message."""
    mailboxes = status(node, user)
    with node.imap(user) as session:
        listed = list_mailboxes(session)
        subscriptions = {name.replace(node.separator, "/")
                         for _, name in list_mailboxes(session, "LSUB")}
        for name, mailbox in mailboxes.items():
            mailbox.messages = session.messages(
                name.replace("/", node.separator), bodies)
            for message in mailbox.messages.values():
                message.body = None
    for row in doveadm_rows(node, "fetch", "-u", user, FETCH_FIELDS, "all"):
        mailbox = mailboxes[row["mailbox"].replace(node.separator, "/")]
        message = mailbox.messages.get(int(row["uid"]))
        if message is None:
            raise RuntimeError("uid %s of %s came while it was looked at" %
                               (row["uid"], row["mailbox"]))
        message.guid = row["guid"]
        message.received = row["date.received.unixtime"]
        message.saved = row["date.saved.unixtime"]
        message.size = int(row["size.physical"])
        message.pop3_uidl = row["pop3.uidl"]
        message.pop3_order = row["pop3.order"]
    noselect = {name.replace(node.separator, "/")
                for attributes, name in listed
                if attributes & {"\\Noselect", "\\NonExistent"} and
                "\\HasChildren" not in attributes}
    return View(node.name, node.format, mailboxes, noselect, subscriptions)


def pop3_listing(node, user):
    """[(UIDL, size)] in the order a POP3 client sees."""
    with node.pop3(user) as session:
        uidls = [line.split(b" ", 1)[1].decode()
                 for line in session.uidl()[1]]
        sizes = [int(line.split()[1]) for line in session.list()[1]]
    return list(zip(uidls, sizes))


def same_guid(a, b, same_format):
    """Maildir's GUIDs are file names, dbox's 128 bits: between these formats
    Dovecot takes a hash (mail_generate_guid_128_hash())."""
    def to_128(guid):
        if re.fullmatch("[0-9a-f]{32}", guid):
            return guid
        return hashlib.sha1(guid.encode()).digest()[-16:].hex()
    return a == b or not same_format and to_128(a) == to_128(b)


def mailbox_pairs(primary, replica):
    """[(name, Mailbox or None, Mailbox or None)] to be compared. An INBOX
    that never had a message may exist on one side only: Maildir's comes with
    the directory of all mailboxes."""
    pairs = [(name, primary.get(name), replica.get(name))
             for name in sorted(primary.keys() | replica.keys())]
    return [(name, a, b) for name, a, b in pairs
            if name != "INBOX" or a and b or (a or b).uidnext > 1]


def status_differences(primary, replica):
    """What already the answers of status() show."""
    def numbers(mailbox):
        return mailbox and (mailbox.guid, mailbox.uidvalidity,
                            mailbox.uidnext, mailbox.messages)
    return ["%r: guid, uidvalidity, uidnext, messages: primary %s, "
            "replica %s" % (name, numbers(a), numbers(b))
            for name, a, b in mailbox_pairs(primary, replica)
            if numbers(a) != numbers(b)]


def differences(primary, replica, ignore=()):
    """Sentences, none when the replica is what it should be. ignore: names
    of fields that the test knows to differ."""
    found = []

    def compare(where, what, a, b, same=None):
        if what not in ignore and not (a == b if same is None else same):
            found.append("%s: %s: primary %s, replica %s" % (where, what, a,
                                                             b))

    dbox = {primary.format in DBOX, replica.format in DBOX}
    compare("user", "subscriptions", sorted(primary.subscriptions),
            sorted(replica.subscriptions))
    if len(dbox) == 1:
        # Maildir++ has no place for such a leaf
        compare("user", "noselect", sorted(primary.noselect),
                sorted(replica.noselect))
    for name, a, b in mailbox_pairs(primary.mailboxes, replica.mailboxes):
        compare(repr(name), "exists", a is not None, b is not None)
        if a is None or b is None:
            continue
        for field in ("guid", "uidvalidity", "uidnext"):
            compare(repr(name), field, getattr(a, field), getattr(b, field))
        compare(repr(name), "highestmodseq", a.highestmodseq, b.highestmodseq,
                b.highestmodseq >= a.highestmodseq)
        compare(repr(name), "uids", *(
            "%s more" % sorted(x.messages.keys() - y.messages.keys())[:20]
            for x, y in ((a, b), (b, a))))
        for uid in sorted(a.messages.keys() & b.messages.keys()):
            m, r = a.messages[uid], b.messages[uid]
            where = "%r uid %d" % (name, uid)
            compare(where, "guid", m.guid, r.guid,
                    same_guid(m.guid, r.guid, len(dbox) == 1))
            compare(where, "flags", sorted(m.flags), sorted(r.flags))
            compare(where, "modseq", m.modseq, r.modseq, r.modseq >= m.modseq)
            for field in ("internaldate", "received", "saved", "size",
                          "sha256", "pop3_uidl", "pop3_order"):
                compare(where, field, getattr(m, field), getattr(r, field))
    return found
