"""dovetail_health_hook and dovetail_health_webhook: a program that is run, and a web
server that is asked, when a state changes."""

import contextlib
import http.server
import json
import os
import re
import ssl
import subprocess
import tempfile
import threading
import time

from cluster import children, wait_for
from test_health import (FAST, OUTAGE, Policy, diverge, metrics, policy,
                         wait_ok, wait_state)
from test_verify import filled

HOOK = """#!/bin/sh
umask 0
new={dir}/$DOVETAIL_NODE.$(date +%s.%N)
{{ env | grep ^DOVETAIL_ | tr '\\n' '\\0'; printf '\\0'; cat; }} >{dir}/.$$
mv {dir}/.$$ $new
"""
# It has a child of its own, and neither wants to go.
HANGING = """#!/bin/sh
trap '' TERM
echo $$ >{dir}/pid
sleep 1000 &
wait
sleep 1000
"""


class Hook:
    """A program, and what it has been told."""

    def __init__(self, text=HOOK):
        # the other Dovecot's system has its own root and our /tmp
        self.tmp = tempfile.TemporaryDirectory(prefix="dovetail-hook.",
                                               dir="/tmp")
        self.dir = self.tmp.name
        self.program = os.path.join(self.dir, ".program")
        with open(self.program, "w") as f:
            f.write(text.format(dir=self.dir))
        os.chmod(self.dir, 0o777)
        os.chmod(self.program, 0o755)

    def messages(self, node):
        """[(environment, text)] in their order."""
        found = []
        for name in sorted(os.listdir(self.dir)):
            if name.startswith(node + "."):
                with open(os.path.join(self.dir, name)) as f:
                    env, _, text = f.read().partition("\0\0")
                found.append((dict(v.split("=", 1) for v in env.split("\0")),
                              text))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.tmp.cleanup()


class Web:
    """A web server, and what it has been told."""

    def __init__(self, tls=None, port=0):
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.headers["Content-Type"] == "application/json"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                web.got.append((self.path, json.loads(body)))
                web.slow.wait()
                self.send_response(web.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self.got, self.status = [], 204
        self.slow = threading.Event()
        self.slow.set()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port),
                                                      Handler)
        self.server.daemon_threads = True
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.server.socket = context.wrap_socket(self.server.socket,
                                                     server_side=True)
        self.port = self.server.server_address[1]
        self.url = "%s://127.0.0.1:%d/told?by=dovetail" % (
            "https" if tls else "http", self.port)
        threading.Thread(target=self.server.serve_forever, args=(0.05,),
                         daemon=True).start()

    def messages(self, node):
        return [body for path, body in list(self.got) if
                body["node"] == node and path == "/told?by=dovetail"]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.slow.set()
        self.server.shutdown()
        self.server.server_close()


def changes(messages, about):
    """[(state before, state)] of one thing."""
    return [(change["state_before"], change["state"]) for message in messages
            for change in message["changes"] if change["about"] == about]


