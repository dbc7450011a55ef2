"""The page for people, in a real browser: what is on it, that it keeps itself up to
date, and that names are shown to those only who may see them.

DOVETAIL_TEST_SCREENSHOTS=DIR keeps pictures of it."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time

import pytest

from cluster import free_port, mail, wait_for
from test_health import FAST, ask, diverge, health, http, wait_ok
from test_verify import filled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# a telephone
WIDTH, HEIGHT = 390, 844


class Browser:
    """Headless Chromium, spoken to in its own protocol over pipes."""

    def __init__(self):
        assert CHROMIUM, "Chromium is not installed (Debian: chromium)"
        self.dir = tempfile.TemporaryDirectory(prefix="dovetail-browser.")
        there, self.out = os.pipe()
        self.input, back = os.pipe()

        def child():
            # it reads from 3 and writes to 4
            os.dup2(there, 100)
            os.dup2(back, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)
            os.closerange(5, 102)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking",
             "--user-data-dir=" + self.dir.name, "--remote-debugging-pipe"],
            preexec_fn=child, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self.count, self.buffer, self.session = 0, b"", None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call(
            "Target.attachToTarget", targetId=target["targetId"],
            flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Network", "Runtime"):
            self.call(domain + ".enable")
        self.call("Emulation.setDeviceMetricsOverride", width=WIDTH,
                  height=HEIGHT, deviceScaleFactor=2, mobile=True)

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            while b"\0" not in self.buffer:
                left = deadline - time.monotonic()
                ready, _, _ = select.select([self.input], [], [], left)
                assert ready, "%s: no answer" % method
                data = os.read(self.input, 1 << 20)
                assert data, "the browser has ended"
                self.buffer += data
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") != self.count:
                self.events.append(answer)
                continue
            assert "error" not in answer, (method, answer["error"])
            return answer["result"]

    def open(self, url):
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.js("document.querySelector('#node') !== null"),
                 "the page")

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression,
                           returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector="main"):
        return self.js("(document.querySelector(%s) || {}).innerText || ''" %
                       json.dumps(selector))

    def picture(self, name):
        height = self.js("document.documentElement.scrollHeight")
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                         clip={"x": 0, "y": 0, "width": WIDTH,
                               "height": height, "scale": 1})["data"]
        data = base64.b64decode(data)
        assert data.startswith(b"\x89PNG")
        directory = os.environ.get("DOVETAIL_TEST_SCREENSHOTS")
        if directory:
            with open(os.path.join(directory, name + ".png"), "wb") as f:
                f.write(data)

    def requests(self):
        self.js("0")
        return [e["params"]["request"]["url"] for e in self.events
                if e["method"] == "Network.requestWillBeSent"]

    def complaints(self):
        """What the console says: what was blocked, exceptions, ..."""
        self.js("0")
        return [e for e in self.events if
                e["method"] == "Runtime.exceptionThrown" or
                e["method"] == "Log.entryAdded" and
                e["params"]["entry"]["level"] == "error"]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.input)
        self.dir.cleanup()


class Ports:
    """More of a node's configuration: TCP listeners for browsers."""

    def __init__(self):
        self.ports = []

    def __call__(self, line):
        http, admin = free_port(), free_port()
        self.ports.append((http, admin))
        return "service dovetail-health {\n%s}\n" % "".join("""
  inet_listener dovetail-%s {
    %s = 127.0.0.1
    port = %d
  }
""" % (name, "listen" if line.is_24 else "address", port) for name, port in
            (("http", http), ("admin", admin)))


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def admin(node, target, host="localhost"):
    answer = ask(node, "admin", (
        "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (
            target, host)).encode()).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


