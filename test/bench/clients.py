"""Mail clients that cost little: raw sockets, no more parsing than needed."""

import contextlib
import re
import socket
import time

PASSWORD = "pw"
TIMEOUT = 120


class Failed(Exception):
    """The server's answer was not the one that was needed."""


class Lines:
    """A connection that is read line by line."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""

    def line(self):
        while True:
            line, found, rest = self.data.partition(b"\r\n")
            if found:
                self.data = rest
                return line
            more = self.sock.recv(65536)
            if not more:
                raise Failed("connection closed")
            self.data += more

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.close()


class Lmtp(Lines):
    def __init__(self, port):
        super().__init__(port)
        self.answer(b"220")
        self.sock.sendall(b"LHLO bench\r\n")
        self.answer(b"250")

    def answer(self, wanted):
        while True:
            line = self.line()
            if line[3:4] != b"-":
                break
        if not line.startswith(wanted):
            raise Failed(line.decode(errors="replace"))

    def deliver(self, user, message):
        """message ends with CRLF and has no line that starts with a dot."""
        self.sock.sendall(b"MAIL FROM:<bench@example.org>\r\n"
                          b"RCPT TO:<%s>\r\nDATA\r\n" % user.encode())
        self.answer(b"250")
        self.answer(b"250")
        self.answer(b"354")
        self.sock.sendall(message + b".\r\n")
        self.answer(b"250")


class Imap(Lines):
    """Responses with literals are not understood: nothing here asks for
    any."""

    def __init__(self, port, user, mailbox=None):
        super().__init__(port)
        self.tag = 0
        self.line()
        self.do(b"LOGIN %s %s" % (user.encode(), PASSWORD.encode()))
        if mailbox:
            self.select(mailbox)

    def send(self, command):
        self.tag += 1
        self.sock.sendall(b"%d %s\r\n" % (self.tag, command))

    def receive(self):
        """The untagged responses to the oldest command not yet answered (its
        number: tags are used in order)."""
        untagged = []
        while True:
            line = self.line()
            if line.startswith(b"* "):
                untagged.append(line)
                continue
            if line.startswith(b"+"):
                continue
            if line.split(b" ", 2)[1:2] != [b"OK"]:
                raise Failed(line.decode(errors="replace"))
            return untagged

    def do(self, command):
        self.send(command)
        return self.receive()

    def pipeline(self, commands):
        for command in commands:
            self.tag += 1
        self.sock.sendall(b"".join(
            b"%d %s\r\n" % (self.tag - len(commands) + n, command)
            for n, command in enumerate(commands, 1)))
        for command in commands:
            self.receive()

    def select(self, mailbox):
        for line in self.do(b"SELECT " + mailbox.encode()):
            if line.endswith(b" EXISTS"):
                self.exists = int(line.split()[1])
        return self.exists

    def append(self, mailbox, *messages):
        self.do(b"APPEND " + mailbox.encode() + b"".join(
            b" {%d+}\r\n%s" % (len(m), m) for m in messages))

    def count(self, mailbox):
        """How many messages a mailbox has; -1 when it does not exist."""
        try:
            line = b" ".join(self.do(b"STATUS %s (MESSAGES)" %
                                     mailbox.encode()))
        except Failed:
            return -1
        return int(re.search(rb"MESSAGES (\d+)", line).group(1))

    def sees(self, wanted):
        """NOOP; whether an untagged response contains wanted."""
        return any(wanted in line for line in self.do(b"NOOP"))

    def wait(self, condition, what, timeout=TIMEOUT, step=0.001):
        """Poll until condition() and return the time at which it was."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise Failed("waited %d s for %s" % (timeout, what))
            time.sleep(step)
        return time.monotonic()


def message(size=1000):
    """A message of size bytes with CRLF line ends."""
    head = (b"From: Ann <ann@example.org>\r\nTo: ben@example.org\r\n"
            b"Date: Mon, 05 Jan 2026 12:00:00 +0000\r\n"
            b"Subject: benchmark\r\n\r\n")
    line = b"x" * 70 + b"\r\n"
    body = line * (max(0, size - len(head)) // len(line))
    rest = max(2, size - len(head) - len(body))
    return head + body + b"y" * (rest - 2) + b"\r\n"