def test_told_once(new_cluster):
    with Hook() as hook, Web() as web:
        cluster = new_cluster(["sdbox", "sdbox"], settings=dict(
            FAST, dovetail_health_hook=hook.program,
            dovetail_health_webhook=web.url))
        a, b = cluster.nodes
        wait_ok(a, b)
        user = filled(cluster)
        user.wait_equal()
        wait_ok(a, b)
        # catching up for a moment, and beginning, are not worth a message
        assert hook.messages("a") == web.messages("a") == []

        b.stop()
        wait_for(lambda: changes(web.messages("a"), "a to b")[-1:] and
                 changes(web.messages("a"), "a to b")[-1][1] == "stalled",
                 "the web server to be told")
        message = web.messages("a")[-1]
        assert message["subject"].startswith("dovetail on a: a ")
        change, = [c for c in message["changes"] if c["about"] == "a to b"]
        assert (change["kind"], change["peer"], change["who"]) == (
            "to", "b", "peer")
        assert change["reason"].startswith("b has not been heard of")
        assert 0 <= time.time() - change["since"] < 60
        assert {key: message[key] for key in change} == max(
            message["changes"], key=lambda c: c["state"] == "stalled")

        # the program is told the same, with everything in it
        wait_for(lambda: "a to b is stalled" in "".join(
            text for _, text in hook.messages("a")), "the program to be told")
        env, text = hook.messages("a")[-1]
        assert env["DOVETAIL_NODE"] == "a" and \
            env["DOVETAIL_STATE"] == "stalled"
        assert text.startswith(env["DOVETAIL_SUBJECT"] + "\n\n")
        assert "(it was " in text and "  Why:  b has not been heard" in text
        assert "  Do:   Start its Dovecot" in text
        assert "  Who:  the administrator of b.\n" in text

        b.start()
        wait_ok(a, b)
        wait_for(lambda: changes(web.messages("a"), "a to b")[-1] == (
            "stalled", "ok"), "the web server to be told that all is well")
        wait_for(lambda: "All is well on a now." in
                 (hook.messages("a")[-1][1]), "the program to be told")

        # Each message begins where the one before has ended: nothing is told
        # twice, and nothing is left out.
        for node in (a, b):
            for about in ("a", "a to b", "a from b", "b to a"):
                states = ["ok"]
                for before, after in changes(web.messages(node.name), about):
                    assert before == states[-1] != after
                    states.append(after)
                assert states[-1] == "ok"
        count = len(web.got), len(hook.messages("a"))
        time.sleep(4)
        assert (len(web.got), len(hook.messages("a"))) == count


def test_users(new_cluster):
    """One message for several users, and what is to be done about each."""
    with Web() as web:
        cluster = new_cluster(["sdbox", "maildir"], settings=dict(
            FAST, dovetail_health_webhook=web.url))
        a, b = cluster.nodes
        users = [filled(cluster) for _ in range(3)]
        wait_ok(a, b)
        for user in users:
            user.wait_equal()
        for user in users:
            diverge(user)
        for node in (a, b):
            for user in users:
                wait_for(lambda: changes(web.messages(node.name), user.name)
                         == [("ok", "diverged")], "a message about " +
                         user.name)
            assert len(web.messages(node.name)) <= 3
            text = "".join(m["text"] for m in web.messages(node.name))
            for user in users:
                assert "user %s is diverged (it was ok)" % user.name in text
                assert "doveadm dovetail verify -u %s" % user.name in text
        a.doveadm("expunge", "-u", users[0].name, "mailbox", "INBOX", "all")
        a.doveadm("mailbox", "delete", "-u", users[0].name, "Work")
        wait_for(lambda: changes(web.messages("a"), users[0].name) ==
                 [("ok", "diverged"), ("diverged", "ok")], "a message")


def test_web_server_is_away(new_cluster):
    """It is only logged, once, and what is told later is what is then."""
    with Web() as web:
        port, url = web.port, web.url
    cluster = new_cluster(["sdbox", "sdbox"], settings=dict(
        FAST, dovetail_health_webhook=url))
    a = cluster.a
    wait_ok(a)
    cluster.expect_errors(*OUTAGE)
    cluster.redis.stop()
    wait_state(a, "unprotected")
    a.wait_log(r"dovetail_health_webhook: The message was not taken, trying "
               r"again: .*127.0.0.1")
    assert policy(a) == "DUNNO"
    with Web(port=port) as web:
        # refused, for a start
        web.status = 500
        wait_for(lambda: web.messages("a"), "another try")
        web.status = 200
        wait_for(lambda: len(web.messages("a")) >= 2, "one more")
        a.wait_log("dovetail_health_webhook: The message was taken")
        for message in web.messages("a"):
            assert changes([message], "a") == [("ok", "unprotected")]
            assert "Do:   Bring Redis back.\n" in message["text"]
            assert "Who:  whoever runs Redis.\n" in message["text"]
        assert a.log_text().count("The message was not taken") == 1
        cluster.redis.start()
        wait_ok(a)
        wait_for(lambda: changes(web.messages("a"), "a")[-1] ==
                 ("unprotected", "ok"), "all to be well")


