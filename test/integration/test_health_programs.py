"""dovetail-health with the programs that ask it, configured as the README says:
Postfix, Exim, HAProxy, curl, promtool, and a script as keepalived runs it."""

import contextlib
import os
import re
import subprocess

import pytest

from cluster import GONE, Cluster, mail, wait_for
from programs import (DOMAIN, POSTFIX_USER, Exim, HaProxy, Place, Postfix,
                      program, readme, settings)
from test_health import (FAST, OUTAGE, diverge, path, policy, route, wait_ok,
                         wait_state, without_domain)
from test_verify import filled


# What Dovecot logs when clients come while it is told to reload.
RELOAD = (r"stats-writer", r"-login: Error: master\(imap\): ",
          r"auth-master: login: .* Login auth request failed",
          r"Master requested auth for nonexistent client")


def subjects(node, user):
    """{subject: how often} as an IMAP client sees it, {} when it gets no
    answer."""
    try:
        with node.imap(user) as session:
            session.select()
            found = session.do("UID FETCH 1:*",
                               "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])",
                               wanted="FETCH")
    except GONE:
        return {}
    names = [re.search(rb"(?i)subject: (\S+)", row[1])[1].decode()
             for row in found if isinstance(row, tuple)]
    return {name: names.count(name) for name in names}


def address(user):
    return "%s@%s" % (user, DOMAIN)


class Site:
    """Two nodes, an MX on node a with the README's configuration, and the
    sender's MTA, which keeps what the MX does not take."""

    def __init__(self):
        self.place = Place()
        self.mx, self.sender = Postfix(), Postfix()
        self.mx.configure(self.main_cf(True))
        self.sender.configure(
            "mynetworks = 127.0.0.0/8\nrelayhost = [127.0.0.1]:%d\n" %
            self.mx.port)
        options = {name: {"conf": self.conf(name)} for name in "ab"}
        self.cluster = Cluster(
            ["sdbox", "maildir"], node_options=options, users=40,
            settings=dict(FAST, **{
                name: self.place.local(value) for name, value in
                settings("dovetail_health_transports = ").items()}))
        self.number = 0

    def main_cf(self, routed):
        text = readme("virtual_transport = ")
        if routed:
            text += readme("transport_maps = ")
        return self.place.local(text)

    def conf(self, name):
        def conf(line):
            text = without_domain(line) + self.place.lmtp(name)(line)
            if name == "a":
                text += readme("/private/dovetail-policy {").replace(
                    "/var/spool/postfix", self.mx.queue).replace(
                    "= postfix", "= " + POSTFIX_USER)
            return text
        return conf

    @property
    def nodes(self):
        return self.cluster.nodes

    def user(self, *args, **kwargs):
        return self.cluster.user(*args, **kwargs)

    def message(self):
        """(subject, message)"""
        self.number += 1
        subject = "mail-%d" % self.number
        return subject, mail("hello", subject=subject)

    def post(self, *users, mta=None):
        """By way of the sender's MTA, which must take it; returns the
        subject."""
        subject, message = self.message()
        answers = (mta or self.sender).send(message, *map(address, users))
        assert all(code == 250 for code, _ in answers.values()), answers
        return subject

    def wait_there(self, user, *wanted, node=None, timeout=30):
        """On the node that is the primary, and once each."""
        node = node or user.primary

        def look():
            found = subjects(node, user)
            return found if set(wanted) <= set(found) else None
        found = wait_for(look, "%s of %s on %s" % (wanted, user, node.name),
                         timeout)
        assert {found[name] for name in wanted} == {1}, found

    def wait_queued(self, sender, mx):
        """Until so many mails wait at each."""
        wait_for(lambda: (self.sender.queued(), self.mx.queued()) ==
                 (sender, mx), "%d mails to wait at the sender, %d at the MX" %
                 (sender, mx), 30)

    def start(self):
        self.mx.start()
        self.sender.start()
        wait_ok(*self.nodes)

    def close(self):
        for server in (self.sender, self.mx, self.cluster):
            server.close()


@pytest.fixture(scope="module")
def site():
    site = Site()
    try:
        site.start()
        yield site
    finally:
        site.close()


@pytest.fixture
def well(site):
    """The same, and all is well, and nothing waits."""
    wait_ok(*site.nodes)
    site.wait_queued(0, 0)
    return site


# ---- Postfix

