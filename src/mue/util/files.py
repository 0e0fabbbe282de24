"""Files that hold whatever happens: atomic writes, hashes of what data means, locks that die with their holder."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any


def cache_folder() -> Path:
    """What may be made again at any time: ``$MUE_CACHE``, else ``mue`` in the user's cache folder."""
    given = os.environ.get("MUE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mue"


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file that somebody may have written by hand, without the byte order mark that some editors put first.

    Args:
        path: of a file in UTF-8.

    Raises:
        UnicodeDecodeError: it is in another encoding; for UTF-16 its text says so. OSError: it cannot be read.
    """
    raw = Path(path).read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UnicodeDecodeError("utf-8", raw, 0, 2, "this is UTF-16: save it as UTF-8")
    # lines end in \n here whatever they end in there, as in a file opened as text
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place; on any error nothing changes.

    The data is on disk before the name is, so that a reader after a crash sees the old file or the whole new one.

    Args:
        path: its folder is made where it is missing. write: fills the file whose path it is given.
    """
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()
        raise


def remove_unfinished(path: Path, *, pattern: bool = False) -> None:
    """Remove what :func:`write_atomic` had begun of a file when its process was killed; only for whoever alone writes that file.

    Args:
        path: of the file, which may be there or not. pattern: its name is a pattern of names, as ``ema-*.safetensors``.
    """
    for left in path.parent.glob(f".{path.name if pattern else glob.escape(path.name)}.*"):
        left.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` fill a temporary folder beside ``path``, then give it that name; on any error nothing is left.

    Args:
        path: does not exist; its parent is made where it is missing. fill: is given the folder, which is empty.

    Raises:
        ValueError: something of that name is there already.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: give --out a name that is free")
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside it, so that the last step is a rename within one file system: all of it appears, or nothing
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(work)
        work.chmod(0o755)  # mkdtemp makes folders that only their owner reads
        os.replace(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Args:
        path: where; see :func:`write_atomic`. text: all of it.
    """

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, readable (one value a line) and with non-ASCII as it is.

    Args:
        path: where; see :func:`write_atomic`. data: what ``json`` can write.
    """
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def rounded(data: Any) -> Any:
    """Data with its numbers as text of 12 significant digits: blind to the last bits that differ between libraries.

    Args:
        data: nested mappings, lists and plain values.

    Returns:
        The same nesting, tuples as lists and keys as text; for comparing and hashing, not for reading back.
    """
    if isinstance(data, Mapping):
        return {str(k): rounded(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(v) for v in data]
    if isinstance(data, float):
        # of a double's 16 digits: what libm, BLAS or another order of factors changes is in the last two or three
        return f"{data:.12g}"
    return f"{data:d}" if isinstance(data, int) and not isinstance(data, bool) else data


def digest(data: Any) -> str:
    """A hash over the meaning of data: key order, formatting and last bits change nothing.

    Args:
        data: as for :func:`rounded`.

    Returns:
        16 hex digits of SHA-256: 64 bits, in which a billion plans or runs meet by chance once in forty times.
    """
    text = json.dumps(rounded(data), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class FileLock:
    """A lock that one holder at a time has, over all processes of the machine: ``with FileLock(path): ...``.

    The kernel holds it for an open file (flock), so it ends with the process, however that dies, and nothing has to be
    cleaned up. The file itself stays.

    Args:
        path: the lock's file, made with its folder where it is missing.
        busy: raised at once where somebody else holds the lock; None: wait for them.
        make: False: a missing file is a ``FileNotFoundError``.
    """

    def __init__(self, path: Path, *, busy: Exception | None = None, make: bool = True) -> None:
        self.path, self.busy, self.make = path, busy, make
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            OSError: the file cannot be opened or locked. And ``busy``, where somebody else holds it.
        """
        import fcntl  # not on every platform, and most of this library runs without

        if self.make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab" if self.make else "rb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if self.busy else 0))
        except BlockingIOError:
            file.close()
            assert self.busy is not None
            raise self.busy from None
        except BaseException:
            file.close()
            raise
        self._file = file

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
