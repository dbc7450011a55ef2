"""Private Redis and Dovecot servers for the integration tests.

A Cluster is one Redis and any number of Dovecot nodes, each with directories,
ports, users and keys of its own below one temporary directory; nothing that
the machine already runs is touched, and every process is ended by its pid.

    with Cluster(["sdbox", "maildir"]) as cluster:
        user = cluster.user()
        with user.imap() as session:
            session.append("INBOX", mail("hello"))
        user.wait_equal()

DOVETAIL_TEST_KEEP=1 keeps the directory for a look afterwards.
DOVETAIL_TEST_LINES chooses the nodes' Dovecot releases (lines.py).
DOVETAIL_TEST_PLAIN tests the tests, without dovetail: with "same" a single
node is its own replica, so they must pass; with "apart" the nodes know nothing
of each other, so they must fail.
"""

import atexit
import collections
import contextlib
import ctypes
import email.utils
import imaplib
import os
import poplib
import pwd
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
import threading
import time

import lines
import view

# owns all virtual users' mail
MAIL_USER = os.environ.get("DOVETAIL_TEST_MAIL_USER", "nobody")
PASSWORD = "pw"
# prepared in each cluster
USERS = 120
PLAIN = os.environ.get("DOVETAIL_TEST_PLAIN")
# a sanitizer needs all the addresses there are
VSZ_LIMIT = "0" if any(name.endswith("SAN_OPTIONS") for name in os.environ) \
    else "1G"
# how long a replica may take on a busy machine before a test calls it broken
PATIENCE = float(os.environ.get("DOVETAIL_TEST_PATIENCE", "20"))

# what a mail client or MTA gets when the server goes away under it
GONE = (OSError, EOFError, imaplib.IMAP4.abort, smtplib.SMTPException,
        poplib.error_proto)

# Clusters whose logs no test has judged yet (conftest.py does)
live = []


def wait_for(condition, what, timeout=PATIENCE, step=0.02):
    """Poll until condition() is true and return its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("waited %.0f s for %s" % (timeout, what))
        time.sleep(step)


def accepts(address):
    """A server listens at a (host, port) or at a unix socket's path."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as s:
        s.settimeout(5)
        return s.connect_ex(address) == 0


_ports = set()


def free_port():
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port not in _ports:
            _ports.add(port)
            return port


def mail(text, size=0, subject=None):
    """A small message with CRLF line ends, padded to at least size bytes."""
    head = ("From: Ann <ann@example.org>\r\nTo: ben@example.org\r\n"
            "Date: %s\r\nMessage-ID: %s\r\nSubject: %s\r\n\r\n%s\r\n" % (
                email.utils.formatdate(),
                email.utils.make_msgid(domain="localhost"),
                subject or text, text)).encode()
    line = b"x" * 76 + b"\r\n"
    return head + line * max(0, (size - len(head) + len(line) - 1) // len(line))


def stat_fields(pid):
    """/proc/PID/stat after the name: state, parent, group, session, ..."""
    with open("/proc/%d/stat" % pid) as f:
        return f.read().rpartition(")")[2].split()


def children(pid):
    """Pids of the direct children of pid."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if int(stat_fields(int(entry))[1]) == pid:
                    found.append(int(entry))
    return found


def session_pids(leader):
    """The living processes of a session. Those of a server stay in its session
    when it is gone itself. (A dead one that nobody has asked for, a zombie, has
    closed its files, unlike one that only lost its executable.)"""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = stat_fields(int(entry))
            if fields[0] not in "ZX" and int(fields[3]) == leader:
                found.append(int(entry))
    return found


def executable(pid):
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink("/proc/%d/exe" % pid))
    return ""


def age(pid):
    """Seconds since a process was started, 0 when it is gone."""
    with contextlib.suppress(OSError):
        ticks = int(stat_fields(pid)[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - \
            ticks / os.sysconf("SC_CLK_TCK")
    return 0


def send(number, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


_libc = ctypes.CDLL(None)


def end_with_parent():
    """A server does not outlive a test run that is killed."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Daemon:
    """A server that runs as a child of this process."""

    def __init__(self):
        self.process = None

    def spawn(self, argv, ready, output):
        assert not self.running()
        env = {k: v for k, v in os.environ.items()
               if k in ("PATH", "TZ") or k.endswith("SAN_OPTIONS")}
        with open(output, "ab") as out:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=env, start_new_session=True, preexec_fn=end_with_parent)

        def up():
            if self.process.poll() is not None:
                with open(output, errors="replace") as f:
                    raise AssertionError("%s does not start: %s" %
                                         (argv[0], f.read()[-2000:]))
            return ready()
        wait_for(up, "%s to start" % argv[0])

    def running(self):
        return self.process is not None and self.process.poll() is None

    def signal(self, number):
        self.process.send_signal(number)

    def end(self, number):
        if self.running():
            self.signal(number)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError("%s ignored signal %d" %
                                     (self.process.args[0], number))


