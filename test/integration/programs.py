"""Others' programs that ask dovetail-health: Postfix, Exim, HAProxy, promtool.

They are Debian's, unpacked and not installed (build-aux/lib.sh: unpack), and run
with configurations, spools and ports of their own: what the machine has of them is
neither used nor touched. What concerns dovetail in their configurations is the
README's own text.
"""

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import smtplib
import tempfile
import textwrap

from cluster import MAIL_USER, Daemon, accepts, free_port, wait_for
from test_migration import chapter

PROGRAMS = os.environ.get("DOVETAIL_TEST_PROGRAMS",
                          "/var/cache/dovetail/programs")
# Postfix wants users and groups that nobody else has. Every Debian has these, and
# nothing of theirs runs here.
POSTFIX_USER, POSTFIX_GROUP = "uucp", "news"
DOMAIN = "example.net"


def program(path):
    found = os.path.join(PROGRAMS, path)
    assert os.path.exists(found), \
        "%s does not exist: build-aux/check puts it there" % found
    return found


def readme(containing, number=12):
    """The README's block of lines (indented, without empty ones) with that
    text."""
    blocks = re.findall(r"(?m)(?:^  +\S.*\n)+", chapter(number))
    block, = [b for b in blocks if containing in b]
    return textwrap.dedent(block)


def settings(containing):
    """The same as {setting: value}."""
    return dict(line.split(" = ", 1)
                for line in readme(containing).splitlines())


class Place:
    """Where things are: the README's addresses and ports become ones of this
    machine that are free."""

    def __init__(self):
        self.net = "127.%d.%d." % (random.randint(1, 254),
                                   random.randint(1, 254))
        self.ports = {port: str(free_port())
                      for port in ("24", "143", "24243", "24244")}

    def local(self, text):
        text = text.replace("10.77.0.", self.net)
        return re.sub(r"(?<=[ :])(24|143|24243|24244)$|"
                      r"(?<=[ :])(24|143|24243|24244)(?=\s)",
                      lambda match: self.ports[match[0]], text, flags=re.M)

    def address(self, node, port):
        return (self.net + {"a": "1", "b": "2", "proxy": "9"}[node],
                int(self.ports[port]))

    def lmtp(self, node):
        """Configuration of a node: LMTP as the README has it."""
        host, port = self.address(node, "24")
        return lambda line: """
service lmtp {
  inet_listener lmtp-mta {
    %s = %s
    port = %d
  }
}
""" % ("listen" if line.is_24 else "address", host, port)


class Mta(Daemon):
    """port: where it takes mail; spool: directory of what it keeps."""

    def __init__(self):
        super().__init__()
        self.dir = tempfile.mkdtemp(prefix="dt-mta-", dir="/tmp")
        os.chmod(self.dir, 0o755)
        self.port = free_port()
        self.log = os.path.join(self.dir, "log")

    def write(self, name, text):
        path = os.path.join(self.dir, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)
        return path

    def up(self):
        return accepts(("127.0.0.1", self.port))

    def log_text(self):
        with contextlib.suppress(FileNotFoundError):
            with open(self.log, errors="replace") as f:
                return f.read()
        return ""

    def send(self, message, *addresses):
        """{address: (code, text)} of the final answers."""
        with contextlib.closing(smtplib.SMTP("127.0.0.1", self.port,
                                             timeout=60)) as session:
            session.ehlo_or_helo_if_needed()
            session.mail("sender@example.org")
            answers = {a: session.rcpt(a) for a in addresses}
            if any(answer[0] == 250 for answer in answers.values()):
                answer = session.data(message)
                answers = {a: answer if answers[a][0] == 250 else answers[a]
                           for a in addresses}
        return {a: (code, text.decode())
                for a, (code, text) in answers.items()}

    def close(self):
        if self.running():
            self.stop()
        if not os.environ.get("DOVETAIL_TEST_KEEP"):
            shutil.rmtree(self.dir, True)


POSTFIX_MAIN = """\
compatibility_level = 3.6
command_directory = {programs}/usr/sbin
daemon_directory = {programs}/usr/lib/postfix/sbin
shlib_directory = {programs}/usr/lib/postfix
meta_directory = {dir}/etc
queue_directory = {dir}/q
data_directory = {dir}/data
mail_owner = {user}
setgid_group = {group}
default_privs = {mail}
import_environment = MAIL_CONFIG LANG=C LD_LIBRARY_PATH={programs}/usr/lib/postfix
maillog_file = {dir}/log
maillog_file_prefixes = /tmp
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mx.{domain}
mydestination =
mynetworks = 192.0.2.1/32
alias_maps =
local_recipient_maps =
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtp_tls_security_level = none
smtpd_error_sleep_time = 0
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 2s
transport_retry_time = 1s
# not the README's: a test has many that fail at once
default_destination_concurrency_failed_cohort_limit = 1000
"""

POSTFIX_MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 1 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
lmtp unix - - n - - lmtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""

POSTFIX_QUEUE = {
    # directory: (mode, owner, group)
    "": (0o755, "root", "root"),
    "pid": (0o755, "root", "root"),
    "maildrop": (0o730, POSTFIX_USER, POSTFIX_GROUP),
    "public": (0o710, POSTFIX_USER, POSTFIX_GROUP),
    **{name: (0o700, POSTFIX_USER, "root") for name in (
        "active", "bounce", "corrupt", "defer", "deferred", "flush", "hold",
        "incoming", "private", "saved", "trace")}}


