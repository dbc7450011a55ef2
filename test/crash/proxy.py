"""A Redis that does to one command what networks and servers do.

It stands between a node and Redis, on a unix socket of its own, understands as
much of the protocol as it takes to tell commands and answers apart, and counts
the commands that matter. The k-th one gets the fault."""

import collections
import contextlib
import os
import selectors
import socket
import threading
import time

# never answers in time: beyond the nodes' dovetail_ack_timeout
LATE_SECONDS = 1.6

REFUSALS = {
    "oom": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "readonly": b"-READONLY You can't write against a read only replica.\r\n",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
}
# what each fault is; those below hit commands of any name, unless they say
FAULTS = tuple(REFUSALS) + (
    # the connection ends, and the command was not executed
    "lost",
    # ... or it was: nobody knows
    "uncertain",
    # executed, and answered late
    "late",
    # executed at once, and the answer never comes
    "silent",
    # executed twice, as by a proxy that repeats what it has no answer to
    "twice",
    # answered twice
    "echo",
    # XADD: answered as if it were executed; a Redis that then lost it
    "forgotten",
    # XREAD: the entries come in the wrong order, or each of them twice, or
    # without the first of them
    "reordered", "repeated", "holed")
ONLY_FOR = {"forgotten": b"XADD", "reordered": b"XREAD",
            "repeated": b"XREAD", "holed": b"XREAD"}
# not part of what a change needs
IGNORED = (b"PING", b"AUTH", b"SELECT", b"HELLO", b"INFO", b"XINFO", b"CLIENT",
           b"CONFIG")


def parse(data, pos=0):
    """One value of the protocol, from data[pos:]. Returns (value, end): bytes
    for what is no array, None for a null; or None when it is not complete."""
    end = data.find(b"\r\n", pos)
    if end < 0:
        return None
    kind, line = data[pos:pos + 1], data[pos + 1:end]
    pos = end + 2
    if kind == b"$":
        size = int(line)
        if size < 0:
            return None, pos
        if len(data) < pos + size + 2:
            return None
        return bytes(data[pos:pos + size]), pos + size + 2
    if kind in (b"*", b">"):
        if int(line) < 0:
            return None, pos
        values = []
        for _ in range(int(line)):
            found = parse(data, pos)
            if found is None:
                return None
            values.append(found[0])
            pos = found[1]
        return values, pos
    # a simple string, number or error, with its mark
    return Simple(kind + line), pos


class Simple(bytes):
    pass


def encode(value):
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, Simple):
        return value + b"\r\n"
    if isinstance(value, bytes):
        return b"$%d\r\n%s\r\n" % (len(value), value)
    return b"*%d\r\n%s" % (len(value), b"".join(map(encode, value)))


def other_entries(fault, answer):
    """The answer to XREAD, made wrong."""
    if not isinstance(answer, list):
        return answer
    parts = []
    for key, entries in answer:
        if fault == "reordered":
            entries = entries[::-1]
        elif fault == "repeated":
            entries = [entry for entry in entries for _ in range(2)]
        else:
            entries = entries[1:]
        parts.append([key, entries])
    return parts


class Command:
    def __init__(self, raw, words):
        self.raw, self.words = raw, words
        self.name = words[0].upper()
        self.fault = None
        # answers of Redis that belong to it, and bytes it gets instead
        self.answers, self.instead = 1, None


