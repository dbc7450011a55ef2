"""doveadm dovetail: keygen, peers, status."""

import base64
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time

import pytest

from cluster import (MAIL_USER, Cluster, Node, free_port, mail,
                     wait_for)

# sysexits.h
USAGE, NOUSER, CANTCREAT, TEMPFAIL, PROTOCOL, NOPERM, CONFIG = (
    64, 67, 73, 75, 76, 77, 78)
FORMATTERS = ("table", "tab", "flow", "json", "pager")
PUBLIC_LINE = re.compile(r"dovetail-public-1 ([a-z0-9.-]+) (\S{44})\n")
POSITION = re.compile(r"(\d+):(\d+)$")


def dovetail(node, /, *args, exit=0, formatter=None, options=(), **settings):
    """Run doveadm dovetail ARGS, which must end with the exit status; returns
    what it printed on stdout and stderr. settings: ack="local" overrides
    dovetail_ack."""
    argv = node.line.command("doveadm", *options, "-c", node.conf)
    argv += ["-f", formatter] if formatter else []
    for name, value in settings.items():
        argv += node.line.option("dovetail_" + name, value)
    done = subprocess.run(argv + ["dovetail", *map(str, args)], text=True,
                          capture_output=True, stdin=subprocess.DEVNULL,
                          timeout=60)
    assert done.returncode == exit, (done.returncode, done.stdout, done.stderr)
    assert "Panic" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def ask(node, *args):
    """The rows that doveadm dovetail ARGS prints."""
    return json.loads(dovetail(node, *args, formatter="json")[0])


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def read(path):
    with open(path) as f:
        return f.read()


def key_path(node, suffix=".key"):
    return os.path.join(node.key_dir, node.name + suffix)


def rows(node, *args):
    return {row["mailbox"]: row for row in ask(node, "status", *args)}


@pytest.fixture
def stopped(new_cluster):
    """Two nodes with keys, not running."""
    return new_cluster(start=False)


@pytest.fixture(scope="module")
def running():
    with Cluster() as cluster:
        yield cluster


# -- keygen

def test_keygen_writes_keys_and_prints_only_the_public_one(stopped):
    node = stopped.a
    shutil.rmtree(node.key_dir)
    out, err = dovetail(node, "keygen")
    assert PUBLIC_LINE.fullmatch(out)[1] == "a"
    assert out == read(key_path(node, ".pub"))
    assert mode(node.key_dir) == 0o700
    assert mode(key_path(node)) == 0o600
    assert mode(key_path(node, ".pub")) == 0o644
    assert sorted(os.listdir(node.key_dir)) == ["a.key", "a.pub"]
    # where to copy what
    assert key_path(node, ".pub") in err and re.search(r"peers: b$", err)


@pytest.mark.parametrize("formatter", (None,) + FORMATTERS)
def test_keygen_never_prints_the_secret(stopped, formatter):
    node = stopped.a
    os.unlink(key_path(node))
    out, err = dovetail(node, "keygen", formatter=formatter, options=["-D"])
    public = read(key_path(node, ".pub")).split("\n")[0]
    secret = read(key_path(node)).split()[2]
    assert len(base64.b64decode(secret)) == 32
    assert public in out
    assert secret not in out + err
    assert base64.b64decode(secret).hex() not in out + err
    if formatter == "json":
        assert json.loads(out) == [{"public_key": public}]


def test_keygen_leaves_an_existing_key_alone(stopped):
    node = stopped.a
    before = read(key_path(node)), read(key_path(node, ".pub"))
    out, err = dovetail(node, "keygen", exit=CANTCREAT)
    assert out == ""
    assert key_path(node) in err and "-r" in err
    assert (read(key_path(node)), read(key_path(node, ".pub"))) == before
    assert not os.path.exists(key_path(node, ".key.old"))


def test_keygen_rotates(stopped):
    a, b = stopped.a, stopped.b
    secret, public = read(key_path(a)), read(key_path(a, ".pub"))
    out, err = dovetail(a, "keygen", "-r")
    assert out != public and PUBLIC_LINE.fullmatch(out)
    assert read(key_path(a, ".pub")) == out + public
    assert read(key_path(a, ".key.old")) == secret
    assert read(key_path(a)) != secret
    assert mode(key_path(a)) == mode(key_path(a, ".key.old")) == 0o600
    assert "reload" in err
    # the peer takes both keys, once it has the file
    ids = {}
    for step in "before", "after":
        ids[step] = [row["key_id"].split(",") for row in
                     ask(b, "peers")
                     if row["node"] == "a"][0]
        b.trust(a)
    assert len(ids["before"]) == 1 and len(ids["after"]) == 2
    assert set(ids["before"]) < set(ids["after"])


