"""The command line: parses, calls, prints. Every command's ``--help`` teaches it.

Here: one file a command, in the order of :data:`COMMANDS`, and what they share (``app``, ``files``, ``terminal``, ``user_model``). A command imports what
it calls when it runs, so that ``--help`` and a user's mistake cost no import of torch. Not here: anything that computes.
"""

from __future__ import annotations

import os
from importlib import import_module

from mue.cli.app import app, fail
from mue.cli.terminal import plain_streams
from mue.util.importing import UserCodeError

__all__ = ["app", "main"]

COMMANDS = (
    "demo",
    "init",
    "plan",
    "rules",
    "schema",
    "sweep",
    "tune",
    "study",
    "train",
    "report",
    "generate",
    "sample",
    "eval",
    "noise",
    "inspect",
    "check",
    "export",
    "export_weights",
    "convert",
    "doctor",
)  # files of this folder, in the order the help shows them
for _name in COMMANDS:
    import_module(f"mue.cli.{_name}")

# 128 + SIGINT, as a shell says of what Ctrl-C ended.
_INTERRUPTED, _AGAIN = 130, "interrupted; start the same command again to go on"


def main() -> None:
    """Entry point: a user's mistake is one clear line and exit code 2, a failure of ours that we know of exit code 1.

    A mistake is a ValueError or OSError, wherever it is raised; what is neither, and no RuntimeError of mue's own, is a
    bug, and keeps its traceback. ``MUE_TRACEBACK=1`` shows that of a mistake in the user's own code, too.
    """
    plain_streams()
    try:
        app()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # typer has taken the KeyboardInterrupt, and says nothing
            fail(_AGAIN, _INTERRUPTED)
        raise
    except KeyboardInterrupt:
        fail(_AGAIN, _INTERRUPTED)
    except (ValueError, OSError) as error:
        from rich.markup import escape

        more = ""
        if isinstance(error, UserCodeError):
            if os.environ.get("MUE_TRACEBACK"):
                raise
            more = " (the whole traceback: MUE_TRACEBACK=1)"
        fail(escape(f"{error}{more}"), 2)
    except RuntimeError as error:
        if type(error).__module__.startswith("mue."):
            from rich.markup import escape

            fail(escape(str(error)), 1)
        raise