class Redis(Daemon):
    """A private redis-server that keeps what it acknowledged (AOF).

    tcp: reached over loopback, else over a unix socket. tls: over loopback,
    with Redis' tls-... settings of this dict. The rest is how dovetail shall
    reach it: ACL user, password, database, key prefix."""

    def __init__(self, directory, tcp=False, username=None, password=None,
                 db=0, prefix=None, tls=None):
        super().__init__()
        self.dir = directory
        self.tcp, self.username, self.password = tcp, username, password
        self.db, self.prefix = db, prefix or "dovetail:"
        self.port = free_port() if tcp or tls else 0
        self.socket = os.path.join(directory, "s")
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, 0o755)
        query = {"prefix": prefix}
        if tcp or tls:
            self.url = "%s://%slocalhost:%d/%d" % (
                "rediss" if tls else "redis",
                username + "@" if username else "", self.port, db)
        else:
            self.url = "unix:" + self.socket
            query.update(user=username, db=db or None)
        query = "&".join("%s=%s" % kv for kv in query.items() if kv[1])
        if query:
            self.url += "?" + query
        conf = ["port %d" % (0 if tls else self.port), "bind 127.0.0.1",
                "dir " + directory,
                "unixsocket " + self.socket, "unixsocketperm 777",
                "appendonly yes", 'save ""', "daemonize no",
                "logfile " + os.path.join(directory, "log")]
        if tls:
            conf += ["tls-port %d" % self.port] + [
                "tls-%s %s" % option for option in tls.items()]
        if username:
            conf += ["user default off",
                     "user %s on >%s ~%s* +@all" % (username, password,
                                                    self.prefix)]
        elif password:
            conf += ['requirepass "%s"' % password]
        self.conf = os.path.join(directory, "conf")
        with open(self.conf, "w") as f:
            f.write("\n".join(conf) + "\n")

    def start(self):
        self.spawn(["redis-server", self.conf],
                   lambda: "LOADING" not in self.cli("ping", check=False) and
                   accepts(self.socket), os.path.join(self.dir, "out"))

    def stop(self):
        self.end(signal.SIGTERM)

    def kill(self):
        self.end(signal.SIGKILL)

    def wipe(self):
        """Forget everything, as a Redis without persistence would."""
        assert not self.running()
        shutil.rmtree(os.path.join(self.dir, "appendonlydir"), True)

    def pause(self):
        self.signal(signal.SIGSTOP)

    def resume(self):
        self.signal(signal.SIGCONT)

    def close(self):
        if self.running():
            self.resume()
            self.kill()

    def cli(self, *args, check=True):
        argv = ["redis-cli", "-s", self.socket, "-n", str(self.db)]
        if self.password:
            argv += ["--no-auth-warning", "-a", self.password]
        if self.username:
            argv += ["--user", self.username]
        done = subprocess.run(argv + list(args), capture_output=True,
                              text=True, errors="replace")
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    def keys(self):
        return self.cli("keys", "*").split()

    def entries(self, origin):
        """How many entries stand in the log streams of a node."""
        return sum(int(self.cli("xlen", key)) for key in self.keys()
                   if key.startswith("%slog:%s:" % (self.prefix, origin)))


class Refused(Exception):
    """An IMAP command was answered with NO or BAD; str() is its text."""