def test_postfix_delivers(well):
    """Each recipient's mail goes to that user's primary."""
    a, b = well.nodes
    ann, ben = well.user(), well.user(primary=b)
    subject = well.post(ann, ben)
    well.wait_there(ann, subject, node=a)
    well.wait_there(ben, subject, node=b)
    for user, node in ((ann, "a"), (ben, "b")):
        assert re.search(r"postfix/lmtp.*to=<%s>, relay=%s\[.*status=sent" % (
            address(user), re.escape(well.place.address(node, "24")[0])),
            well.mx.log_text())
        user.wait_equal()
    # others' mail is not for us, and nothing else knows a way
    (_, text), = well.mx.send(b"x", "other@example.com").values()
    assert "Relay access denied" in text


def test_postfix_and_a_diverged_mailbox(well):
    a = well.nodes[0]
    user, other = filled(well.cluster), filled(well.cluster)
    wait_ok(*well.nodes)
    diverge(user)
    wait_state(a, "diverged", recipient=user.name)
    _, message = well.message()
    answers = well.mx.send(message, address(user), address(other))
    assert answers[address(user)][0] == 450
    assert "4.3.2" in answers[address(user)][1]
    assert "diverged" in answers[address(user)][1]
    assert answers[address(other)][0] == 250
    waits, goes = well.post(user), well.post(other)
    well.wait_there(other, goes)
    well.wait_queued(1, 0)
    assert waits not in subjects(a, user)
    a.doveadm("dovetail", "repair", "-u", user.name)
    well.wait_there(user, waits)
    user.wait_equal()


def test_postfix_and_no_protection(well):
    """Mail that nobody would protect waits outside, and comes once."""
    a = well.nodes[0]
    user, other = well.user(), well.user()
    well.cluster.expect_errors(*OUTAGE)
    well.cluster.redis.stop()
    try:
        wait_for(lambda: policy(a).startswith("DEFER_IF_PERMIT"),
                 "mail to be deferred")
        posted = [well.post(user, other) for _ in range(5)]
        wait_for(lambda: "450 4.3.2" in well.sender.log_text(),
                 "the sender to be told")
        well.wait_queued(5, 0)
        assert not subjects(a, user) and not subjects(a, other)
    finally:
        well.cluster.redis.start()
    for who in (user, other):
        well.wait_there(who, *posted)
        who.wait_equal()
    assert "status=bounced" not in well.sender.log_text()


def test_postfix_and_refusal(well):
    """Mail that was accepted waits in Postfix' queue with dovetail_ack_failure =
    refuse, and comes once."""
    a = well.nodes[0]
    user = well.user()
    well.cluster.expect_errors(*OUTAGE, *RELOAD)
    a.settings["dovetail_ack_failure"] = "refuse"
    a.reload()
    wait_ok(a)
    # as if it had been accepted before
    well.mx.configure(re.sub(r"(?s),\s+check_policy_service \{.*?\}", "",
                             well.main_cf(True)))
    well.mx.restart()
    well.cluster.redis.stop()
    try:
        wait_state(a, "unprotected")
        posted = [well.post(user) for _ in range(3)]
        well.wait_queued(0, 3)
        wait_for(lambda: re.search(
            r"status=deferred.*new messages cannot be replicated",
            well.mx.log_text(), re.I), "mail to be deferred")
        assert not subjects(a, user)
    finally:
        well.cluster.redis.start()
        well.mx.configure(well.main_cf(True))
        well.mx.restart()
    well.wait_there(user, *posted)
    user.wait_equal()
    del a.settings["dovetail_ack_failure"]
    a.reload()
    wait_ok(a)


def test_postfix_and_lost_nodes(well):
    """A node that is away keeps its users' mail waiting, and nobody else's."""
    a, b = well.nodes
    ann, ben = well.user(), well.user(primary=b)
    b.kill()
    first = well.post(ann, ben)
    well.wait_there(ann, first)
    well.wait_queued(0, 1)
    b.start()
    well.wait_there(ben, first)
    # That node of which the MX asks: Postfix has no default for that. (Of ann and
    # ben it may still know what it was told.)
    cat, dan = well.user(), well.user(primary=b)
    a.kill()
    try:
        second = well.post(cat, dan)
        wait_for(lambda: re.search(r"451 4\.3\.0.*Temporary lookup failure",
                                   well.sender.log_text()),
                 "the mail to wait")
    finally:
        a.start()
    # an smtpd remembers that there was no answer: what the README says
    well.mx.reload()
    for user in (cat, dan):
        well.wait_there(user, second)
        user.wait_equal()
        assert set(subjects(user.primary, user).values()) == {1}


