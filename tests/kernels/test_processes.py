"""A program's peak memory, its status, and its end at the limit."""

import sys
import time

import pytest
from kernels.processes import run_measured

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups and wait4 are POSIX")


def python(code, limit=30.0):
    return run_measured([sys.executable, "-c", code], limit)


def test_the_largest_process_counts():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(300 << 20)'])"
    small, large = python("pass"), python(child)
    assert small.status == large.status == 0
    assert large.peak_bytes > 300 << 20 > small.peak_bytes


def test_status_and_message_come_back():
    done = python("import sys; print('a lot'); sys.exit('no such GPU')")
    assert (done.status, done.said.strip()) == (1, "no such GPU")


def test_at_the_limit_it_is_stopped_with_its_children():
    began = time.monotonic()
    done = python("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", 1.0)
    assert done.status is None and time.monotonic() - began < 30