def test_keygen_needs_little(stopped, tmp_path):
    """A key can be made before the other settings are right."""
    out, _ = dovetail(stopped.a, "keygen", key_dir=tmp_path / "new",
                           redis="nonsense", peers="")
    assert out == read(tmp_path / "new" / "a.pub")


@pytest.mark.parametrize("name,value", [
    ("node", ""), ("node", "Not A Name"), ("node", "../a"), ("node", "x" * 65),
    ("key_dir", "relative")])
def test_keygen_names_the_wrong_setting(stopped, name, value):
    out, err = dovetail(stopped.a, "keygen", exit=CONFIG,
                             **{name: value})
    assert out == "" and "dovetail_%s: " % name in err


def test_keygen_in_a_place_that_cannot_be(stopped, tmp_path):
    (tmp_path / "file").write_text("")
    out, err = dovetail(stopped.a, "keygen", exit=CANTCREAT,
                             key_dir=tmp_path / "file" / "keys")
    assert out == "" and str(tmp_path / "file" / "keys") in err


# -- peers

def test_peers(stopped):
    node = stopped.a
    found = ask(node, "peers")
    assert [(row["node"], row["key_file"], row["status"]) for row in found] \
        == [("a", key_path(node), "ok"),
            ("b", os.path.join(node.key_dir, "b.pub"), "ok")]
    assert all(re.fullmatch("[0-9a-f]{16}", row["key_id"]) for row in found)
    # both sides name the same keys
    other = ask(stopped.b, "peers")
    assert {row["node"]: row["key_id"] for row in found} == \
        {row["node"]: row["key_id"] for row in other}


def broken_missing(a, b_pub):
    os.unlink(b_pub)


def broken_empty(a, b_pub):
    open(b_pub, "w").close()


def broken_garbage(a, b_pub):
    with open(b_pub, "w") as f:
        f.write("-----BEGIN PUBLIC KEY-----\n")


def broken_other_node(a, b_pub):
    with open(b_pub, "w") as f:
        f.write(read(b_pub[:-5] + "a.pub"))


def broken_same_key(a, b_pub):
    text = read(key_path(a, ".pub")).replace(" a ", " b ")
    with open(b_pub, "w") as f:
        f.write(text)


@pytest.mark.parametrize("broken", [
    broken_missing, broken_empty, broken_garbage, broken_other_node,
    broken_same_key])
def test_peers_names_the_broken_file(stopped, broken):
    a = stopped.a
    b_pub = os.path.join(a.key_dir, "b.pub")
    broken(a, b_pub)
    out, _ = dovetail(a, "peers", exit=CONFIG, formatter="json")
    own, peer = json.loads(out)
    assert own["status"] == "ok"
    assert b_pub in peer["status"] and peer["key_id"] == "-"
    out, _ = dovetail(a, "peers", exit=CONFIG)
    assert b_pub in out


@pytest.mark.parametrize("broken", ["missing", "readable", "not ours"])
def test_peers_checks_our_own_key(stopped, broken):
    a = stopped.a
    if broken == "missing":
        os.unlink(key_path(a))
    elif broken == "readable":
        os.chmod(key_path(a), 0o640)
    else:
        shutil.copy(key_path(stopped.b, ".pub"), key_path(a, ".pub"))
    out, err = dovetail(a, "peers", exit=CONFIG, formatter="json")
    own, peer = json.loads(out)
    assert a.key_dir in own["status"]
    assert peer["status"].startswith("not checked")
    secret = read(key_path(a)).split()[2] if broken != "missing" else "-" * 9
    assert secret not in out + err


@pytest.mark.parametrize("verb", ["peers", "status"])
def test_wrong_settings_are_named(stopped, verb):
    for name, value in [("shards", "900"), ("peers", "a"), ("redis", "x:y"),
                        ("ack", "perhaps"), ("node", "")]:
        out, err = dovetail(stopped.a, verb, exit=CONFIG,
                                 **{name: value})
        # what Dovecot 2.4 refuses by itself it calls "dovetail_ack=perhaps"
        assert out == "" and re.search("dovetail_%s(: |=)" % name, err)


