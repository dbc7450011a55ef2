"""A small part of the crash runs; all of them: test/crash/crash."""

import os
import re
import subprocess
import sys

CRASH = os.path.join(os.path.dirname(__file__), "..", "crash", "crash")


def test_crash_at_some_steps():
    """Each line of the output is about one scenario and one party."""
    done = subprocess.run([sys.executable, CRASH, "--quick"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=1200)
    runs, failed = map(int, re.search(
        r"^(\d+) runs, (\d+) failed$", done.stdout, re.M).groups())
    assert done.returncode == 0 and failed == 0, done.stdout
    # it did not stop half-way
    assert runs > 50, done.stdout
