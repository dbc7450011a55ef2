"""What Dovecot itself checks when it starts: the settings, and that plugin and
services were built for it."""

import os
import re
import shutil
import subprocess

import pytest

from cluster import GONE, Cluster, mail

MODULES = "/usr/lib/dovecot/modules"
PLUGIN = "lib95_dovetail_plugin.so"

WRONG = [
    ("dovetail_node", "A", "is not a node name"),
    ("dovetail_node", "", "Not set"),
    ("dovetail_peers", "b, c", "not commas"),
    ("dovetail_primary", "d", "neither this node"),
    ("dovetail_redis", "localhost", "must begin with"),
    ("dovetail_key_dir", "keys", "does not begin with /"),
    ("dovetail_ack", "perhaps", "perhaps"),
    ("dovetail_ack_timeout", "2", "missing units"),
    ("dovetail_ack_timeout", "61s", "is not within 1ms and 60s"),
    ("dovetail_ack_failure", "ignore", "ignore"),
    ("dovetail_shards", "65", "is not a number within 1 and 64"),
    ("dovetail_queue_max_size", "1M", "is less than 16M"),
    ("dovetail_nonsense", "1", "(no such|[Uu]nknown) setting"),
]


def run_dovecot(node):
    """Dovecot, which is to refuse its configuration."""
    node.write_conf()
    return subprocess.run(node.line.command("dovecot", "-F", "-c", node.conf),
                          capture_output=True, text=True, timeout=30)


def doveconf(node, *args):
    return subprocess.run(
        node.line.in_root("/usr/bin/doveconf", "-c", node.conf, *args),
        capture_output=True, text=True, timeout=30, check=True).stdout


@pytest.fixture(scope="module")
def stopped():
    with Cluster(["sdbox", "sdbox"], start=False) as cluster:
        yield cluster


@pytest.mark.parametrize("name, value, message", WRONG)
def test_wrong_setting_stops_the_start(stopped, name, value, message):
    node = stopped.a
    node.settings = {name: value}
    done = run_dovecot(node)
    assert done.returncode != 0
    assert re.search("%s: .*%s" % (name, message), done.stderr), done.stderr


def test_settings_are_shown(stopped):
    node = stopped.a
    node.settings = {"dovetail_ack_timeout": "1500ms",
                     "dovetail_queue_max_size": "17M"}
    node.write_conf()
    shown = doveconf(node, "-n")
    for line in ("dovetail_node = a", "dovetail_ack_timeout = 1500ms",
                 "dovetail_queue_max_size = 17M"):
        assert re.search("(?m)^ *%s$" % re.escape(line), shown), shown


def test_a_protocol_has_its_own_value(stopped):
    """2.4 only: plugin { } of 2.3 knows no such thing as a wrong part of it."""
    node = stopped.a
    node.settings = {}
    if not node.line.is_24:
        return
    for value, right in (("3s", True), ("100s", False)):
        node.extra_conf = "protocol imap {\n  dovetail_ack_timeout = %s\n}\n" % \
            value
        if right:
            node.write_conf()
            assert doveconf(node, "-f", "protocol=imap", "-h",
                            "dovetail_ack_timeout") == value + "\n"
        else:
            done = run_dovecot(node)
            assert "dovetail_ack_timeout: '100000ms' is not" in done.stderr
    node.extra_conf = ""


def other_modules(node, *change):
    """Dovecot's modules, with a change to dovetail's plugin."""
    directory = os.path.join(node.cluster.dir, "modules-" + node.name)
    shutil.copytree(node.line.path(MODULES), directory)
    path = os.path.join(directory, PLUGIN)
    with open(path, "rb") as f:
        data = f.read()
    assert change[0] in data
    with open(path, "wb") as f:
        f.write(data.replace(*change))
    node.extra_conf = "mail_plugin_dir = %s\n" % directory


def test_plugin_for_another_abi_is_refused(new_cluster):
    cluster = new_cluster(["sdbox"], start=False)
    line = cluster.a.line
    other_modules(cluster.a, *{
        "2.3": (b"2.3.ABIv", b"2.2.ABIv"),
        "2.4": (b"2.4.ABIv", b"2.3.ABIv")}[line.name])
    cluster.start()
    cluster.expect_errors("different ABI version", "dovetail-replay",
                          "imap-login", "Couldn't load required plugin")
    with pytest.raises(GONE):
        with cluster.user().imap() as session:
            session.append("INBOX", mail("never"))
    cluster.a.wait_log("different ABI version")


def test_plugin_for_another_release_steps_aside(new_cluster):
    """Mail keeps flowing, and the log says why nothing is replicated."""
    cluster = new_cluster(start=False)
    version = cluster.a.line.version.encode()
    other_modules(cluster.a, b"\0%s\0" % version,
                  b"\0%s\0" % version.replace(b".", b","))
    cluster.start()
    cluster.expect_errors("Not replicating: dovetail was built for Dovecot")
    user = cluster.user()
    with user.imap() as session:
        session.append("INBOX", mail("one"))
    cluster.a.wait_log("Not replicating: dovetail was built for Dovecot")
    assert len(user.look(node=cluster.a)) == 1
    assert not user.look(node=cluster.b)
