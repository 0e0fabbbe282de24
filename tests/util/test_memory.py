"""Freed memory that is kept for the next allocation."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from mue.util.memory import keep_freed_memory
if {keep} and not keep_freed_memory():
    sys.exit(7)
def allocate():
    return [bytearray(b"1") * (1 << size) for size in (20, 21, 22, 20)]
allocate(), allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_freed_memory_is_not_fetched_again() -> None:
    """Five times 8 MiB are 10,240 pages, none of which is new; without it (the control) they are."""
    faults = {}
    for keep in (True, False):
        code = _FAULTS.format(keep=keep)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 7:
            pytest.skip("this C library cannot be told")
        assert done.returncode == 0, done.stderr
        faults[keep] = int(done.stdout)
    assert faults[True] < 200
    assert faults[False] > 2000
