"""Lines of Dovecot releases: how to run their programs, and how the same
configuration is written for them.

The machine has one Dovecot, of the line 2.3 or 2.4. Another one may be in a
Debian tree of its own, which build-aux/sandbox prepares and names in
DOVETAIL_TEST_TREE: its programs run in a chroot there, where /tmp is the
machine's.

DOVETAIL_TEST_LINES says which line each node of a cluster is of, in their order,
e.g. "2.3,2.4"; the last one is that of all further nodes. The default is the
machine's own.
"""

import functools
import os
import re
import subprocess

DOVECOT = os.environ.get("DOVETAIL_TEST_DOVECOT", "/usr/sbin/dovecot")
DOVEADM = os.environ.get("DOVETAIL_TEST_DOVEADM", "/usr/bin/doveadm")
LIBEXEC = os.environ.get("DOVETAIL_TEST_LIBEXEC", "/usr/lib/dovecot")


class Line:
    """root: of the tree with this Dovecot; None: the machine's."""

    def __init__(self, root=None):
        self.root = root
        # variables for the machine's own only
        own = (DOVECOT, DOVEADM, LIBEXEC)
        self.dovecot, self.doveadm, self.libexec = own if not root else (
            "/usr/sbin/dovecot", "/usr/bin/doveadm", "/usr/lib/dovecot")
        self.version = subprocess.run(
            self.command("dovecot", "--version"), check=True, text=True,
            stdout=subprocess.PIPE).stdout.split()[0]
        self.name = re.match(r"\d+\.\d+", self.version)[0]
        assert self.name in ("2.3", "2.4"), self.version

    def __repr__(self):
        return self.name

    @property
    def is_24(self):
        return self.name == "2.4"

    def command(self, program, *args, user=None):
        """argv that runs a program of this Dovecot: dovecot, doveadm, or one
        of its libexec directory; user: as that user of its system."""
        path = {"dovecot": self.dovecot, "doveadm": self.doveadm}.get(
            program, os.path.join(self.libexec, program))
        argv = [path, *map(str, args)]
        if user:
            return ["chroot", "--userspec=%s:%s" % (user, user),
                    self.root or "/", *argv]
        return self.in_root(*argv)

    def in_root(self, *argv):
        """argv that runs a command of this Dovecot's system."""
        return ["chroot", self.root, *argv] if self.root else list(argv)

    def path(self, path):
        """Where a file of this Dovecot's system stands for us."""
        return (self.root or "") + path

    def uid(self, user):
        """The number of a user of its system, as text."""
        with open(self.path("/etc/passwd")) as f:
            return re.search("(?m)^%s:[^:]*:([0-9]+):" % user, f.read())[1]

    def option(self, name, value):
        """doveadm's arguments that override a setting of dovetail's."""
        return ["-o", "%s%s=%s" % ("" if self.is_24 else "plugin/", name,
                                   value)]

    # -- configuration

    def settings(self, settings):
        """dovetail's settings as they stand in the configuration."""
        lines = ["%s = %s" % kv for kv in settings.items()
                 if kv[1] is not None]
        if self.is_24 or not lines:
            return "\n".join(lines) + "\n"
        return "plugin {\n  %s\n}\n" % "\n  ".join(lines)

    def plugins(self, *names):
        """More mail_plugins."""
        if self.is_24:
            return "mail_plugins {\n%s}\n" % "".join(
                "  %s = yes\n" % name for name in names)
        return "mail_plugins = $mail_plugins %s\n" % " ".join(names)

    def namespace(self, name, prefix, separator, mail_format, directory):
        return (NAMESPACE + (LOCATION_24 if self.is_24 else LOCATION_23) +
                "}}\n").format(
            name=name, prefix=prefix, separator=separator,
            inbox="no" if prefix else "yes", format=mail_format,
            directory=directory)

    def configuration(self, node, **values):
        text = (CONF_24 if self.is_24 else CONF_23) + CONF
        return text.format(n=node, **values)

    def services(self, node, **values):
        return SERVICES.format(
            n=node, libexec=self.libexec, forever=self.forever,
            internal_user="$SET:default_internal_user" if self.is_24 else
            "$default_internal_user", **values)

    @property
    def versions(self):
        """What a configuration begins with."""
        return VERSIONS_24 if self.is_24 else ""

    @property
    def forever(self):
        """A service's setting: its processes are not ended for being idle."""
        return "idle_kill_interval = infinite" if self.is_24 else \
            "idle_kill = 4294967295 s"


@functools.lru_cache(maxsize=None)
def available():
    """{name: Line}, the machine's own first."""
    roots = [None]
    if os.environ.get("DOVETAIL_TEST_TREE"):
        roots.append(os.environ["DOVETAIL_TEST_TREE"])
    lines = {}
    for root in roots:
        line = Line(root)
        lines.setdefault(line.name, line)
    return lines


