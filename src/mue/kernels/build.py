"""Building and finding the kernel. It is never built behind the user's back: `mue doctor --build` and `make` do.

The library is kept in the user's cache folder under a name made of everything it depends on: the source, torch, the
instruction set and the compiler. A build runs in a folder of its own, under a lock that the operating system drops when
its holder dies, and its result appears by an atomic rename: a build that is killed leaves nothing that a later start
would wait for or load. What is built is first tried in a process of its own, and only what passes is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mue.util.files import FileLock, cache_folder, write_json

SOURCES = ("attention.cpp", "entry.cpp", "feedforward.cpp", "kernel.cpp", "norm.cpp", "processor.cpp", "route.cpp")
# -O2, for -O3 made attention 15 % slower (docs/LOG.md). Errno and traps are given up, which vectorising needs; not
# -ffast-math, which would also give up NaN and the order of sums.
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra")
# By torch.backends.cpu.get_cpu_capability(), which asks the processor (and obeys ATEN_CPU_CAPABILITY); others: none.
INSTRUCTIONS = {
    # compilers prefer vectors of 256 bits by themselves, for processors that clock down; products want 512
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
ENGINES = ("plain", "dot products", "matrix unit")  # the better last


class BuildError(RuntimeError):
    """The compiler refused, or what it made computes wrongly; the message says what was printed."""


def folder() -> Path:
    """Where libraries lie."""
    return cache_folder() / "native"


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of c++, g++ and clang++."""
    if given := os.environ.get("CXX"):
        return shutil.which(given)
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _stem() -> str:
    """Everything a library depends on but its compiler, which need not be there any more when it is loaded."""
    here = Path(__file__).parent / "csrc"
    parts = [path.read_bytes() for path in sorted((*here.glob("*.cpp"), *here.glob("*.h")))]
    parts += [repr((torch.__version__, OPTIONS, INSTRUCTIONS.get(_instructions()), sys.platform)).encode()]
    return f"experts-{_instructions().lower()}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}"


def find() -> Path | None:
    """The library for this source, torch and processor, if it has been built."""
    built = sorted(folder().glob(f"{_stem()}-*.so"), key=lambda path: path.stat().st_mtime)
    # by several compilers: the newest build
    return built[-1] if built else None


def engines(library: Path) -> list[str]:
    """Those of ENGINES that passed their trial when the library was built."""
    return list(json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))["engines"])


def build(trial: str) -> Path:
    """The library, built now if it is not there.

    Args:
        trial: module whose ``main(path, engine)`` ends with 1 where a library computes wrongly; it is run in a process of
            its own.

    Raises:
        ValueError: no compiler, or no place to keep the library.
        BuildError: see there.
    """
    found = compiler()
    if found is None:
        raise ValueError("there is no C++ compiler: install g++ (or clang++), or name one in CXX")
    # another version of the same compiler is another library
    version = subprocess.run([found, "--version"], capture_output=True, timeout=60, check=False).stdout
    path = folder() / f"{_stem()}-{hashlib.sha256(found.encode() + version).hexdigest()[:8]}.so"
    with _lock(path.parent):
        if not path.exists():
            for stale in path.parent.glob("build-*"):  # of a build that was killed: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as work:
                made = _compile(found, Path(work))
                write_json(
                    path.with_suffix(".json"),
                    {"engines": _trials(made, trial), "compiler": version.decode().split("\n")[0]},
                )
                os.replace(made, path)
    return path


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Waits for another build; the lock lives as long as this process holds the file open, and no child inherits it."""
    lock = FileLock(place / "lock")
    try:
        lock.acquire()
    except OSError as problem:
        raise ValueError(
            f"the kernel cannot be kept in {place} ({problem.strerror}): name a folder for it in MUE_CACHE"
        ) from problem
    try:
        yield
    finally:
        lock.release()


def _compile(compiler: str, work: Path) -> Path:
    """All sources at once, then the library; torch's own headers are not needed."""
    here, libraries = Path(__file__).parent / "csrc", Path(torch.__file__).parent / "lib"
    options = (*OPTIONS, *INSTRUCTIONS.get(_instructions(), ()))
    objects = [work / f"{name}.o" for name in SOURCES]
    _run(*([compiler, *options, "-c", str(here / n), "-o", str(o)] for n, o in zip(SOURCES, objects, strict=True)))
    made = work / "experts.so"
    needed = ["-L", str(libraries), "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    _run([compiler, "-shared", *map(str, objects), *needed, "-o", str(made)])
    return made


def _run(*commands: list[str]) -> None:
    # all at once: no source waits for another
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    printed = [process.communicate()[0] for process in running]
    for command, process, text in zip(commands, running, printed, strict=True):
        if process.returncode:
            raise BuildError(f"{' '.join(command)}\nended with {process.returncode}:\n{text[-4000:]}")


def _trials(library: Path, trial: str) -> list[str]:
    """The engines that compute rightly, each tried in a process of its own: a wrong one may crash.

    Without the plain one there is no library; without another there is one that leaves it alone.
    """
    passed: list[str] = []
    offered: tuple[str, ...] = ENGINES[:1]
    for engine in ENGINES:
        if engine not in offered:
            continue
        code = f"from {trial} import main; main({str(library)!r}, {engine!r})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        tried = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        if tried.returncode == 0:
            passed.append(engine)
        elif engine == ENGINES[0]:
            raise BuildError(
                f"the kernel does not load or computes wrongly here:\n{(tried.stdout + tried.stderr)[-4000:]}"
            )
        if engine == ENGINES[0]:  # which others the processor has is known to the library only
            offered = tuple(name for name in ENGINES if name in tried.stdout)
    return passed