class Imap(imaplib.IMAP4):
    """imaplib with a plain way to send any command: do()."""

    def __init__(self, port, user, timeout=60):
        super().__init__("127.0.0.1", port, timeout)
        try:
            self.login(user, PASSWORD)
        except BaseException:
            self.shutdown()
            raise
        # do() leaves it to the server what is allowed when
        self.state = "SELECTED"

    def __exit__(self, *exc):
        # the server may have been killed meanwhile
        with contextlib.suppress(*GONE):
            self.logout()

    def do(self, command, *args, wanted=None):
        """Send a command; str and bytes arguments go as they are (see
        quote() and literal()). Returns its untagged responses of the type
        wanted, or the text after OK."""
        self.untagged_responses = {}
        word, _, rest = command.partition(" ")
        args = [a.encode() if isinstance(a, str) else a
                for a in ((rest,) if rest else ()) + args]
        status, text = self.xatom(word, *args)
        if status != "OK":
            raise Refused("%s %s" % (status, text[0].decode()))
        if wanted:
            return self.untagged_responses.get(wanted, [])
        return text[0].decode()

    def select(self, mailbox="INBOX", how="SELECT"):
        self.do(how, quote(mailbox))

    def append(self, mailbox, *messages, flags="", date="", binary=False):
        """One APPEND, a MULTIAPPEND when there are several messages."""
        parts = [quote(mailbox)]
        for message in messages:
            parts += ["(%s)" % flags if flags else "",
                      '"%s"' % date if date else "",
                      (b"~" if binary else b"") + literal(message)]
        return self.do("APPEND", *(p for p in parts if p))

    def messages(self, mailbox, body=True, sequence="1:*"):
        """{uid: Message} of one mailbox, without changing anything. In
        flags \\Recent is left out."""
        self.do("EXAMINE", quote(mailbox))
        rows = self.do("UID FETCH %s (UID FLAGS INTERNALDATE MODSEQ%s)" % (
            sequence, " BODY.PEEK[]" if body else ""), wanted="FETCH")
        return view.parse_fetch(rows)


def quote(mailbox):
    name = view.encode_mutf7(mailbox)
    return '"%s"' % name.replace("\\", "\\\\").replace('"', '\\"')


def literal(data):
    return b"{%d+}\r\n%s" % (len(data), data)