@pytest.mark.parametrize("args", [
    ("keygen", "x"), ("keygen", "-x"), ("peers", "x"), ("peers", "--all"),
    ("status", "x"), ("status", "--nonsense"), ("status", "-S", "/x"),
    ("nonsense",), ()])
def test_help_for_arguments_that_make_no_sense(stopped, args):
    out, err = dovetail(stopped.a, *args, exit=USAGE)
    assert out == "" and err
    if not args or args[-1] in ("x", "nonsense", "/x"):
        assert "doveadm" in err and (args[0] if args[1:] else "keygen") in err


# -- status of the node

class FakeQueue:
    """Something else at the other end of the service's socket: reads what
    doveadm asks, sends this, and hangs up. hang: waits for doveadm to do that;
    deaf: leaves unread what doveadm asks, which then sees a reset; rude: does
    not even wait for that."""

    def __init__(self, path, *sends, hang=False, deaf=False, rude=False):
        self.sends, self.hang, self.deaf = sends, hang, deaf
        self.rude = rude
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(20)
        self.listener.bind(path)
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve)

    def serve(self):
        with contextlib.suppress(OSError):
            self.answer(self.listener.accept()[0])

    def answer(self, connection):
        with connection:
            if not self.rude:
                connection.recv(1000, socket.MSG_PEEK if self.deaf else 0)
            for data in self.sends:
                connection.sendall(data)
                time.sleep(0.01)
            if self.hang:
                connection.recv(1000)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *exc):
        self.thread.join()
        self.listener.close()


def num(value):
    """LEB128"""
    out = b""
    while value > 0x7f:
        out += bytes([value & 0x7f | 0x80])
        value >>= 7
    return out + bytes([value])


def string(text):
    return num(len(text.encode())) + text.encode()


def frame(kind, *parts):
    payload = b"".join(parts)
    return struct.pack(">IB", 1 + len(payload), kind) + payload


WELCOME, REPLY, STATUS = 65, 66, 68
welcome = frame(WELCOME, num(1), string("a"))


def status_frame(*found):
    return frame(STATUS, num(1), num(len(found)), *(
        num(len(row)) + b"".join(string(k) + string(v)
                                 for k, v in row.items()) for row in found))


ROWS = ({"zebra": "1", "node": "a", "error": "line\nbreak\ttab \"ü\"",
         "rejected": "0", "position": "1-1"},
        {"peer": "b", "node": "a", "lag": ""})


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_status_prints_what_it_gets(stopped, tmp_path, formatter):
    """Columns in our order whatever the order of the fields, unknown ones
    before the error, nothing that breaks a line."""
    path = str(tmp_path / "s")
    data = welcome + status_frame(*ROWS)
    with FakeQueue(path, data[:3], data[3:70], data[70:]):
        out, _ = dovetail(stopped.a, "status", "-a", path,
                          formatter=formatter)
    if formatter == "json":
        error = json.loads(out)[0]["error"]
        assert [list(row.values()) for row in json.loads(out)] == [
            ["a", "-", "-", "1-1", "0", "1", error],
            ["a", "b", "-", "-", "-", "-", "-"]]
        assert list(json.loads(out)[0]) == [
            "node", "peer", "lag", "position", "rejected", "zebra", "error"]
        assert error.startswith("line") and error.endswith('tab "ü"')
        assert not re.search("[\x00-\x1f]", error)
    else:
        lines = out.rstrip("\n").split("\n")
        assert len(lines) == {"flow": 2, "pager": 15}.get(formatter, 3)
    if formatter == "tab":
        assert all(line.count("\t") == 6 for line in lines)


def test_status_of_nothing(stopped, tmp_path):
    path = str(tmp_path / "s")
    with FakeQueue(path, welcome + status_frame({}, {"node": "a"}, {})):
        assert ask(stopped.a, "status", "-a", path) == [{"node": "a"}]


def test_status_hangs_up_at_once(stopped, tmp_path):
    """Before, while or after doveadm writes: as it happens."""
    for n in range(20):
        path = str(tmp_path / str(n))
        with FakeQueue(path, rude=True):
            _, err = dovetail(stopped.a, "status", "-a", path, exit=TEMPFAIL)
        assert "hung up" in err


