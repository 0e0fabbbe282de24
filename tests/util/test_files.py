"""A lock on a file: one holder at a time over processes, gone with the process that held it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mue.util.files import FileLock

HOLD = "import sys, pathlib\nfrom mue.util.files import FileLock\nwith FileLock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until it is killed or its stdin closes."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    process = holder(path)
    with pytest.raises(KeyError, match="taken"), FileLock(path, busy=KeyError("taken")):
        pytest.fail("two hold the lock")
    with FileLock(tmp_path / "another", busy=KeyError("taken")):
        pass
    process.kill()
    process.wait()
    with FileLock(path, busy=KeyError("taken")):
        assert path.exists()


def test_a_lock_without_a_word_for_busy_waits_for_its_holder(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", list[str]()
    first = FileLock(path)
    first.acquire()

    def second() -> None:
        with FileLock(path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    order.append("first")
    first.release()
    thread.join(10)
    assert order == ["first", "second"]


def test_a_lock_is_released_on_an_error_and_only_made_where_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(FileNotFoundError), FileLock(path, make=False):
        pass
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), FileLock(path):
        _ = 1 / 0
    with FileLock(path, busy=KeyError("taken"), make=False):
        pass