def of_nodes():
    """The lines of a cluster's nodes; the last one is for all further."""
    names = os.environ.get("DOVETAIL_TEST_LINES")
    if not names:
        return list(available().values())[:1]
    return [available()[name] for name in names.split(",")]


def of_node(number):
    lines = of_nodes()
    return lines[min(number, len(lines) - 1)]


NAMESPACE = """
namespace {name} {{
  type = private
  inbox = {inbox}
  prefix = {prefix}
  separator = {separator}
"""

LOCATION_23 = """  location = {format}:~/{directory}
"""

LOCATION_24 = """  mail_driver = {format}
  mail_path = ~/{directory}
"""

VERSIONS_24 = """dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
"""

CONF_23 = """# written by the integration tests
protocols = imap pop3 lmtp sieve
disable_plaintext_auth = no
mail_plugins = {plugins}
passdb {{
  driver = passwd-file
  args = {n.passwd}
}}
userdb {{
  driver = passwd-file
  args = {n.passwd}
}}
plugin {{
  sieve = file:~/sieve;active=~/.dovecot.sieve
}}
protocol lmtp {{
  mail_plugins = $mail_plugins sieve
}}
protocol lda {{
  mail_plugins = $mail_plugins sieve
}}
service imap-login {{
  service_count = 0
}}
service pop3-login {{
  service_count = 0
}}
"""

CONF_24 = """# written by the integration tests
""" + VERSIONS_24 + """protocols = imap pop3 lmtp sieve
auth_allow_cleartext = yes
mail_plugins = {plugins}
passdb passwd-file {{
  passwd_file_path = {n.passwd}
}}
userdb passwd-file {{
  passwd_file_path = {n.passwd}
}}
sieve_script personal {{
  driver = file
  path = ~/sieve
  active_path = ~/.dovecot.sieve
}}
protocol lmtp {{
  mail_plugins {{
    sieve = yes
  }}
}}
protocol lda {{
  mail_plugins {{
    sieve = yes
  }}
}}
service imap-login {{
  restart_request_count = unlimited
}}
service pop3-login {{
  restart_request_count = unlimited
}}
"""

CONF = """base_dir = {base_dir}
state_dir = {n.state_dir}
instance_name = dovetail-test-{n.name}
log_path = {n.log}
listen = 127.0.0.1
ssl = no
mail_max_userip_connections = 100
first_valid_uid = 1
auth_failure_delay = 0
default_vsz_limit = 1G
lda_mailbox_autocreate = yes
postmaster_address = postmaster@example.org
hostname = {n.name}.example.org
{settings}
{namespaces}
service imap-login {{
  inet_listener imap {{
    port = {n.imap_port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {n.pop3_port}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service managesieve-login {{
  inet_listener sieve {{
    port = {n.sieve_port}
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    port = {n.lmtp_port}
  }}
}}
service auth {{
  unix_listener auth-userdb {{
    mode = 0666
    user = {mail}
  }}
}}
service stats {{
  unix_listener stats-writer {{
    mode = 0666
  }}
}}
"""

SERVICES = """
service auth {{
  unix_listener auth-dovetail-userdb {{
    mode = 0600
    user = {internal_user}
  }}
}}
service dovetail-queue {{
  executable = {libexec}/dovetail-queue
  user = root
  process_min_avail = 1
  process_limit = 1
  client_limit = 10000
  {forever}
  unix_listener dovetail-queue {{
    mode = {queue_mode}
    user = {mail}
  }}
}}
service dovetail-replay {{
  executable = {libexec}/dovetail-replay
  user = {n.replay_user}
  process_min_avail = {n.replay_workers}
  process_limit = {n.replay_workers}
  client_limit = 1
  {forever}
  unix_listener dovetail-replay {{
    mode = 0600
    user = {internal_user}
  }}
}}
service dovetail-health {{
  executable = {libexec}/dovetail-health
  process_min_avail = 1
  process_limit = 1
  client_limit = 1000
  user = {internal_user}
  {forever}
  unix_listener dovetail-health {{
    mode = 0600
    user = {internal_user}
  }}
  unix_listener dovetail-policy {{
    mode = 0666
  }}
  unix_listener dovetail-socketmap {{
    mode = 0666
  }}
  unix_listener dovetail-exim {{
    mode = 0666
  }}
  unix_listener dovetail-agent {{
    mode = 0666
  }}
  unix_listener dovetail-http {{
    mode = 0666
  }}
  unix_listener dovetail-admin {{
    mode = 0600
  }}
}}
"""