class Connection:
    def __init__(self, proxy, client):
        self.proxy, self.client = proxy, client
        self.server = socket.socket(socket.AF_UNIX)
        self.server.connect(proxy.redis_path)
        self.from_client, self.from_server = bytearray(), bytearray()
        # not answered yet, in order
        self.commands = collections.deque()
        self.silent = False
        # nothing is sent to the client before that
        self.not_before = 0
        self.to_client = bytearray()

    def close(self):
        self.client.close()
        self.server.close()

    def client_input(self):
        data = self.client.recv(262144)
        if not data:
            raise ConnectionError
        self.from_client += data
        while self.from_client:
            found = parse(self.from_client)
            if found is None:
                break
            words, end = found
            command = Command(bytes(self.from_client[:end]), words)
            del self.from_client[:end]
            self.command(command)

    def command(self, command):
        fault = command.fault = self.proxy.fault_of(command)
        if fault == "lost":
            raise ConnectionError
        self.commands.append(command)
        if fault in REFUSALS:
            command.answers, command.instead = 0, REFUSALS[fault]
            self.flush()
            return
        if fault == "forgotten":
            # XADD key [...] id e entry: its id, an explicit one
            words = [w for w in command.words if b"-" in w and
                     w.replace(b"-", b"").isdigit()]
            command.answers = 0
            command.instead = encode(words[0] if words else b"1-1")
            self.flush()
            return
        self.server.sendall(command.raw)
        if fault == "twice":
            self.server.sendall(command.raw)
            command.answers = 2

    def server_input(self):
        data = self.server.recv(262144)
        if not data:
            raise ConnectionError
        self.from_server += data
        self.flush()

    def flush(self):
        """Answer what can be answered."""
        while self.commands:
            command = self.commands[0]
            answers = []
            pos = 0
            while len(answers) < command.answers:
                found = parse(self.from_server, pos)
                if found is None:
                    return
                answers.append((found[0], bytes(self.from_server[pos:found[1]])))
                pos = found[1]
            del self.from_server[:pos]
            self.commands.popleft()
            self.answer(command, answers)

    def answer(self, command, answers):
        fault = command.fault
        if command.instead is not None:
            data = command.instead
        elif fault in ("reordered", "repeated", "holed"):
            data = encode(other_entries(fault, answers[0][0]))
        else:
            data = answers[0][1]
        if fault == "uncertain":
            raise ConnectionError
        if fault == "silent":
            self.silent = True
        if fault == "echo":
            data += data
        if fault == "late":
            self.not_before = time.monotonic() + LATE_SECONDS
        if not self.silent:
            self.to_client += data
        self.send()

    def send(self):
        if self.to_client and time.monotonic() >= self.not_before:
            self.client.sendall(self.to_client)
            self.to_client.clear()


class Proxy:
    """Between one node and Redis."""

    def __init__(self, path, redis_path):
        self.path, self.redis_path = path, redis_path
        self.lock = threading.Lock()
        self.disarm()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        os.chmod(path, 0o777)
        self.listener.listen(64)
        self.ended = False
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return "unix:" + self.path

    def arm(self, fault=None, k=0):
        """Count from now on; the k-th command for which the fault is gets
        it."""
        with self.lock:
            self.fault, self.k = fault, k
            self.names = []
            self.hit = None

    def disarm(self):
        self.arm()

    def fault_of(self, command):
        with self.lock:
            only = ONLY_FOR.get(self.fault)
            if command.name in IGNORED or only and command.name != only:
                return None
            self.names.append(command.name.decode())
            if self.fault and len(self.names) == self.k:
                self.hit = command.name.decode()
                return self.fault
            return None

    def work(self):
        selector = selectors.DefaultSelector()
        selector.register(self.listener, selectors.EVENT_READ)
        connections = set()

        def end(connection):
            for s in (connection.client, connection.server):
                with contextlib.suppress(KeyError, ValueError):
                    selector.unregister(s)
            connection.close()
            connections.discard(connection)

        while not self.ended:
            for key, _ in selector.select(0.05):
                if key.fileobj is self.listener:
                    client = self.listener.accept()[0]
                    try:
                        connection = Connection(self, client)
                    except OSError:
                        client.close()
                        continue
                    connections.add(connection)
                    selector.register(connection.client, selectors.EVENT_READ,
                                      (connection, connection.client_input))
                    selector.register(connection.server, selectors.EVENT_READ,
                                      (connection, connection.server_input))
                    continue
                connection, function = key.data
                if connection not in connections:
                    continue
                try:
                    function()
                except OSError:
                    end(connection)
            for connection in list(connections):
                try:
                    connection.send()
                except OSError:
                    end(connection)
        for connection in list(connections):
            end(connection)
        self.listener.close()

    def close(self):
        self.ended = True
        self.thread.join()