def test_postfix_and_silence(well):
    """Without an answer mail goes on."""
    a, b = well.nodes
    ann = well.user()
    well.cluster.expect_errors(*RELOAD)
    well.mx.configure(well.main_cf(False))
    well.mx.restart()
    try:
        with a.paused("dovetail-health"):
            well.wait_there(ann, well.post(ann))
        assert "problem talking to server private/dovetail-policy" in \
            well.mx.log_text()
        a.doveadm("service", "stop", "dovetail-health")
        wait_for(lambda: not a.pids("dovetail-health"), "no dovetail-health")
        well.wait_there(ann, well.post(ann))
        # and what Postfix refuses then it refuses for ever without the
        # README's default_action
        well.mx.configure(well.main_cf(False).replace(
            "default_action=DUNNO", "try_limit=1"))
        well.mx.restart()
        waits = well.post(ann)
        wait_for(lambda: "Server configuration problem" in
                 well.sender.log_text(), "mail to be refused")
    finally:
        a.reload()
        # Postfix remembers for a while when there was no answer
        wait_state(a, "ok", "unknown", "catching-up")
        well.mx.configure(well.main_cf(True))
        well.mx.restart()
    well.wait_there(ann, waits)


def test_postfix_follows_the_primary(well):
    """... and so does mail that waits in its queue."""
    a, b = well.nodes
    user, other = well.user(), well.user(primary=b)
    well.cluster.expect_errors(*RELOAD)
    well.wait_there(user, well.post(user), node=a)
    user.wait_equal()
    try:
        a.doveadm("service", "stop", "lmtp")
        waits = well.post(user)
        well.wait_queued(0, 1)
        for node in well.nodes:
            node.settings["dovetail_primary"] = "b"
            node.reload()

        def told():
            with contextlib.suppress(OSError, AssertionError):
                return route(a, address(user))
        wanted = "OK lmtp:inet:%s:%d" % well.place.address("b", "24")
        wait_for(lambda: told() == wanted, "the new primary to be told")
        # Postfix remembers its last question for half a minute: another
        well.post(other)
        well.wait_there(user, waits, node=b)
        wait_ok(a, b)
        user.primary = b
        user.wait_equal()
    finally:
        for node in well.nodes:
            node.settings["dovetail_primary"] = "a"
            node.reload()
    wait_ok(a, b)


# ---- Exim

@pytest.fixture
def exim_site(new_cluster):
    place = Place()

    def conf(line):
        return without_domain(line) + place.lmtp("a")(line) + \
            readme("unix_listener dovetail-exim").replace(
                "mode = 0660\n    group = Debian-exim", "mode = 0666")
    cluster = new_cluster(["sdbox", "maildir"], users=20,
                          node_options={"a": {"conf": conf},
                                        "b": {"conf": without_domain}},
                          settings=dict(FAST, dovetail_health_defer=(
                              "unprotected diverged"),
                              dovetail_health_warn="stalled"))
    acl = readme("${readsocket{").replace("/run/dovecot/dovetail-exim",
                                          path(cluster.a, "exim"))
    cluster.exim = Exim(acl, place.address("a", "24"))
    try:
        cluster.exim.start()
        yield cluster
    finally:
        cluster.exim.close()


def test_exim(exim_site):
    a, b = exim_site.nodes
    exim = exim_site.exim
    user, other = filled(exim_site), filled(exim_site)
    wait_ok(a, b)
    number = iter(range(1, 100))

    def send(*users):
        subject = "mail-%d" % next(number)
        answers = exim.send(mail("hello", subject=subject),
                            *map(address, users))
        return subject, [answers[address(u)] for u in users]

    def there(who, subject):
        wait_for(lambda: subjects(a, who).get(subject), "%s: %s" % (
            who, subject))
        assert subjects(a, who)[subject] == 1

    subject, answers = send(user, other)
    assert [code for code, _ in answers] == [250, 250]
    there(user, subject)
    there(other, subject)

    # a mailbox that differs
    diverge(user)
    wait_state(a, "diverged", recipient=user.name)
    subject, answers = send(user, other)
    assert [code for code, _ in answers] == [451, 250]
    assert answers[0][1] == "Try again later"
    assert "dovetail: diverged: Mailbox INBOX differs" in exim.log_text()
    there(other, subject)
    assert subject not in subjects(a, user)
    a.doveadm("dovetail", "repair", "-u", user.name)
    wait_for(lambda: send(user)[1][0][0] == 250, "mail to be accepted")

    # a warning
    b.stop()
    wait_state(a, "stalled")
    subject, answers = send(user)
    assert answers[0][0] == 250
    assert "dovetail: stalled: b has not been heard of" in exim.log_text()
    there(user, subject)
    b.start()

    # no protection
    exim_site.expect_errors(*OUTAGE)
    exim_site.redis.stop()
    wait_for(lambda: policy(a).startswith("DEFER_IF_PERMIT"),
             "mail to be deferred")
    assert [code for code, _ in send(user, other)[1]] == [451, 451]
    exim_site.redis.start()
    wait_for(lambda: send(user)[1][0][0] == 250, "mail to be accepted")

    # silence
    wait_ok(a, b)
    with a.paused("dovetail-health"):
        subject, answers = send(user)
        assert answers[0][0] == 250
        there(user, subject)
    a.doveadm("service", "stop", "dovetail-health")
    wait_for(lambda: not a.pids("dovetail-health"), "no dovetail-health")
    subject, answers = send(user)
    assert answers[0][0] == 250
    there(user, subject)


