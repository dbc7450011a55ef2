"""doveadm dovetail lag, once and --follow, and the completion for bash."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

from cluster import Cluster, mail, wait_for
from test_health import FAST, wait_ok
from test_verify import filled

COMPLETION = os.path.join(os.path.dirname(__file__), "..", "..", "plugin",
                          "bash-completion", "doveadm")
COLUMNS = ["time", "node", "peer", "direction", "state", "lag", "entries"]


@pytest.fixture(scope="module")
def two():
    with Cluster(["sdbox", "sdbox"], settings=FAST) as cluster:
        wait_ok(*cluster.nodes)
        yield cluster


def command(node, *args, options=()):
    return node.line.command("doveadm", *options, "-c", node.conf, "dovetail",
                             "lag", *args)


class Terminal:
    """lag --follow on a terminal, and its screen as a list of lines."""

    def __init__(self, node):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 130,
                                                           0, 0))
        self.process = subprocess.Popen(
            command(node, "--follow"), stdin=slave, stdout=slave, stderr=slave,
            env={"PATH": os.environ["PATH"], "TERM": "xterm"})
        os.close(slave)
        self.bytes = b""

    def read(self, seconds=0.1):
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            self.bytes += data

    @property
    def screen(self):
        """What the last complete picture looks like."""
        self.read()
        pictures = self.bytes.decode().split("\033[H")
        done = [p for p in pictures[1:] if "\033[J" in p]
        text = done[-1].partition("\033[J")[0] if done else ""
        return text.replace("\033[K", "").split("\r\n")

    def line(self, name):
        found = [line for line in self.screen if line.startswith(name + " ")]
        return found[0] if found else ""

    def end(self, number):
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.read()
        os.close(self.master)
        return status


def test_once(two):
    a, b = two.nodes
    rows = json.loads(a.doveadm("-f", "json", "dovetail", "lag"))
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [(row["node"], row["peer"], row["direction"], row["state"])
            for row in rows] == [("a", "b", "to", "ok"), ("a", "b", "from",
                                                          "ok")]
    assert all(0 <= float(row["lag"]) < 1 for row in rows)
    text = a.doveadm("dovetail", "lag").splitlines()
    assert text[0].split() == COLUMNS and len(text) == 3
    # columns stand below their names
    assert {line.index(word) for line, word in
            ((text[0], "state"), (text[1], "ok"), (text[2], "ok"))} == {
        text[0].index("state")}


def test_follow_rows(two):
    """Where nobody looks, rows, as they come, until nobody reads."""
    a = two.a
    for options, first in ((("-f", "tab"), "\t".join(COLUMNS)), ((), None)):
        process = subprocess.Popen(command(a, "--follow", options=options),
                                   stdout=subprocess.PIPE, text=True)
        lines = [process.stdout.readline().rstrip("\n") for _ in range(7)]
        if first:
            assert lines[0] == first
        assert [line.split()[1:4] for line in lines[1:]] == [
            ["a", "b", "to"], ["a", "b", "from"]] * 3
        times = [line.split()[0] for line in lines[1:]]
        assert times == sorted(times) and len(set(times)) == 3
        process.stdout.close()
        assert process.wait(20) == 0
    process = subprocess.Popen(command(a, "--follow", options=("-f", "json")),
                               stdout=subprocess.PIPE, text=True)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and len(json.loads(out)) in (4, 6, 8)


def test_follow_terminal(two):
    a, b = two.nodes
    user = filled(two)
    user.wait_equal()
    wait_ok(a, b)
    terminal = Terminal(a)
    try:
        wait_for(lambda: terminal.line("a from b"), "the picture")
        assert terminal.bytes.startswith(b"\033[?1049h\033[?25l")
        assert re.search(r"^a to b +ok +0\.\d+ s +\d+ +[_.:-]+$",
                         terminal.line("a to b"))
        # something happens, and it moves
        b.stop()
        user.lmtp(mail("two"))
        wait_for(lambda: re.search(r" stalled +\d+\.\d+ s +\d+ +.*[+*#]$",
                                   terminal.line("a to b")), "the lag", 40)
        assert any(line.startswith("  b has not been heard of")
                   for line in terminal.screen)
        wait_for(lambda: " ? s" in terminal.line("a from b"),
                 "what is not known", 30)
        first = float(terminal.line("a to b").split()[4])
        wait_for(lambda: float(terminal.line("a to b").split()[4]) > first + 1,
                 "it to grow")
        # the service goes, and comes back
        with a.paused("dovetail-health"):
            wait_for(lambda: "did not answer within 5 s" in
                     "".join(terminal.screen), "the silence to be told")
        b.start()
        wait_for(lambda: re.search("^a to b +ok", terminal.line("a to b")),
                 "all to be well", 40)
        assert all(len(line) < 130 for line in terminal.screen)
    finally:
        if not b.running():
            b.start()
    assert terminal.end(signal.SIGINT) == 0
    # what was on the terminal is there again
    # (2.4's doveadm adds by what it was ended)
    assert re.search(rb"\033\[\?25h\033\[\?1049l(Warning: Killed .*)?\s*$",
                     terminal.bytes)
    assert terminal.bytes.isascii()


def test_refusals(two):
    a = two.a
    done = a.doveadm("dovetail", "lag", "--follow", "-a", "/nonexistent",
                     "more", check=False)
    assert done.returncode == 64
    done = a.doveadm("dovetail", "lag", "-a", "/nonexistent", check=False)
    assert done.returncode == 75 and b"is not reachable" in done.stderr


# ---- the completion

def complete(*words):
    """What the Tab key offers behind these words; the last one is begun."""
    script = """source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"
        COMP_POINT=${#COMP_LINE}
        _doveadm_dovetail doveadm "${COMP_WORDS[COMP_CWORD]}" \\
            "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"; complete -p doveadm"""
    done = subprocess.run(
        ["bash", "--norc", "-euc", script, "bash", COMPLETION, *words],
        check=True, text=True, stdout=subprocess.PIPE)
    *found, how = done.stdout.splitlines()
    assert how == "complete -o default -F _doveadm_dovetail doveadm"
    return [word for word in found if word]


def test_completion(two):
    verbs = complete("doveadm", "dovetail", "")
    assert complete("doveadm", "-v", "-f", "json", "dovetail", "s") == [
        "seed", "status"]
    assert complete("doveadm", "do") == ["dovetail"]
    assert complete("doveadm", "-f", "t") == ["tab", "table"]
    assert complete("doveadm", "user", "") == []
    assert complete("doveadm", "dovetail", "lag", "--f") == ["--follow"]
    assert complete("doveadm", "dovetail", "verify", "--rate", "") == []

    # it knows what doveadm knows: verbs, and the options of each
    usage = two.a.doveadm("dovetail", check=False).stderr.decode()
    known = dict(re.findall(r"(?m)^ *(?:dovetail )?(\w+) +(.*)$",
                            usage.partition("\n")[2]))
    assert sorted(known) == sorted(verbs)
    for verb in verbs:
        options = re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", known[verb])
        assert sorted(set(options)) == sorted(
            complete("doveadm", "dovetail", verb, "-")), verb
