"""A lock on a file: one holder at a time over processes, gone with the process that held it. Writes that are whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mue.util.files import (
    FileLock,
    cache_folder,
    digest,
    remove_unfinished,
    rounded,
    write_atomic,
    write_json,
    write_text,
)

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


# ---- writes and hashes -----------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"

    def broken(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise KeyError("power")

    with pytest.raises(KeyError):
        write_atomic(path, broken)
    assert not path.parent.exists()  # the folder was made for this file
    write_text(path, "whole")
    with pytest.raises(KeyError):
        write_atomic(path, broken)
    assert path.read_text(encoding="utf-8") == "whole" and list(path.parent.iterdir()) == [path]
    write_json(path, {"ρ": 1})
    assert path.read_text(encoding="utf-8") == '{\n "ρ": 1\n}\n' and path.stat().st_mode & 0o777 == 0o644


def test_a_digest_is_of_what_data_means() -> None:
    data = {"lr": 0.1 + 0.2, "betas": (0.9, 1), "tied": True, "clip": None}
    assert digest(data) == digest({"clip": None, "tied": True, "betas": [0.9, 1], "lr": 0.3})
    assert len(digest(data)) == 16 and rounded(data)["lr"] == "0.3"
    for change in ({"lr": 0.3 + 1e-9}, {"tied": False}, {"clip": 1.0}, {"betas": (1, 0.9)}):
        assert digest({**data, **change}) != digest(data), change


def test_the_cache_lies_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "mue"
    monkeypatch.setenv("MUE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mue.util.files import write_atomic\n"
        "write_atomic(Path(sys.argv[1]), lambda path: (path.write_text('half'), os.kill(os.getpid(), 9)))"
    )
    file, beside = (
        tmp_path / "a.[x]",
        [tmp_path / "a.[x]", tmp_path / ".b.json.1", tmp_path / ".a.x.2", tmp_path / "a.3"],
    )
    for path in beside:
        path.write_text("whole")
    subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert len(list(tmp_path.iterdir())) == len(beside) + 1  # the control: it is there
    remove_unfinished(file)
    assert sorted(tmp_path.iterdir()) == sorted(beside) and file.read_text() == "whole"
