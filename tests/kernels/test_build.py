"""The build of the kernels: locks, kills, refusals, what a library's name depends on, other instruction sets."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mue.kernels import build
from mue.moe.backends import native

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: the native kernel cannot be built")


def fake_compiler(folder: Path, body: str) -> Path:
    """A "compiler" that is a shell script; $out is the file it is asked to write."""
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n{body}\n')
    path.chmod(0o755)
    return path


def held(lock: Path) -> bool:
    """Whether some process stands in the lock."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_killed_build_leaves_nothing_that_hangs_or_misleads(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle of compiling; the next build waits for no one, removes the leftovers and succeeds."""
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    monkeypatch.setenv(
        "CXX", str(fake_compiler(tmp_path, 'case "$out" in *.o) echo $$ >> pids; exec sleep 300;; esac'))
    )
    code = "from mue.moe.backends import native; native.build()"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    pids = tmp_path / "pids"
    end = time.monotonic() + 200
    while not pids.exists() or len(pids.read_text().split()) < len(build.SOURCES):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    assert held(tmp_path / "native" / "lock")  # a second build would wait now
    first.kill()
    first.wait()
    assert not held(tmp_path / "native" / "lock")  # although its compilers are still running
    for pid in pids.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    assert list(tmp_path.glob("native/build-*"))  # negative control: there was something to clean up
    assert build.find() is None  # nothing half-made is ever found
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, f'[ -n "$out" ] && cp {kernel} "$out"; exit 0')))
    made = native.build()
    assert build.find() == made and "plain" in build.engines(made)
    assert not list(tmp_path.glob("native/build-*"))


def test_a_compiler_that_refuses_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "echo no such header; exit 3")))
    with pytest.raises(build.BuildError, match="ended with 3:\nno such header"):
        native.build()
    assert build.find() is None and not list(tmp_path.glob("native/build-*"))
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="CXX"):
        native.build()


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error for `mue doctor --build`; `make`, which needs no kernel, only says so."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="MUE_CACHE"):
        native.build()
    native.main()
    assert "portable" in capsys.readouterr().out


def test_a_library_that_computes_wrongly_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler made is tried first: here it is no library at all."""
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, '[ -n "$out" ] && echo rubbish > "$out"; exit 0')))
    with pytest.raises(build.BuildError, match="computes wrongly"):
        native.build()
    assert build.find() is None


def test_the_name_says_what_a_library_depends_on(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch, another instruction set: another library; nothing is loaded that was built for something else."""
    assert build.find() == kernel
    assert native.build() == kernel  # there already: not built again
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert build.find() is None
    monkeypatch.undo()
    monkeypatch.setattr(build, "_instructions", lambda: "SSE9")
    assert build.find() is None


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability: str, tmp_path: Path) -> None:
    """The same source for narrower vectors; the trial of the build compares it with the reference."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "MUE_CACHE": str(tmp_path)}
    code = "from mue.moe.backends import native; native.build()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = tmp_path.glob("native/*.json")
    assert capability in made.name and json.loads(made.read_text())["engines"] == ["plain"]