def test_status_is_brief_unless_told(stopped, tmp_path):
    for i, (options, header) in enumerate([
            ((), ["node", "peer", "lag", "zebra", "error"]),
            (("-v",), ["node", "peer", "lag", "position", "rejected", "zebra",
                       "error"])]):
        path = str(tmp_path / str(i))
        with FakeQueue(path, welcome + status_frame(*ROWS)):
            out, _ = dovetail(stopped.a, "status", "-a", path,
                              options=options)
        assert out.split("\n")[0].split() == header


def test_status_tells_what_is_wrong_at_the_end(stopped, tmp_path):
    """A brief table stays in line, also in a pipe, which has 80 columns."""
    path = str(tmp_path / "s")
    found = [{"node": "a", "peer": "b", "connection": connection,
              "error": error, "lag": "0.001"}
             for connection, error in [("ok", ""), ("it " + "x" * 40, ""),
                                       ("no", "no"), ("no", "bad")]]
    with FakeQueue(path, welcome + status_frame(*found)):
        out, _ = dovetail(stopped.a, "status", "-a", path)
    assert [line.rstrip() for line in out.splitlines()] == [
        "node peer connection   lag error",
        "a    b    ok         0.001 -",
        "a    b    failed     0.001 it " + "x" * 40,
        "a    b    failed     0.001 no",
        "a    b    failed     0.001 no; bad"]


@pytest.mark.parametrize("sends,exit,what", [
    ((), TEMPFAIL, "hung up"),
    ((welcome,), TEMPFAIL, "hung up"),
    ((welcome, status_frame(*ROWS)[:40]), TEMPFAIL, "hung up"),
    ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), PROTOCOL, "not a dovetail-queue"),
    ((frame(WELCOME),), PROTOCOL, "not a dovetail-queue"),
    ((status_frame(*ROWS),), PROTOCOL, "not a dovetail-queue"),
    ((frame(WELCOME, num(2), string("a")),), PROTOCOL, "version 2"),
    ((welcome, frame(STATUS, num(1), num(2 ** 60), num(2 ** 60))), PROTOCOL,
     "cannot be read"),
    ((welcome, status_frame(*ROWS)[:4] + b"\x44" +
      status_frame(*ROWS)[5:-1] + b"\xff"), PROTOCOL, "cannot be read"),
    ((welcome, frame(REPLY, num(1), b"\x03", string("go away"))), NOPERM,
     "go away"),
], ids=range(10))
@pytest.mark.parametrize("deaf", [False, True])
def test_status_of_a_stranger(stopped, tmp_path, sends, exit, what, deaf):
    path = str(tmp_path / "s")
    with FakeQueue(path, *sends, deaf=deaf):
        out, err = dovetail(stopped.a, "status", "-a", path, exit=exit)
    assert out == "" and path in err and what in err


def test_status_without_an_answer(stopped, tmp_path):
    path = str(tmp_path / "s")
    with FakeQueue(path, welcome, hang=True):
        start = time.monotonic()
        out, err = dovetail(stopped.a, "status", "-a", path, exit=TEMPFAIL)
        assert 4.5 < time.monotonic() - start < 8
    assert out == "" and "within 5 s" in err


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_status_without_the_service(stopped, formatter):
    out, err = dovetail(stopped.a, "status", exit=TEMPFAIL,
                        formatter=formatter)
    assert "dovetail-queue" in err and "not reachable" in err
    assert out.strip() in ("", "[]")