# ---- HAProxy, keepalived

@pytest.fixture
def proxied(new_cluster):
    """Two nodes behind HAProxy, with the README's configuration."""
    place = Place()

    def conf(name):
        def text(line):
            text = readme("inet_listener dovetail-agent")
            if line.is_24:
                text = text.replace("address =", "listen =")
            if name == "b":
                text = text.replace("10.77.0.1", "10.77.0.2")
            host, port = place.address(name, "143")
            return without_domain(line) + place.lmtp(name)(line) + \
                place.local(text) + """
service imap-login {
  inet_listener imap-proxy {
    %s = %s
    port = %d
  }
}
""" % ("listen" if line.is_24 else "address", host, port)
        return text
    cluster = new_cluster(
        ["sdbox", "sdbox"], users=4, node_options={
            name: {"conf": conf(name)} for name in "ab"},
        settings=dict(FAST, dovetail_health_drain="lagging stalled",
                      dovetail_health_down="unprotected unknown"))
    cluster.place = place
    cluster.proxy = HaProxy(place.local(readme("default-server check")))
    cluster.proxy.start()
    yield cluster
    cluster.proxy.close()


class Proxy:
    """Where clients go."""

    def __init__(self, cluster):
        self.cluster = cluster

    def node(self, user):
        """Which node an IMAP client and an MTA get to, or None."""
        import imaplib
        import smtplib
        place = self.cluster.place
        with contextlib.suppress(OSError, imaplib.IMAP4.error,
                                 smtplib.SMTPException):
            with imaplib.IMAP4(*place.address("proxy", "143"),
                               timeout=10) as session:
                session.login(str(user), "pw")
                mailbox = "by-proxy"
                ok = session.create(mailbox)[0] == "OK"
                if ok:
                    session.delete(mailbox)
            with smtplib.LMTP(*place.address("proxy", "24"),
                              timeout=10) as session:
                banner = session.ehlo()[1].decode()
            name = re.match(r"(\w)\.example\.org", banner)[1]
            assert ok, "%s takes no writes" % name
            return name


def test_haproxy(proxied):
    """Clients are led to the primary; a back end leaves and returns."""
    a, b = proxied.nodes
    proxy, clients, user = proxied.proxy, Proxy(proxied), proxied.user()
    wait_ok(a, b)
    for listen in ("imap", "lmtp"):
        proxy.wait(listen, a="UP", b="DOWN")
    assert clients.node(user) == "a"

    # The agent speaks: nobody knows, so nobody new.
    with a.paused("dovetail-queue"):
        proxy.wait("imap", a="DOWN")
        assert clients.node(user) is None
    wait_for(lambda: clients.node(user) == "a", "clients to get back to a")

    # The replica is missed: clients stay, and no new ones come.
    with a.imap(user) as session:
        b.stop()
        proxy.wait("imap", 40, a="DRAIN")
        session.append("INBOX", mail("still there"))
        b.start()
    wait_for(lambda: clients.node(user) == "a", "clients to get back to a")

    # A node is gone, and is back.
    a.kill()
    proxy.wait("imap", a="DOWN", b="DOWN")
    a.start()
    wait_for(lambda: clients.node(user) == "a", "clients to get back to a")

    # Another primary.
    user.wait_equal()
    proxied.expect_errors(*RELOAD)
    for node in (a, b):
        node.settings["dovetail_primary"] = "b"
        node.reload()
    for listen in ("imap", "lmtp"):
        proxy.wait(listen, a="DOWN", b="UP")
    wait_for(lambda: clients.node(user) == "b", "clients to get to b")


def keepalived(number):
    """The command of one of the two scripts."""
    return re.findall(r'script "(.*)"', readme("vrrp_script dovetail"))[number]


