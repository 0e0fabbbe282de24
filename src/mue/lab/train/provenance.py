"""Where a number comes from: what is recorded beside every result."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mue


def provenance() -> dict[str, Any]:
    """What a number needs to be believed later: versions, the kind of machine and the commit.

    Returns:
        JSON-ready; ``git`` is None where the code is not a checkout, and ends in ``-dirty`` where it was changed since.
    """
    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,  # a hanging file system must not hold up a result
            check=False,  # outside a checkout git fails and prints nothing
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        git = ""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "git": git or None,
        "mue": mue.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine,
        "threads": torch.get_num_threads(),  # the last bits of training depend on it (docs/performance.md)
    }