def test_status_with_a_socket_nobody_listens_to(stopped, tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
    start = time.monotonic()
    _, err = dovetail(stopped.a, "status", "-a", path, exit=TEMPFAIL)
    assert "Connection refused" in err and time.monotonic() - start < 5


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_status_of_a_node(running, formatter):
    node = running.a
    wait_for(lambda: any(
        row.get("peer") == "b" for row in
        ask(node, "status")),
        "a row about the peer")
    out, err = dovetail(node, "status", formatter=formatter)
    assert err == ""
    if formatter == "json":
        found = json.loads(out)
        assert found and all(row.keys() == found[0].keys() for row in found)
        assert {row["node"] for row in found} == {"a"}
        assert "b" in {row["peer"] for row in found}
    elif formatter in ("table", "tab"):
        assert out.split()[0] == "node" and len(out.splitlines()) > 1
    elif formatter == "flow":
        assert out.startswith("node=a ")
    else:
        assert out.startswith("node: a\n")


def test_status_before_redis_was_reached(new_cluster):
    cluster = new_cluster()
    cluster.b.stop()
    cluster.redis.pause()
    cluster.expect_errors("(?i)redis")
    cluster.b.start()

    def connections():
        found = {row["connection"] for row in ask(cluster.b, "status")}
        return not any("worker" in text for text in found) and found
    found = wait_for(connections, "the workers")
    cluster.redis.resume()
    assert found == {"connecting to Redis"}


def test_status_is_not_for_everybody(running):
    done = subprocess.run(
        running.a.line.command("doveadm", "-c", running.a.conf, "dovetail",
                               "status", user="dovenull"),
        capture_output=True, text=True, timeout=60)
    assert done.returncode == NOPERM and done.stdout == ""
    assert "Permission denied" in done.stderr


# -- status of users

def test_status_of_a_user(running):
    user = running.user()
    with user.imap() as session:
        session.do('CREATE "Gr&APwA3w-e"')
        session.append("INBOX", mail("one"), mail("two"))
    user.wait_equal()
    out = {}
    for formatter in FORMATTERS:
        out[formatter], err = dovetail(running.a, "status", "-u", user,
                                       formatter=formatter)
        assert err == ""
    found = {row["mailbox"]: row for row in json.loads(out["json"])}
    assert set(found) == {"INBOX", "Grüße"}
    inbox = found["INBOX"]
    assert (inbox["role"], inbox["primary"], inbox["state"],
            inbox["unqueued"], inbox["applied"], inbox["messages"],
            inbox["uidnext"]) == ("primary", "a", "ok", "0", "-", "2", "3")
    assert len(out["table"].splitlines()) == 3
    assert len(out["tab"].splitlines()) == 3
    assert out["flow"].count("mailbox=") == 2
    assert out["pager"].count("mailbox: ") == 2

    replica = rows(running.b, "-u", user)["INBOX"]
    assert (replica["role"], replica["primary"], replica["state"],
            replica["queued"], replica["unqueued"], replica["messages"],
            replica["uidnext"]) == ("replica", "a", "ok", "-", "-", "2", "3")
    place = [tuple(map(int, POSITION.match(text).groups()))
             for text in (inbox["queued"], replica["applied"])]
    assert place[1] >= place[0]


def test_status_of_several_users(running, tmp_path):
    here, there = running.user(), running.user(primary=running.b)
    for user in here, there:
        user.lmtp(mail("hello"))
        user.wait_equal()
    (tmp_path / "users").write_text("%s\n%s\n" % (there, here))
    for args, wanted in [
            (("-A",), {str(u) for u in running.users}),
            (("-u", "u*"), {str(u) for u in running.users}),
            (("-F", tmp_path / "users"), {str(here), str(there)})]:
        found = ask(running.a, "status", *args, "INBOX")
        assert {row["username"] for row in found} >= {str(here), str(there)}
        assert {row["username"] for row in found} <= wanted
        assert {row["mailbox"] for row in found} == {"INBOX"}
        role = {row["username"]: (row["role"], row["primary"])
                for row in found}
        assert role[str(here)] == ("primary", "a")
        assert role[str(there)] == ("replica", "b")
    out, _ = dovetail(running.a, "status", "-A")
    assert out.split()[:2] == ["Username", "mailbox"]


def test_status_masks(running):
    user = running.user()
    for name in "Work", "Work/Old", "Play":
        user.doveadm("mailbox create", name)
    for masks, wanted in [
            (["Work"], {"Work"}), (["W*"], {"Work", "Work/Old"}),
            (["%"], {"INBOX", "Work", "Play"}), (["INBOX", "Play"],
                                                 {"INBOX", "Play"}),
            (["nothing"], set())]:
        assert set(rows(running.a, "-u", user, *masks)) | {"INBOX"} == \
            wanted | {"INBOX"}


def test_status_of_nobody(running):
    out, err = dovetail(running.a, "status", "-u", "stranger", exit=NOUSER,
                        formatter="json")
    assert json.loads(out) == [] and "doesn't exist" in err


def test_status_sees_what_is_not_queued_and_changes_nothing(running):
    """Written without the plugin, the changes wait in the mailbox' log until
    a process with it looks; doveadm dovetail status does not count as one."""
    user = running.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    before = rows(running.a, "-u", user)["INBOX"]
    assert (before["state"], before["unqueued"]) == ("ok", "0")

    running.a.doveadm("-o", "mail_plugins=", "save", "-u", user,
                      input=mail("two"))
    for _ in range(2):
        found = rows(running.a, "-u", user)["INBOX"]
        assert found["state"] == "pending" and int(found["unqueued"]) > 0
        assert (found["queued"], found["messages"]) == (before["queued"], "2")
        assert rows(running.b, "-u", user)["INBOX"]["messages"] == "1"

    user.look(node=running.a)
    user.wait_equal()
    found = rows(running.a, "-u", user)["INBOX"]
    assert (found["state"], found["unqueued"]) == ("ok", "0")


def test_status_of_a_rebuilt_index(running):
    user = running.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    running.a.doveadm("-o", "mail_plugins=", "force-resync", "-u", user,
                      "INBOX")
    found = rows(running.a, "-u", user)["INBOX"]
    assert (found["state"], found["unqueued"]) == ("snapshot", "-")


def test_status_of_a_mailbox_that_never_was_replicated(stopped):
    """The positions are read from the indexes; no service is needed but the
    userdb, which knows no user here."""
    _, err = dovetail(stopped.a, "status", "-u", "u1", exit=TEMPFAIL)
    assert "auth-userdb" in err


# -- the same over HTTP

def test_http(new_cluster):
    port = free_port()
    cluster = new_cluster(["sdbox", "sdbox"], node_options={"a": {"conf": """
doveadm_password = secret
service doveadm {
  inet_listener http {
    port = %d
  }
}
""" % port}})
    user = cluster.user()
    user.lmtp(mail("one"))

    def post(name, **parameters):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST", "/doveadm/v1", json.dumps([[name, parameters, "t"]]),
            {"Content-Type": "application/json", "Authorization": "Basic " +
             base64.b64encode(b"doveadm:secret").decode()})
        (kind, body, tag), = json.loads(connection.getresponse().read())
        assert tag == "t"
        return kind, body

    kind, body = post("dovetailStatus")
    assert kind == "doveadmResponse" and body[0]["node"] == "a"
    kind, body = post("dovetailStatus", user=str(user), mailboxMask=["INBOX"])
    assert kind == "doveadmResponse" and body[0]["messages"] == "1"
    kind, body = post("dovetailPeers")
    assert [row["status"] for row in body] == ["ok", "ok"]
    cluster.expect_errors("a.key exists already")
    assert post("dovetailKeygen") == ("error", {"type": "exitCode",
                                               "exitCode": CANTCREAT})


