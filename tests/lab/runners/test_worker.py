"""A worker process serves as long as the process that started it, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def wait_for(true: Callable[[], bool], patience: float = 240) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker process ends when its stdin does")
def test_a_worker_process_ends_with_its_parent_even_when_it_is_stopped() -> None:
    start = "import subprocess as s, sys, time; print(s.Popen([sys.executable, '-m', 'mue.lab.runners.worker'], stdin=s.PIPE).pid)"
    command = [sys.executable, "-u", "-c", f"{start}; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        wait_for(lambda: "libtorch" in (child / "maps").read_text())  # it serves
        os.kill(int(child.name), signal.SIGSTOP)
        wait_for(lambda: (child / "stat").read_text().rpartition(")")[2].split()[0] == "T")
        parent.kill()
    wait_for(lambda: not child.exists() or (child / "stat").read_text().rpartition(")")[2].split()[0] == "Z")