def run_script(node, command):
    """As keepalived does, which splits words as a shell does; doveadm and
    Dovecot's directory are those of the node."""
    bin_dir = os.path.join(node.dir, "bin")
    if not os.path.isdir(bin_dir):
        os.mkdir(bin_dir)
        shim = os.path.join(bin_dir, "doveadm")
        with open(shim, "w") as f:
            f.write('#!/bin/sh\nexec %s "$@"\n' % " ".join(
                node.line.command("doveadm", "-c", node.conf)))
        os.chmod(shim, 0o755)
    done = subprocess.run(
        command.replace("/run/dovecot", os.path.join(node.dir, "run")),
        shell=True, timeout=30, stdout=subprocess.DEVNULL,
        env={"PATH": bin_dir + ":/usr/sbin:/usr/bin:/sbin:/bin"})
    return done.returncode


def test_keepalived(proxied):
    a, b = proxied.nodes
    wait_ok(a, b)
    primary, well = keepalived(0), keepalived(1)
    assert [run_script(node, primary) for node in (a, b)] == [0, 22]
    assert [run_script(node, well) for node in (a, b)] == [0, 0]
    with a.paused("dovetail-queue"):
        wait_for(lambda: run_script(a, well) == 1, "the script to fail")
    wait_for(lambda: run_script(a, well) == 0, "the script to succeed")
    b.stop()
    assert run_script(b, well) == 1 and run_script(b, primary) == 7
    wait_state(a, "stalled")
    assert run_script(a, well) == 1 and run_script(a, primary) == 0
    b.start()


# ---- HTTP

def curl(node, target, *options):
    """(status, body)"""
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "10", "-w", "\n%{http_code}",
         "--unix-socket", path(node, "http"), *options, "http://x" + target],
        stdout=subprocess.PIPE, text=True, check=True)
    body, _, code = done.stdout.rpartition("\n")
    return int(code), body


def codes(node, *targets):
    return {target: curl(node, target)[0] for target in targets}


def test_curl(well):
    """Every path, while all is well, and while it is not."""
    a, b = well.nodes
    targets = ("/healthz", "/readyz", "/primary", "/replica", "/replica?lag=5",
               "/replica?lag=500ms", "/replica?lag=x", "/health", "/metrics",
               "/nothing")
    assert codes(a, *targets) == {
        "/healthz": 200, "/readyz": 200, "/primary": 200, "/replica": 503,
        "/replica?lag=5": 503, "/replica?lag=500ms": 503,
        "/replica?lag=x": 400, "/health": 200, "/metrics": 200,
        "/nothing": 404}
    assert codes(b, *targets) == {
        "/healthz": 200, "/readyz": 200, "/primary": 503, "/replica": 200,
        "/replica?lag=5": 200, "/replica?lag=500ms": 200,
        "/replica?lag=x": 400, "/health": 200, "/metrics": 200,
        "/nothing": 404}
    for method in ("POST", "PUT", "DELETE"):
        assert curl(a, "/health", "-X", method)[0] == 405
    assert curl(a, "/healthz", "--head")[0] == 200
    # the README's own
    command, = re.findall(r"(?m)^# (curl .*)$", readme("# curl "))
    done = subprocess.run(command.replace("/run/dovecot/dovetail-http",
                                          path(a, "http")),
                          shell=True, check=True, stdout=subprocess.PIPE)
    assert b'"node":"a"' in done.stdout
    with b.paused("dovetail-queue"):
        wait_for(lambda: codes(b, "/healthz") == {"/healthz": 503},
                 "old news")
        assert codes(b, "/readyz", "/primary", "/replica", "/health",
                     "/metrics") == {
            "/readyz": 200, "/primary": 503, "/replica": 503, "/health": 200,
            "/metrics": 200}


def promtool(text):
    done = subprocess.run([program("usr/bin/promtool"), "check", "metrics"],
                          input=text, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def test_promtool(well):
    a, b = well.nodes
    for node in (a, b):
        code, text = curl(node, "/metrics")
        assert code == 200 and "# EOF" not in text
        assert promtool(text) == (0, "")
        assert "dovetail_health_state{" in text
    # it would tell
    assert promtool(text + "dovetail_broken_total 1\n")[0] != 0
    # Both formats have the same samples.
    code, modern = curl(a, "/metrics", "-H",
                        "Accept: application/openmetrics-text")
    assert modern.endswith("# EOF\n")
    names = [[line.split()[0] for line in body.splitlines()
              if not line.startswith("#")]
             for body in (modern, curl(a, "/metrics")[1])]
    assert names[0] == names[1]