# -- the example configuration

EXAMPLE = os.path.join(os.path.dirname(__file__), "..", "..", "plugin",
                       "example-config", "conf.d-%s", "90-dovetail.conf")


def example(cluster, node, uncommented):
    """The example with the cluster's names in it. uncommented: with all
    defaults as settings."""
    text = read(EXAMPLE % node.line.name)
    if uncommented:
        text, count = re.subn(r"(?m)^( *)#(dovetail_\w+ = )", r"\1\2", text)
        assert count >= 8
    text = text.replace("user = vmail", "user = " + MAIL_USER)
    peer, = (n.name for n in cluster.nodes if n is not node)
    return text + "\n" + node.line.settings({
        "dovetail_node": node.name, "dovetail_peers": peer,
        "dovetail_redis": cluster.redis.url, "dovetail_key_dir": node.key_dir,
        "dovetail_state_dir": os.path.join(node.state_dir, "dovetail")})


@pytest.mark.parametrize("uncommented", [False, True])
def test_example_configuration(new_cluster, uncommented):
    def configure(node):
        """Nothing of what the fixture would say about dovetail; the plugin as
        the example says it."""
        node.plugin = False
        node.extra_conf = example(cluster, node, uncommented)
        Node.write_conf(node)
        if node.line.is_24:
            return
        text, count = re.subn(r"(?m)^mail_plugins = $",
                              "mail_plugins = $mail_plugins dovetail",
                              read(node.conf))
        assert count == 1
        with open(node.conf, "w") as f:
            f.write(text)

    cluster = new_cluster(start=False)
    for node in cluster.nodes:
        node.write_conf = functools.partial(configure, node)
    cluster.start()
    user = cluster.user()
    user.lmtp(mail("one"))
    user.wait_equal()
    assert rows(cluster.b, "-u", user)["INBOX"]["state"] == "ok"
