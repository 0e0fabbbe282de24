"""A PostgreSQL of the test's own: Debian's package, on loopback, as the user ``postgres``; and a wire that can be cut."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest


def binary(name: str) -> str:
    """Where a PostgreSQL program lies; the test fails (it does not skip) where it is not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(debian[-1]) if debian else None)
    if found is None:
        pytest.fail(f"{name} was not found: make test installs Debian's package; else apt-get install postgresql")
    return found


def as_postgres(*command: str | Path) -> None:
    """Run a program as ``postgres``, for the server refuses to be root; as ourselves where we are not."""
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    done = subprocess.run([*user, *map(str, command)], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres() -> Iterator[str]:
    """A fresh server on a free port; yields its URL, password included. What it held is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mue-postgres-"))
    secret, port, data = secrets.token_hex(8), free_port(), folder / "data"
    (folder / "password").write_text(secret)
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
    # It may lose everything with the machine: nothing is synced, which takes most of the time of small transactions.
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
    login = ["-U", "mue", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    try:
        as_postgres(binary("initdb"), "-D", data, "-E", "UTF8", "--no-sync", *login)
        as_postgres(binary("pg_ctl"), "-D", data, "-l", folder / "log", "-w", "-o", options, "start")
        try:
            yield f"postgresql://mue:{secret}@127.0.0.1:{port}/postgres"
        finally:
            as_postgres(binary("pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Wire:
    """A TCP proxy on loopback before the server at ``url``: :meth:`cut` breaks it, :meth:`mend` lets connections through.

    ``url``: the server's, through the wire.
    """

    def __init__(self, url: str) -> None:
        self.whole = True
        self.target = urlsplit(url).port
        self.open: list[socket.socket] = []
        self.door = socket.create_server(("127.0.0.1", 0))
        self.url = url.replace(f":{self.target}/", f":{self.door.getsockname()[1]}/")
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """Connections end in the middle of whatever they did, and new ones are turned away."""
        self.whole = False
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    def mend(self) -> None:
        self.whole = True

    def close(self) -> None:
        self.door.close()
        self.cut()

    def _serve(self) -> None:
        while True:
            try:
                inside, _ = self.door.accept()
            except OSError:
                return
            if not self.whole:
                inside.close()
                continue
            outside = socket.create_connection(("127.0.0.1", self.target))
            self.open += [inside, outside]
            for source, sink in ((inside, outside), (outside, inside)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