class Postfix(Mta):
    """more: of main.cf."""

    def __init__(self, more=""):
        super().__init__()
        self.queue = os.path.join(self.dir, "q")
        for name, (mode, user, group) in POSTFIX_QUEUE.items():
            path = os.path.join(self.queue, name)
            os.mkdir(path)
            shutil.chown(path, user, group)
            os.chmod(path, mode)
        os.mkdir(os.path.join(self.dir, "data"))
        shutil.chown(os.path.join(self.dir, "data"), POSTFIX_USER)
        self.write("etc/master.cf", POSTFIX_MASTER.format(port=self.port))
        self.configure(more)

    def configure(self, more):
        self.write("etc/main.cf", POSTFIX_MAIN.format(
            programs=PROGRAMS, dir=self.dir, user=POSTFIX_USER,
            group=POSTFIX_GROUP, mail=MAIL_USER, domain=DOMAIN) + more)

    def start(self):
        self.spawn(["env", "LD_LIBRARY_PATH=" + program("usr/lib/postfix"),
                    program("usr/lib/postfix/sbin/master"), "-s", "-c",
                    os.path.join(self.dir, "etc")], self.up,
                   os.path.join(self.dir, "out"))

    def stop(self):
        self.end(15)

    def restart(self):
        self.stop()
        self.start()

    def reload(self):
        """As "postfix reload" does."""
        self.signal(signal.SIGHUP)

    def queued(self):
        """How many mails wait. One that is moved meanwhile may be missed."""
        return len({name for queue in ("incoming", "active", "deferred")
                    for _, _, files in os.walk(os.path.join(self.queue, queue))
                    for name in files})


EXIM = """\
spool_directory = {dir}/spool
log_file_path = {dir}/%slog
pid_file_path = {dir}/pid
exim_path = {exim}
primary_hostname = mx.{domain}
domainlist local_domains = {domain}
host_lookup =
rfc1413_query_timeout = 0s
smtp_enforce_sync = false
keep_environment =
queue_run_max = 1
acl_smtp_rcpt = acl_check_rcpt
tls_advertise_hosts =

begin acl
acl_check_rcpt:
  require domains = +local_domains
{acl}
  accept

begin routers
nodes:
  driver = manualroute
  route_list = * {host} byname
  self = send
  transport = lmtp

begin transports
lmtp:
  driver = smtp
  protocol = lmtp
  port = {lmtp}
  hosts_try_chunking =

begin retry
* * F,1h,1s
"""


class Exim(Mta):
    """acl: for RCPT; lmtp: (host, port)."""

    def __init__(self, acl, lmtp):
        super().__init__()
        self.log = os.path.join(self.dir, "mainlog")
        self.exim = program("usr/sbin/exim4")
        os.mkdir(os.path.join(self.dir, "spool"))
        self.conf = self.write("exim.conf", EXIM.format(
            dir=self.dir, exim=self.exim, domain=DOMAIN,
            acl=textwrap.indent(acl, "  "), host=lmtp[0], lmtp=lmtp[1]))
        # The user that it was built with, for it alone.
        self.user = "Debian-exim"
        account = pwd.getpwnam(POSTFIX_USER)
        self.mounts = ""
        for name, line in (
                ("passwd", "%s:x:%d:%d::/:/bin/sh\n" % (
                    self.user, account.pw_uid, account.pw_gid)),
                ("group", "%s:x:%d:\n" % (self.user, account.pw_gid))):
            with open("/etc/" + name) as f:
                text = f.read()
            if not re.search("(?m)^%s:" % self.user, text):
                path = self.write(name, text + line)
                self.mounts += "mount --bind %s /etc/%s && " % (path, name)
                owner = account.pw_uid, account.pw_gid
            else:
                user = pwd.getpwnam(self.user)
                owner = user.pw_uid, user.pw_gid
        for path in (self.dir, os.path.join(self.dir, "spool")):
            os.chown(path, *owner)

    def start(self):
        self.spawn(["unshare", "--mount", "--propagation", "private",
                    "/bin/sh", "-c", self.mounts + 'exec "$@"', "sh",
                    self.exim, "-C", self.conf, "-bdf", "-q1s", "-oX",
                    "127.0.0.1.%d" % self.port], self.up,
                   os.path.join(self.dir, "out"))

    def stop(self):
        self.end(15)


HAPROXY = """\
global
  stats socket {dir}/stats mode 600
"""


class HaProxy(Daemon):
    def __init__(self, conf):
        super().__init__()
        self.dir = tempfile.mkdtemp(prefix="dt-ha-", dir="/tmp")
        self.conf = os.path.join(self.dir, "haproxy.cfg")
        with open(self.conf, "w") as f:
            f.write(HAPROXY.format(dir=self.dir) + conf)

    def start(self):
        self.spawn([program("usr/sbin/haproxy"), "-db", "-f", self.conf],
                   lambda: accepts(os.path.join(self.dir, "stats")),
                   os.path.join(self.dir, "out"))

    def states(self, listen):
        """{server: "UP", "DOWN", "DRAIN", ...}"""
        import socket
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(os.path.join(self.dir, "stats"))
            s.sendall(b"show stat\n")
            answer = b""
            while data := s.recv(65536):
                answer += data
        rows = [line.split(",") for line in
                answer.decode().lstrip("# ").splitlines() if line]
        keys = rows[0]
        found = {}
        for row in rows[1:]:
            values = dict(zip(keys, row))
            if values["pxname"] == listen and values["svname"] not in (
                    "FRONTEND", "BACKEND"):
                found[values["svname"]] = values["status"].split()[0]
        return found

    def wait(self, listen, timeout=30, **wanted):
        wait_for(lambda: {name: state for name, state in
                          self.states(listen).items() if name in wanted} ==
                 wanted, "%s, is %s" % (wanted, self.states(listen)), timeout)

    def close(self):
        if self.running():
            self.end(15)
        shutil.rmtree(self.dir, True)