class Node(Daemon):
    """One Dovecot installation. settings: dovetail's, over the defaults; conf:
    more configuration, or a function that gets the node's Line and returns
    it."""

    def __init__(self, name, cluster, mail_format="sdbox", settings=(),
                 plugin=True, separator="/", namespaces=(), replay_user=None,
                 replay_workers=4, conf="", line=None):
        super().__init__()
        self.line = line or lines.of_node(len(cluster.nodes))
        self.name, self.cluster, self.format = name, cluster, mail_format
        self.settings, self.plugin = dict(settings), plugin
        self.separator = separator
        self.extra_conf = conf(self.line) if callable(conf) else conf
        # (prefix without separator, format): more private namespaces
        self.namespaces = namespaces
        self.replay_user = replay_user or MAIL_USER
        self.replay_workers = replay_workers
        self.dir = os.path.join(cluster.dir, name)
        self.conf = os.path.join(self.dir, "dovecot.conf")
        self.log = os.path.join(self.dir, "log")
        self.passwd = os.path.join(self.dir, "users")
        self.key_dir = os.path.join(self.dir, "keys")
        self.state_dir = os.path.join(self.dir, "state")
        self.imap_port, self.pop3_port, self.lmtp_port, self.sieve_port = (
            free_port() for _ in range(4))
        self.log_offset = 0
        self.killed = []
        self.final_log = None
        for sub in ("", "mail", "state"):
            os.makedirs(os.path.join(self.dir, sub))
            os.chmod(os.path.join(self.dir, sub), 0o755)
        for path in (self.log, self.passwd):
            open(path, "w").close()
        os.chmod(self.passwd, 0o644)

    # -- configuration

    def write_conf(self):
        peers = [n.name for n in self.cluster.nodes if n is not self]
        settings = {"dovetail_node": self.name,
                    "dovetail_peers": " ".join(peers),
                    "dovetail_primary": self.cluster.nodes[0].name,
                    "dovetail_redis": self.cluster.redis.url
                    if self.cluster.redis else "",
                    "dovetail_key_dir": self.key_dir,
                    "dovetail_state_dir": os.path.join(self.state_dir,
                                                       "dovetail"),
                    "dovetail_ack": "queued"}
        settings.update(self.settings)
        spaces = [("inbox", "", self.format, "mail")]
        spaces += [(prefix.lower(), prefix + self.separator, mail_format,
                    prefix.lower()) for prefix, mail_format in self.namespaces]
        text = self.line.configuration(
            self, base_dir=os.path.join(self.dir, "run"), mail=MAIL_USER,
            plugins="dovetail" if self.plugin else "",
            settings=self.line.settings(settings) if self.plugin else "",
            namespaces="".join(self.line.namespace(
                name, prefix, self.separator, mail_format, directory)
                for name, prefix, mail_format, directory in spaces))
        if self.plugin:
            text += self.line.services(self, mail=MAIL_USER, queue_mode="0600"
                                       if self.replay_user == MAIL_USER
                                       else "0666")
        # complete or not at all
        with open(self.conf + ".new", "w") as f:
            f.write(text.replace("default_vsz_limit = 1G",
                                 "default_vsz_limit = " + VSZ_LIMIT) +
                    self.extra_conf)
        os.rename(self.conf + ".new", self.conf)

    def keygen(self):
        self.doveadm("dovetail", "keygen")
        password = self.cluster.redis.password
        if password:
            path = os.path.join(self.key_dir, "redis.password")
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600),
                      "w") as f:
                f.write(password + "\n")

    def trust(self, other):
        name = other.name + ".pub"
        shutil.copy(os.path.join(other.key_dir, name),
                    os.path.join(self.key_dir, name))

    def add_user(self, name, uid, gid, **fields):
        home = self.home(name)
        os.makedirs(home)
        os.chown(home, uid, gid)
        extra = " ".join("userdb_%s=%s" % kv for kv in fields.items())
        line = "%s:{PLAIN}%s:%d:%d::%s::%s\n" % (name, PASSWORD, uid, gid,
                                                 home, extra)
        with open(self.passwd, "a") as f:
            f.write(line)

    def home(self, user):
        return os.path.join(self.dir, "mail", str(user))

    # -- running

    def start(self):
        self.write_conf()
        self.spawn(self.line.command("dovecot", "-F", "-c", self.conf),
                   self.greets, os.path.join(self.dir, "out"))

    def greets(self):
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.imap_port),
                                          timeout=1) as s:
                return s.recv(4) == b"* OK"
        return False

    def stop(self):
        """Until the last process is gone, as an init system does it. Dovecot's
        master does not wait for all: an imap process goes on as long as its
        client has commands, and one that waits for the disk just then keeps
        the listeners, and a start finds "Socket already exists". auth, when it
        is to list users, tries for 30 s to reach a worker of its own, which
        nobody starts any more."""
        self.end(signal.SIGTERM)
        send(signal.SIGTERM, self.pids())
        try:
            wait_for(lambda: not self.pids(), "processes to end",
                     max(PATIENCE, 45))
        except AssertionError:
            self.kill_all()
            raise

    def reload(self):
        self.write_conf()
        self.doveadm("reload")

    def kill(self):
        """As a machine that loses power: no process gets a last word."""
        # the master first, which would start others
        os.kill(self.process.pid, signal.SIGSTOP)
        wait_for(lambda: stat_fields(self.process.pid)[0] in "TZ",
                 "the master to stand still")
        send(signal.SIGSTOP, self.pids())
        self.kill_all()

    def kill_all(self):
        send(signal.SIGKILL, session_pids(self.process.pid))
        self.process.wait()
        wait_for(lambda: not self.pids(), "killed processes to end")

    def restart(self):
        self.stop()
        self.start()

    def close(self):
        if self.running():
            try:
                self.stop()
            finally:
                if self.running():
                    self.kill()
        with open(self.log, errors="replace") as f:
            self.final_log = f.read()

    def pids(self, service=None):
        """Processes of a service (by executable), all when None; without the
        master."""
        return [pid for pid in session_pids(self.process.pid)
                if pid != self.process.pid and
                service in (None, executable(pid))]

    def settled(self, service):
        """Processes of a service that Dovecot's master has heard of and that
        live for some time. If others die it takes the service for broken, and
        starts the next one only after 2, 4, ... 60 s."""
        rows = self.doveadm("-f", "tab", "process", "status", service)
        lines = [line.split("\t") for line in rows.splitlines()]
        heard = {int(row["pid"]) for row in
                 (dict(zip(lines[0], line)) for line in lines[1:])
                 if row["last_status_update"] != "0"}
        return [pid for pid in heard & set(self.pids(service))
                if age(pid) > 0.5]

    def kill_service(self, service, wait=True):
        """kill -9 all settled processes of a service; returns their number.
        wait: there must be some."""
        pids = wait_for(lambda: self.settled(service),
                        "a process of %s" % service) \
            if wait else self.settled(service)
        send(signal.SIGKILL, pids)
        self.killed += pids
        return len(pids)

    def wait_killed(self):
        """Until the log says of which processes kill_service() was the end, so
        that the next test does not find it there. One that had ended by itself
        is not named."""
        ends = time.monotonic() + 5
        while self.running() and self.killed and time.monotonic() < ends:
            named = re.findall(r"child (\d+) killed with signal 9",
                               self.log_text())
            self.killed = [pid for pid in self.killed if str(pid) not in named]
            time.sleep(0.02 if self.killed else 0)
        self.killed = []

    @contextlib.contextmanager
    def paused(self, service):
        """The processes of a service stand still meanwhile."""
        pids = wait_for(lambda: self.pids(service), service)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def log_text(self):
        if self.final_log is not None:
            return self.final_log
        with open(self.log, errors="replace") as f:
            return f.read()

    def wait_log(self, regex, timeout=PATIENCE):
        """Wait for a line that was logged since the test began."""
        return wait_for(lambda: re.search(
            regex, self.log_text()[self.log_offset:]),
            "%r in the log of %s" % (regex, self.name), timeout)

    # -- ways in

    def doveadm(self, *args, check=True, input=b""):
        """Run doveadm and return its output; check=False: the
        CompletedProcess."""
        done = subprocess.run(
            self.line.command("doveadm", "-c", self.conf, *args),
            input=input, capture_output=True, timeout=300)
        if not check:
            return done
        if done.returncode != 0:
            raise RuntimeError("doveadm %s on %s: exit %d: %s" % (
                " ".join(map(str, args)), self.name, done.returncode,
                done.stderr.decode(errors="replace")))
        return done.stdout.decode(errors="replace")

    def imap(self, user, **kwargs):
        return Imap(self.imap_port, str(user), **kwargs)

    @contextlib.contextmanager
    def pop3(self, user):
        """QUIT at the end, which is POP3's commit."""
        session = poplib.POP3("127.0.0.1", self.pop3_port, timeout=60)
        try:
            session.user(str(user))
            session.pass_(PASSWORD)
            yield session
            session.quit()
        finally:
            session.close()

    def lmtp(self, users, message):
        """Deliver; returns {recipient: (code, text)} of the final answers.
        (smtplib reads only one answer after the data.)"""
        if isinstance(users, (str, User)):
            users = [users]
        users = [str(user) for user in users]
        with contextlib.closing(smtplib.LMTP("127.0.0.1", self.lmtp_port,
                                             "localhost")) \
                as session:
            session.sock.settimeout(60)
            session.ehlo_or_helo_if_needed()
            def must(answer, wanted):
                # such as "421 shutting down"
                if answer[0] != wanted:
                    raise smtplib.SMTPServerDisconnected(*answer)
            must(session.mail("sender@example.org"), 250)
            answers = {user: session.rcpt(user) for user in users}
            accepted = [u for u in users if answers[u][0] == 250]
            if accepted:
                must(session.docmd("data"), 354)
                data = smtplib._quote_periods(smtplib._fix_eols(
                    message.decode("latin-1")).encode("latin-1"))
                session.send(data + b".\r\n")
                for user in accepted:
                    answers[user] = session.getreply()
        return {u: (code, text.decode())
                for u, (code, text) in answers.items()}

    def lda(self, user, message, *args, check=True):
        done = subprocess.run(
            self.line.command("dovecot-lda", "-c", self.conf, "-d", user,
                              *args), input=message.replace(b"\r\n", b"\n"),
            capture_output=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.returncode


class User:
    """A mail user of a cluster, seen from the primary and the replicas."""

    def __init__(self, cluster, name, primary, uid, gid):
        self.cluster, self.name, self.primary = cluster, name, primary
        self.uid, self.gid = uid, gid

    def __str__(self):
        return self.name

    @property
    def replicas(self):
        return [n for n in self.cluster.nodes if n is not self.primary] or \
            [self.primary]

    @property
    def replica(self):
        return self.replicas[0]

    def imap(self, node=None):
        return (node or self.primary).imap(self)

    def pop3(self, node=None):
        return (node or self.primary).pop3(self)

    def lmtp(self, message, node=None):
        """Deliver, which must work."""
        answers = (node or self.primary).lmtp([self], message)
        assert answers[self.name][0] == 250, answers

    def doveadm(self, command, *args, node=None, **kwargs):
        """doveadm COMMAND -u user ARGS; command: "mailbox create", ..."""
        return (node or self.primary).doveadm(*command.split(), "-u",
                                              self.name, *args, **kwargs)

    def sieve(self, script):
        """Install the active Sieve script on every node."""
        for node in self.cluster.nodes:
            self.write(os.path.join(node.home(self), ".dovecot.sieve"),
                       script.encode())

    def write(self, path, data):
        """Create a file as the user would, complete or not at all."""
        temporary = os.path.join(os.path.dirname(path), "..tmp")
        with open(temporary, "wb") as f:
            f.write(data)
        os.chown(temporary, self.uid, self.gid)
        os.chmod(temporary, 0o600)
        os.rename(temporary, path)

    def look(self, mailbox="INBOX", node=None, body=True):
        """{uid: message} as an IMAP client of the replica sees them."""
        with self.imap(node or self.replica) as session:
            return session.messages(mailbox, body)

    def flags(self, mailbox="INBOX", node=None):
        return {uid: set(m.flags)
                for uid, m in self.look(mailbox, node, False).items()}

    def mailboxes(self, node=None):
        """Names a client of the replica can select, sorted."""
        return sorted(view.status(node or self.replica, self))

    def subscriptions(self, node=None):
        with self.imap(node or self.replica) as session:
            return sorted(name for _, name in view.list_mailboxes(
                session, "LSUB"))

    def wait_equal(self, timeout=PATIENCE, bodies=True, ignore=()):
        """Until each replica holds what the primary holds."""
        for replica in self.replicas:
            wait_equal(self, self.primary, replica, timeout, bodies, ignore)


def wait_equal(user, primary, replica, timeout=PATIENCE, bodies=True,
               ignore=()):
    """Poll, the cheapest question first, until the independent views of both
    sides agree; else fail with all that differs. A look may itself wait for a
    lock of Dovecot's, and see a part before and a part after; so the last one
    begins when the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        last = time.monotonic() > deadline
        try:
            difference = view.status_differences(
                view.status(primary, user), view.status(replica, user))
            for with_bodies in ((False, True) if bodies else (False,)):
                if not difference:
                    difference = view.differences(
                        view.view(primary, user, with_bodies),
                        view.view(replica, user, with_bodies), ignore)
        except (RuntimeError, Refused, *GONE) as e:
            # a mailbox may go away while it is looked at
            difference = ["%s: %s" % (type(e).__name__, e)]
        if not difference:
            return
        if last:
            raise AssertionError(
                "%s: %s is not equal to primary %s after %.0f s:\n  %s" % (
                    user, replica.name, primary.name, timeout,
                    "\n  ".join(difference[:40])))
        time.sleep(0.02)


class Cluster:
    """formats: mail format per node; nodes are named a, b, c, ... and a is
    the default primary. settings: dovetail's for all nodes; node_options:
    {name: Node arguments}; redis: arguments for Redis; users: how many to
    prepare."""

    def __init__(self, formats=("sdbox", "sdbox"), settings=(), redis=(),
                 node_options=(), plugin=not PLAIN, start=True, users=USERS,
                 **options):
        self.dir = tempfile.mkdtemp(prefix="dt-", dir="/tmp")
        os.chmod(self.dir, 0o755)
        self.expected = []
        self.users = []
        self.redis = Redis(os.path.join(self.dir, "redis"), **dict(redis)) \
            if plugin else None
        self.nodes = []
        node_options = dict(node_options)
        for name, mail_format in zip("a" if PLAIN == "same" else "abcdefgh",
                                     formats):
            arguments = dict(options, **node_options.get(name, {}))
            arguments["settings"] = dict(settings,
                                         **arguments.get("settings", {}))
            node = Node(name, self, mail_format, plugin=plugin, **arguments)
            setattr(self, name, node)
            self.nodes.append(node)
        if PLAIN == "same":
            self.b = self.c = self.a
        # users that exist from the start cost no waiting
        self.prepared = ["u%d" % n for n in range(1, users + 1)]
        account = pwd.getpwnam(MAIL_USER)
        for node in self.nodes:
            for name in self.prepared:
                node.add_user(name, account.pw_uid, account.pw_gid)
        live.append(self)
        atexit.register(self.close)
        for node in self.nodes:
            node.write_conf()
        if plugin:
            self.exchange_keys()
        if start:
            self.start()

    def exchange_keys(self):
        for node in self.nodes:
            node.keygen()
        for node in self.nodes:
            for other in self.nodes:
                if other is not node:
                    node.trust(other)

    def start(self):
        try:
            if self.redis:
                self.redis.start()
            for node in self.nodes:
                node.start()
        except BaseException:
            self.close()
            raise

    def user(self, primary=None, owner=MAIL_USER, name=None, **fields):
        """A fresh user on all nodes. primary: a node that is not the
        default; fields: more userdb fields."""
        if primary is None and owner == MAIL_USER and not fields and \
           not name and self.prepared:
            name, account = self.prepared.pop(0), pwd.getpwnam(owner)
        else:
            name, account = self.add_user(primary, owner, name, fields)
        user = User(self, name, primary or self.nodes[0], account.pw_uid,
                    account.pw_gid)
        self.users.append(user)
        return user

    def add_user(self, primary, owner, name, fields):
        if primary is not None:
            fields["dovetail_primary"] = primary.name
        name = name or "user%d" % len(self.users)
        account = pwd.getpwnam(owner)
        for node in self.nodes:
            node.add_user(name, account.pw_uid, account.pw_gid, **fields)
        for node in self.nodes:
            if node.running():
                # Dovecot looks at a passwd-file only once per second
                wait_for(lambda: node.doveadm(
                    "user", name, check=False).returncode == 0, "user")
        return name, account

    @property
    def servers(self):
        return self.nodes + ([self.redis] if self.redis else [])

    def expect_errors(self, *regexes):
        """The running test may cause log lines that match one of these."""
        self.expected += regexes

    def close(self):
        for node in self.nodes:
            # all at once: each takes a second
            if node.running():
                node.signal(signal.SIGTERM)
        for server in self.servers:
            with contextlib.suppress(FileNotFoundError):
                server.close()
        if not os.environ.get("DOVETAIL_TEST_KEEP"):
            shutil.rmtree(self.dir, True)
        atexit.unregister(self.close)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Memory:
    """Watches how far processes grow, from /proc, in a thread of its own:

        with Memory(lambda: node.pids()) as memory: ...
        memory.growth  # {(executable, pid): bytes beyond its first size}
    """

    def __init__(self, pids):
        self.pids = pids
        self.first = {}
        self.peak = collections.defaultdict(int)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def sample(self):
        for pid in self.pids():
            with contextlib.suppress(OSError):
                key = (executable(pid), pid)
                with open("/proc/%d/status" % pid) as f:
                    size = {k: int(v) * 1024 for k, v in re.findall(
                        r"^Vm(RSS|HWM):\s+(\d+) kB", f.read(), re.M)}
                if key[0] and size:
                    self.first.setdefault(key, size["RSS"])
                    self.peak[key] = max(self.peak[key], size["HWM"])

    def run(self):
        while not self.done.is_set():
            self.sample()
            self.done.wait(0.02)

    def __enter__(self):
        self.sample()
        # what a process once needed is not this test's doing
        self.before = dict(self.peak)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.done.set()
        self.thread.join()
        self.sample()

    @property
    def growth(self):
        return {key: peak - self.before.get(key, self.first[key])
                for key, peak in self.peak.items()}