def test_page(new_cluster, browser):
    ports = Ports()
    cluster = new_cluster(["sdbox", "maildir"], settings=FAST, conf=ports)
    a, b = cluster.nodes
    user, other = filled(cluster), filled(cluster)
    for u in (user, other):
        u.wait_equal()
    wait_ok(a, b)
    url = "http://127.0.0.1:%d/" % ports.ports[0][0]
    browser.open(url)
    wait_for(lambda: browser.js("document.title") == "a: ok", "all to be ok")
    text = browser.text()
    for expected in (r"a \(primary\)", "a to b\n", "a from b\n",
                     r"Behind\s+0\.\d+ s", r"Behind, last hour",
                     r"In Redis\s+\d+ entries, .* of 1\.0 GiB",
                     r"Last verification\s+(not yet|.* ago)", "Users: all ok"):
        assert re.search(expected, text), (expected, text)
    # a telephone need not be moved sideways
    assert browser.js("document.documentElement.scrollWidth") <= WIDTH
    wait_for(lambda: browser.js(
        "[...document.querySelectorAll('#plot path')].some("
        "p => p.getAttribute('d').length > 10)"), "the plot")
    assert browser.js("document.querySelectorAll('#plot rect').length") >= 1
    browser.picture("ok")

    # Something goes wrong: it is there within seconds, without anybody's doing
    start = time.monotonic()
    diverge(user)
    wait_for(lambda: "diverged" in browser.text("#node"), "it to be shown", 10)
    print("a divergence was on the page after %.1f s" %
          (time.monotonic() - start))
    assert browser.js("document.title") == "a: diverged"
    wait_for(lambda: "1 not ok" in browser.text("#users"), "the user", 10)
    # but not who it is
    assert user.name not in browser.text("body")
    assert "Do\nLook with \"doveadm dovetail verify --explain\"" in \
        browser.text("main")
    browser.picture("diverged")

    # ... unless one may see that
    browser.open("http://127.0.0.1:%d/" % ports.ports[0][1])
    wait_for(lambda: user.name in browser.text("#users"), "the user's name")
    text = browser.text("#users")
    assert "INBOX" in text and "diverged" in text and other.name not in text
    assert "verify -u %s --explain" % user.name in text
    assert browser.js("document.documentElement.scrollWidth") <= WIDTH
    browser.picture("admin")

    # nothing was loaded from elsewhere, and nothing went wrong in the page
    assert {request.split("/")[2].split(":")[0] for request in
            browser.requests() if request.startswith("http")} == {"127.0.0.1"}
    assert browser.complaints() == []

    # Nobody answers: what is on the page does not look as if it were so.
    with a.paused("dovetail-health"):
        wait_for(lambda: "has not answered for" in browser.text("#lost"),
                 "the silence to be shown", 30)
        browser.picture("lost")
    wait_for(lambda: browser.js("document.getElementById('lost').hidden"),
             "the page to go on", 30)


def test_hostile_names(new_cluster, browser):
    """What others may choose is text on the page."""
    ports = Ports()
    cluster = new_cluster(["sdbox", "maildir"], settings=FAST, conf=ports)
    a, b = cluster.nodes
    user = filled(cluster)
    name = "<b id=evil>'\"&lt;"
    user.doveadm("mailbox create", name)
    user.doveadm("move", name, "mailbox", "INBOX", "all")
    user.wait_equal()
    wait_ok(a, b)
    lost, = [os.path.join(directory, file) for directory, _, files in
             os.walk(os.path.join(b.home(user), "mail")) for file in files
             if ",S=" in file]
    os.unlink(lost)
    a.doveadm("dovetail", "verify", "-u", user.name, check=False)
    browser.open("http://127.0.0.1:%d/" % ports.ports[0][1])
    wait_for(lambda: name in browser.text("#users"), "the mailbox")
    assert browser.js("document.querySelector('#evil')") is None


def test_names(new_cluster):
    cluster = new_cluster(["sdbox", "maildir"], settings=FAST)
    a, b = cluster.nodes
    user = filled(cluster)
    user.wait_equal()
    wait_ok(a, b)
    assert admin(a, "/health")[0] == 200
    assert json.loads(admin(a, "/health")[1])["users"] == []
    diverge(user)
    wait_for(lambda: health(a)["users_not_ok"] == 1, "the user")
    row, = json.loads(admin(a, "/health")[1])["users"]
    assert (row["user"], row["mailbox"], row["state"]) == (
        user.name, "INBOX", "diverged")
    assert "users" not in health(a)
    for target in ("/", "/health", "/history", "/metrics"):
        assert user.name not in http(a, target)[1]
    # a browser that was led here by a page of somebody else says so
    for host in ("127.0.0.1:8080", "[::1]", "localhost:1"):
        assert admin(a, "/health", host)[0] == 200
    for host in ("evil.example.net", "localhost.evil.example.net", ""):
        code, body = admin(a, "/health", host)
        assert code in (400, 403) and user.name not in body


def test_history(new_cluster):
    cluster = new_cluster(["sdbox", "sdbox"], settings=FAST)
    a, b = cluster.nodes
    user = filled(cluster)
    user.wait_equal()
    wait_ok(a, b)

    def history():
        value = json.loads(http(a, "/history")[1])
        peer, = value["peers"]
        assert value["samples"] == len(value["states"]) == len(peer["to"]) == \
            len(peer["from"]) == 360
        return value, peer

    # what was before the start is not known, and one is of ten seconds
    value, peer = history()
    assert value["states"][:300] == [None] * 300 == peer["to"][:300]
    assert peer["to"][-1] is not None and peer["peer"] == "b"
    b.stop()
    user.lmtp(mail("two"))
    wait_for(lambda: max(v or 0 for v in history()[1]["to"]) > 5,
             "the lag to be in it")
    wait_for(lambda: 5 in history()[0]["states"], "stalled to be in it")
    rising = [v for v in history()[1]["to"] if v is not None]
    assert rising[-1] == max(rising)