def test_certificate_is_checked(new_cluster):
    with tempfile.TemporaryDirectory() as directory:
        key, cert = (os.path.join(directory, f) for f in ("key", "cert"))
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048",
                        "-nodes", "-subj", "/CN=127.0.0.1", "-addext",
                        "subjectAltName=IP:127.0.0.1", "-keyout", key,
                        "-out", cert], check=True, stderr=subprocess.DEVNULL)
        with Web(tls=(cert, key)) as web:
            cluster = new_cluster(["sdbox", "sdbox"], settings=dict(
                FAST, dovetail_health_webhook=web.url))
            a = cluster.a
            wait_ok(a)
            cluster.expect_errors(*OUTAGE)
            cluster.redis.stop()
            a.wait_log(r"dovetail_health_webhook: The message was not taken, "
                       r"trying again: .*certificate")
            assert not web.got
            cluster.redis.start()
            wait_ok(a)


def times_of(connection, count=1000):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        connection.ask()
        times.append(time.perf_counter() - start)
    return sorted(times)


def alive(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True


def test_neither_ends(new_cluster):
    """A program that hangs, and a web server that does not answer: one of each
    at a time, for a limited time, and the service goes on."""
    with Hook(HANGING) as hook, Web() as web:
        web.slow.clear()
        cluster = new_cluster(["sdbox", "sdbox"], settings=dict(
            FAST, dovetail_health_hook=hook.program,
            dovetail_health_webhook=web.url))
        a, b = cluster.nodes
        wait_ok(a)
        cluster.expect_errors(*OUTAGE)
        service, = a.pids("dovetail-health")
        with Policy(a) as connection:
            b.stop()
            wait_for(lambda: web.messages("a"), "the web server to be asked")
            pid, = wait_for(lambda: children(service), "the program")
            wait_for(lambda: len(children(pid)) == 1, "its child")
            group = [pid, *children(pid)]
            # nothing of ours is in its hands: no connection stays open
            # because of it
            assert not [fd for fd in os.listdir("/proc/%d/fd" % pid)
                        if re.search("socket:|anon_inode:", os.readlink(
                            "/proc/%d/fd/%s" % (pid, fd)))]
            # more happens
            cluster.redis.stop()
            wait_state(a, "unprotected")
            times = times_of(connection)
            assert times[500] < 0.01
            assert children(service) == [pid]
            assert len(web.messages("a")) == 1
        a.wait_log(r"dovetail_health_hook: .* has not ended after 30 s",
                   timeout=60)
        wait_for(lambda: not any(map(alive, group)), "all of it to be ended")
        a.wait_log(r"dovetail_health_webhook: .*not taken.*")
        web.slow.set()
        wait_for(lambda: ("ok", "unprotected") in
                 changes(web.messages("a"), "a"), "the web server to be told")
        assert a.pids("dovetail-health") == [service]
        assert metrics(a)["dovetail_redis_up"] == 0
        cluster.redis.start()


def test_program_fails(new_cluster):
    with Hook("#!/bin/sh\necho this goes wrong\nexit 3\n") as hook:
        cluster = new_cluster(["sdbox", "sdbox"], settings=dict(
            FAST, dovetail_health_hook=hook.program))
        a = cluster.a
        wait_ok(a)
        cluster.expect_errors(*OUTAGE, "this goes wrong")
        cluster.redis.stop()
        a.wait_log("dovetail_health_hook: .* ended with exit status 3")
        a.wait_log("this goes wrong")
        cluster.redis.start()
        wait_ok(a)
