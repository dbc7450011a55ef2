"""A small part of the crash runs; all of them: test/crash/crash."""

import os
import re
import subprocess
import sys

CRASH = os.path.join(os.path.dirname(__file__), "..", "crash", "crash")


def crash(*args):
    """Each line of the output is about one scenario and one party. Returns
    the number of runs."""
    done = subprocess.run([sys.executable, CRASH, *args], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=1200)
    runs, failed = map(int, re.search(
        r"^(\d+) runs, (\d+) failed$", done.stdout, re.M).groups())
    assert done.returncode == 0 and failed == 0, done.stdout
    return runs


# it must not stop half-way

def test_crash_at_some_steps():
    assert crash("--quick") > 50


def test_crash_while_mdbox_saves():
    """What was written to a file, wholly or in part, and has no place in a
    mailbox yet, is found by Dovecot when it rebuilds the storage."""
    assert crash("--format", "mdbox", "--scenario", "append,multiappend",
                 "--service", "b:dovetail-replay") > 40


def test_crash_while_messages_are_put_back():
    """A repair that is interrupted is gone on with, and leaves nothing behind."""
    assert crash("--format", "maildir", "--scenario", "rebuild", "--service",
                 "b:dovetail-replay", "--every", "8") > 10
